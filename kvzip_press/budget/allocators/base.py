"""What an allocation is: a rule that turns an amount into a number of pairs for each head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvzip_press.arguments.numbers import is_int
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Candidates, Counts, Pool, of_batch
from kvzip_press.budget.spending import spend
from kvzip_press.errors import InvalidArgumentError

SAFEGUARD = 0.2
"""AdaKV's alpha."""


@dataclass(frozen=True)
class Allocation:
    """A rule that turns an amount into a number of pairs for each head.

    Within a pool, heads first take in turns the pairs that floors reserve, then the best of the remaining pairs win.
    Most allocations differ only in their pools and in how much is reserved; one of another kind overrides
    :meth:`counts`.

    Args:
        min_kept_per_head: Number of unprotected pairs that every head keeps at least. They are part of the budget; a
            head with fewer pairs, or a budget too small for all floors, keeps fewer.
        safeguard: AdaKV's alpha, in [0, 1]; only :class:`AdaKV` uses it. Other allocations carry it for a caller who
            later asks for "adakv" by name.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    min_kept_per_head: int = 0
    safeguard: float = SAFEGUARD

    #: The short name; empty for an allocation without one. A subclass that only counts otherwise keeps its parent's.
    name: ClassVar[str] = ""
    #: Whether pairs of different layers compete, so that there can be no ratio for each layer.
    layers_compete: ClassVar[bool] = False
    #: Whether a head keeps what the amount and its own pairs say, so that heads of all layers may be as if of one. A
    #: class says it of itself, and not of its subclasses, which may ask of which layer a head is.
    heads_alone: ClassVar[bool] = False
    #: Whether the rule itself says how much is kept, so that no amount can be asked for.
    is_outcome: ClassVar[bool] = False
    #: Whether the rule looks at the attention of the last token (``Candidates.attention``).
    needs_attention: ClassVar[bool] = False
    #: Whether the rule is about scores in units of uniform attention, so that they must be weights of attention.
    needs_weights: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "heads_alone" not in vars(cls):
            cls.heads_alone = False

    def __post_init__(self) -> None:
        safeguard, floor = self.safeguard, self.min_kept_per_head
        if isinstance(safeguard, bool) or not isinstance(safeguard, (int, float)) or not 0 <= safeguard <= 1:
            raise InvalidArgumentError(f"expected safeguard (a part of the equal share) in [0, 1], got {safeguard!r}")
        if not is_int(floor) or floor < 0:
            raise InvalidArgumentError(f"expected min_kept_per_head to be an int of at least 0, got {floor!r}")

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        """Returns the pools of a model, given ``layer_idx -> number of KV heads``: every head once.

        An allocation that overrides :meth:`counts` needs none; how much it keeps is then its own matter.
        """
        return []

    def asked(self, amount: Amount, layers: Sequence[int], n_pairs: int, n_heads: int, n_held: int = 0) -> int:
        """Returns how many pairs a pool is to keep; arguments as in :meth:`kvzip_press.budget.amount.Amount.pairs`.

        Override it to give pools other shares of the whole. What is held of earlier turns (``n_held``) is subtracted
        in the result: scale ``amount.pairs(layers, n_pairs, n_heads, 0)`` and subtract ``n_held`` from that.
        """
        return amount.pairs(layers, n_pairs, n_heads, n_held)

    @property
    def rounding(self) -> int:
        """The most pairs by which a row's total may stay below what was asked for; 0 for exact rules."""
        return 0

    def reserved(self, sizes: Sequence[int], budget: int) -> int:
        """Returns how much of a pool's budget its heads take in turns, at most all of it.

        Args:
            sizes: Number of competing pairs in each head.
            budget: Number of these pairs that the pool keeps.
        """
        return min(sum(min(size, self.min_kept_per_head) for size in sizes), budget)

    def counts(self, row: Candidates, amount: Amount) -> Counts:
        """Returns ``layer_idx -> [heads]``, int64: how many unprotected pairs each head of a row keeps.

        Raises:
            InvalidArgumentError: The pools do not hold every head once, or the amount is not for pools of these layers.
        """
        counts, pools = row.no_counts(), self.pools(row.heads)
        self._check(pools, row.heads)
        for pool in pools:
            sizes = row.sizes(pool)
            asked = self.asked(amount, [i for i, _ in pool], row.n_counted(pool), len(sizes), row.n_held(pool))
            budget = row.to_spend(pool, asked)
            if budget == 0:
                continue
            spent = spend(row.best_first(pool), sizes, budget, self.reserved(sizes, budget))
            for (i, heads), part in zip(pool, spent.split([len(row.free[i][heads]) for i, heads in pool]), strict=True):
                counts[i][heads] = part.to(counts[i].device)
        return counts

    def counts_of_rows(self, rows: Sequence[Candidates], amount: Amount) -> Counts:
        """Returns ``layer_idx -> [batch, heads]``, int64: :meth:`counts` of each row.

        Raises:
            InvalidArgumentError: As :meth:`counts` does.
        """
        return of_batch([self.counts(row, amount) for row in rows], rows[0].values)

    def _check(self, pools: Sequence[Pool], heads: Mapping[int, int]) -> None:
        """Refuses pools that forget a head, which would keep nothing, or count one twice."""
        held = Counter((i, head) for pool in pools for i, which in pool for head in range(heads[i])[which])
        wrong = [(i, head) for i, n_heads in heads.items() for head in range(n_heads) if held[i, head] != 1]
        if wrong:
            raise InvalidArgumentError(
                f"expected pools of {self!r} with every head in one of them, got (layer, head) {wrong[0]} in "
                f"{held[wrong[0]]}"
            )
