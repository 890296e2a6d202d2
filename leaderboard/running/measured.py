"""Measures what a compressed cache really holds, and checks that it is what was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.budget.allocators import Decided
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import BudgetMismatchError


@dataclass(frozen=True)
class Measured:
    """One row of a cache just after eviction, measured as if it were alone: the batch's padding is not counted.

    Attributes:
        n_tokens: Tokens of the row.
        kept: ``layer_idx -> kept pairs of each KV head``, for the layers that can be compressed.
        resident_bytes: Bytes of its keys, values, positions and lengths, and of the layers that stay dense.
        dense_bytes: Bytes that its keys and values would take without compression.
    """

    n_tokens: int
    kept: dict[int, list[int]]
    resident_bytes: int
    dense_bytes: int

    @property
    def n_kept(self) -> int:
        """Number of kept pairs."""
        return sum(map(sum, self.kept.values()))

    @property
    def n_pairs(self) -> int:
        """Number of pairs that were read."""
        return self.n_tokens * sum(map(len, self.kept.values()))

    @property
    def kept_fraction(self) -> float:
        """Kept pairs over pairs read."""
        return self.n_kept / self.n_pairs

    @property
    def kept_fractions(self) -> tuple[tuple[float, ...], ...]:
        """``[layer][kv head]``, of the layers in the order of ``kept``."""
        return tuple(tuple(kept / self.n_tokens for kept in heads) for heads in self.kept.values())


def measure(cache: RaggedCache, valid: torch.Tensor) -> list[Measured]:
    """Measures the rows of a cache of which no question has been asked yet.

    Args:
        cache: From ``Prefill.evict``.
        valid: ``[batch, span]``, bool, False at padding.

    Raises:
        BudgetMismatchError: The cache holds more or fewer bytes than its kept pairs need.
    """
    rows = [_row(cache, row, n_tokens) for row, n_tokens in enumerate(valid.sum(dim=-1).tolist())]
    needed = sum(_needed(layer) for layer in cache.layers)
    if needed != cache.resident_bytes:
        raise BudgetMismatchError(
            f"expected a cache of {sum(row.n_kept for row in rows)} pairs in {needed} bytes, got one that holds "
            f"{cache.resident_bytes}"
        )
    return rows


def _row(cache: RaggedCache, row: int, n_tokens: int) -> Measured:
    kept: dict[int, list[int]] = {}
    resident = dense = 0
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, RaggedLayer):
            heads = kept[layer_idx] = layer.packed.seqlens[row].tolist()
            resident += layer.packed.row_bytes(row)
            dense += n_tokens * len(heads) * layer.packed.storage.dense_pair_bytes
        else:
            held = _dense_row_bytes(layer, n_tokens)
            resident, dense = resident + held, dense + held
    return Measured(n_tokens, kept, resident, dense)


def _needed(layer: Any) -> int:
    if not isinstance(layer, RaggedLayer):
        return sum(tensor.nbytes for tensor in (layer.keys, layer.values))
    return int(layer.packed.nbytes(slice(None)))


def _dense_row_bytes(layer: Any, n_tokens: int) -> int:
    """Returns the bytes of a sliding layer's row without the padding on its left, which the layer holds too."""
    columns = layer.keys.shape[2]
    row: int = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[0]
    return row // columns * min(columns, n_tokens)


def check_kept(label: str, compression_ratio: float, scores: Scores, rows: Sequence[Measured]) -> None:
    """Compares what rows keep with what was asked for.

    A ratio refers to all pairs except those protected pairs that do not count towards it; protected pairs always stay.
    A press that decides its own counts is checked against those.

    Args:
        label: The press's label.
        compression_ratio: The fraction that the run asks to remove.
        scores: The scores that decided the eviction, with the policy that was asked for.
        rows: The cache's rows.

    Raises:
        BudgetMismatchError: A row keeps a different number of pairs, or keeps all though some were to be removed.
    """
    slack = 0 if scores.is_decided else len(scores.layers)  # one pair for each layer that would be left empty
    slack *= 1 + scores.policy.allocation.rounding  # or a page
    for row, found in enumerate(rows):
        asked = _asked_pairs(scores, row, found.n_tokens)
        if asked is not None and abs(found.n_kept - asked) > slack:
            raise BudgetMismatchError(
                f"{label} at compression_ratio {compression_ratio}: expected {asked} of {found.n_pairs} pairs kept "
                f"({asked / found.n_pairs:.4f}), got {found.n_kept} ({found.kept_fraction:.4f})"
            )
        if compression_ratio > 0 and found.n_kept >= found.n_pairs:
            raise BudgetMismatchError(
                f"{label} at compression_ratio {compression_ratio}: expected pairs to be removed, got all "
                f"{found.n_pairs} kept, {found.resident_bytes} bytes"
            )


def _asked_pairs(scores: Scores, row: int, n_tokens: int) -> int | None:
    """Returns the number of pairs that a row should keep; None if that is an outcome of the allocation's own rule."""
    protected, charged = int(scores.protected[row].sum()), int(scores.charged[row].sum())
    policy, outside = scores.policy, protected - charged
    if isinstance(policy.allocation, Decided):
        decided = policy.allocation.per_head.values()
        return sum(int(counts[row].sum()) + counts.shape[1] * protected for counts in decided)
    heads, total = {i: layer.shape[1] for i, layer in scores.layers.items()}, 0
    pools = policy.allocation.pools(heads)
    if not pools:
        return None
    for pool in pools:
        n_heads = sum(len(range(heads[i])[which]) for i, which in pool)
        inside = n_heads * (n_tokens - outside)
        asked = policy.allocation.asked(policy.amount, [i for i, _ in pool], inside, n_heads)
        total += n_heads * outside + min(max(asked, n_heads * charged), inside)
    return total
