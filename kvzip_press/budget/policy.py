"""What can be asked of a budget: its size, and how pairs compete for it. Checks, and nothing that spends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvzip_press.errors import InvalidArgumentError

#: "global": all pairs of all layers and heads compete (KVzip). "layer": every layer keeps the same number, its heads
#: compete. "head": every head keeps the same number (SnapKV and most others). "adakv": as "layer", but every head
#: keeps a safeguarded part of its equal share (AdaKV, https://arxiv.org/abs/2407.11550).
ALLOCATIONS = ("global", "layer", "head", "adakv")

#: AdaKV's alpha.
SAFEGUARD = 0.2


class LayerRatios(Mapping[int, float]):
    """``layer_idx -> compression_ratio``, hashable, so that a press stays a value.

    Args:
        ratios: A mapping, or a sequence whose i-th ratio is that of layer i.

    Raises:
        InvalidArgumentError: Neither of them, or a ratio or an index out of range.
    """

    def __init__(self, ratios: Mapping[int, float] | Sequence[float]) -> None:
        if isinstance(ratios, str) or not isinstance(ratios, (Mapping, Sequence)):
            raise InvalidArgumentError(f"expected layer_ratios as a mapping or a sequence, got {ratios!r}")
        items = ratios.items() if isinstance(ratios, Mapping) else enumerate(ratios)
        self._ratios = {_layer_idx(layer_idx): check_compression_ratio(ratio) for layer_idx, ratio in items}

    def __getitem__(self, layer_idx: int) -> float:
        return self._ratios[layer_idx]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ratios)

    def __len__(self) -> int:
        return len(self._ratios)

    def __hash__(self) -> int:
        return hash(frozenset(self._ratios.items()))

    def __repr__(self) -> str:
        return repr(self._ratios)


def check_compression_ratio(compression_ratio: float) -> float:
    """Returns the ratio as a float, or raises InvalidArgumentError unless it is a number in [0, 1)."""
    valid = isinstance(compression_ratio, (int, float)) and not isinstance(compression_ratio, bool)
    if not valid or math.isnan(compression_ratio) or not 0 <= compression_ratio < 1:
        raise InvalidArgumentError(
            f"expected compression_ratio (the fraction removed) in [0, 1), got {compression_ratio!r}"
        )
    return float(compression_ratio)


def check_allocation(allocation: str) -> str:
    """Returns the allocation, or raises InvalidArgumentError when it is not one of :data:`ALLOCATIONS`."""
    if allocation not in ALLOCATIONS:
        raise InvalidArgumentError(f"expected allocation to be one of {ALLOCATIONS}, got {allocation!r}")
    return allocation


def check_amount(
    compression_ratio: float | None, budget: int | None, layer_ratios: Mapping[int, float] | None = None
) -> None:
    """Raises InvalidArgumentError for a bad ratio or budget, or when more than one says how much is kept."""
    if compression_ratio is not None:
        check_compression_ratio(compression_ratio)
    if budget is not None and (not _is_int(budget) or budget < 1):
        raise InvalidArgumentError(f"expected budget (tokens kept per head) to be an int of at least 1, got {budget!r}")
    given = {
        "compression_ratio": compression_ratio or None,  # 0.0 is a press's default and removes nothing
        "budget": budget,
        "layer_ratios": layer_ratios,
    }
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidArgumentError(f"expected only one of {', '.join(given)}, got {' and '.join(named)}")


def check_policy(
    *,
    compression_ratio: float,
    budget: int | None,
    layer_ratios: Mapping[int, float] | None,
    allocation: str,
    safeguard: float,
    min_kept_per_head: int,
) -> None:
    """Raises InvalidArgumentError for a value out of range, or for values that contradict each other."""
    check_amount(compression_ratio, budget, layer_ratios)
    check_allocation(allocation)
    if layer_ratios is not None and allocation == "global":
        raise InvalidArgumentError(
            'expected allocation "layer", "head" or "adakv" with layer_ratios, got "global", where layers compete'
        )
    if isinstance(safeguard, bool) or not isinstance(safeguard, (int, float)) or not 0 <= safeguard <= 1:
        raise InvalidArgumentError(f"expected safeguard (a part of the equal share) in [0, 1], got {safeguard!r}")
    if not _is_int(min_kept_per_head) or min_kept_per_head < 0:
        raise InvalidArgumentError(f"expected min_kept_per_head to be an int of at least 0, got {min_kept_per_head!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layer_idx(layer_idx: Any) -> int:
    if not _is_int(layer_idx) or layer_idx < 0:
        raise InvalidArgumentError(f"expected layer_ratios by layer index, got {layer_idx!r}")
    return int(layer_idx)
