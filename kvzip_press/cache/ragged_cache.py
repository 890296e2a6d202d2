"""A transformers cache whose compressed layers are ragged, so that head-wise eviction really frees memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.file import kept_export
from kvzip_press.cache.file import writing as cache_file
from kvzip_press.cache.moving import move_layers
from kvzip_press.cache.padded_block import drop_ends_of_sliding
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.model.structure import attention_layers, text_decoder
from kvzip_press.model.weights import weights_fingerprint


class RaggedCache(compat.Cache):
    """A transformers cache whose compressed layers are :class:`RaggedLayer`; the others stay dense.

    It is made by ``compress``, ``Prefill.evict`` or ``with press(model)`` (use :meth:`of` to get the figures of the
    latter).

    Args:
        layers: One cache layer per decoder layer.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        # Tokens seen before each kept turn (a question and its answer): what `truncate` takes.
        self.turn_starts: list[int | list[int]] = []

    @classmethod
    def of(cls, cache: Any) -> RaggedCache:
        """Returns a RaggedCache over the same layers, for a DynamicCache that was compressed in place.

        Raises:
            CacheMismatchError: No layer of the cache is ragged.
        """
        if isinstance(cache, cls):
            return cache
        if not any(isinstance(layer, RaggedLayer) for layer in getattr(cache, "layers", [])):
            raise CacheMismatchError(f"expected a cache with ragged layers, got {type(cache).__name__} without any")
        view = cls.__new__(cls)
        cache.__dict__.setdefault("turn_starts", [])  # one list for all views of the cache
        view.__dict__.update(cache.__dict__)
        return view

    def ragged_layers(self) -> Iterable[tuple[int, RaggedLayer]]:
        """Yields the index and the layer of each compressed layer."""
        return ((index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, RaggedLayer))

    @property
    def batch_size(self) -> int:
        """Number of batch rows."""
        return self._any_ragged().batch_size

    @property
    def n_seen(self) -> int | list[int]:
        """Number of tokens seen; a list with one number per row if rows have read different numbers since compression.

        Padding of the contexts counts, as in ``get_seq_length()``, which returns the number for the longest row.
        """
        layer = self._any_ragged()
        if layer.tail.padding is None:
            return int(self.get_seq_length())
        counts: list[int] = (layer.n_context + layer.n_tail_tokens).tolist()
        return counts

    @property
    def resident_bytes(self) -> int:
        """Bytes really held in memory, each storage once: packed pairs, positions, lengths, tails and dense layers."""
        tensors = [tensor for layer in self.layers for tensor in _tensors_of(layer)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes that the same tokens would take without compression (sliding layers count what they hold)."""
        dense = [layer for layer in self.layers if not isinstance(layer, RaggedLayer)]
        held = sum(tensor.nbytes for layer in dense for tensor in _tensors_of(layer))
        return held + sum(layer.dense_bytes for _, layer in self.ragged_layers())

    @property
    def kept_fraction(self) -> float:
        """Kept pairs divided by seen pairs, over the compressed layers (padding counts as seen).

        It is 1.0 if nothing was seen.
        """
        kept = seen = 0
        for _, layer in self.ragged_layers():
            seqlens = layer.packed.seqlens if layer.row_index is None else layer.packed.seqlens[layer.row_index]
            tail = layer.batch_size * layer.packed.num_heads * layer.tail.length
            kept += int(seqlens.sum()) + tail
            seen += layer.batch_size * layer.packed.num_heads * layer.get_seq_length()
        return kept / seen if seen else 1.0

    def seqlens(self, layer_idx: int) -> torch.Tensor:
        """Returns the number of kept context pairs of a compressed layer, ``[rows, num_key_value_heads]``, int32.

        Raises:
            InvalidArgumentError: The layer is not compressed.
        """
        return self._ragged(layer_idx).packed.seqlens

    def kept_positions(self, layer_idx: int) -> list[list[torch.Tensor]]:
        """Returns the positions kept by each head of a compressed layer: ``[row][head] -> int32 [kept]``, ascending.

        Raises:
            InvalidArgumentError: The layer is not compressed.
        """
        packed = self._ragged(layer_idx).packed
        return [
            [packed.head_positions(row, head) for head in range(packed.num_heads)] for row in range(packed.num_rows)
        ]

    def truncate(self, n_seen: int | Sequence[int]) -> None:
        """Forgets every token from position ``n_seen`` on, so that the next question starts from the same context.

        It works layer by layer, so it also repairs a cache that a forward left half-way (but not a forward over padded
        rows).

        Args:
            n_seen: A value that :attr:`n_seen` had before: one number for all rows, or one for each.

        Raises:
            InvalidArgumentError: ``n_seen`` cuts into the compressed context, exceeds the tokens seen, or is a list of
                another length than the batch; or a sliding layer has already lost tokens that it would need (in that
                case, call :meth:`fork` before asking).
        """
        seen = self.n_seen
        if not isinstance(n_seen, int):
            self._truncate_rows(n_seen)
        elif isinstance(seen, int):
            self._truncate_columns(n_seen)
        else:
            self._truncate_rows([min(n_seen, tokens) for tokens in seen])
        layer = self._any_ragged()
        left = layer.n_context + layer.n_tail_tokens
        starts = [torch.as_tensor(start, device=left.device) for start in self.turn_starts]
        self.turn_starts[:] = [
            start for start, tokens in zip(self.turn_starts, starts, strict=True) if bool((tokens < left).any())
        ]

    def _truncate_columns(self, n_seen: int) -> None:
        if n_seen > self.get_seq_length():
            raise InvalidArgumentError(f"expected at most the {self.get_seq_length()} tokens seen, got {n_seen}")
        surplus = [layer.get_seq_length() - n_seen for layer in self.layers]
        for layer, excess in zip(self.layers, surplus, strict=True):
            if excess > 0:
                _check_holds_all(layer)
        layers: list[Any] = self.layers
        for layer, excess in zip(layers, surplus, strict=True):
            if excess > 0:
                layer.crop(-excess)

    def _truncate_rows(self, n_seen: Sequence[int]) -> None:
        """Truncates every row to its own number of tokens, and drops columns that are padding in every row."""
        ragged = self._any_ragged()
        if len(n_seen) != ragged.batch_size:
            raise InvalidArgumentError(f"expected a number for each of {ragged.batch_size} rows, got {len(n_seen)}")
        if len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise InvalidArgumentError("expected layers that have seen the same tokens, but a forward failed half-way")
        counts = ragged.n_context + ragged.n_tail_tokens
        counts = counts - torch.tensor(n_seen, device=counts.device)
        if bool((counts < 0).any()):
            raise InvalidArgumentError(f"expected at most the {self.n_seen} tokens seen, got {list(n_seen)}")
        sliding = [layer for layer in self.layers if not isinstance(layer, RaggedLayer)]
        for layer in sliding if bool(counts.any()) else ():
            _check_holds_all(layer)
        for _, layer in self.ragged_layers():
            layer.tail.drop_ends(counts)
        for layer in sliding:
            drop_ends_of_sliding(layer, counts, n_columns=ragged.get_seq_length())

    def fork(self) -> RaggedCache:
        """Returns a cache that shares the packed context and copies only what came after it.

        Pairs in a pool, which change while a model generates, are copied, too.
        """
        layers = [layer.fork() if isinstance(layer, RaggedLayer) else copy.copy(layer) for layer in self.layers]
        twin = RaggedCache(layers)
        twin.turn_starts = list(self.turn_starts)
        return twin

    def adopt_turn(self, grown: RaggedCache) -> None:
        """Takes over, as one turn, what a fork of this cache has read since."""
        if not isinstance(grown.n_seen, int):
            grown.truncate(grown.n_seen)  # drops the columns that are padding in every row
        self.turn_starts.append(self.n_seen)
        self.layers[:] = grown.layers

    def move_to(self, target: torch.device | str | nn.Module) -> None:
        """Moves the whole cache in place: to a device, or to the devices of a model's layers.

        ``cache.move_to("cpu")`` lets it wait in host memory; ``cache.move_to(model)`` brings it back. A forward over a
        cache on another device raises. The method is not named ``to``, because accelerate calls that on everything it
        finds among a layer's arguments, and would move the whole cache to the device of each layer in turn.

        Raises:
            CacheMismatchError: The model has other layers.
            UnsupportedCacheError: A layer holds no keys and values.
        """
        move_layers(self.layers, target)

    def save(self, path: str | Path, *, press: Any = None, model: nn.Module | None = None) -> None:
        """Writes the cache as a safetensors file of about ``resident_bytes``, replacing an existing file atomically.

        Args:
            path: The file. Its folder must exist.
            press: What compressed the cache, stored as a description: a text, or a press, whose ``repr`` is taken.
            model: The model that made the cache; only needed if the original model object no longer exists.

        Raises:
            CacheFileError: The file cannot be written; an existing one stays as it was.
            CacheMismatchError: ``model`` did not make the cache.
            InvalidArgumentError: The original model object is gone and none was given, or a forward failed half-way.
            UnsupportedCacheError: No layer is ragged, or a layer is of a kind or dtype that cannot be saved.
        """
        config, starts = self._config(model), self.turn_starts
        cache_file.save_layers(Path(path), self.layers, config=config, press=press, turn_starts=starts)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, *, device: torch.device | str | None = None, verify: bool = True
    ) -> RaggedCache:
        """Reads a cache that :meth:`save` wrote, which answers bit for bit as the saved one did. Attaches the model.

        Args:
            path: The file.
            model: The model that made the cache: the same weights, settings and dtype.
            device: Where the cache goes; by default each layer goes to the device of the model's layer.
            verify: Whether to check every byte against the SHA-256 in the file.

        Raises:
            CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache
                files.
            CacheMismatchError: Another model made the cache, or the model is loaded in another dtype.
        """
        layers, record = cache_file.load_layers(Path(path), model, device=device, verify=verify)
        cache = cls(layers)
        cache.turn_starts = list(record.turn_starts)
        attach(model)
        return cache

    def export_kept(self, path: str | Path) -> None:
        """Writes the positions that every head kept, as numpy arrays.

        See :func:`kvzip_press.cache.file.kept_export.export_kept`.
        """
        kept_export.export_kept(Path(path), self.layers)

    def _config(self, model: nn.Module | None) -> Any:
        """Returns the config of the model that made the cache."""
        if model is not None:
            weights = weights_fingerprint(text_decoder(model))
            by_idx = {layer.layer_idx: layer.module for layer in attention_layers(model)}
            for layer_idx, layer in self.ragged_layers():
                if layer_idx not in by_idx:
                    raise CacheMismatchError(f"expected a model with attention in layer {layer_idx}, got one without")
                layer.check_module(by_idx[layer_idx], again=True, weights=weights)
        known = self._any_ragged()._known_module()  # noqa: SLF001  # the layer and its cache
        if known is None:
            raise InvalidArgumentError("expected save(..., model=...), got no model, and the one of the cache is gone")
        config: Any = known.config
        return config

    def _any_ragged(self) -> RaggedLayer:
        for _, layer in self.ragged_layers():
            return layer
        raise UnsupportedCacheError("expected a cache with ragged layers, got one without any")

    def _ragged(self, layer_idx: int) -> RaggedLayer:
        layer = self.layers[layer_idx]
        if not isinstance(layer, RaggedLayer):
            indices = [index for index, _ in self.ragged_layers()]
            raise InvalidArgumentError(f"expected one of the compressed layers {indices}, got layer {layer_idx}")
        return layer


def _check_holds_all(layer: Any) -> None:
    window = getattr(layer, "sliding_window", None)
    if window is not None and layer.get_seq_length() >= window:
        raise InvalidArgumentError(
            f"a sliding layer holds only its last {window} tokens and cannot go back: expected a fork() made "
            "before the tokens that are to be forgotten"
        )


def _tensors_of(layer: Any) -> tuple[torch.Tensor, ...]:
    if isinstance(layer, RaggedLayer):
        return layer.tensors
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return tuple(tensor for tensor in held if isinstance(tensor, torch.Tensor))
