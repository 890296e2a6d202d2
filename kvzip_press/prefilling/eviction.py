"""Builds the layers of a compressed cache from keep masks, one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press import compat
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.cache.codecs.finite import check_finite
from kvzip_press.cache.cold.span import ColdPart, ColdSpan
from kvzip_press.cache.compressible import last_pairs
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.sliding_windows import own_window
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import AttentionLayer, attention_layers, full_attention_layers, text_decoder
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.sharing.layer import SharedLayer

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.budget.scores import Scores
    from kvzip_press.cache.codecs.storage import Storage


@dataclass(frozen=True)
class Span:
    """The tokens that were read last, from which eviction selects.

    Attributes:
        valid: ``[batch, span]``, bool, False at padding.
        positions: ``[batch, span]``, int32.
        protected: ``[batch, span]``, bool: positions that no head loses.
    """

    valid: torch.Tensor
    positions: torch.Tensor
    protected: torch.Tensor

    @cached_property
    def n_protected(self) -> tuple[int, ...]:
        """Number of first tokens of each row that no head loses."""
        lost = (self.valid & ~self.protected).cumsum(dim=-1) > 0  # from the first token on that a head may lose
        return tuple((self.valid & ~lost).sum(dim=-1).tolist())

    @cached_property
    def n_padding(self) -> tuple[int, ...]:
        """Number of columns of padding on the left of each row; -1 if there is padding elsewhere."""
        return tuple((~self.valid).sum(dim=-1).masked_fill(~self.valid[:, -1], -1).tolist())

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The position after the last token of each row."""
        return tuple((self.positions.masked_fill(~self.valid, -1).amax(dim=-1) + 1).tolist())

    def protected_first(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns scores ``[batch, num_heads, span]`` with infinity where pairs are protected."""
        return scores.masked_fill(self.protected.to(scores.device).unsqueeze(1), torch.inf)


def evicted_layers(
    model: nn.Module,
    cache: Any,
    span: Span,
    keep: Mapping[int, torch.Tensor],
    *,
    earlier: Mapping[int, torch.Tensor] | None = None,
    scores: Mapping[int, torch.Tensor] | None = None,
    importance: Scores | None = None,
    weights: str | None = None,
    storage: str = "model",
    cold: ColdSpan | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yields ``(layer_idx, layer)`` for the layers of the compressed cache in order, each built when it is asked for.

    What pairs cannot be stored is refused before the first one is built.

    Args:
        model: The model.
        cache: Its cache, which is only read.
        span: The tokens that it has read last.
        keep: ``layer_idx -> [batch, num_heads, span]``, bool: the pairs of the span that stay.
        earlier: ``layer_idx -> [total]``, bool: which packed pairs of earlier spans stay; None for all of them.
        scores: ``layer_idx -> [batch, num_heads, span]``, fp32, for the pairs to carry; None for none. After an earlier
            context they are only carried if its pairs carry scores, and the span follows it directly.
        importance: Scores of the span, for storages that give important pairs more bits (others do not look at them);
            what is protected is as important as can be, and so is everything if it is None.
        weights: Fingerprint of the decoder that read the span; None for that of the decoder as it is now.
        storage: The name of how pairs are stored; a later span is stored as the layers already are.
        cold: What is kept of what the span loses; None for nothing.

    Raises:
        InvalidArgumentError: The storage cannot hold rows of this width, or a key or value is NaN or infinite and it
            does not store these. The message names the layer.
    """
    kind = storage_named(storage)
    check_can_be_stored(cache, keep, storage)
    stored = {i: _storage_of(cache.layers[i], kind) for i in keep}
    if importance is not None and any(one.needs_weights for one in stored.values()):
        importance.check_weights()
    weights = weights_fingerprint(text_decoder(model)) if weights is None else weights
    by_idx = {layer.layer_idx: layer for layer in attention_layers(model)}
    for layer_idx, layer in enumerate(cache.layers):
        if layer_idx not in keep:
            yield layer_idx, sliding_copy(layer, by_idx.get(layer_idx))
            continue
        kept, module = keep[layer_idx], by_idx[layer_idx].module
        part = () if cold is None else (ColdPart(cold, layer_idx, tuple(range(kept.shape[0]))),)
        carried = None if scores is None else scores[layer_idx]
        ranks = None
        if importance is not None and stored[layer_idx].reads_importance:
            ranks = span.protected_first(importance.of_uniform(layer_idx))
        if isinstance(layer, RaggedLayer):
            survivors = None if earlier is None else earlier[layer_idx]
            yield layer_idx, _merged(layer, span, kept, survivors, carried, ranks, module, weights, part)
        else:
            n_tokens = kept.shape[-1]
            keys, values = last_pairs(layer, n_tokens)
            positions = span.positions.to(keys.device)
            packed = PackedPairs.pack(keys, values, kept, positions, carried, storage=kind, importance=ranks)
            yield (
                layer_idx,
                RaggedLayer(
                    packed,
                    n_context=n_tokens,
                    n_protected=span.n_protected,
                    n_padding=span.n_padding,
                    context_ends=span.ends,
                    module=module,
                    weights=weights,
                    cold=part,
                ),
            )


def check_can_be_stored(cache: Any, keep: Mapping[int, torch.Tensor], storage: str) -> None:
    """Raises InvalidArgumentError, naming the layer, unless a storage can hold what is kept of a cache's last tokens.

    Args:
        cache: The cache.
        keep: ``layer_idx -> [batch, num_heads, span]``, bool.
        storage: The name of the storage; layers that are compressed already have their own.
    """
    kind = storage_named(storage)
    for layer_idx, kept in keep.items():
        _check_can_be_stored(layer_idx, cache.layers[layer_idx], kept, kind)


def storage_of(press: object) -> str:
    """Returns the name of how a press stores what stays; a scorer that is no ``Press`` need not say."""
    return getattr(press, "storage", "model")


def check_storage(model: nn.Module, storage: str) -> None:
    """Raises InvalidArgumentError unless there is a storage of this name that can hold a model's keys and values."""
    kind = storage_named(storage)
    for attention in full_attention_layers(model):
        head_dim: Any = getattr(attention.module, "head_dim", None)
        if isinstance(head_dim, int):  # if the module does not say, the first span is refused
            with _in_layer(attention.layer_idx):
                kind.check_widths(head_dim, head_dim)


@contextmanager
def _in_layer(layer_idx: int) -> Iterator[None]:
    """Names the layer in what is refused inside."""
    try:
        yield
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"layer {layer_idx}: {error}") from error


def pack_prefix(
    model: nn.Module,
    cache: Any,
    valid: torch.Tensor,
    positions: torch.Tensor,
    *,
    scored: bool = False,
    storage: str = "model",
) -> None:
    """Packs what dense layers held before the tokens that were read last: all of it, for no head to lose.

    The cache is then as if the tokens that were read last were a later turn, after a context that lost nothing.

    Args:
        model: The model.
        cache: Its cache, whose dense layers are replaced.
        valid: ``[batch, prefix]``, bool, False at padding.
        positions: ``[batch, span]``, int32, of the tokens that were read last.
        scored: Whether the pairs get scores (0), for a cache from which pairs are evicted while the model generates.
        storage: The name of how pairs are stored.

    Raises:
        InvalidArgumentError: As :func:`evicted_layers`; the cache is then as it was.
    """
    kind, n = storage_named(storage), valid.shape[1]
    for attention in full_attention_layers(model):
        layer = cache.layers[attention.layer_idx]
        keep = valid.to(layer.keys.device)[:, None].expand(-1, layer.keys.shape[1], -1)
        _check_can_be_stored(attention.layer_idx, layer, keep, kind, first=0)
    rank = valid.long().cumsum(dim=-1) - 1
    before = (positions[:, :1] - valid.sum(dim=-1, keepdim=True) + rank).clamp(min=0).int()
    prefix = Span(valid, before, protected=valid)
    for attention in full_attention_layers(model):
        layer = cache.layers[attention.layer_idx]
        keys, values = layer.keys, layer.values
        keep = valid.to(keys.device)[:, None].expand(-1, keys.shape[1], -1)
        zeros = torch.zeros_like(keep, dtype=torch.float32) if scored else None
        prefix_pairs = keys[:, :, :n], values[:, :, :n]
        packed = PackedPairs.pack(*prefix_pairs, keep, before.to(keys.device), zeros, storage=kind)
        ragged = RaggedLayer(
            packed,
            n_context=n,
            n_protected=prefix.n_protected,
            n_padding=prefix.n_padding,
            context_ends=prefix.ends,
            module=attention.module,
        )
        ragged.update(keys[:, :, n:], values[:, :, n:])
        cache.layers[attention.layer_idx] = ragged


def _check_can_be_stored(
    layer_idx: int, layer: Any, keep: torch.Tensor, kind: type[Storage], *, first: int | None = None
) -> None:
    """Raises InvalidArgumentError, naming the layer, unless a storage can hold what is kept of a layer's columns.

    These are the columns from ``first`` on, by default the last ones. A ragged layer has its own storage, and what lies
    between its context and the span is kept whole.
    """
    kind = _storage_of(layer, kind)
    if kind.is_exact:
        return  # it holds any number, in rows of any width
    if isinstance(layer, RaggedLayer):
        keep = torch.nn.functional.pad(keep, (layer.tail.length - keep.shape[2], 0), value=True)
    n = keep.shape[2]
    keys, values = (
        last_pairs(layer, n) if first is None else (x[:, :, first : first + n] for x in (layer.keys, layer.values))
    )
    with _in_layer(layer_idx):
        kind.check_widths(keys.shape[-1], values.shape[-1])
        check_finite(keys, values, keep)


def _storage_of(layer: Any, kind: type[Storage]) -> type[Storage]:
    """Returns how pairs are stored that are packed into a layer: as it stores its own, if it does."""
    return type(layer.packed.storage) if isinstance(layer, RaggedLayer) else kind


def _merged(
    layer: RaggedLayer,
    span: Span,
    keep: torch.Tensor,
    kept: torch.Tensor | None,
    scores: torch.Tensor | None,
    importance: torch.Tensor | None,
    module: nn.Module,
    weights: str,
    cold: tuple[ColdPart, ...],
) -> RaggedLayer:
    """Builds the layer for a later span.

    Of what was packed, the ``kept`` pairs stay; the span's survivors and the tail before it are added. What earlier
    spans lost can still come back.
    """
    keys, values = last_pairs(layer, layer.tail.length)
    n_between = keys.shape[2] - keep.shape[2]  # tokens that were read after the context, before the span
    batch, heads, _ = keep.shape
    before = torch.arange(-n_between, 0, device=keys.device)
    positions = span.positions.to(keys.device)
    positions = torch.cat([positions[:, :1] + before, positions], dim=1).int()
    keep = torch.cat([keep.new_ones(batch, heads, n_between), keep], dim=2)
    if importance is not None:
        importance = torch.nn.functional.pad(importance, (n_between, 0), value=torch.inf)
    rows = range(batch) if layer.row_index is None else layer.row_index.tolist()
    packed = layer.packed if layer.row_index is None else layer.packed.select_rows(rows)
    counts, whole = span.n_protected, span.valid.all(dim=-1).tolist()
    n_protected = tuple(layer.n_protected[row] or counts[i] for i, row in enumerate(rows))
    # padding in a later span leaves a gap in what sliding layers hold
    n_padding = tuple(layer.n_padding[row] if whole[i] else -1 for i, row in enumerate(rows))
    return RaggedLayer(
        packed.merge(keys, values, positions, keep, kept, None if n_between else scores, importance=importance),
        n_context=layer.get_seq_length(),
        n_protected=n_protected if layer.n_context else counts,
        n_padding=n_padding,
        context_ends=span.ends,
        module=module,
        weights=weights,
        turns=layer.turns,
        cold=(*(part.of_rows(rows) for part in layer.cold), *cold),
    )


def sliding_copy(layer: Any, attention: AttentionLayer | None) -> Any:
    """Returns a separate object for a layer that stays dense; its tensors are replaced on update, never written into.

    A layer that reads another has none, and is only copied.
    In a cache that was made without the model's config, a sliding layer holds every token. Only the last window - 1 can
    still be seen, and its mask would not fit a cache with ragged layers, so it becomes a proper sliding layer.
    """
    if isinstance(layer, SharedLayer):
        return SharedLayer(layer.shares_with)
    if attention is None or attention.sliding_window is None or type(layer) is not compat.DynamicLayer:
        sliding = copy.copy(layer)
    else:
        assert layer.keys is not None and layer.values is not None
        sliding = compat.DynamicSlidingWindowLayer(sliding_window=attention.sliding_window)
        sliding.update(layer.keys, layer.values)
    own_window(sliding)
    return sliding
