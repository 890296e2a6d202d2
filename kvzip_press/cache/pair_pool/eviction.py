"""An eviction while the model writes: which pairs of a pool go, and the pool without them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvzip_press.budget.policy import Policy
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.pair_pool.change import change
from kvzip_press.cache.pair_pool.cutting import kept_after
from kvzip_press.cache.pair_pool.merging import Merges
from kvzip_press.cache.pair_pool.pair_list import PairList, PerPair
from kvzip_press.cache.pair_pool.pool import PairPool
from kvzip_press.cache.pair_pool.stack import bounds_of, marked_pairs, numbers_of
from kvzip_press.cache.pair_pool.tails import Tails
from kvzip_press.cache.pair_pool.worth import Worth
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheMismatchError

NUMBERS_AT_ONCE = 2**24  # of the scores that are laid out together: bounds the memory that takes, whatever the batch


def evict(
    by_idx: Mapping[int, RaggedLayer],
    due: torch.Tensor,
    *,
    policy: Policy,
    window_sizes: torch.Tensor,
    worth: Mapping[int, Worth] | None = None,
) -> None:
    """Merges the layers' tails into their pool, and cuts rows to what a policy leaves them, protected pairs included.

    The first tokens that no head has lost stay, and so do the last ``window_sizes``. Of the others, exactly those stay
    that a prefill with the same scores would keep under the policy. The tails are empty afterwards. Pairs whose score
    is :data:`~kvzip_press.cache.pair_pool.worth.STAYS` stay besides.

    Args:
        by_idx: All compressed layers by layer index, with the tokens that were read since in their tails.
        due: Bool ``[batch]``, the rows to cut.
        policy: How much a row keeps, counting everything that it holds, and how its pairs compete.
        window_sizes: int64 ``[batch]``, the number of last tokens of each row that every head keeps.
        worth: What pairs are worth, by layer; None for the scores that they carry.

    Raises:
        CacheMismatchError: The pairs carry no scores, or a token of a tail has none.
        UnsupportedCacheError: The layers differ in shape or device, or rows share pairs (beams).
    """
    layers = list(by_idx.values())
    pool = PairPool.of(layers)
    packed, tails = numbers_of(layers), Tails.of(layers)
    rows = _rows_due(due, tails)
    competing, carried = _competing_and_carried(packed, tails, worth)
    span = max(max(layer.context_ends) for layer in layers) + layers[0].tail.length
    pairs = PairList.of(packed, tails, competing, tuple(by_idx), span)
    first = torch.tensor(layers[0].n_protected).to(tails.ends.device, non_blocking=True)
    safe = torch.stack([first, tails.ends - window_sizes], dim=1)
    most = int(bounds_of(layers).diff().max()) + layers[0].tail.length  # of a head
    kept = competing.like(kept_after(pairs, rows.split(_rows_at_once(pairs, most)), safe, policy))
    del pairs  # before keys and values are merged
    importance, lengths = competing.tails, _lengths(packed, kept)
    merges = Merges.of(layers, tails.positions, kept=kept, carried=carried, importance=importance, lengths=lengths)
    change(pool, merges)


def _rows_due(due: torch.Tensor, tails: Tails) -> torch.Tensor:
    """Returns the rows to cut, int64 ``[n]``, if every token has a score, else raises; waits for the device once."""
    *are_due, is_missing_some = torch.cat([due, tails.lack_scores()[None]]).tolist()
    if is_missing_some:
        raise CacheMismatchError(
            "expected every token since the context to be read inside `with press(model):`, which scores it, got "
            "some that were read outside of it, or whose rows were rearranged before they had a score"
        )
    return torch.tensor(are_due).nonzero()[:, 0].to(tails.ends.device, non_blocking=True)


def _competing_and_carried(
    packed: PackedPairs, tails: Tails, worth: Mapping[int, Worth] | None
) -> tuple[PerPair, PerPair]:
    """Returns what decides which pairs stay, and what those that stay carry."""
    assert packed.scores is not None
    scores = PerPair(packed.scores, tails.scores)
    if worth is None:
        return scores, scores
    of_layers = list(worth.values())
    found = PerPair(torch.cat([one.packed for one in of_layers]), torch.cat([one.tail for one in of_layers]))
    return found, found if all(one.carried for one in of_layers) else scores


def _rows_at_once(pairs: PairList, most: int) -> int:
    """Returns how many rows are cut together, given how many pairs a head has at most: as many as take little memory.

    A row has a column for each position that a head holds, so at least as many as a head has pairs.
    """
    layers, _, heads = pairs.shape
    return max(NUMBERS_AT_ONCE // max(layers * heads * most, pairs.n_numbers), 1)


def _lengths(packed: PackedPairs, kept: PerPair) -> torch.Tensor:
    """Returns how many pairs each segment keeps, int64 ``[segments]`` on the host; waits for the device."""
    return (marked_pairs(packed, kept.packed) + kept.tails.sum(dim=-1).flatten()).cpu()
