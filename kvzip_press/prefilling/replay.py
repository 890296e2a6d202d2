"""Replays: the model reads tokens again against a frozen cache, in which nothing of them is kept.

A replay forward gets a cache of its own, whose layers attend to the frozen context and (causally) to the replayed
tokens, and show a scorer the queries. The frozen cache is only read, through views.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import CacheView
from kvzip_press.attention.stand_in_layer import StandInLayer
from kvzip_press.cache.compressible import compressible_layers
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.kernels.dense_attention import attention_with_lse, merge_attention
from kvzip_press.model.rope import depends_on_length, own_frequencies, pin, rotary_modules
from kvzip_press.model.structure import attention_layers, max_positions, text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.prefilling.eviction import sliding_copy
from kvzip_press.prefilling.mlp_slices import mlps_of, slice_mlps
from kvzip_press.sharing.layer import sources_in

if TYPE_CHECKING:
    from kvzip_press.prefilling.whole import Prefill

logger = logging.getLogger(__name__)

Attended = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerSpan:
    """One row of one layer's cache, as a replay sees it.

    Attributes:
        keys: ``[1, heads, span, head_dim]``, the row's tokens of the span, without padding.
        values: ``[1, heads, span, v_head_dim]``.
        sink_keys: ``[1, heads, n_sink, head_dim]``, the protected first tokens of the row.
        sink_values: ``[1, heads, n_sink, v_head_dim]``.
        packed: The layer if it is ragged: its packed context comes before the span.
        row: The batch row.
        visible: ``[1, 1, 1, tail]``, bool, False where the row has padding in the span; only for a ragged layer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    packed: RaggedLayer | None = None
    row: int = 0
    visible: torch.Tensor | None = None

    @classmethod
    def of(cls, layer_idx: int, prefill: Prefill, row: int, n_sink: int) -> LayerSpan:
        """Returns the span of a prefill in one layer; for a later turn the sink is that of the packed context."""
        columns = prefill.valid[row].nonzero()[:, 0]
        first, end = int(columns[0]), int(columns[-1]) + 1
        keys, values = (x[row : row + 1, :, first:end] for x in prefill.pairs(layer_idx))
        layer = prefill.cache.layers[layer_idx]
        if not isinstance(layer, RaggedLayer):
            return cls(keys, values, keys[:, :, :n_sink], values[:, :, :n_sink])
        offset = layer.tail.length - prefill.valid.shape[1]
        visible = torch.nn.functional.pad(prefill.valid[row].to(keys.device), (offset, 0), value=True)[None, None, None]
        if n_sink:
            return cls(keys, values, keys[:, :, :n_sink], values[:, :, :n_sink], layer, row, visible)
        packed_row = row if layer.row_index is None else int(layer.row_index[row])
        sinks = layer.packed.first_pairs(packed_row, layer.n_protected[packed_row])
        return cls(keys, values, *sinks, layer, row, visible)

    def attend(self, query: torch.Tensor, scaling: float | None, softcap: float | None) -> Attended:
        """Returns the attention of ``query`` to everything in the row, including the span: output and log-sum-exp."""
        if self.packed is None:
            return attention_with_lse(query, self.keys, self.values, causal=False, scaling=scaling, softcap=softcap)
        layer, index = self.packed, torch.tensor([self.row], device=query.device)
        tail_keys, tail_values = layer.tail.keys, layer.tail.values
        assert tail_keys is not None and tail_values is not None
        assert self.visible is not None
        attended = layer.packed.attend(
            query,
            tail_keys[self.row : self.row + 1],
            tail_values[self.row : self.row + 1],
            row_index=index if layer.row_index is None else layer.row_index[index],
            tail_mask=self.visible.expand(-1, -1, query.shape[2], -1),
            scaling=scaling,
            softcap=softcap,
            return_lse=True,
        )
        assert isinstance(attended, tuple)
        return attended


@dataclass(frozen=True)
class ReplayedAttention:
    """The tensors of one layer's attention during a replay forward, for a scorer to look at.

    Attributes:
        module: The attention module.
        query: ``[batch, num_attention_heads, query_length, head_dim]``, after RoPE.
        keys: ``[batch, heads, query_length, head_dim]``, the keys of the replayed tokens.
        chunk_keys: ``[batch, heads, chunk, head_dim]``, the frozen cache's keys of the chunk that is replayed.
        chunk_values: ``[batch, heads, chunk, v_head_dim]``, its values.
        sink_keys: ``[batch, heads, n_sink, head_dim]``, the frozen cache's keys of the sink.
        scaling: Factor of the logits; None means ``head_dim ** -0.5``.
        softcap: Bound of the logits; None means no bound.
        lse: ``[batch, num_attention_heads, query_length]``, fp32, the log-sum-exp of each row's logits over sink, chunk
            and replayed keys, if that is what the row attended to (a local replay); None otherwise.
    """

    module: nn.Module
    query: torch.Tensor
    keys: torch.Tensor
    chunk_keys: torch.Tensor
    chunk_values: torch.Tensor
    sink_keys: torch.Tensor
    scaling: float | None
    softcap: float | None
    lse: torch.Tensor | None = None


class ReplayLayer(StandInLayer):
    """The cache layer of one replay forward; ``look`` sees the tensors of its attention.

    Args:
        span: The frozen context.
        chunks: For each batch row of the replay, the part of the span that is replayed (all of one length).
        local: Whether to attend to the sink and the chunk only, instead of everything.
        n_seen: Number of tokens that the frozen cache has seen.
        look: Called once per forward.
        is_shared: Whether other layers read this one's pairs, those of the replayed tokens included.
    """

    def __init__(
        self,
        span: LayerSpan,
        chunks: Sequence[slice],
        *,
        local: bool,
        n_seen: int,
        look: Callable[[ReplayedAttention], None],
        is_shared: bool = False,
    ) -> None:
        super().__init__()
        self.span, self.chunks, self.local, self.n_seen, self.look = span, chunks, local, n_seen, look
        self.is_shared = is_shared

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Attended:
        """Keeps the replayed tokens' keys and values for the attention call that follows."""
        self.keys, self.values = key_states, value_states.to(key_states.dtype)  # autocast: see last_pairs
        return CacheView.of(self, key_states), CacheView.of(self, value_states)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attends to the frozen context unmasked and to the replayed tokens causally; merges both by log-sum-exp."""
        replayed_keys = self.keys
        assert replayed_keys is not None
        output, lse = self._attend(query, scaling, softcap)
        if not self.is_shared:
            self.keys = self.values = None  # for this layer only: those of all layers together would be large
        chunk_keys, chunk_values = (self._chunks_of(x) for x in (self.span.keys, self.span.values))
        sink_keys = self.span.sink_keys.expand(len(self.chunks), -1, -1, -1)
        seen = (module, query, replayed_keys, chunk_keys, chunk_values, sink_keys, scaling, softcap)
        self.look(ReplayedAttention(*seen, lse=lse if self.local else None))
        return output

    def attend_for_another(
        self, query: torch.Tensor, attention_mask: Any, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """Does what :meth:`attend` does for a layer that shares this one's pairs, whose queries nobody looks at."""
        return self._attend(query, scaling, softcap)[0]

    def _attend(self, query: torch.Tensor, scaling: float | None, softcap: float | None) -> Attended:
        own_keys, own_values = self.keys, self.values
        assert own_keys is not None and own_values is not None
        chunk_keys, chunk_values = (self._chunks_of(x) for x in (self.span.keys, self.span.values))
        sink_keys, sink_values = (
            x.expand(len(self.chunks), -1, -1, -1) for x in (self.span.sink_keys, self.span.sink_values)
        )
        if self.local:
            past = attention_with_lse(query, chunk_keys, chunk_values, causal=False, scaling=scaling, softcap=softcap)
            # The few keys of the sink go before the replayed ones: lower right, the causal rule shows them to all rows.
            own_keys, own_values = torch.cat([sink_keys, own_keys], 2), torch.cat([sink_values, own_values], 2)
        else:
            past = self.span.attend(query, scaling, softcap)
        own = attention_with_lse(query, own_keys, own_values, causal=True, scaling=scaling, softcap=softcap)
        return merge_attention(*past, *own)

    def _chunks_of(self, span: torch.Tensor) -> torch.Tensor:
        """Returns ``[len(chunks), heads, chunk, dim]``, as a view: the chunks are adjacent and equally long."""
        together = span[0, :, self.chunks[0].start : self.chunks[-1].stop]
        return together.unflatten(1, (len(self.chunks), -1)).transpose(0, 1)


class Replay:
    """Runs replays of one row of a prefill.

    Args:
        prefill: The prefill, which is only read.
        row: The batch row.
        n_sink: Number of protected first tokens of the row in this span.
        look: Called with the layer index and the tensors of its attention, once per layer and forward.
    """

    def __init__(self, prefill: Prefill, row: int, n_sink: int, look: Callable[[int, ReplayedAttention], None]) -> None:
        decoder = text_decoder(prefill.model)
        # Other threads run the model meanwhile.
        self._decoder = twin_of(decoder, only=[*mlps_of(decoder), *rotary_modules(decoder)])
        slice_mlps(self._decoder)
        if depends_on_length(decoder):  # a replay reads further than the context, and must not turn
            own_frequencies(self._decoder)
            pin(self._decoder, decoder, prefill.turned_for)
        self._look = look
        self._n_seen = prefill.start + prefill.valid.shape[1] - _left_padding(prefill, row)
        self._next_position = int(prefill.positions[row][prefill.valid[row]][-1]) + 1
        self._limit = max_positions(prefill.model)
        self._device = prefill.valid.device
        layers = prefill.cache.layers
        compressible = compressible_layers(prefill.model, prefill.cache)
        self._spans = {idx: LayerSpan.of(idx, prefill, row, n_sink) for idx in compressible}
        self._shared = set(sources_in(layers).values())
        by_idx = {layer.layer_idx: layer for layer in attention_layers(prefill.model)}
        self._dense = {
            idx: _row_of(sliding_copy(layer, by_idx.get(idx)), row, self._n_seen)
            for idx, layer in enumerate(layers)
            if idx not in compressible
        }

    def run(self, input_ids: Sequence[Sequence[int]], chunks: Sequence[slice], *, local: bool) -> None:
        """Runs one forward of the decoder over a batch of replays, each of its own chunk of the span.

        The forward ends after the attention of the last layer that is looked at: nothing needs what would come after.

        Args:
            input_ids: One list of ids per replay, all of one length.
            chunks: The part of the span that each replays, all of one length; more than one only with ``local``.
            local: See :class:`ReplayLayer`.
        """
        assert local or len(chunks) == 1
        self._warn_beyond(self._next_position + len(input_ids[0]))
        ids = torch.tensor([list(row) for row in input_ids], device=self._device)
        positions = self._next_position + torch.arange(ids.shape[1], device=self._device)[None]
        layers: list[Any] = [None] * (len(self._spans) + len(self._dense))
        for idx, span in self._spans.items():
            look = _bind(self._look, idx, last=idx == max(self._spans))
            is_shared = idx in self._shared
            layers[idx] = ReplayLayer(span, chunks, local=local, n_seen=self._n_seen, look=look, is_shared=is_shared)
        for idx, layer in self._dense.items():
            layers[idx] = _repeated(layer, len(chunks))
        cache = compat.Cache(layers=layers)
        with suppress(_LastLayerSeen):
            self._decoder(
                input_ids=ids, position_ids=positions, use_cache=True, **compat.cache_argument(self._decoder, cache)
            )

    def _warn_beyond(self, end: int) -> None:
        if self._limit is not None and end > self._limit:
            logger.warning(
                "a replay reads up to position %d and the model has %d: scores rest on positions that it was not "
                "trained for; a smaller chunk_size needs fewer",
                end,
                self._limit,
            )
            self._limit = None  # one warning per row


class _LastLayerSeen(Exception):  # noqa: N818  # no error: how a forward ends early
    """Ends a replay forward."""


def _bind(
    look: Callable[[int, ReplayedAttention], None], layer_idx: int, *, last: bool
) -> Callable[[ReplayedAttention], None]:
    def look_at(attention: ReplayedAttention) -> None:
        look(layer_idx, attention)
        if last:
            raise _LastLayerSeen

    return look_at


def _left_padding(prefill: Prefill, row: int) -> int:
    """Returns the number of columns of padding on the left of a row; 0 if its padding is elsewhere."""
    if not prefill.start:
        return int((~prefill.valid[row]).sum()) if bool(prefill.valid[row, -1]) else 0
    layer = next(layer for layer in prefill.cache.layers if isinstance(layer, RaggedLayer))
    return max(0, layer.n_padding[row if layer.row_index is None else int(layer.row_index[row])])


def _row_of(layer: Any, row: int, n_seen: int) -> Any:
    """Returns one row of a dense layer as if it were alone: the last of its ``n_seen`` tokens, without padding."""
    alone = _with_tensors(layer, lambda tensor: tensor[row : row + 1, :, -n_seen:])
    if hasattr(alone, "cumulative_length"):
        alone.cumulative_length = n_seen
    return alone


def _repeated(layer: Any, batch: int) -> Any:
    return _with_tensors(layer, lambda tensor: tensor.expand(batch, *tensor.shape[1:]))


def _with_tensors(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns a copy of a dense layer with changed views of its tensors.

    Updates replace tensors, so the original is safe.
    """
    twin = copy.copy(layer)
    if isinstance(getattr(layer, "keys", None), torch.Tensor):
        twin.keys, twin.values = change(layer.keys), change(layer.values)
    return twin
