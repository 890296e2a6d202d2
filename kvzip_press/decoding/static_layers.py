"""Cache layers with fixed addresses in memory, for a decode step that is captured once and replayed.

A captured CUDA graph repeats the same kernels on the same addresses. So a static layer writes a token's keys and values
where a number on the device says, and attends to as many tokens as another number on the device says; the graph itself
increments both. During the capture only, these layers stand in for those of a cache, over the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import CacheView
from kvzip_press.attention.stand_in_layer import StandInLayer
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.padding import visible_columns
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.kernels.tail_append import Queries, tail_append
from kvzip_press.sharing.layer import SharedLayer, holding


class Place:
    """The place in a buffer where the token of a decode step goes, stored on the device.

    Args:
        n_before: Number of tokens before it.
        size: Rows of the buffer if it is a ring, in which the newest token overwrites the oldest; None if it grows.
        device: The device.

    Attributes:
        index: int64 ``[1]``, the token's row in the buffer.
        n_live: int32 ``[1]``, rows of the buffer that the token sees, including its own.
    """

    def __init__(self, n_before: int, size: int | None, device: torch.device) -> None:
        self._n_before = torch.tensor([n_before], dtype=torch.int64, device=device)
        self._size = size
        self.index = torch.empty_like(self._n_before)
        self.n_live = torch.empty(1, dtype=torch.int32, device=device)
        self._settle()

    def advance(self) -> None:
        """Moves on by one token, on the device."""
        self._n_before.add_(1)
        self._settle()

    def move_to(self, n_before: int) -> None:
        """Goes to the place after ``n_before`` tokens."""
        self._n_before.fill_(n_before)
        self._settle()

    def _settle(self) -> None:
        n_live = self._n_before + 1
        self.index.copy_(self._n_before if self._size is None else self._n_before % self._size)
        self.n_live.copy_(n_live if self._size is None else n_live.clamp(max=self._size))


class StaticLayer(StandInLayer):
    """One layer of a decode step: frozen pairs and, after them, a buffer ``[batch, num_heads, room, head_dim]``.

    Args:
        keys: The buffer of keys, written in place.
        values: The buffer of values.
        place: Where the token of the step goes.
        packed: The frozen pairs.
        row_index: Batch row -> packed row, int64 ``[batch]``; None if they are the same.
        n_seen: Number of tokens seen before the step, as the model counts them.
        visible: Bool ``[batch, room]``, False where a row of the buffer holds padding, until it is overwritten; None
            for no padding.
        queries: The layer whose tail keeps queries, and how many rows of its window that of the step lies behind its
            token's place, int64 ``[1]``; None if none does.
    """

    is_initialized = True

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        place: Place,
        packed: PackedPairs,
        *,
        row_index: torch.Tensor | None,
        n_seen: int,
        visible: torch.Tensor | None = None,
        queries: tuple[RaggedLayer, torch.Tensor] | None = None,
    ) -> None:
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.place, self.packed = place, packed
        self.row_index, self.n_seen, self.visible = row_index, n_seen, visible
        self._queries = queries
        self._token: tuple[torch.Tensor, torch.Tensor] | None = None  # that waits for its query

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values ``[batch, num_heads, 1, head_dim]`` into the buffer, at once or with their query."""
        if self._queries is None:
            tail_append(self.keys, self.values, key_states, value_states, self.place.index)
        else:
            self._token = key_states, value_states
        if self.visible is not None:
            self.visible.index_fill_(1, self.place.index, True)
        return CacheView.of(self, self.keys), CacheView.of(self, self.values)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Computes attention of one token per row to all frozen pairs and to all live buffer rows but padding."""
        if self._queries is not None:
            layer, shift = self._queries
            assert layer.tail.window is not None and self._token is not None
            window, token, self._token = layer.tail.window.buffer, self._token, None
            queries = Queries(window, query.to(window.dtype), shift)
            tail_append(self.keys, self.values, *token, self.place.index, queries=queries)
            layer.logits = scaling, softcap
        return self.attend_for_another(query, attention_mask, scaling=scaling, softcap=softcap)

    def attend_for_another(
        self, query: torch.Tensor, attention_mask: Any, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """Does what :meth:`attend` does for a layer that shares this one's pairs, whose queries count for nothing."""
        output = self.packed.attend(
            query,
            self.keys,
            self.values,
            row_index=self.row_index,
            tail_mask=None if self.visible is None else self.visible[:, None, None],
            tail_length=self.place.n_live,
            part_of_storage=self.packed.pool is not None,
            scaling=scaling,
            softcap=softcap,
        )
        assert isinstance(output, torch.Tensor)
        return output


class SlidingRing:
    """The window of a sliding layer as a ring: decode steps overwrite its oldest token instead of moving all others.

    Args:
        layer: The dense sliding layer, which stays as it is until :meth:`write_back`.
        padding: int64 ``[batch]``, how many of the columns seen are padding on the left of each row.
    """

    def __init__(self, layer: Any, padding: torch.Tensor) -> None:
        self.layer = layer
        self.size = int(layer.sliding_window)
        self.n_seen = int(layer.get_seq_length())
        keys, values = (x[:, :, -self.size :] for x in (layer.keys, layer.values))
        slots = torch.arange(self.n_seen - keys.shape[2], self.n_seen, device=keys.device) % self.size
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], self.size, x.shape[3]).index_copy_(2, slots, x) for x in (keys, values)
        )
        visible = visible_columns(padding.to(keys.device), self.n_seen)[:, -keys.shape[2] :]
        self.visible = None if bool(visible.all()) else visible.new_ones(len(padding), self.size)
        if self.visible is not None:
            self.visible.index_copy_(1, slots, visible)

    def static_layer(self, place: Place) -> StaticLayer:
        """Returns the layer of a decode step over the ring."""
        nobody = torch.zeros(self.keys.shape[:3], dtype=torch.bool, device=self.keys.device)
        nothing = PackedPairs.pack(self.keys, self.values, nobody, nobody[:, 0].int())
        return StaticLayer(
            self.keys, self.values, place, nothing, row_index=None, n_seen=self.n_seen, visible=self.visible
        )

    def write_back(self, n_steps: int) -> None:
        """Gives the dense layer the tokens of ``n_steps`` decode steps; those outside the window count, as zeros."""
        n_held = min(n_steps, self.size)
        slots = torch.arange(self.n_seen + n_steps - n_held, self.n_seen + n_steps, device=self.keys.device) % self.size
        padding = (0, 0, n_steps - n_held, 0)
        self.layer.update(*(nn.functional.pad(x.index_select(2, slots), padding) for x in (self.keys, self.values)))


class StaticCache:
    """Static layers over the memory of a ragged cache, for decode steps of one token per row.

    Args:
        cache: A cache for which :func:`reason_against` returns None.
        n_tokens: Most tokens to decode.
    """

    def __init__(self, cache: Any, n_tokens: int) -> None:
        self._ragged = [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]
        self._rings: list[SlidingRing] = []
        self._places: dict[int | None, Place] = {}
        self._query_shift: torch.Tensor | None = None  # from a token's place to its query's, int64 [1]
        self.n_seen = int(cache.get_seq_length())
        self.layers = compat.Cache(layers=[self._static(layer, n_tokens) for layer in cache.layers])
        self._memory = [_memory_of(layer) for layer in self._ragged]

    @property
    def batch_size(self) -> int:
        """Number of batch rows."""
        layer: Any = self.layers.layers[0]
        return int(layer.keys.shape[0])

    def _static(self, layer: Any, n_tokens: int) -> StaticLayer | SharedLayer:
        if isinstance(layer, SharedLayer):
            return SharedLayer(layer.shares_with)
        if not isinstance(layer, RaggedLayer):
            ring = SlidingRing(layer, self._ragged[0].left_padding)
            self._rings.append(ring)
            return ring.static_layer(self._place(ring.n_seen, ring.size, ring.keys.device))
        packed = layer.packed if layer.packed.pool is None else self._in_pool(layer)
        keys, values = layer.tail.reserve(n_tokens, *layer.blank_token)
        place = self._place(layer.tail.length, None, keys.device)
        padding = layer.tail.padding
        visible = None if padding is None else visible_columns(padding, keys.shape[2])
        queries = None
        if layer.tail.window is not None:
            if self._query_shift is None:
                self._query_shift = torch.empty_like(place.index)
                self._restart_queries()
            queries = layer, self._query_shift
        return StaticLayer(
            keys,
            values,
            place,
            packed,
            row_index=layer.row_index,
            n_seen=self.n_seen,
            visible=visible,
            queries=queries,
        )

    def _in_pool(self, layer: RaggedLayer) -> PackedPairs:
        """Returns a layer's pairs as the pool's own tensors, which stay valid when pairs are evicted from it."""
        whole, n_segments = layer.packed.pool.packed, layer.packed.cu_seqlens.numel() - 1
        first = self._ragged.index(layer) * n_segments
        bounds = whole.cu_seqlens[first : first + n_segments + 1]
        return whole.part(slice(first, first + n_segments), slice(None), bounds, layer.packed.pool)

    def follows_eviction(self) -> bool:
        """Continues after an eviction emptied the tails; returns False if it moved pairs to other memory."""
        if [_memory_of(layer) for layer in self._ragged] != self._memory:
            return False
        for layer in self.layers.layers:
            if isinstance(layer, StaticLayer) and layer.visible is not None and layer.place is self._places.get(None):
                layer.visible.fill_(True)  # the padding in the tails is gone with them
        self._places[None].move_to(0)
        self._restart_queries()
        return True

    def _place(self, n_before: int, size: int | None, device: torch.device) -> Place:
        return self._places.setdefault(size, Place(n_before, size, device))

    def advance(self) -> None:
        """Moves all places on by one token, on the device."""
        for place in self._places.values():
            place.advance()

    def restart(self) -> None:
        """Moves all places back to the end of the cache, so that the first real step overwrites a trial step."""
        for size, place in self._places.items():
            place.move_to(self._ragged[0].tail.length if size is None else self.n_seen)
        self._restart_queries()

    def _restart_queries(self) -> None:
        tail = self._ragged[0].tail
        if self._query_shift is not None and tail.window is not None:
            self._query_shift.fill_(tail.window.next_row - tail.length)

    def count(self, n_steps: int) -> None:
        """Adds ``n_steps`` tokens, which were written into their buffers, to the tails of the ragged layers."""
        for layer in self._ragged:
            layer.tail.wrote(n_steps)

    def write_back(self, n_steps: int) -> None:
        """Gives the sliding layers what ``n_steps`` steps wrote into their rings."""
        if n_steps:
            for ring in self._rings:
                ring.write_back(n_steps)


def _memory_of(layer: RaggedLayer) -> tuple[int, ...]:
    """Returns the addresses of a layer's pairs, in its own tensors or those of its pool, and of its tail's buffers."""
    packed = layer.packed if layer.packed.pool is None else layer.packed.pool.packed
    return tuple(tensor.data_ptr() for tensor in (*packed.tensors, *layer.tail.tensors))


def reason_against(cache: Any) -> str | None:
    """Returns why the layers of a cache cannot stay at fixed addresses in memory; None if they can."""
    layers: list[Any] = list(getattr(cache, "layers", []))
    ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
    if not ragged:
        return "the cache has no ragged layer"
    if len({(layer.tail.length, layer.packed.device) for layer in ragged}) > 1:
        return "the ragged layers of the cache lie on several devices or differ in length"
    if any(layer.packed.offloaded for layer in ragged):
        return "pairs lie in host memory, and a step waits for those that it reads"
    others = [layer for layer in holding(layers) if not isinstance(layer, RaggedLayer)]
    odd = next((layer for layer in others if type(layer) is not compat.DynamicSlidingWindowLayer), None)
    return None if odd is None else f"the cache has a layer of type {type(odd).__name__}"
