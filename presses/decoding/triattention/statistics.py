"""What is known of a model's queries before RoPE, and the file that it is kept in. Reading it runs no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.files import (
    DIGEST,
    FLOATS,
    check_contents,
    check_format,
    digest_of_contents,
    json_of,
    opened,
    tensor_in,
    write_tensors,
)
from kvzip_press.model.identity import check_facts, same_shape, same_weights
from kvzip_press.model.structure import full_attention_layers, text_config
from kvzip_press.presses.decoding.triattention.circles import LAYOUTS
from kvzip_press.serving.rotation import fixed_frequencies

HEADER, FORMAT, INDICES, LAYOUT = "kvzip_press_queries", "format", "layer_indices", "layouts"
_TENSORS = ("centres", "frequencies", "magnitudes")
_SHIPPED = Path(__file__).parent / "data"
_MAX_LAYERS = 100_000


@dataclass(frozen=True, eq=False, repr=False)
class QueryStatistics:
    """Means of a model's queries, before RoPE, over some texts; as complex numbers, one for each pair of channels.

    Attributes:
        centres: fp32 ``[layers, num_attention_heads, head_dim / 2, 2]``: the mean query, real and imaginary parts.
        magnitudes: fp32 ``[layers, num_attention_heads, head_dim / 2]``: the mean absolute value.
        frequencies: fp64 ``[n]``: by which angle a position, in radians, RoPE turns its n pairs of channels.
        layouts: For each layer, which channels are a pair: see :class:`kvzip_press.serving.rotation.Rotation`.
        layer_indices: The layer's index in the model for each row.
        provenance: Where they come from: the model, its shape, a sketch of its weights, texts, version.

    Raises:
        InvalidArgumentError: Shapes do not fit each other, a layout is not known, or numbers are not finite.
    """

    centres: torch.Tensor
    magnitudes: torch.Tensor
    frequencies: torch.Tensor
    layouts: tuple[str, ...]
    layer_indices: tuple[int, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, n = tuple(self.magnitudes.shape), len(self.layer_indices)
        fit = len(shape) == 3 and shape[0] == n == len(self.layouts) > 0 and min(shape) > 0
        fit = fit and tuple(self.centres.shape) == (*shape, 2)
        fit = fit and self.frequencies.dim() == 1 and 0 < len(self.frequencies) <= shape[-1]
        if not fit or not set(self.layouts) <= set(LAYOUTS):
            raise InvalidArgumentError(
                "expected centres [layers, heads, n, 2], magnitudes [layers, heads, n], up to n frequencies and a "
                f"layout of {LAYOUTS} for each layer, got {tuple(self.centres.shape)}, {shape}, "
                f"{tuple(self.frequencies.shape)}, {self.layouts!r:.80} and {n} indices of layers"
            )
        numbers = (self.centres, self.magnitudes, self.frequencies)
        if not all(x.is_floating_point() and bool(x.isfinite().all()) for x in numbers):
            raise InvalidArgumentError("expected finite means of queries and frequencies, got NaN, infinity or ints")
        object.__setattr__(self, "frequencies", self.frequencies.detach().cpu().double())
        for name in ("centres", "magnitudes"):
            object.__setattr__(self, name, getattr(self, name).detach().cpu().float())

    def __repr__(self) -> str:
        model = self.provenance.get("model", "not named")
        return f"QueryStatistics({list(self.magnitudes.shape)}, model={model!r})"

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; its folder is created if it does not exist.

        Raises:
            CacheFileError: The file cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        header = {**self.provenance, INDICES: self.layer_indices, LAYOUT: self.layouts, FORMAT: 1}
        texts = {HEADER: json.dumps(header, sort_keys=True)}
        write_tensors(Path(path), tensors, {**texts, DIGEST: digest_of_contents(tensors, texts)}, parents=True)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> QueryStatistics:
        """Reads a file that :meth:`save` wrote.

        Raises:
            InvalidArgumentError: There is no such file, it is of another kind, or it was changed or damaged.
        """
        expected = f"expected statistics of queries (`kvzip-press queries calibrate`) at {path}"
        with opened(Path(path), InvalidArgumentError, expected) as file:
            texts = dict(file.metadata() or {})
            header = json_of(texts.get(HEADER, "null"), InvalidArgumentError, expected)
            mark = header.get(FORMAT) if isinstance(header, dict) and sorted(file.keys()) == list(_TENSORS) else None
            check_format(mark, 1, file, InvalidArgumentError, f"{expected}, of format 1", n_named=5)
            tensors = {name: tensor_in(file, name, FLOATS, InvalidArgumentError, expected) for name in _TENSORS}
        digest = texts.pop(DIGEST, "")
        check_contents(tensors, texts, digest, InvalidArgumentError, str(path))
        indices, layouts = header.pop(INDICES, None), header.pop(LAYOUT, None)
        known = isinstance(indices, list) and all(type(i) is int and 0 <= i < _MAX_LAYERS for i in indices)
        if not known or not isinstance(layouts, list) or not all(isinstance(one, str) for one in layouts):
            raise InvalidArgumentError(f"{expected}, got other {INDICES} or {LAYOUT} than lists of them")
        said = {name: str(value) for name, value in header.items() if name != FORMAT}
        return cls(**tensors, layouts=tuple(layouts), layer_indices=tuple(indices), provenance=said)

    @classmethod
    def shipped(cls, model: nn.Module) -> QueryStatistics | None:
        """Returns those that come with the package for a model's shape and weights; None if there are none."""
        for path in sorted(_SHIPPED.glob("*.safetensors")):
            found = cls.load(path)
            if same_shape(found.provenance, model) and same_weights(found.provenance, model):
                return found
        return None

    def check(self, model: Any) -> QueryStatistics:
        """Returns these statistics, if a model has these layers, heads and RoPE, and these weights as far as known.

        Raises:
            InvalidArgumentError: They are those of another model, or of this one with another RoPE.
            UnsupportedModelError: The model's RoPE has no fixed frequencies.
        """
        check_facts(self.provenance, model, "statistics of queries", "dataclasses.replace(statistics, provenance={})")
        indices = tuple(layer.layer_idx for layer in full_attention_layers(model))
        config = text_config(model)
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        expected, got = (len(indices), heads, head_dim // 2), tuple(self.magnitudes.shape)
        if got != expected or self.layer_indices != indices:
            raise InvalidArgumentError(
                f"expected statistics of queries {expected} [layers, heads, head_dim / 2] for {type(model).__name__} "
                f"with the layers {indices}, got {got} of the layers {self.layer_indices}"
            )
        frequencies = fixed_rope(model)
        if len(frequencies) != len(self.frequencies) or not torch.allclose(frequencies, self.frequencies, rtol=1e-5):
            raise InvalidArgumentError(
                f"expected statistics of queries made with the RoPE of this {type(model).__name__}, got those "
                "of other frequencies: make them anew with `kvzip-press queries calibrate`"
            )
        return self


def fixed_rope(model: Any) -> torch.Tensor:
    """Returns the frequencies of a model's RoPE, which have to be fixed, fp64 ``[n]``.

    Raises:
        UnsupportedModelError: They change with the length that is read, or differ from layer to layer.
    """
    try:
        return fixed_frequencies(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"TriAttentionPress: expected a model whose RoPE turns every key by the same fixed frequencies, got "
            f"{type(model).__name__}: {error}"
        ) from error
