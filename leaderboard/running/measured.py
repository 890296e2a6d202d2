"""What a compressed cache really holds, and whether that is what was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.budget.scores import Scores
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import BudgetMismatchError


@dataclass(frozen=True)
class Measured:
    """One row of a cache just after eviction, as it would be alone: padding of a batch counts nowhere.

    Attributes:
        n_tokens: Tokens of the row.
        kept: ``layer_idx -> kept pairs of each KV head``, of the layers that can be compressed.
        resident_bytes: Of its keys, values, positions and lengths, and of layers that stay dense.
        dense_bytes: Of its keys and values without compression.
    """

    n_tokens: int
    kept: dict[int, list[int]]
    resident_bytes: int
    dense_bytes: int

    @property
    def n_kept(self) -> int:
        """Kept pairs."""
        return sum(map(sum, self.kept.values()))

    @property
    def n_pairs(self) -> int:
        """Pairs that were read."""
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
    """The rows of a cache that nothing was asked of yet.

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
            resident += sum(heads) * _pair_bytes(layer) + (len(heads) + 1) * layer.packed.cu_seqlens.element_size()
            dense += n_tokens * len(heads) * _dense_pair_bytes(layer)
        else:
            held = _dense_row_bytes(layer, n_tokens)
            resident, dense = resident + held, dense + held
    return Measured(n_tokens, kept, resident, dense)


def _needed(layer: Any) -> int:
    if not isinstance(layer, RaggedLayer):
        return sum(tensor.nbytes for tensor in (layer.keys, layer.values))
    packed = layer.packed
    return int(packed.cu_seqlens[-1]) * _pair_bytes(layer) + packed.cu_seqlens.nbytes


def _pair_bytes(layer: RaggedLayer) -> int:
    """Key, value, position, and the score where it is kept for later."""
    packed = layer.packed
    scores = 0 if packed.scores is None else packed.scores.element_size()
    return _dense_pair_bytes(layer) + packed.positions.element_size() + scores


def _dense_pair_bytes(layer: RaggedLayer) -> int:
    return sum(tensor.shape[1] * tensor.element_size() for tensor in layer.packed.pairs)


def _dense_row_bytes(layer: Any, n_tokens: int) -> int:
    """Of a sliding layer, whose rows hold the padding on their left too."""
    columns = layer.keys.shape[2]
    row: int = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[0]
    return row // columns * min(columns, n_tokens)


def check_kept(label: str, compression_ratio: float, scores: Scores, rows: Sequence[Measured]) -> None:
    """Compares what rows keep with what was asked for.

    A ratio is of all pairs but the protected ones that do not count in it; protected pairs stay in any case. A press
    that decides its counts itself is held to these.

    Args:
        label: The press's.
        compression_ratio: The fraction that the run asks to remove.
        scores: What was evicted by, under the policy that was asked for.
        rows: The cache's.

    Raises:
        BudgetMismatchError: A row keeps another number of pairs, or all of them though some were to be removed.
    """
    pools = 1 if scores.allocation == "global" else sum(layer.shape[1] for layer in scores.layers.values())
    slack = 0.0 if scores.is_decided else 0.5 * pools + len(scores.layers)  # rounding, and a pair for an empty layer
    for row, found in enumerate(rows):
        asked = _asked_pairs(scores, row, found.n_tokens)
        if abs(found.n_kept - asked) > slack:
            raise BudgetMismatchError(
                f"{label} at compression_ratio {compression_ratio}: expected {asked:.0f} of {found.n_pairs} pairs kept "
                f"({asked / found.n_pairs:.4f}), got {found.n_kept} ({found.kept_fraction:.4f})"
            )
        if compression_ratio > 0 and found.n_kept >= found.n_pairs:
            raise BudgetMismatchError(
                f"{label} at compression_ratio {compression_ratio}: expected pairs to be removed, got all "
                f"{found.n_pairs} kept, {found.resident_bytes} bytes"
            )


def _asked_pairs(scores: Scores, row: int, n_tokens: int) -> float:
    """How many pairs a row should keep, before rounding."""
    protected, charged = int(scores.protected[row].sum()), int(scores.charged[row].sum())
    outside = protected - charged
    if scores.counts is not None:
        return sum(int(counts[row].sum()) + counts.shape[1] * protected for counts in scores.counts.values())
    total = 0.0
    for layer_idx, layer in scores.layers.items():
        share = (1 - scores.ratio_of(layer_idx)) * (n_tokens - outside) if scores.budget is None else scores.budget
        total += layer.shape[1] * (outside + min(max(share, charged), n_tokens - outside))
    return total
