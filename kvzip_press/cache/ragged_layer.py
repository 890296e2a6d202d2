"""One layer of a compressed cache: a frozen packed context and a dense tail that grows."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import CacheView, refuse_gradients
from kvzip_press.cache.cold.span import ColdPart
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.rows import NO_TURNS, LayerRows, Turns
from kvzip_press.cache.tail import Tail
from kvzip_press.cache.tail_mask import tail_mask
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.model.identity import check_fingerprint, layer_fingerprint
from kvzip_press.model.structure import is_first_full

LOST = "lost: "  # begins the fingerprint of a layer whose pairs were written over in part


class CopiedByFork:
    """Is copied by its :meth:`fork`, which shares what nothing writes to, and is not pickled."""

    def fork(self) -> Any:
        """Returns a copy."""
        raise NotImplementedError

    def __copy__(self) -> Any:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedCacheError(
            "expected save(path) to write a compressed cache, RaggedCache.load(path, model) to read it and fork() to "
            "copy it, got pickle (or torch.save), which runs code of whoever wrote the file when it is read"
        )


class RaggedLayer(CopiedByFork, LayerRows, compat.CacheLayerMixin):
    """One layer's cache in which every head of every row keeps its own number of context pairs.

    Args:
        packed: The kept pairs of the context.
        n_context: Number of tokens of the context as the model saw them (columns, including padding).
        n_protected: For each packed row, how many of its first tokens no head has lost.
        n_padding: For each packed row, the columns of padding on the left of its context; -1 if there is padding
            elsewhere, which sliding layers hold without knowing it, so that :attr:`left_padding` raises.
        context_ends: For each packed row, the position after its context.
        module: The attention module that made the keys and values; the layer refuses any other.
        row_index: Batch row -> packed row, int64 ``[batch]``; None if they are the same.
        weights: Fingerprint of the decoder that made them (:mod:`kvzip_press.model.weights`); None for that of the
            module's decoder as it is now.
        turns: The kept turns of each batch row.
        cold: What was evicted of each span and can come back, if that was asked for.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(
        self,
        packed: PackedPairs,
        *,
        n_context: int,
        n_protected: tuple[int, ...],
        n_padding: tuple[int, ...],
        context_ends: tuple[int, ...],
        module: nn.Module,
        row_index: torch.Tensor | None = None,
        weights: str | None = None,
        turns: Turns = NO_TURNS,
        cold: tuple[ColdPart, ...] = (),
    ) -> None:
        self.packed = packed
        self.n_context = n_context
        self.n_protected, self.n_padding, self.context_ends = n_protected, n_padding, context_ends
        self.tail = Tail(scored=packed.scores is not None)
        self.row_index, self.turns, self.cold = row_index, turns, cold
        self.n_rearranged = 0  # times that rows were reordered, repeated or dropped
        self.logits: tuple[float | None, float | None] = None, None  # scaling and softcap of the last attention
        self.fingerprint = layer_fingerprint(module, weights)
        self._known_module = weakref.ref(module)

    # What Hugging Face asks of a cache layer -----------------------------------------------------------------------

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a ragged layer is made with its content."""

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]  # no dense tensor to set
        """Raises CacheMismatchError: there is no dense tensor of keys, and a part would be a silent wrong answer."""
        raise CacheMismatchError(
            "a ragged layer has no dense `keys` and `values`: read `packed` (kept context pairs) and `tail`"
        )

    values = keys

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[batch, num_heads, t, head_dim]`` to the tail in place.

        Returns:
            Views of the tail, which only this package's attention function accepts; through them it reaches the packed
            context.

        Raises:
            CacheMismatchError: The keys differ from the layer in batch size, heads, dtype or device.
            UnsupportedCacheError: The keys or values record gradients.
        """
        return self.append(key_states, value_states)

    def append(
        self, key_states: torch.Tensor, value_states: torch.Tensor, padding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what :meth:`update` does, for new tokens whose first ``padding`` ``[batch]`` columns are padding."""
        if self.get_seq_length() == 0:
            self._empty(key_states.shape[0])  # after reset(): a batch of any size may begin
        expected = (self.batch_size, self.packed.num_heads, self.packed.storage.dtype, self.packed.device)
        given = (key_states.shape[0], key_states.shape[1], key_states.dtype, key_states.device)
        if given != expected:
            raise CacheMismatchError(f"expected keys with (batch, heads, dtype, device) = {expected}, got {given}")
        refuse_gradients(key_states, value_states)  # here, before the tail holds them: the cache stays as it was
        self.tail.append(key_states, value_states.to(key_states.dtype), padding)  # autocast: see last_pairs
        assert self.tail.keys is not None and self.tail.values is not None
        return CacheView.of(self, self.tail.keys), CacheView.of(self, self.tail.values)

    def get_mask_sizes(self, cache_position: int | torch.Tensor) -> tuple[int, int]:
        """Returns length and offset of the keys that a mask covers: the tail. Every query sees all context pairs."""
        return self.tail.length + compat.query_length_of(cache_position), self.n_context

    def get_seq_length(self) -> int:
        """Returns the number of columns seen, kept or not: for a row without padding, its tokens."""
        return self.n_context + self.tail.length

    def get_max_cache_shape(self) -> int:
        """Returns -1: there is no maximum."""
        return -1

    get_max_length = get_max_cache_shape

    def crop(self, max_length: int) -> None:
        """Drops tokens from the end: see :func:`kvzip_press.compat.length_after_crop`.

        Raises:
            InvalidArgumentError: The cut would reach into the context, which is packed for good.
        """
        length = compat.length_after_crop(max_length, self.get_seq_length())
        if length < self.n_context:
            raise InvalidArgumentError(
                f"expected to crop to at least the {self.n_context} tokens of the compressed context, got {length}"
            )
        self.tail.truncate(length - self.n_context)
        self._forget_turns()

    def drop_ends(self, counts: torch.Tensor) -> None:
        """Forgets the last ``counts`` ``[batch]`` tokens of each row: see :meth:`Tail.drop_ends`."""
        self.tail.drop_ends(counts)
        self._forget_turns()

    def reset(self) -> None:
        """Empties the layer; the next update may have any batch size."""
        self._empty(self.packed.num_rows)
        self.n_context, self.tail = 0, Tail(scored=self.packed.scores is not None)

    def _empty(self, num_rows: int) -> None:
        self.packed, self.row_index, self.turns = self.packed.emptied(num_rows), None, NO_TURNS
        self.cold = ()
        self.n_protected = self.n_padding = self.context_ends = (0,) * num_rows

    def offload(self) -> None:
        """Raises CacheMismatchError: moving layers to the CPU and back is not supported for ragged layers."""
        raise CacheMismatchError("expected a cache without offloading: ragged layers stay on their device")

    prefetch = offload

    # What is ours ------------------------------------------------------------------------------------------------

    @property
    def blank_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A key and a value for every row and head, ``[batch, num_heads, 1, head_dim]`` each, of arbitrary content."""
        packed, size = self.packed, (self.batch_size, self.packed.num_heads, 1)
        keys, values = (
            torch.empty(1, 1, 1, dim, dtype=packed.storage.dtype, device=packed.device).expand(*size, -1)
            for dim in (packed.storage.head_dim, packed.storage.v_head_dim)
        )
        return keys, values

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Computes exact attention to all kept context pairs of a query's row and head, and to the tail under its mask.

        Args:
            module: The calling attention module.
            query: ``[batch, num_attention_heads, query_length, head_dim]``.
            attention_mask: The mask that the model's own implementation would get; None means lower-right causal.
            scaling: Factor of the logits; None means ``head_dim ** -0.5``.
            softcap: Bound of the logits (Gemma 2); None means no bound.

        Returns:
            ``[batch, num_attention_heads, query_length, v_head_dim]``, in the dtype of ``query``.

        Raises:
            CacheMismatchError: The weights of the module's decoder are not those that made this layer.
        """
        # Once a forward that reads more than one token, or the first after the context, all weights are looked at.
        reads = query.shape[2] > 1 or self.tail.length <= query.shape[2]
        self.check_module(module, again=reads and is_first_full(module))
        if self.tail.window is not None:
            self.tail.put_queries(query)
            self.logits = scaling, softcap
        return self._attend(query, attention_mask, scaling, softcap)

    def attend_for_another(
        self, query: torch.Tensor, attention_mask: Any, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """Does what :meth:`attend` does for a layer that shares this one's pairs, whose queries count for nothing."""
        return self._attend(query, attention_mask, scaling, softcap)

    def _attend(
        self, query: torch.Tensor, attention_mask: Any, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        mask = tail_mask(
            attention_mask, query_length=query.shape[2], tail_length=self.tail.length, padding=self.tail.padding
        )
        output = self.packed.attend(
            query,
            self.tail.keys,
            self.tail.values,
            row_index=self.row_index,
            tail_mask=mask,
            scaling=scaling,
            softcap=softcap,
        )
        assert isinstance(output, torch.Tensor)
        return output

    def check_module(self, module: nn.Module, *, again: bool = False, weights: str | None = None) -> None:
        """Raises CacheMismatchError if the weights of the module's decoder are not those that made this layer.

        Args:
            module: The attention module.
            again: Whether to look at the weights of a module that is known: adapters may have been switched.
            weights: The fingerprint of the module's decoder; made here if None.
        """
        if self._known_module() is module and not again:
            return
        if self.fingerprint.startswith(LOST):
            raise CacheMismatchError(f"expected a whole cache, got one that is {self.fingerprint}: read the text again")
        check_fingerprint(self.fingerprint, module, weights)
        self._known_module = weakref.ref(module)

    def take(self, packed: PackedPairs, ends: Sequence[int] | None = None) -> None:
        """Replaces the layer's pairs and its tail by ``packed``, in which the tail's tokens are part of the context.

        Args:
            packed: The pairs.
            ends: The position after each row, if the host knows it; otherwise it is read from the device.
        """
        # Rows move over their padding in sliding layers, too, so all of it is on the left there.
        padding = [0] * self.batch_size if self.tail.padding is None else self.tail.padding.tolist()
        tail = self.tail.emptied()
        changed = {
            "packed": packed,
            "n_context": self.get_seq_length(),
            "n_padding": tuple(n + more if n >= 0 else -1 for n, more in zip(self.n_padding, padding, strict=True)),
            "context_ends": tuple(self.next_positions.tolist() if ends is None else ends),
            "tail": tail,
        }
        vars(self).update(changed)  # at once: an interrupt comes before or behind it

    def give_up(self, reason: str) -> None:
        """Makes every later use raise CacheMismatchError: what the layer holds is not to be trusted any more."""
        self.packed = replace(self.packed)  # another object, as after an eviction, which a failed forward does not undo
        self.fingerprint, self._known_module = LOST + reason, weakref.ref(nn.Module())  # of no model

    def move_to(self, device: torch.device) -> None:
        """Moves everything that the layer holds; forks keep the tensors that they share with it where they are."""
        self.packed, self.tail = self.packed.to(device), self.tail.copy(device)
        self.row_index = None if self.row_index is None else self.row_index.to(device)

    def fork(self) -> RaggedLayer:
        """Returns a layer that shares the packed context and has its own copy of the tail."""
        twin = RaggedLayer.__new__(RaggedLayer)
        vars(twin).update(vars(self), packed=self.packed.frozen(), tail=self.tail.copy())
        return twin

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor the layer holds."""
        return *self.packed.tensors, *self.tail.tensors

    @property
    def dense_bytes(self) -> int:
        """Bytes that an uncompressed layer would hold for the tokens seen."""
        pairs = self.batch_size * self.packed.num_heads * self.get_seq_length()
        return pairs * self.packed.storage.dense_pair_bytes
