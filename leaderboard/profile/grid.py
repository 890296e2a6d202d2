"""What a profile measures, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.profile.measure import Case, original
from kvzip_press.leaderboard.profile.rows import BASELINE, DENSE, KVPRESS, OURS
from kvzip_press.registry import get_press

PRESSES = ("kvzip", "kvzip_local", "snapkv")
CONTEXT_LENGTHS = {"cuda": (4096, 16384, 65536), "cpu": (1024, 4096)}
WARMUP_LENGTH = 4096
DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Grid:
    """The cases of a profile.

    Attributes:
        context_lengths: Ascending.
        presses: Registry names, without the baseline, which is always measured.
        originals: Those of them that kvpress runs its own way too.
        compression_ratios: Fractions removed.
        decode_tokens: Steps timed for each figure.
        compile: Whether the compiled decode step is measured too.
    """

    context_lengths: tuple[int, ...]
    presses: tuple[str, ...]
    originals: frozenset[str]
    compression_ratios: tuple[float, ...]
    decode_tokens: int
    compile: bool = False

    def cases(self) -> Iterator[Case]:
        """Length by length: the two that keep everything, then press by press and ratio by ratio."""
        for length in self.context_lengths:
            yield self._case(BASELINE, DENSE, 0.0, length)
            yield self._case(BASELINE, OURS, 0.0, length)
            for name in self.presses:
                for engine in (OURS, KVPRESS) if name in self.originals else (OURS,):
                    for ratio in self.compression_ratios:
                        yield self._case(name, engine, ratio, length)

    def warmups(self) -> Iterator[Case]:
        """Every way through the code once, over a short context."""
        length, seen = min(WARMUP_LENGTH, self.context_lengths[0]), set()
        for case in self.cases():
            if (case.press, case.engine) not in seen:
                seen.add((case.press, case.engine))
                yield replace(case, context_length=length, decode_tokens=1, compile=False)

    def _case(self, press: str, engine: str, ratio: float, length: int) -> Case:
        return Case(press, engine, ratio, length, self.decode_tokens, self.compile)


def make_grid(
    device: torch.device,
    *,
    context_lengths: Sequence[int] = (),
    presses: Sequence[str] = (),
    compression_ratios: Sequence[float] = (0.7,),
    decode_tokens: int = 32,
    compile: bool = False,  # noqa: A002  # the name of DecodeStep's argument
    kvpress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Grid:
    """Checks what was asked for and fills in the rest.

    Args:
        device: Chooses the lengths where none are given.
        context_lengths: Tokens.
        presses: Registry names; by default those of `PRESSES` whose packages are installed.
        compression_ratios: Fractions removed, in [0, 1).
        decode_tokens: Steps timed.
        compile: Whether the compiled step is measured too.
        kvpress: Whether kvpress's presses are also run its own way; by default where it is installed.
        say: Is told what is left out, and why.

    Raises:
        InvalidArgumentError: A value out of range, or an unknown press.
        MissingDependencyError: A press or kvpress was asked for by name, and its package is absent.
    """
    lengths = tuple(sorted(set(context_lengths))) or CONTEXT_LENGTHS.get(device.type, CONTEXT_LENGTHS["cpu"])
    if lengths[0] < 1 or decode_tokens < 1:
        raise InvalidArgumentError(
            f"expected context lengths and decode_tokens of at least 1, got {list(lengths)} and {decode_tokens}"
        )
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
    return Grid(lengths, chosen, _originals(chosen, ratios, kvpress), ratios, decode_tokens, compile)


def _originals(names: Sequence[str], ratios: Sequence[float], wanted: bool | None) -> frozenset[str]:
    if wanted is False:
        return frozenset()
    try:
        return frozenset(name for name in names if original().original_press(name, ratios[0]) is not None)
    except MissingDependencyError:
        if wanted:
            raise
        return frozenset()


def get_device(name: str | None) -> torch.device:
    """The device of a name, by default the GPU where there is one.

    Raises:
        InvalidArgumentError: No such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        have = "cpu, cuda or cuda:<index>" if torch.cuda.is_available() else "cpu (torch sees no GPU here)"
        raise InvalidArgumentError(f"expected the device {have}, got {name!r}")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidArgumentError(f"expected the device cpu, cuda or cuda:<index>, got {name!r}") from error


def get_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name; None, for a default, stays None.

    Raises:
        InvalidArgumentError: No such dtype.
    """
    if name is not None and name not in DTYPES:
        raise InvalidArgumentError(f"expected a dtype among {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else DTYPES[name]
