"""Workers on this machine: processes that Python starts, one or several to a GPU."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import connection, get_context
from typing import Any

import torch

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, WorkerError
from kvzip_press.leaderboard.running.plan import Run
from kvzip_press.leaderboard.running.spread import Load, Worker, WorkerDiedError
from kvzip_press.model.devices import get_device

_END = 10.0  # seconds that a process has to end


class ProcessWorkers:
    """Workers as processes of this machine: see :class:`~kvzip_press.leaderboard.running.spread.Workers`.

    Args:
        makes: What makes the object whose methods a process calls, for each of them; picklable.
    """

    def __init__(self, makes: Sequence[Callable[[], Any]]) -> None:
        self.makes, self.count = makes, len(makes)
        self._processes: dict[int, Any] = {}
        self._pipes: dict[int, connection.Connection] = {}
        self._asked: set[int] = set()
        self._context = _context()

    def start(self, number: int) -> None:
        """Begins a process, in place of the one that had this number."""
        self._end(number)
        self._pipes[number], theirs = self._context.Pipe()
        n_threads = max(torch.get_num_threads() // self.count, 1)
        arguments = theirs, self.makes[number], n_threads, dict(os.environ)
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._processes[number] = process

    def ask(self, number: int, method: str, *arguments: Any) -> None:
        """Has a process call one of its worker's methods."""
        self._asked.add(number)
        with suppress(OSError):  # it is gone, as waiting will find
            self._pipes[number].send((method, arguments))

    def wait(self) -> tuple[int, Any]:
        """Waits for any result, and returns it with the worker's number."""
        numbers = {id(self._pipes[number]): number for number in self._asked}
        first = connection.wait([self._pipes[number] for number in self._asked])[0]
        number = numbers[id(first)]
        self._asked.discard(number)
        try:
            result, error = self._pipes[number].recv()
        except (EOFError, OSError) as ended:
            process = self._processes[number]
            process.join(_END)
            raise WorkerDiedError(number, f"its process ended with {process.exitcode}") from ended
        if error is not None:
            raise error
        return number, result

    def end(self) -> None:
        """Ends all processes."""
        for number in list(self._processes):
            self._end(number)

    def _end(self, number: int) -> None:
        if number not in self._processes:
            return
        process = self._processes.pop(number)
        self._pipes.pop(number).close()
        process.terminate()
        process.join(_END)
        if process.is_alive():
            process.kill()
            process.join()


def process_workers(run: Run, loads: Sequence[Load]) -> AbstractContextManager[ProcessWorkers]:
    """The workers of a run, which end with this.

    Args:
        run: The run.
        loads: What makes model and tokenizer, for each worker; picklable.

    Raises:
        InvalidArgumentError: There are none.
    """
    return processes([functools.partial(Worker, run, load) for load in loads])


@contextmanager
def processes(makes: Sequence[Callable[[], Any]]) -> Iterator[ProcessWorkers]:
    """Processes that each hold an object, and end with this.

    Args:
        makes: What makes the object, for each; picklable.

    Raises:
        InvalidArgumentError: There are none.
    """
    if not makes:
        raise InvalidArgumentError("expected one worker or more, got none")
    workers = ProcessWorkers(makes)
    try:
        yield workers
    finally:
        workers.end()


def places(device: str | None, workers: int) -> list[str]:
    """Returns the device of each process; None is the GPU, if any."""
    place = get_device(device)
    n_gpus = torch.cuda.device_count() if place.type == "cuda" and place.index is None else 0
    return [f"cuda:{number % n_gpus}" if n_gpus else str(place) for number in range(workers)]


def _context() -> Any:
    """Returns what begins processes: on Linux without GPUs, forks of a process that has imported, which takes seconds.

    That process is begun once and ends with this one. Where there are GPUs, each process begins anew: to import
    transformers is to look for them, and forks of a process that has done so cannot use them.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([Worker.__module__])  # heeded if nobody has begun that process before
    return context


def _work(pipe: connection.Connection, make: Callable[[], Any], n_threads: int, environment: Mapping[str, str]) -> None:
    """What a process does: makes its object, and answers until nobody asks any more."""
    os.environ.clear()  # it may be that of an earlier time, when the process was begun that this one is forked from
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the first process, which ends this one
    torch.set_num_threads(n_threads)
    worker: Any = None
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):  # the first process is gone, or has ended this one
            return
        answer: tuple[Any, Exception | None]
        try:
            worker = make() if worker is None else worker
            answer = getattr(worker, method)(*arguments), None
        except KVzipPressError as error:
            answer = None, error
        except Exception as error:  # noqa: BLE001  # of any class, which need not be one that can be sent
            answer = None, WorkerError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        with suppress(OSError):
            pipe.send(answer)
