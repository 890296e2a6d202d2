"""Reads the layers of a compressed cache from a file, and checks that they fit the model."""

from __future__ import annotations

import reprlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.cache.codecs.held import CU_SEQLENS, POSITIONS, Held
from kvzip_press.cache.codecs.storage import Layout, Shapes
from kvzip_press.cache.file.checks import check_numbers, check_pairs, storage_of
from kvzip_press.cache.file.cold_parts import cold_names, cold_parts
from kvzip_press.cache.file.metadata import opened_cache, record_in
from kvzip_press.cache.file.record import DTYPES, NAMES, TEXT, CacheRecord, LayerRecord, live_tokens, settings_of
from kvzip_press.cache.packed_pairs import SCORES, PackedPairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheFileError, CacheMismatchError, InvalidArgumentError
from kvzip_press.files import digest_of, digest_of_tensor, to_json
from kvzip_press.model.devices import execution_device
from kvzip_press.model.identity import check_fingerprint
from kvzip_press.model.structure import AttentionLayer, attention_layers, text_config, text_decoder
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.sharing.layer import SharedLayer


def load_layers(
    path: Path, model: nn.Module, *, device: torch.device | str | None = None, verify: bool = True
) -> tuple[list[Any], CacheRecord]:
    """Reads the layers of a compressed cache into memory of their own, and the metadata of the file.

    Args:
        path: A file that :func:`kvzip_press.cache.file.writing.save_layers` wrote.
        model: The model that made the cache.
        device: Where the layers go; by default each goes to the device of its attention module.
        verify: Whether to check the bytes of every tensor against their SHA-256 (about 1 GB/s), and whether all numbers
            are finite; shapes, dtypes, lengths and positions are always checked.

    Returns:
        The layers, one per decoder layer, and the file's metadata.

    Raises:
        CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache files.
            The message names the path.
        CacheMismatchError: Another model made the cache, or the model is loaded in another dtype.
    """
    with opened_cache(path) as file:
        record = record_in(file)
        modules, weights = check_model(record, model)
        tensors = _Tensors(file, record, verify=verify)
        layers: list[Any] = []
        for index, (layer, module) in enumerate(zip(record.layers, modules, strict=True)):
            target = execution_device(module) if device is None else torch.device(device)
            if layer.kind == "shared":
                layers.append(SharedLayer(layer.shares_with))
            elif layer.kind == "ragged":
                layers.append(_ragged(index, record, tensors, module, target, weights))
            else:
                layers.append(_dense(index, record, tensors, target))
        for index, parts in cold_parts(record, tensors.on_host, path, file.metadata()[TEXT]).items():
            layers[index].cold = parts
        return layers, record


def read_record(path: Path) -> CacheRecord:
    """Reads the metadata of a cache file, without reading a tensor.

    Raises:
        CacheFileError: The file does not exist, is truncated or changed, or is not one of this package's cache files.
            The message names the path.
    """
    with opened_cache(path) as file:
        return record_in(file)


def check_contents(path: Path) -> None:
    """Reads a cache file whole, without a model, and compares all bytes with their SHA-256.

    Raises:
        CacheFileError: As :func:`load_layers`.
    """
    with opened_cache(path) as file:
        record = record_in(file)
        tensors = _Tensors(file, record, verify=True)
        for name in record.tensors:
            tensors.verified(name)


def load_pairs(
    path: Path, device: torch.device
) -> tuple[CacheRecord, list[tuple[PackedPairs, tuple[torch.Tensor, torch.Tensor] | None]]]:
    """Reads the pairs of a cache with one row that is compressed in every layer, without its model.

    All but the model is checked as by :func:`load_layers`; the caller compares the metadata with what it knows of the
    model.

    Returns:
        The metadata; for each layer the packed pairs, and keys and values ``[1, num_heads, t, head_dim]`` of the tokens
        after them, None if there are none.

    Raises:
        CacheFileError: As :func:`load_layers`.
    """
    with opened_cache(path) as file:
        record = record_in(file)
        tensors = _Tensors(file, record, verify=True)
        layers = range(len(record.layers))
        return record, [(_packed(i, record, tensors, device), _tail(i, record, tensors, device)) for i in layers]


def pair_counts(path: Path) -> torch.Tensor:
    """Returns how many kept pairs each (packed row, head) of each layer has, int32 ``[layers, rows * heads]``.

    Only lengths are read, of a cache that is compressed alike in every layer.

    Raises:
        CacheFileError: As :func:`load_layers`.
    """
    with opened_cache(path) as file:
        record = record_in(file)
        tensors = _Tensors(file, record, verify=True)
        bounds = [
            tensors.read(f"{i}.cu_seqlens", "I32", (len(one.n_protected) * one.num_heads + 1,), torch.device("cpu"))
            for i, one in enumerate(record.layers)
        ]
        return torch.stack(bounds).diff()


def check_model(record: CacheRecord, model: nn.Module) -> tuple[list[nn.Module], str]:
    """Returns every layer's attention module and the weights' fingerprint, after checking that model and cache fit."""
    expected, got = record.config, settings_of(text_config(model))
    if expected != got:
        names = [name for name in sorted({*expected, *got}) if expected.get(name) != got.get(name)]
        differ = [f"{name}={reprlib.repr(expected.get(name))}, got {reprlib.repr(got.get(name))}" for name in names]
        raise CacheMismatchError(
            f"this cache was made by another model: expected config {record.config_hash[:16]}, got "
            f"{digest_of(to_json(got).encode())[:16]}: expected {'; expected '.join(differ)}"
        )
    dtype: Any = text_decoder(model).dtype
    if dtype is not DTYPES[record.dtype]:
        raise CacheMismatchError(f"expected a model in {DTYPES[record.dtype]}, as this cache is, got one in {dtype}")
    attention = {layer.layer_idx: layer for layer in attention_layers(model)}
    if sorted(attention) != list(range(len(record.layers))):
        raise CacheMismatchError(
            f"expected a model with attention in each of {len(record.layers)} layers, got layers {sorted(attention)}"
        )
    shared = {i: layer.shares_with for i, layer in enumerate(record.layers) if layer.kind == "shared"}
    if shared != (sharing := {i: one.shares_with for i, one in attention.items() if one.shares_with is not None}):
        raise CacheMismatchError(
            f"expected a model whose layers share as in this cache, {_sharing(shared)}, got one {_sharing(sharing)}"
        )
    weights = weights_fingerprint(text_decoder(model))
    for index, layer in enumerate(record.layers):
        _check_layer(layer, attention[index], weights)
    return [attention[index].module for index in range(len(record.layers))], weights


def _sharing(sources: dict[int, int]) -> str:
    return f"inside share_layers(model, {reprlib.repr(sources)})" if sources else "outside of share_layers(...)"


def _check_layer(layer: LayerRecord, attention: AttentionLayer, weights: str) -> None:
    module, where = attention.module, f"layer {attention.layer_idx}"
    kinds = ("ragged", "dense", "shared") if attention.is_full else ("sliding",)
    if layer.kind not in kinds or (not attention.is_full and layer.sliding_window != attention.sliding_window):
        raise CacheMismatchError(
            f"{where}: expected a {layer.kind} layer with window {layer.sliding_window or None}, got a model whose "
            f"window there is {attention.sliding_window}"
        )
    config: Any = module.config
    head_dim: Any = getattr(module, "head_dim", None) or layer.head_dim
    projection: Any = getattr(module, "k_proj", None)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = projection.out_features // head_dim if hasattr(projection, "out_features") else heads
    if (layer.num_heads, layer.head_dim) != (heads, head_dim):
        raise CacheMismatchError(
            f"{where}: expected (KV heads, head_dim) = {(layer.num_heads, layer.head_dim)}, got {(heads, head_dim)}"
        )
    if layer.kind == "ragged":
        check_fingerprint(layer.fingerprint, module, weights)


class _Tensors:
    """The tensors of an open file; each is read after its dtype and shape were compared with what they must be."""

    def __init__(self, file: Any, record: CacheRecord, *, verify: bool) -> None:
        self._file, self._digests, self._verify = file, record.tensors, verify
        names = {f"{i}.{part}" for i, layer in enumerate(record.layers) for part in _part_names(layer, record)}
        names |= set(cold_names(record))
        if set(file.keys()) != names or set(record.tensors) != names:
            differing = sorted((set(file.keys()) | set(record.tensors)) ^ names) or sorted(set(file.keys()) ^ names)
            raise CacheFileError(f"expected {len(names)} tensors, got others: {reprlib.repr(differing)}")

    def read(self, name: str, dtype: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        held = self._file.get_slice(name)
        if (held.get_dtype(), tuple(held.get_shape())) != (dtype, shape):
            raise CacheFileError(f"expected {name!r} as {dtype} {shape}, got {held.get_dtype()} {held.get_shape()}")
        return self.verified(name).to(device)

    def on_host(self, name: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.read(name, dtype, shape, torch.device("cpu"))

    def verified(self, name: str) -> torch.Tensor:
        # A copy: mapped memory would change or vanish with the file, and its alignment depends on the header's length.
        tensor: torch.Tensor = self._file.get_tensor(name).clone(memory_format=torch.contiguous_format)
        if self._verify and digest_of_tensor(tensor) != self._digests[name]:
            raise CacheFileError(f"expected {name!r} with the SHA-256 that was saved, got another: a byte was changed")
        if self._verify:
            check_numbers(tensor, name)
        return tensor


def _part_names(layer: LayerRecord, record: CacheRecord) -> list[str]:
    if layer.kind == "shared":
        return []
    if layer.kind != "ragged":
        return ["keys", "values"]
    storage, scores = storage_of(layer, record), ["scores"] if layer.has_scores else []
    tail = ["tail_keys", "tail_values", *(f"tail_{name}" for name in scores)]
    names = [*_names(storage.layout()), *scores, POSITIONS]
    names += tail if record.n_seen > record.n_context else []
    return [*names, *(["row_index"] if layer.has_row_index else [])]


def _names(layout: Layout) -> list[str]:
    parts = (f"{part}.{name}" for part, of_part in layout.parts.items() for name in _names(of_part))
    return [*layout.columns, *layout.tables, CU_SEQLENS, *parts]


def _ragged(
    index: int, record: CacheRecord, tensors: _Tensors, module: nn.Module, device: torch.device, weights: str
) -> RaggedLayer:
    layer = record.layers[index]
    row_index = None
    if layer.has_row_index:
        row_index = tensors.read(f"{index}.row_index", "I64", (record.batch_size,), device)
        _check_range(row_index, len(layer.n_protected), f"{index}.row_index")
    restored = RaggedLayer(
        _packed(index, record, tensors, device),
        n_context=record.n_context,
        n_protected=layer.n_protected,
        n_padding=layer.n_padding,
        context_ends=layer.context_ends,
        module=module,
        row_index=row_index,
        weights=weights,
    )
    tail = _tail(index, record, tensors, device)
    if tail is not None:
        padding = torch.tensor(record.tail_padding, device=device) if any(record.tail_padding) else None
        restored.tail.append(*tail, padding)
        if layer.has_scores:
            restored.tail.put_scores(tensors.read(f"{index}.tail_scores", "F32", tail[0].shape[:3], device), 0)
    return restored


def _tail(
    index: int, record: CacheRecord, tensors: _Tensors, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    layer = record.layers[index]
    if record.n_seen == record.n_context:
        return None
    shape = (record.batch_size, layer.num_heads, record.n_seen - record.n_context)
    keys = tensors.read(f"{index}.tail_keys", record.dtype, (*shape, layer.head_dim), device)
    values = tensors.read(f"{index}.tail_values", record.dtype, (*shape, layer.v_head_dim), device)
    return keys, values


def _packed(index: int, record: CacheRecord, tensors: _Tensors, device: torch.device) -> PackedPairs:
    layer = record.layers[index]
    storage, segments = storage_of(layer, record), len(layer.n_protected) * layer.num_heads
    layout = storage.layout()
    columns: Shapes = {**layout.columns, POSITIONS: (torch.int32, ())}
    if layer.has_scores:
        columns[SCORES] = (torch.float32, ())
    layout = replace(layout, columns=columns)
    held = _held(str(index), layout, segments, tensors, device)
    check_pairs(held.cu_seqlens, held.columns[POSITIONS], layer, record, str(index))
    try:
        storage.check(held)
    except InvalidArgumentError as error:
        raise CacheFileError(f"expected '{index}' to be whole: {error}") from error
    return PackedPairs.of(held, layer.num_heads, storage)


def _held(name: str, layout: Layout, segments: int, tensors: _Tensors, device: torch.device) -> Held:
    """Reads what is held of so many segments; the lengths come first, because they say how long columns are."""
    cu_seqlens = tensors.read(f"{name}.{CU_SEQLENS}", "I32", (segments + 1,), device)
    total = int(cu_seqlens[-1])
    if int(cu_seqlens[0]) != 0 or bool((cu_seqlens.long().diff() < 0).any()):
        raise CacheFileError(
            f"expected '{name}.{CU_SEQLENS}' to ascend from 0, got {reprlib.repr(cu_seqlens.tolist())}"
        )
    columns, tables = (
        {
            part: tensors.read(f"{name}.{part}", NAMES[dtype], (n, *shape), device)
            for part, (dtype, shape) in shapes.items()
        }
        for n, shapes in ((total, layout.columns), (segments, layout.tables))
    )
    parts = {
        part: _held(f"{name}.{part}", of_part, segments, tensors, device) for part, of_part in layout.parts.items()
    }
    return Held(columns, cu_seqlens, tables=tables, parts=parts)


def _dense(index: int, record: CacheRecord, tensors: _Tensors, device: torch.device) -> Any:
    layer = record.layers[index]
    shape = (record.batch_size, layer.num_heads, live_tokens(record.n_seen, layer.sliding_window))
    keys = tensors.read(f"{index}.keys", record.dtype, (*shape, layer.head_dim), device)
    values = tensors.read(f"{index}.values", record.dtype, (*shape, layer.v_head_dim), device)
    if layer.kind == "dense":
        dense = compat.DynamicLayer()
        dense.update(keys, values)
        return dense
    sliding = compat.DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    sliding.update(keys, values)
    sliding.cumulative_length = record.n_seen
    return sliding


def _check_range(tensor: torch.Tensor, limit: int, name: str) -> None:
    if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < limit:
        raise CacheFileError(
            f"expected {name!r} in [0, {limit}), got values from {int(tensor.min())} to {int(tensor.max())}"
        )
