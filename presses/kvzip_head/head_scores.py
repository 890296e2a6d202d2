"""One score per (layer, KV head): KVzip's pair scores, reduced by their maximum over the sequence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press import __version__
from kvzip_press.chat import encode
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.models import full_attention_layers
from kvzip_press.prefilling import prefill
from kvzip_press.press import Press
from kvzip_press.presses.kvzip_head import head_file
from kvzip_press.presses.kvzip_head.model_facts import SHAPE, num_kv_heads, shape_of, weight_sketch
from kvzip_press.registry import get_press

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """How much each KV head of a model matters, whatever the context.

    Attributes:
        values: ``[full_attention_layers, num_key_value_heads]``, fp32, on the CPU, higher is more important.
        layer_indices: The cache's index of each row; empty where a file of another project does not say, and then the
            rows are the model's full-attention layers in order.
        provenance: Where the scores come from: model, its shape, texts by SHA-256 and tokens, version.

    Raises:
        InvalidArgumentError: Values that are not finite numbers ``[layers, heads]``, or as many indices as rows.
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
    def compute(
        cls,
        model: nn.Module,
        tokenizer: Any,
        texts: Sequence[str],
        chunk_size: int = 2048,
        progress: Progress | None = None,
    ) -> HeadScores:
        """Reads each text, scores it with KVzip and takes the maximum over its tokens, then over the texts.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            texts: One text of a kind that the model will see, or several.
            chunk_size: Context tokens replayed at a time.
            progress: Called after every forward with how many are done and how many there are.

        Raises:
            InvalidArgumentError: No text, an empty one, or one longer than the model's positions.
        """
        if isinstance(texts, str) or not texts:
            raise InvalidArgumentError(f"expected a list of one text or more, got {texts!r}")
        press, lengths = get_press("kvzip", 0.0, chunk_size=chunk_size), [len(encode(tokenizer, t)) for t in texts]
        total = sum(1 + -(-length // chunk_size) for length in lengths)
        done = 0

        def count(*_: Any) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        hook = full_attention_layers(model)[0].module.register_forward_hook(count)  # a replay calls no decoder
        try:
            values = torch.stack([_of_text(model, tokenizer, text, press) for text in texts]).amax(dim=0)
        finally:
            hook.remove()
        indices = tuple(layer.layer_idx for layer in full_attention_layers(model))
        return cls(values, indices, _provenance(model, texts, lengths, chunk_size))

    def merged(self, others: Sequence[HeadScores]) -> HeadScores:
        """The elementwise maximum of these scores and others of the same model.

        Raises:
            InvalidArgumentError: Scores of another shape, or of a model that is known to be another.
        """
        values, provenance = self.values, dict(self.provenance)
        for other in others:
            known = [name for name in (*SHAPE, "k_proj_norms") if name in provenance and name in other.provenance]
            differing = [name for name in known if provenance[name] != other.provenance[name]]
            layers = self.layer_indices, other.layer_indices
            if other.values.shape != values.shape or differing or (all(layers) and layers[0] != layers[1]):
                raise InvalidArgumentError(f"expected scores of one model, got {self!r} and {other!r}")
            values = torch.maximum(values, other.values)
            texts = json.loads(provenance.get("texts", "[]")) + json.loads(other.provenance.get("texts", "[]"))
            provenance = {**other.provenance, **provenance, "texts": json.dumps(texts)}
        indices = next((scores.layer_indices for scores in (self, *others) if scores.layer_indices), ())
        return HeadScores(values, indices, provenance)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; its folder is made where it is missing."""
        head_file.write(Path(path), self.values, {**self.provenance, "layer_indices": json.dumps(self.layer_indices)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HeadScores:
        """Reads what :meth:`save` wrote, or (``.pt``) what KVzip did, see :meth:`from_kvzip`.

        Raises:
            InvalidArgumentError: There is no such file, or one of another kind.
        """
        if Path(path).suffix == ".pt":
            return cls.from_kvzip(path)
        values, provenance, indices = head_file.read(Path(path))
        return cls(values, indices, provenance)

    @classmethod
    def from_kvzip(cls, path: str | PathLike[str]) -> HeadScores:
        """Reads a file of KVzip's: one tensor ``[layers, heads]`` (dimensions of one between are fine) in a ``.pt``.

        No code of the file is run. Several files of a model are :meth:`merged`, as KVzip does.

        Raises:
            InvalidArgumentError: There is no such file, or it holds something else.
        """
        return cls(head_file.read_pt(Path(path)), (), {"source": Path(path).name})

    def kept_heads(self, compression_ratio: float) -> torch.Tensor:
        """The ``round((1 - compression_ratio) * layers * heads)`` best heads, exactly, as bool ``[layers, heads]``.

        Among equals the lower layer stays, then the lower head.
        """
        flat = self.values.flatten()
        n_kept = round((1 - compression_ratio) * len(flat))
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.argsort(descending=True, stable=True)[:n_kept]] = True
        return kept.view_as(self.values)

    def check(self, model: nn.Module) -> HeadScores:
        """These scores, if they fit a model's layers and heads.

        Raises:
            InvalidArgumentError: They do not.
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
        return self


def _of_text(model: nn.Module, tokenizer: Any, text: str, press: Press) -> torch.Tensor:
    """``[full_attention_layers, num_key_value_heads]``: the best pair of each head outside the protected prefix."""
    done = prefill(model, tokenizer, text)
    scores = press.score(done)
    free = done.valid & ~scores.protected
    best = [values.masked_fill(~free.to(values.device).unsqueeze(1), -torch.inf) for values in scores.layers.values()]
    return torch.stack([values.amax(dim=(0, 2)).cpu() for values in best])


def _provenance(model: Any, texts: Sequence[str], lengths: Sequence[int], chunk_size: int) -> dict[str, str]:
    read = [
        {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": length}
        for text, length in zip(texts, lengths, strict=True)
    ]
    name = Path(str(getattr(model.config, "name_or_path", "") or type(model).__name__)).name
    return {
        "model": name,
        **shape_of(model),
        "k_proj_norms": json.dumps([round(norm, 4) for norm in weight_sketch(model)]),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "texts": json.dumps(read),
        "chunk_size": str(chunk_size),
        "kvzip_press": __version__,
    }
