"""Ties caches and files to the model that they were made for: by its shape, a sketch of its weights, or all of them."""

from __future__ import annotations

import hashlib
import json
import logging
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import CacheMismatchError, InvalidArgumentError
from kvzip_press.model.structure import decoder_of, full_attention_layers, is_first_full, layer_index, text_config
from kvzip_press.model.weights import MARK, first_difference, in_memory, looks_unchanged, weights_fingerprint
from kvzip_press.untrusted import parse_json

logger = logging.getLogger(__name__)

SHAPE = ("model_type", "num_hidden_layers", "num_key_value_heads", "hidden_size", "vocab_size")
"""Settings that models of one shape share; keys of the facts that files record of their model."""

SKETCH_TOLERANCE = 0.01  # quantized weights and light fine-tunes of the same model stay within it


def shape_of(model: nn.Module) -> dict[str, str]:
    """Returns the settings of :data:`SHAPE`, as texts."""
    config = text_config(model)
    return {name: str(getattr(config, name, "")) for name in SHAPE}


def num_kv_heads(model: nn.Module) -> int:
    """Returns the number of KV heads of each layer."""
    config = text_config(model)
    heads: Any = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads)


@torch.no_grad()
def weight_sketch(model: nn.Module) -> list[float]:
    """Returns the norm of each full-attention layer's key projection.

    If keys have no projection of their own, it is the norm of the fused one; if weights cannot be read so, of all
    parameters.
    """
    norms = [_key_norm(layer.module) for layer in full_attention_layers(model)]
    numbers: list[float] = torch.stack([norm.cpu() for norm in norms]).tolist()
    return numbers


def facts_of(model: nn.Module) -> dict[str, str]:
    """Returns the facts that a file records of its model: name, settings of :data:`SHAPE`, weight sketch and dtype."""
    return {
        "model": Path(str(getattr(model.config, "name_or_path", "") or type(model).__name__)).name,
        **shape_of(model),
        "k_proj_norms": json.dumps([round(norm, 4) for norm in weight_sketch(model)]),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def same_shape(facts: Mapping[str, str], model: nn.Module) -> bool:
    """Returns whether a file's facts are those of a model of this shape."""
    return all(facts.get(name) == said for name, said in shape_of(model).items())


def same_weights(facts: Mapping[str, str], model: nn.Module) -> bool:
    """Returns whether a file's facts are those of a model with these weights, as far as the sketch tells."""
    sketch = _sketch_in(facts)
    return sketch is not None and alike(sketch, weight_sketch(model))


def check_facts(facts: Mapping[str, str], model: nn.Module, what: str, without: str) -> None:
    """Raises InvalidArgumentError if a file's facts are those of another model than this.

    Facts that are not recorded are not compared, nor are weights that are quantized to packed numbers, which have no
    norm to compare.

    Args:
        facts: What the file records, see :func:`facts_of`; other entries are ignored.
        model: The model that it is to be used with.
        what: What the file holds, for the message.
        without: Code that makes the same without its record, for the message.
    """
    said = {name: value for name, value in shape_of(model).items() if name in facts}
    differing = [f"{name}={facts[name][:40]}, got {value}" for name, value in said.items() if facts[name] != value]
    sketch = _sketch_in(facts)
    if "k_proj_norms" in facts and not differing and not _is_packed(model):
        if sketch is None:
            differing = [f"norms of key projections as JSON, got {facts['k_proj_norms'][:40]!r}"]
        elif not alike(sketch, weight_sketch(model)):
            differing = [f"weights of {facts.get('model', 'another model')[:80]}, got other weights of its shape"]
    if differing:
        raise InvalidArgumentError(
            f"expected {what} made with this {type(model).__name__}, got some of another model: expected "
            f"{'; expected '.join(differing)}. To use them all the same, leave out the record of their model: {without}"
        )


def _sketch_in(facts: Mapping[str, str]) -> list[float] | None:
    """Returns the sketch that a file records; None if that is none."""
    try:
        sketch = parse_json(facts.get("k_proj_norms", ""))
    except ValueError:
        return None
    known = isinstance(sketch, list) and all(type(norm) in (int, float) for norm in sketch)
    return [float(norm) for norm in sketch] if known else None


def _is_packed(model: nn.Module) -> bool:
    weights = [getattr(_projection(layer.module), "weight", None) for layer in full_attention_layers(model)]
    return any(isinstance(w, torch.Tensor) and (w.element_size() == 1 or not w.is_floating_point()) for w in weights)


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Returns whether two sketches are those of the same weights, up to a relative :data:`SKETCH_TOLERANCE`."""
    return len(one) == len(other) and all(
        abs(a - b) <= SKETCH_TOLERANCE * max(abs(a), abs(b)) for a, b in zip(one, other, strict=True)
    )


def _projection(module: nn.Module) -> nn.Module | None:
    """Returns a layer's projection to keys, alone or fused with others; None if it has none of a known name."""
    found: Any = (getattr(module, name, None) for name in ("k_proj", "qkv_proj"))
    return next((projection for projection in found if projection is not None), None)


def _key_norm(module: nn.Module) -> torch.Tensor:
    for name in ("k_proj", "qkv_proj"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            weight = in_memory(getattr(module, name), "weight", weight)
            return torch.linalg.vector_norm(weight, dtype=torch.float32)
    return torch.stack([p.detach().float().norm() for p in module.parameters()]).norm()


def layer_fingerprint(module: nn.Module, weights: str | None = None) -> str:
    """Returns a text that says which weights made the keys and values of a layer: its place, and its decoder's weights.

    Args:
        module: The layer's attention module.
        weights: The :func:`~kvzip_press.model.weights.weights_fingerprint` of its decoder, for a caller who needs it
            for every layer; made here if None. Of a module whose decoder is not known
            (:func:`~kvzip_press.model.structure.decoder_of`) only its own weights count.

    Raises:
        UnsupportedModelError: Weights are neither in memory nor offloaded by accelerate, or cannot be read.
    """
    if weights is None:
        decoder = decoder_of(module)
        weights = weights_fingerprint(module if decoder is None else decoder)
    return f"{weights}/{type(module).__name__}:{layer_index(module)}"


def check_fingerprint(expected: str, module: nn.Module, weights: str | None = None) -> None:
    """Raises CacheMismatchError if an attention module's layer fingerprint is not the one that a cache was made with.

    Args:
        expected: The fingerprint of a layer of the cache.
        module: The module that is to attend to it.
        weights: See :func:`layer_fingerprint`.
    """
    if not expected.startswith(MARK):
        _check_sample(expected, module)
        return
    decoder = decoder_of(module)
    if weights is None and decoder is not None and looks_unchanged(decoder, expected.partition("/")[0]):
        weights = expected.partition("/")[0]
    got = layer_fingerprint(module, weights)
    if got == expected:
        return
    name = first_difference(expected.partition("/")[0], got.partition("/")[0])
    known = weights is not None or decoder is not None
    raise CacheMismatchError(
        "this cache was made by another model, or by this one with other weights or adapters: expected fingerprint "
        f"{reprlib.repr(expected)}, got {reprlib.repr(got)}{f' (they differ first in {name})' if name else ''}"
        + ("" if known else "; only one layer of this model can be seen from here: call kvzip_press.attach(model) once")
    )


def _check_sample(expected: str, module: nn.Module) -> None:
    """Does what :func:`check_fingerprint` does with a fingerprint of files that an earlier version wrote."""
    got = sampled_fingerprint(module)
    if got != expected:
        raise CacheMismatchError(
            "this cache was made by another model: expected an attention layer with fingerprint "
            f"{reprlib.repr(expected)}, got {type(module).__name__} {layer_index(module)} with {got}"
        )
    if is_first_full(module):
        logger.warning(
            "this cache was saved by an earlier version of kvzip-press, which noted a sample of the attention weights: "
            "that the adapters, MLPs and embeddings that made it are those of this model is not checked"
        )


def sampled_fingerprint(module: nn.Module) -> str:
    """Returns the fingerprint of earlier versions: of an attention module's place, shape and 64 values of each weight.

    Raises:
        UnsupportedModelError: Weights are neither in memory nor offloaded by accelerate.
    """
    digest = hashlib.sha256(f"{type(module).__name__}:{layer_index(module)}".encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            owner = module.get_submodule(name.rpartition(".")[0])
            sample = in_memory(owner, name, tensor).detach().reshape(-1)[:64]
            if sample.element_size() == 1:  # fp8, int8 and packed weights: bytes, whatever they stand for
                sample = sample.view(torch.uint8)
            digest.update(f"{name}:{tuple(tensor.shape)}".encode() + sample.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
