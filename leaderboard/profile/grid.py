"""The cases that a profile measures, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.profile.measure import Case
from kvzip_press.leaderboard.profile.rows import BASELINE, DENSE, KVPRESS, OURS
from kvzip_press.registry import get_press

PRESSES = ("kvzip", "kvzip_local", "snapkv")
CONTEXT_LENGTHS = {"cuda": (4096, 16384, 65536), "cpu": (1024, 4096)}
WARMUP_LENGTH = 4096


@dataclass(frozen=True)
class Grid:
    """The cases of a profile.

    Attributes:
        context_lengths: Ascending.
        presses: Registry names, without the baseline, which is always measured.
        originals: Those presses that are also run by kvpress, its own way.
        compression_ratios: Fractions removed.
        decode_tokens: Steps timed for each figure.
        compile: Whether the compiled decode step is measured too.
        storages: How kept pairs are stored: names.
    """

    context_lengths: tuple[int, ...]
    presses: tuple[str, ...]
    originals: frozenset[str]
    compression_ratios: tuple[float, ...]
    decode_tokens: int
    compile: bool = False
    storages: tuple[str, ...] = ("model",)

    def cases(self) -> Iterator[Case]:
        """Yields the cases of each length: the two that keep everything, then every press at every ratio."""
        for length in self.context_lengths:
            yield self._case(BASELINE, DENSE, 0.0, length)
            yield self._case(BASELINE, OURS, 0.0, length)
            for name in self.presses:
                for engine in (OURS, KVPRESS) if name in self.originals else (OURS,):
                    for ratio in self.compression_ratios:
                        for storage in self.storages if engine == OURS else ("model",):
                            yield self._case(name, engine, ratio, length, storage)

    def warmups(self) -> Iterator[Case]:
        """Yields one short case for each press and engine, so that every code path runs once before it is timed."""
        length, seen = min(WARMUP_LENGTH, self.context_lengths[0]), set()
        for case in self.cases():
            if (kind := (case.press, case.engine, case.storage)) not in seen:
                seen.add(kind)
                yield replace(case, context_length=length, decode_tokens=1, compile=False)

    def _case(self, press: str, engine: str, ratio: float, length: int, storage: str = "model") -> Case:
        return Case(press, engine, ratio, length, self.decode_tokens, self.compile, storage)


def make_grid(
    device: torch.device,
    *,
    context_lengths: Sequence[int] = (),
    presses: Sequence[str] = (),
    compression_ratios: Sequence[float] = (0.7,),
    decode_tokens: int = 32,
    compile: bool = False,  # noqa: A002  # the name of DecodeStep's argument
    kvpress: bool | None = None,
    storages: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Grid:
    """Checks what was asked for and fills in the rest.

    Args:
        device: Decides the lengths if none are given.
        context_lengths: Lengths in tokens.
        presses: Registry names; by default those of `PRESSES` whose packages are installed.
        compression_ratios: Fractions removed, in [0, 1).
        decode_tokens: Steps timed.
        compile: Whether the compiled step is measured too.
        kvpress: Whether kvpress's presses are also run its own way; by default if it is installed.
        storages: How kept pairs are stored, as names; by default as the model made them.
        say: Called with a message for each press that is left out; the message says why.

    Raises:
        InvalidArgumentError: A value out of range, or an unknown press.
        MissingDependencyError: A press or kvpress was asked for by name, and its package is not installed.
    """
    lengths = tuple(sorted(set(context_lengths))) or CONTEXT_LENGTHS.get(device.type, CONTEXT_LENGTHS["cpu"])
    if lengths[0] < 1 or decode_tokens < 1:
        raise InvalidArgumentError(
            f"expected context lengths and decode_tokens of at least 1, got {list(lengths)} and {decode_tokens}"
        )
    for storage in storages:
        storage_named(storage)
    ratios, names = tuple(dict.fromkeys(compression_ratios)), []
    for name in dict.fromkeys(presses or PRESSES):
        try:
            for ratio in ratios:
                get_press(name, ratio)
        except MissingDependencyError as error:
            if presses:
                raise
            say(f"left out: {name} ({error})")
        else:
            names.append(name)
    chosen = tuple(name for name in names if name != BASELINE)
    kinds = tuple(dict.fromkeys(storages)) or ("model",)
    return Grid(lengths, chosen, _originals(chosen, ratios, kvpress), ratios, decode_tokens, compile, kinds)


def _originals(names: Sequence[str], ratios: Sequence[float], wanted: bool | None) -> frozenset[str]:
    if wanted is False:
        return frozenset()
    from kvzip_press.presses.kvpress_adapter.original import original_press

    try:
        return frozenset(name for name in names if original_press(name, ratios[0]) is not None)
    except MissingDependencyError:
        if wanted:
            raise
        return frozenset()
