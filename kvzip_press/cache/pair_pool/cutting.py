"""Which pairs stay when rows are cut to what a policy leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.cache.pair_pool.layout import Layout
from kvzip_press.cache.pair_pool.pair_list import PairList
from kvzip_press.cache.pair_pool.worth import STAYS


def kept_after(pairs: PairList, due: Iterable[torch.Tensor], safe: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Returns which pairs stay, bool ``[pairs]``, if the rows that are due are cut, so many at a time.

    Args:
        pairs: Pairs of all rows; other rows keep theirs.
        due: int64 ``[n]`` each, the rows to cut.
        safe: int64 ``[batch, 2]``: in each row, positions before the first number and from the second on stay.
        policy: How much a row keeps, and how its pairs compete.
    """
    kept = pairs.alive.clone()
    for rows in due:
        if len(rows):
            cut(pairs, kept, rows, safe[rows], policy)
    return kept


def cut(pairs: PairList, kept: torch.Tensor, rows: torch.Tensor, safe: torch.Tensor, policy: Policy) -> None:
    """Marks in ``kept`` what some rows keep.

    The pairs are laid out like the scores of a span, so that the code that spends a prefill's budget can spend this
    one.

    Args:
        pairs: Pairs of these rows and of others.
        kept: Bool ``[pairs]``, changed in place to False at pairs that go.
        rows: int64 ``[n]``, the rows to cut.
        safe: int64 ``[n, 2]``, of these rows: see :func:`kept_after`.
        policy: How much a row keeps, and how its pairs compete.
    """
    layout = Layout.of(pairs, rows)
    if layout.positions.numel():
        kept &= layout.listed(_keep(pairs, layout, safe, policy))


def _keep(pairs: PairList, layout: Layout, safe: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Returns which pairs stay of those that are laid out, bool ``[layers, rows, heads, columns]``."""
    values, alive = layout.laid_out(pairs.score), layout.laid_out(pairs.alive)
    stays = (values == STAYS).any(dim=2).any(dim=0)
    is_safe = (layout.positions < safe[:, :1]) | (layout.positions >= safe[:, 1:])
    protected = layout.valid & (stays | is_safe)

    def selected(indices: Sequence[int], values: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        scores = Scores(dict(zip(indices, values, strict=True)), protected, policy, protected_count=~stays)
        return torch.stack(list(select(scores, layout.valid, among=dict(zip(indices, alive, strict=True))).values()))

    if not type(policy.allocation).heads_alone or not layout.is_finite:  # what is not finite is said with its layer
        return selected(pairs.indices, values, alive)
    of_all = (x.transpose(0, 1).flatten(1, 2)[None] for x in (values, alive))  # all heads, as those of one layer
    return selected(pairs.indices[:1], *of_all)[0].unflatten(1, (values.shape[0], -1)).transpose(0, 1)
