"""Budgets of heads from a table that was measured once for a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch

from kvzip_press.budget.allocators.levels import Curve, Levelled
from kvzip_press.budget.candidates import Candidates
from kvzip_press.budget.share_file import read_shares
from kvzip_press.errors import InvalidArgumentError

_LEAST = 1e-6  # of the largest share: a head with a share of 0 is served last


@dataclass(frozen=True)
class Table(Levelled):
    """Each head has a share of the whole, from a file: "table".

    Heads keep pairs in proportion to their shares, at any amount, until they have no more; what they cannot keep goes
    to the others in proportion. That is how BaKlaVa (https://arxiv.org/abs/2502.13176) uses its profile;
    ``kvzip-press budgets profile`` makes such a file. Curves of LU-KV (https://arxiv.org/abs/2602.08585), as kvpress
    reads them, hold shares for 99 ratios, 1 % to 99 % removed; between them they are interpolated. Published curves
    may cross: where one would give a head less of a larger budget, the head keeps what it had. So the whole keeps
    exactly what was asked for, and budgets are nested.

    Args:
        shares: ``[layers, heads]``, numbers of at least 0, of which the ratios count; or a curve of the fractions
            removed, ``[99, layers, heads]``; or a file of either: our JSON, or LU-KV's ``.npy``. Rows are the model's
            layers, or those of them that can be compressed.
        min_kept_per_head: See :class:`Allocation`.
        safeguard: See :class:`Allocation`.

    Raises:
        InvalidArgumentError: There are no shares, they are no such numbers, or the file cannot be read.
    """

    shares: Sequence[Any] | str | PathLike[str] = ()

    name: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.shares
        table = read_shares(Path(given)) if isinstance(given, str | PathLike) else _tensor_of(given)
        object.__setattr__(self, "shares", _checked(table))

    def __repr__(self) -> str:
        return f"Table({list(torch.tensor(self.shares).shape)})"

    def curve(self, row: Candidates, sizes: torch.Tensor) -> Curve:
        """Returns each head's share, times the level; of LU-KV's curves, what is left at the level.

        Raises:
            InvalidArgumentError: The table is for another number of layers or heads.
        """
        table = torch.tensor(self.shares, dtype=torch.float64)[..., self._rows(row.heads), :].flatten(-2)
        if table.dim() == 1:
            table = table.clamp(min=_LEAST * float(table.max()))
            return lambda level: level * table
        left = torch.cat([torch.zeros_like(table[:1]), 1 - table.flip(0), torch.ones_like(table[:1])])
        left = left.cummax(dim=0).values  # [101, heads]: at 0 %, 1 %, ... 100 % kept

        def at(level: float) -> torch.Tensor:
            place = min(level, 1.0) * 100
            below = min(math.floor(place), 99)
            return sizes * (left[below] + (left[below + 1] - left[below]) * (place - below))

        return at

    def _rows(self, heads: dict[int, int]) -> list[int]:
        """Returns the table's row of each layer."""
        table = torch.tensor(self.shares)
        n_rows, n_heads = table.shape[-2:]
        rows = list(range(len(heads))) if n_rows == len(heads) else list(heads)
        if set(heads.values()) != {n_heads} or max(rows) >= n_rows:
            raise InvalidArgumentError(
                f"expected a table of shares for {len(heads)} layers, of {sorted(set(heads.values()))} KV heads, got "
                f"one for {n_rows} layers of {n_heads}: was it made for another model?"
            )
        return rows


def _tensor_of(given: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(f"expected shares as numbers [layers, heads], got {given!r:.80}") from error


def _checked(table: torch.Tensor) -> tuple[Any, ...]:
    """Returns the shares as tuples, so that an allocation is a value."""
    is_curve = table.dim() == 3 and table.shape[0] == 99
    if not (table.dim() == 2 or is_curve) or not table.numel():
        raise InvalidArgumentError(
            "expected shares [layers, heads], or LU-KV's curve [99, layers, heads], as numbers or in a file "
            f"(`kvzip-press budgets profile` makes one), got {tuple(table.shape)}"
        )
    if not bool((torch.isfinite(table) & (table >= 0)).all()) or not bool(table.any()):
        raise InvalidArgumentError("expected shares that are finite and at least 0, and not all of them 0")
    if is_curve and bool((table > 1).any()):
        raise InvalidArgumentError(
            f"expected LU-KV's curve as fractions removed, in [0, 1], got up to {float(table.max())}"
        )
    return _tuples(table.tolist())


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values
