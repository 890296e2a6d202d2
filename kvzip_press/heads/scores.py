"""One score for each (layer, KV head) of a model, made once and used for every context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.heads import file as head_file
from kvzip_press.model.chat import encode
from kvzip_press.model.identity import SHAPE, check_facts, facts_of, num_kv_heads, same_shape, same_weights, shape_of
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.version import __version__


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """How much each KV head of a model matters, whatever the context.

    Attributes:
        values: ``[full_attention_layers, num_key_value_heads]``, fp32, on the CPU, higher is more important.
        layer_indices: The layer's index in the cache for each row; empty if a file of another project does not record
            it, in which case the rows are the model's full-attention layers in order.
        provenance: Where the scores come from: method, model, its shape, SHA-256 and number of tokens of the texts,
            version.

    Raises:
        InvalidArgumentError: The values are not finite floating-point numbers ``[layers, heads]``, or the number of
            indices is not that of the rows.
    """

    values: torch.Tensor
    layer_indices: tuple[int, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.values
        if values.dim() != 2 or not values.numel() or not values.is_floating_point():
            raise InvalidArgumentError(
                f"expected head scores [layers, heads] of floating point, got {tuple(values.shape)} of {values.dtype}"
            )
        if not bool(torch.isfinite(values).all()):
            raise InvalidArgumentError("expected finite head scores, got NaN or infinity")
        if self.layer_indices and len(self.layer_indices) != len(values):
            raise InvalidArgumentError(
                f"expected one layer index for each of {len(values)} rows, got {len(self.layer_indices)}"
            )
        object.__setattr__(self, "values", values.detach().to("cpu", torch.float32).clone())

    def __repr__(self) -> str:
        return f"HeadScores({list(self.values.shape)}, model={self.provenance.get('model', 'not named')!r})"

    @classmethod
    def of_texts(
        cls, values: torch.Tensor, model: Any, tokenizer: Any, texts: Sequence[str], **settings: object
    ) -> HeadScores:
        """Returns scores made with a model from texts; their provenance records everything that they depend on.

        Args:
            values: ``[full_attention_layers, num_key_value_heads]``.
            model: The model.
            tokenizer: Its tokenizer.
            texts: The texts that it read.
            settings: The name of the method, and its settings.
        """
        read = [
            {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(encode(tokenizer, text))}
            for text in texts
        ]
        provenance = {
            **facts_of(model),
            "texts": json.dumps(read),
            **{setting: str(value) for setting, value in settings.items()},
            "kvzip_press": __version__,
        }
        return cls(values, tuple(layer.layer_idx for layer in full_attention_layers(model)), provenance)

    @classmethod
    def shipped(cls, folder: Path, model: nn.Module) -> HeadScores:
        """Returns the scores that ``folder`` has for a model, found by the model's shape and weights.

        Raises:
            InvalidArgumentError: There are none for a model of this shape, or only some for other weights of this
                shape.
        """
        others = []
        for path in sorted(folder.glob("*.safetensors")):
            scores = cls.load(path)
            if not same_shape(scores.provenance, model):
                continue
            if same_weights(scores.provenance, model):
                return scores.check(model)
            others.append(scores.provenance["model"])
        got = f"only those of other weights of this shape ({', '.join(others)})" if others else "none"
        described = ", ".join(f"{name}={value}" for name, value in shape_of(model).items())
        raise InvalidArgumentError(
            f"expected head scores shipped for {type(model).__name__} ({described}), got {got}: make them with "
            "`kvzip-press heads compute --model MODEL --out FILE` and pass scores=FILE"
        )

    def merged(self, others: Sequence[HeadScores]) -> HeadScores:
        """Returns the elementwise maximum of these scores and others of the same model, made by the same method.

        Raises:
            InvalidArgumentError: The scores differ in shape, or are known to be of different models or methods.
        """
        values, provenance = self.values, dict(self.provenance)
        for other in others:
            facts = (*SHAPE, "k_proj_norms", "method")
            known = [name for name in facts if name in provenance and name in other.provenance]
            differing = [name for name in known if provenance[name] != other.provenance[name]]
            layers = self.layer_indices, other.layer_indices
            if other.values.shape != values.shape or differing or (all(layers) and layers[0] != layers[1]):
                cause = f", which differ in {', '.join(differing)}" if differing else ""
                raise InvalidArgumentError(
                    f"expected scores of one model by one method, got {self!r} and {other!r}{cause}"
                )
            values = torch.maximum(values, other.values)
            texts = json.loads(provenance.get("texts", "[]")) + json.loads(other.provenance.get("texts", "[]"))
            provenance = {**other.provenance, **provenance, "texts": json.dumps(texts)}
        indices = next((scores.layer_indices for scores in (self, *others) if scores.layer_indices), ())
        return HeadScores(values, indices, provenance)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; its folder is created if it does not exist.

        Raises:
            CacheFileError: The file cannot be written.
        """
        head_file.write(Path(path), self.values, {**self.provenance, "layer_indices": json.dumps(self.layer_indices)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HeadScores:
        """Reads a file that :meth:`save` wrote, or one of KVzip's if its name ends in ``.pt``, see :meth:`from_kvzip`.

        Raises:
            InvalidArgumentError: The file does not exist or is of another kind.
        """
        if Path(path).suffix == ".pt":
            return cls.from_kvzip(path)
        values, provenance, indices = head_file.read(Path(path))
        return cls(values, indices, provenance)

    @classmethod
    def from_kvzip(cls, path: str | PathLike[str]) -> HeadScores:
        """Reads a file of KVzip's: a ``.pt`` with one tensor ``[layers, heads]``.

        Further dimensions of size 1 are removed. No code of the file is run. To combine several files of a model, use
        :meth:`merged`, as KVzip does.

        Raises:
            InvalidArgumentError: The file does not exist, or holds something else.
        """
        return cls(head_file.read_pt(Path(path)), (), {"method": "kvzip", "source": Path(path).name})

    def kept_heads(self, compression_ratio: float) -> torch.Tensor:
        """Returns which heads to keep: the best ``round((1 - compression_ratio) * layers * heads)``, exactly.

        Among equals the lower layer stays, then the lower head.

        Returns:
            Bool ``[layers, heads]``.
        """
        flat = self.values.flatten()
        n_kept = round((1 - compression_ratio) * len(flat))
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.argsort(descending=True, stable=True)[:n_kept]] = True
        return kept.view_as(self.values)

    def check(self, model: nn.Module) -> HeadScores:
        """Returns these scores if they fit a model's layers and heads.

        If the scores record the model that they were made with, it must have the same weights. To use them with others
        all the same, leave the record out: ``HeadScores(scores.values, scores.layer_indices)``.

        Raises:
            InvalidArgumentError: They do not fit, or were made with other weights.
        """
        indices = tuple(layer.layer_idx for layer in full_attention_layers(model))
        expected, got = (len(indices), num_kv_heads(model)), tuple(self.values.shape)
        if got != expected:
            raise InvalidArgumentError(
                f"expected head scores {expected} [full-attention layers, KV heads] for {type(model).__name__}, "
                f"got {got}"
            )
        if self.layer_indices and self.layer_indices != indices:
            raise InvalidArgumentError(f"expected scores of the layers {indices}, got those of {self.layer_indices}")
        check_facts(self.provenance, model, "head scores", "HeadScores(scores.values, scores.layer_indices)")
        return self


def check_texts(texts: Sequence[str]) -> Sequence[str]:
    """Returns the texts if they are a list of at least one.

    Raises:
        InvalidArgumentError: They are not. A single string is refused, too, because it would count as a list of
            letters.
    """
    if isinstance(texts, str) or not texts:
        raise InvalidArgumentError(f"expected a list of one text or more, got {texts!r}")
    return texts
