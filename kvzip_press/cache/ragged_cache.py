"""A transformers cache whose compressed layers are ragged, so that head-wise eviction really frees memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.arguments.model import check_model
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.all_layers import (
    all_or_nothing,
    config_of,
    move_layers,
    tensors_of,
    truncate_columns,
    truncate_rows,
)
from kvzip_press.cache.codecs.by_name import name_of
from kvzip_press.cache.cold.place import InFile, Place
from kvzip_press.cache.cold.restoring import at_ratio
from kvzip_press.cache.file import kept_export
from kvzip_press.cache.file import writing as cache_file
from kvzip_press.cache.ragged_layer import CopiedByFork, RaggedLayer
from kvzip_press.cache.recall.policy import Recall
from kvzip_press.cache.recall.recalled_pairs import RecalledPairs
from kvzip_press.cache.rows import TurnLock, Turns, batch_rows
from kvzip_press.cache.sliding_windows import own_window
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.model.devices import reachable
from kvzip_press.sharing.layer import SharedLayer, holding
from kvzip_press.terminal import counted


class RaggedCache(CopiedByFork, compat.Cache):
    """A transformers cache whose compressed layers are :class:`RaggedLayer`; the others stay dense.

    It is made by ``compress``, ``Prefill.evict`` or ``with press(model)`` (use :meth:`of` to get the figures of the
    latter).

    Args:
        layers: One cache layer per decoder layer.

    Attributes:
        press: What compressed it, in short; empty if that is not known.
    """

    press: str = ""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self.turn_lock = TurnLock()

    @classmethod
    def of(cls, cache: Any) -> RaggedCache:
        """Returns a RaggedCache over the same layers, for a DynamicCache that was compressed in place.

        Raises:
            CacheMismatchError: No layer of the cache is ragged.
        """
        if isinstance(cache, cls):
            return cache
        if not any(isinstance(layer, RaggedLayer) for layer in getattr(cache, "layers", [])):
            raise CacheMismatchError(
                "expected a compressed cache, from compress(...), prefill.evict(...) or `with press(model):`, got "
                f'{type(cache).__name__} without ragged layers (get_press("none") makes one that keeps everything)'
            )
        vars(cache).setdefault("turn_lock", TurnLock())  # one for all views of the cache
        view = cls.__new__(cls)
        vars(view).update(vars(cache))
        return view

    def __repr__(self) -> str:
        if not any(True for _ in self.ragged_layers()):
            return f"RaggedCache({counted(len(self.layers), 'layer')}, none compressed)"
        seen = self.n_seen
        parts = [
            counted(self.batch_size, "row"),
            f"{seen if isinstance(seen, int) else f'{min(seen)} to {max(seen)}'} tokens seen",
            f"{self.kept_fraction:.1%} of pairs kept",
            f"{self.resident_bytes / 1e6:.1f} of {self.dense_bytes / 1e6:.1f} MB",
            *([f"{host / 1e6:.1f} MB in host memory"] if (host := self.host_bytes) else []),
            *(f"a step reads by {recall!r}" for recall in self._recalls()),
            *(f"{place.nbytes / 1e6:.1f} MB evicted in {place}" for place in self._places()),
            *([f"by {self.press}"] if self.press else []),
        ]
        return f"RaggedCache({', '.join(parts)})"

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
    def turn_starts(self) -> list[int | list[int]]:
        """Tokens seen before each kept turn (a question and its answer), as :meth:`truncate` takes them.

        Each is a value that :attr:`n_seen` had; where a press has compressed a later turn, turns lie in the context.
        The list is a new one.
        """
        return self._any_ragged().turns.as_list()

    @property
    def resident_bytes(self) -> int:
        """Bytes really held in memory, each once: packed pairs (codes, scales, tables), positions, lengths, tails.

        Dense layers count, too.
        """
        tensors = [tensor for layer in self.layers for tensor in tensors_of(layer)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of pairs that lie in host memory to be read from there (``with_recall(..., offload=True)``), each once.

        :attr:`resident_bytes` does not count them.
        """
        tensors = [tensor for _, layer in self.ragged_layers() for tensor in layer.packed.offloaded]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @property
    def cold_bytes(self) -> int:
        """Bytes of evicted pairs, and of scores, that are kept for :meth:`restore`, in host memory or in files.

        Forks share them, and :attr:`resident_bytes` does not count them.
        """
        return sum(place.nbytes for place in self._places())

    def restore(self, compression_ratio: float = 0.0) -> None:
        """Brings evicted pairs back, so that the context is as if it had been evicted at a smaller ratio.

        The kept pairs are then, bit for bit, those of ``prefill.evict(scores, compression_ratio)`` with the same
        allocation and storage, and the context is not read again. Turns that were kept since stay as they were read,
        with the pairs that were there then. Turns that a press compressed go back to the ratio each by itself. While
        this runs, memory holds the layers as they were and as they will be. Forks of the cache stay as they are. Close
        an open :class:`kvzip_press.DecodeStep` before.

        Args:
            compression_ratio: Fraction of pairs removed, in [0, 1), at most what is removed now; by default, everything
                comes back.

        Raises:
            CacheFileError: The file of the evicted pairs is gone, or was changed. The cache stays as it was.
            InvalidArgumentError: The ratio is out of range, or would take pairs away.
            UnsupportedCacheError: The cache keeps nothing of what was evicted (``cold=``), has lost pairs otherwise, or
                recalls pairs.
        """
        self._go_to(compression_ratio, grows=True)

    def shrink(self, compression_ratio: float) -> None:
        """Takes pairs away again that :meth:`restore` can bring back, as if the context had been evicted at this ratio.

        Args:
            compression_ratio: Fraction of pairs removed, in [0, 1), at least what is removed now, and at most what was
                removed when the pairs were evicted: what stayed then lies nowhere else.

        Raises:
            CacheFileError: As for :meth:`restore`.
            InvalidArgumentError: The ratio is out of range, would bring pairs back, or is more than at first.
            UnsupportedCacheError: As for :meth:`restore`.
        """
        self._go_to(compression_ratio, grows=False)

    def forget_evicted(self) -> None:
        """Lets go of evicted pairs that are kept for :meth:`restore`; forks keep theirs, and a file stays on disk."""
        for _, layer in self.ragged_layers():
            layer.cold = ()

    @property
    def dense_bytes(self) -> int:
        """Bytes that the same tokens would take without compression (sliding layers count what they hold).

        A layer that reads another's pairs (:func:`kvzip_press.share_layers`) counts as if it had its own.
        """
        return sum(map(self._dense_bytes_of, self.layers))

    @property
    def compression(self) -> float:
        """How many times smaller the cache is than without compression: dense bytes over resident bytes.

        It is 1.0 if nothing is held.
        """
        resident = self.resident_bytes
        return self.dense_bytes / resident if resident else 1.0

    @property
    def storage(self) -> str:
        """The name of how kept pairs are stored: see :class:`kvzip_press.press.Press`."""
        return name_of(type(self._any_ragged().packed.storage))

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
            truncate_rows(self, self._any_ragged(), n_seen)
        elif isinstance(seen, int):
            truncate_columns(self, n_seen)
        else:
            truncate_rows(self, self._any_ragged(), [min(n_seen, tokens) for tokens in seen])

    def crop(self, max_length: int) -> None:
        """Drops columns from the end of every layer, as transformers asks for it; see :meth:`truncate` for rows."""
        with all_or_nothing(self):
            super().crop(max_length)
            for layer in holding(self.layers):
                own_window(layer)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the given batch rows, by number or as a bool mask, in that order; all that is held follows them.

        Columns that are then padding in every row are dropped.

        Raises:
            InvalidArgumentError: ``indices`` does not name rows of the cache.
        """
        index = batch_rows(indices, self.batch_size)
        with all_or_nothing(self):
            super().batch_select_indices(index)
            if not isinstance(self.n_seen, int):
                self.truncate(self.n_seen)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Goes on with row ``beam_idx[i]`` as row i; rows share the packed context.

        Raises:
            InvalidArgumentError: ``beam_idx`` does not name rows of the cache.
        """
        index: Any = batch_rows(beam_idx, self.batch_size)
        with all_or_nothing(self):
            super().reorder_cache(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times, at least once; copies share the packed context."""
        self._any_ragged().check_repeats(repeats)
        with all_or_nothing(self):
            super().batch_repeat_interleave(repeats)

    def fork(self) -> RaggedCache:
        """Returns a cache that shares the packed context and copies only what came after it.

        Pairs in a pool, which change while a model generates, are copied, too.
        """
        layers: list[Any] = list(self.layers)  # at once: another thread may give the cache its next turn meanwhile
        forked = RaggedCache([layer.fork() if isinstance(layer, RaggedLayer) else copy.copy(layer) for layer in layers])
        forked.press = self.press
        return forked

    def adopt_turn(self, grown: RaggedCache) -> None:
        """Takes over, as one turn, what a fork of this cache has read since.

        Raises:
            InvalidArgumentError: The fork has read nothing in some row.
        """
        before, after = self._any_ragged().next_positions, grown._any_ragged().next_positions
        if before.shape != after.shape or not bool((before < after).all()):
            raise InvalidArgumentError(
                f"expected a fork that has read more in every row, got rows that end at {after.tolist()} instead of "
                f"{before.tolist()}"
            )
        if not isinstance(grown.n_seen, int):
            grown.truncate(grown.n_seen)  # drops the columns that are padding in every row
        turns = Turns.of([*self.turn_starts, self.n_seen])
        for _, layer in grown.ragged_layers():
            layer.turns = turns
        self.layers[:] = grown.layers  # at once

    def move_to(self, target: torch.device | str | nn.Module) -> None:
        """Moves the whole cache in place: to a device, or to the devices of a model's layers.

        ``cache.move_to("cpu")`` lets it wait in host memory; ``cache.move_to(model)`` brings it back. A forward over a
        cache on another device raises. The method is not named ``to``, because accelerate calls that on everything it
        finds among a layer's arguments, and would move the whole cache to the device of each layer in turn.

        Raises:
            CacheMismatchError: The model has other layers.
            InvalidArgumentError: There is no such device.
            UnsupportedCacheError: A layer holds no keys and values.
        """
        move_layers(self, target)

    def save(self, path: str | Path, *, press: Any = None, model: nn.Module | None = None) -> None:
        """Writes the cache as a safetensors file of about ``resident_bytes``, replacing an existing file atomically.

        What was evicted and can come back is written, too (``cold_bytes``).

        Args:
            path: The file. Its folder must exist.
            press: What compressed the cache, stored as a description: a text, or a press, whose ``repr`` is taken.
            model: The model that made the cache; only needed if the original model object no longer exists.

        Raises:
            CacheFileError: The file cannot be written; an existing one stays as it was.
            CacheMismatchError: ``model`` did not make the cache.
            InvalidArgumentError: The original model object is gone and none was given, a forward failed half-way, some
                rows, but not all, have forgotten a turn, or the file is the one that this cache's evicted pairs lie in.
            UnsupportedCacheError: No layer is ragged, a layer is of a kind or dtype that cannot be saved, or evicted
                pairs that are kept went under an allocation of a user's own, or pairs are recalled, which a file has no
                place for.
        """
        self._refuse_recall("save")
        if any(isinstance(place, InFile) and place.is_in(Path(path)) for place in self._places()):
            raise InvalidArgumentError(
                f"expected another file than {path}, in which the evicted pairs of this cache lie: writing over it "
                "would lose them for this cache and its forks"
            )
        starts, config = self.turn_starts, config_of(dict(self.ragged_layers()), model)
        cache_file.save_layers(Path(path), self.layers, config=config, press=press, turn_starts=starts)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, *, device: torch.device | str | None = None, verify: bool = True
    ) -> RaggedCache:
        """Reads a cache that :meth:`save` wrote, which answers bit for bit as the saved one did. Attaches the model.

        Evicted pairs that can come back stay in the file, which must remain as it is, until :meth:`restore` reads them.

        Args:
            path: The file.
            model: The model that made the cache: the same weights, settings and dtype.
            device: Where the cache goes; by default each layer goes to the device of the model's layer.
            verify: Whether to check every byte against the SHA-256 in the file.

        Raises:
            CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache
                files.
            CacheMismatchError: Another model made the cache, or the model is loaded in another dtype.
            InvalidArgumentError: There is no model, or no such device.
        """
        check_model(model, "RaggedCache.load(path, model)")
        device = None if device is None else reachable(device)
        layers, record = cache_file.load_layers(Path(path), model, device=device, verify=verify)
        cache = cls(layers)
        cache.press = record.press or ""
        for _, layer in cache.ragged_layers():
            layer.turns = Turns.of(record.turn_starts)
        attach(model)
        return cache

    def export_kept(self, path: str | Path) -> None:
        """Writes the positions that every head kept, as numpy arrays.

        See :func:`kvzip_press.cache.file.kept_export.export_kept`.
        """
        kept_export.export_kept(Path(path), self.layers)

    def _dense_bytes_of(self, layer: Any) -> int:
        if isinstance(layer, SharedLayer):
            layer = self.layers[layer.shares_with]
        return layer.dense_bytes if isinstance(layer, RaggedLayer) else sum(t.nbytes for t in tensors_of(layer))

    def _go_to(self, compression_ratio: float, *, grows: bool) -> None:
        self._refuse_recall("restore or shrink")
        with self.turn_lock:
            layers = dict(self.ragged_layers())
            packed = at_ratio(layers, compression_ratio, grows=grows)
            with all_or_nothing(self):
                for index, layer in layers.items():
                    layer.packed = packed[index]

    def _recalls(self) -> set[Recall]:
        """Returns what steps of the layers read, if not all pairs."""
        return {layer.packed.recall for _, layer in self.ragged_layers() if isinstance(layer.packed, RecalledPairs)}

    def _refuse_recall(self, to: str) -> None:
        """Raises UnsupportedCacheError if steps read only a part of the pairs, where all of them are needed."""
        if self._recalls():
            raise UnsupportedCacheError(
                f"expected a cache without recall to {to}, got one whose steps read a part of it: call "
                "without_recall(cache) first"
            )

    def _places(self) -> list[Place]:
        """Returns where evicted pairs are kept, each place once."""
        spans = [part.span for _, layer in self.ragged_layers() for part in layer.cold]
        return list({id(span): span.place for span in spans}.values())

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
