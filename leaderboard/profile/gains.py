"""Says in sentences where the gain begins. Lengths without a gain are named, not left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.profile.rows import DENSE, KVPRESS, OURS, ProfileRow

LEAST_GAIN = 0.02  # fraction of the baseline's time; anything less is noise
_COMPARED = ("baseline_ms", "speedup_low", "speedup", "speedup_high")
_MODES = {"graph": "in a CUDA graph", "eager": "eager"}  # the first of which both caches were timed is compared


@dataclass(frozen=True)
class Comparison:
    """Decode steps of a press in turns with those of its baseline at one length, both eager or both in a CUDA graph.

    Attributes:
        row: The press's row.
        mode: "in a CUDA graph" or "eager".
        ms: Milliseconds of the press, the median.
        baseline_ms: Milliseconds of its baseline, the median.
        speedup: How many times as fast the press's steps were: the quartiles over turns, and between them the median.
    """

    row: ProfileRow
    mode: str
    ms: float
    baseline_ms: float
    speedup: tuple[float, float, float]

    @property
    def gains(self) -> bool:
        """Whether the gain exceeds its spread: three of four turns take at least 2 % less time."""
        return self.speedup[0] * (1 - LEAST_GAIN) > 1

    @property
    def tokens_to_pay_back(self) -> int | None:
        """Decoded tokens until the time spent compressing is won back; None if that time was not measured separately.

        kvpress's own runs compress inside the prefill, in whole or in part.
        """
        if self.row.compress_seconds is None or self.row.engine == KVPRESS or self.ms >= self.baseline_ms:
            return None
        return max(1, math.ceil(self.row.compress_seconds * 1e3 / (self.baseline_ms - self.ms)))

    @property
    def times_as_fast(self) -> str:
        """The speed-up, with its quartiles."""
        low, median, high = self.speedup
        return f"{median:.2f} ({low:.2f} to {high:.2f}) times as fast"

    def __str__(self) -> str:
        return f"{self.ms:.2f} ms beside {self.baseline_ms:.2f} ms"


def sentences(rows: Sequence[ProfileRow]) -> list[str]:
    """Describes the rows: the baselines, each press at each ratio, errors, and (once) why there is no CUDA graph.

    Each row is compared with the cache that it was timed in turns with: our presses with the ragged cache that keeps
    everything, kvpress's own runs with a DynamicCache. A gain is one that exceeds its spread, see `Comparison.gains`.
    """
    said = list(_about_baselines(rows))
    groups: dict[tuple[str, float], list[ProfileRow]] = {}
    for row in rows:
        if row.engine != DENSE and not row.is_baseline:
            groups.setdefault((row.label, row.compression_ratio), []).append(row)
    said += [_about_press(label, ratio, group, rows) for (label, ratio), group in groups.items()]
    reasons = dict.fromkeys(row.notes["graph"] for row in rows if row.engine == OURS and "graph" in row.notes)
    said += [f"No CUDA graph: {reason}." for reason in reasons]
    compilers = dict.fromkeys(row.notes["compiled"] for row in rows if "compiled" in row.notes)
    return said + [f"Compiled decode step: {reason}." for reason in compilers]


def _about_baselines(rows: Sequence[ProfileRow]) -> Iterator[str]:
    for row in rows:
        if (row.engine == DENSE or row.is_baseline) and row.error is not None:
            yield f"{row.label} at {row.context_length} tokens: {row.error}."
    both = [
        (row, dense)
        for row in rows
        if row.is_baseline and row.error is None and (dense := _dense_beside(row, rows)) is not None
    ]
    if both:
        ours, dense = max(both, key=lambda pair: pair[0].context_length)
        yield (
            f"Nothing removed, {ours.context_length} tokens: {_times(ours)} of the ragged cache, {_times(dense)} of a "
            "plain DynamicCache."
        )


def _times(row: ProfileRow) -> str:
    graph = "" if row.decode_ms_graph is None else f" ({row.decode_ms_graph:.2f} ms in a CUDA graph)"
    return "no decode time" if row.decode_ms_eager is None else f"{row.decode_ms_eager:.2f} ms eager{graph}"


def _about_press(label: str, ratio: float, group: Sequence[ProfileRow], rows: Sequence[ProfileRow]) -> str:
    compared, without, failed = [], [], []
    for row in sorted(group, key=lambda row: row.context_length):
        comparison = _compare(row)
        if row.error is not None:
            failed.append(f"at {row.context_length} tokens: {row.error}")
        elif comparison is None:
            without.append(str(row.context_length))
        else:
            compared.append(comparison)
    gains = [one for one in compared if one.gains]
    parts = [_about_gains(gains)] if gains else []
    parts += [_about_losses([one for one in compared if not one.gains])] if len(gains) < len(compared) else []
    parts += [_beside_dense(compared[-1], rows)] if compared and compared[-1].row.engine == OURS else []
    parts += [f"nothing to compare with at {', '.join(without)} tokens"] if without else []
    return f"{label}, {100 * ratio:g}% removed: {'; '.join([part for part in [*parts, *failed] if part])}."


def _about_gains(gains: Sequence[Comparison]) -> str:
    first, last = gains[0], gains[-1]
    paid = [
        f"{one.tokens_to_pay_back} at {one.row.context_length}" for one in gains if one.tokens_to_pay_back is not None
    ]
    text = f"decode ({last.mode}) gains from {first.row.context_length} tokens on ({first})"
    if last is not first:
        text += f", at {last.row.context_length} tokens it is {last.times_as_fast} ({last})"
    else:
        text += f", {last.times_as_fast}"
    return text + (f"; decoded tokens until compressing is paid back: {', '.join(paid)}" if paid else "")


def _beside_dense(comparison: Comparison, rows: Sequence[ProfileRow]) -> str:
    """Describes what a user has without us, at the longest length; empty if that was not measured."""
    dense = _dense_beside(comparison.row, rows)
    if dense is None or dense.decode_ms_eager is None:
        return ""
    return f"a plain DynamicCache (eager) takes {dense.decode_ms_eager:.2f} ms at {dense.context_length} tokens"


def _about_losses(losses: Sequence[Comparison]) -> str:
    lengths = ", ".join(f"{one.row.context_length} tokens ({one}, {one.times_as_fast})" for one in losses)
    return f"no gain beyond the spread ({losses[-1].mode}) at {lengths}"


def _compare(row: ProfileRow) -> Comparison | None:
    for mode, words in _MODES.items():
        turns, ms = row.turns.get(mode, {}), getattr(row, f"decode_ms_{mode}")
        known = [value for name in _COMPARED if (value := turns.get(name)) is not None]
        if ms is not None and len(known) == len(_COMPARED):
            baseline_ms, low, median, high = known
            return Comparison(row, words, ms, baseline_ms, (low, median, high))
    return None


def _dense_beside(row: ProfileRow, rows: Sequence[ProfileRow]) -> ProfileRow | None:
    """Returns the row of a DynamicCache of the same length, if it was measured."""
    alike = [one for one in rows if one.context_length == row.context_length and one.error is None]
    return next((one for one in alike if one.engine == DENSE), None)
