"""How much is kept: a fraction, a number of tokens, or a fraction for each layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvzip_press.arguments.numbers import is_int
from kvzip_press.errors import InvalidArgumentError


class Amount(ABC):
    """How many pairs a pool keeps. Frozen, and hashable."""

    @property
    def compression_ratio(self) -> float:
        """The fraction removed, if the amount names one; 0.0 otherwise."""
        return 0.0

    @abstractmethod
    def pairs(self, layers: Sequence[int], n_pairs: int, n_heads: int, n_held: int) -> int:
        """Returns how many pairs a pool keeps, before that is limited to the pairs it has.

        Args:
            layers: The pool's layers, by index.
            n_pairs: Number of pairs that a ratio applies to.
            n_heads: Number of heads in the pool.
            n_held: Number of pairs of earlier turns that count towards a budget in tokens.
        """

    def check_layers(self, layers: Iterable[int]) -> None:  # noqa: B027  # most amounts are for any layers
        """Raises InvalidArgumentError if the amount is for other layers than these."""


@dataclass(frozen=True)
class Ratio(Amount):
    """Keeps all but a fraction of the pairs, rounded.

    Args:
        compression_ratio: The fraction removed, in [0, 1).

    Raises:
        InvalidArgumentError: The ratio is out of range.
    """

    compression_ratio: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "compression_ratio", check_compression_ratio(self.compression_ratio))

    def pairs(self, layers: Sequence[int], n_pairs: int, n_heads: int, n_held: int) -> int:
        """Returns ``round((1 - compression_ratio) * n_pairs)``."""
        return round((1 - self.compression_ratio) * n_pairs)


@dataclass(frozen=True)
class Tokens(Amount):
    """Keeps a fixed number of pairs per head, on average over a pool.

    Args:
        budget: The number of pairs, an int of at least 1.

    Raises:
        InvalidArgumentError: The budget is out of range.
    """

    budget: int

    def __post_init__(self) -> None:
        if not is_int(self.budget) or self.budget < 1:
            raise InvalidArgumentError(
                f"expected budget (tokens kept per head) to be an int of at least 1, got {self.budget!r}"
            )

    def pairs(self, layers: Sequence[int], n_pairs: int, n_heads: int, n_held: int) -> int:
        """Returns ``budget`` pairs per head, less those already held."""
        return self.budget * n_heads - n_held


class LayerRatios(Mapping[int, float], Amount):
    """A mapping ``layer_idx -> compression_ratio``, hashable so that a press stays a value.

    Args:
        ratios: A mapping, or a sequence whose i-th ratio is that of layer i.

    Raises:
        InvalidArgumentError: ``ratios`` is neither of these, or a ratio or an index is out of range.
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

    def pairs(self, layers: Sequence[int], n_pairs: int, n_heads: int, n_held: int) -> int:
        """Returns what a :class:`Ratio` with this layer's own ratio would."""
        if len(set(layers)) > 1:
            raise InvalidArgumentError(
                f"expected layer_ratios with an allocation under which layers do not compete, got a pool of the layers "
                f"{sorted(set(layers))}"
            )
        return round((1 - self._ratios[layers[0]]) * n_pairs)

    def check_layers(self, layers: Iterable[int]) -> None:
        """Raises InvalidArgumentError unless there is a ratio for each of these layers, and for no other."""
        if set(self._ratios) != set(layers):
            raise InvalidArgumentError(
                f"expected layer_ratios for layers {sorted(layers)}, got them for {sorted(self._ratios)}"
            )


def amount_of(
    compression_ratio: float | None = None,
    budget: int | None = None,
    layer_ratios: Mapping[int, float] | Sequence[float] | None = None,
) -> Amount:
    """Returns the one amount that is given; a ratio of 0.0 if none is.

    Raises:
        InvalidArgumentError: A value is out of range, or more than one is given. A ratio of 0.0, which removes nothing
            and is the default of presses, does not count as given.
    """
    ratio = Ratio(0.0 if compression_ratio is None else compression_ratio)
    named = {
        "compression_ratio": compression_ratio or None,
        "budget": None if budget is None else Tokens(budget).budget,
        "layer_ratios": None if layer_ratios is None else LayerRatios(layer_ratios),
    }
    given = [f"{name}={value!r}" for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise InvalidArgumentError(f"expected only one of {', '.join(named)}, got {' and '.join(given)}")
    if budget is not None:
        return Tokens(budget)
    return ratio if layer_ratios is None else LayerRatios(layer_ratios)


def check_compression_ratio(compression_ratio: float) -> float:
    """Returns the ratio as a float, or raises InvalidArgumentError unless it is a number in [0, 1)."""
    valid = isinstance(compression_ratio, (int, float)) and not isinstance(compression_ratio, bool)
    if not valid or math.isnan(compression_ratio) or not 0 <= compression_ratio < 1:
        raise InvalidArgumentError(
            f"expected compression_ratio (the fraction removed) in [0, 1), got {_described(compression_ratio)}"
        )
    return float(compression_ratio)


def _described(given: object) -> str:
    """Says what was given as a ratio; for what was meant as something else, what to write."""
    if isinstance(given, int | float) and given > 1 and float(given).is_integer():
        percent = f"{int(given)} % is {int(given) / 100}, " if given < 100 else ""
        return f"{given}: {percent}{int(given)} tokens are budget={int(given)}"
    if isinstance(given, int | float | str | None):
        return f"{given!r:.80}"
    return f"{type(given).__name__}: a press is made first, and given a model then, `with press(model):`"


def _layer_idx(layer_idx: Any) -> int:
    if not is_int(layer_idx) or layer_idx < 0:
        raise InvalidArgumentError(f"expected layer_ratios by layer index, got {layer_idx!r}")
    return int(layer_idx)
