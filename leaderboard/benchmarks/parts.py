"""Parts of a benchmark that do not depend on each other: made by any number of processes, kept on disk as they come.

What a part gives depends on its arguments alone, so the figures are the same for any number of processes, and of a run
that was stopped and given again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import typer
from rich.progress import track

from kvzip_press.errors import WorkerError
from kvzip_press.files import digest_of, to_json
from kvzip_press.leaderboard.rows.line_file import LineWriter, keep_aside, read_lines
from kvzip_press.leaderboard.rows.sealed_line import SealedLine
from kvzip_press.leaderboard.running.process_executor import ProcessWorkers, places, processes
from kvzip_press.leaderboard.running.spread import WorkerDiedError

Make = Callable[[str], Any]


@dataclass(frozen=True)
class Part:
    """One call of a method.

    Attributes:
        method: The method.
        arguments: Its arguments, as JSON has them.
    """

    method: str
    arguments: tuple[Any, ...] = ()

    @cached_property
    def name(self) -> str:
        """What tells it from others of its run."""
        return f"{self.method}, {digest_of(to_json(self.arguments).encode())[:16]}"


@dataclass(frozen=True)
class Made(SealedLine):
    """A part that was made.

    Attributes:
        settings: What its run was asked for, as JSON.
        name: The part's name.
        result: What the method returned, as JSON has it.
    """

    settings: str
    name: str
    result: Any

    kind: ClassVar[str] = "a part of a benchmark"


@dataclass
class Parts:
    """Makes parts, one after the other here, or in processes that each hold a maker.

    Attributes:
        maker: What has the methods; None if processes do.
        workers: The processes; None if there are none.
        settings: What the run was asked for, as JSON.
        writer: Where parts are kept; None for nowhere.
        made: Results of parts that were found there, by name.
    """

    maker: Any
    workers: ProcessWorkers | None
    settings: str
    writer: LineWriter[Made] | None
    made: dict[str, Any] = field(default_factory=dict)

    def results(self, parts: Sequence[Part], description: str) -> list[Any]:
        """Returns what the parts give, in their order; values of JSON, in which tuples may be lists.

        Raises:
            WorkerError: A process has died; what was made is kept, and the same command goes on.
            Exception: Whatever a part raises.
        """
        missing = [part for part in parts if part.name not in self.made]
        given = self._here(missing) if self.workers is None else self._spread(self.workers, missing)
        for part, result in track(given, description=description, total=len(missing), transient=True):
            self.made[part.name] = result
            if self.writer is not None:
                self.writer.write(Made(self.settings, part.name, result))
        return [self.made[part.name] for part in parts]

    def _here(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
        for part in parts:
            yield part, getattr(self.maker, part.method)(*part.arguments)

    @staticmethod
    def _spread(workers: ProcessWorkers, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
        waiting = list(reversed(parts))
        at: dict[int, Part] = {}

        def give(number: int) -> None:
            if waiting:
                part = at[number] = waiting.pop()
                workers.ask(number, part.method, *part.arguments)

        for number in range(workers.count):
            give(number)
        while at:
            try:
                number, result = workers.wait()
            except WorkerDiedError as error:
                raise WorkerError(
                    f"expected processes that live until all parts are made, but {error}: what was made before is kept "
                    "beside --output, if that was given, and the same command goes on; with fewer --workers if memory "
                    "ran out"
                ) from error
            part = at.pop(number)
            give(number)
            yield part, result


@contextmanager
def parts_of(
    make: Make, *, device: str | None, workers: int, settings: Mapping[str, Any], output: Path | None
) -> Iterator[Parts]:
    """Parts of a run; what was made of it before is not made again.

    Args:
        make: Makes the object whose methods make parts, on a device; picklable.
        device: The device; None for the GPU, if any. Processes share all GPUs, unless it says which.
        workers: Number of processes; 1 for none besides this one.
        settings: What parts depend on. Parts of a run with others are kept aside.
        output: File of the run's figures; parts are kept beside it until this has ended well.

    Raises:
        typer.BadParameter: There are no workers.
        RunDirectoryError: The file of parts cannot be written, or another process writes to it.
        InvalidArgumentError: It was damaged.
    """
    if workers < 1:
        raise typer.BadParameter(f"expected --workers of 1 or more, got {workers}")
    asked = to_json(settings)
    path = None if output is None else output.with_suffix(".parts.jsonl")
    made = {} if path is None else _made(path, asked)
    with _writing(path) as writer:
        if workers == 1:
            yield Parts(make(places(device, 1)[0]), None, asked, writer, made)
        else:
            with processes([functools.partial(make, place) for place in places(device, workers)]) as begun:
                for number in range(workers):
                    begun.start(number)
                yield Parts(None, begun, asked, writer, made)
    if path is not None:
        path.unlink()


@contextmanager
def _writing(path: Path | None) -> Iterator[LineWriter[Made] | None]:
    if path is None:
        yield None
    else:
        with LineWriter(path, Made) as writer:
            yield writer


def _made(path: Path, settings: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    lines = list(read_lines(path, Made))
    if any(line.settings != settings for line in lines):
        keep_aside([path])
        return {}
    return {line.name: line.result for line in lines}
