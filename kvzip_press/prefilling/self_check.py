"""Checks in every prefill, before anything is evicted, that the model attends as a ragged cache will.

A ragged layer computes ``softmax(scaling * q k^T) v`` over all pairs that it kept, from what the attention interface
passes to it. A model computes the same unless its attention adds something: sinks, a bias, another scale, a local or
sparse pattern, a second pass through the same layer. Such a model would answer from a ragged cache without an error,
but wrongly. So the last query of every full-attention layer is computed again, over all keys of its row, and compared
with the output of the model's own attention; that is about the work of one decode step. Nothing is recomputed from
hidden states: queries and keys, after projection, norm and RoPE, are those of the model's own call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press.attention.implementation import refuse_unsupported, softcap_of
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import UnsupportedModelError
from kvzip_press.kernels.dense_attention import attention_with_lse
from kvzip_press.model.structure import AttentionLayer, full_attention_layers

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _Seen:
    """The record of one attention call.

    It holds the newest pair, and the largest deviation as a multiple of what is allowed (None if it cannot be
    compared).
    """

    keys: torch.Tensor
    values: torch.Tensor
    excess: torch.Tensor | None


class SelfCheck:
    """Watches the attention calls of one prefill (:func:`kvzip_press.attention.implementation.attention_watched`).

    Args:
        model: The model.
        valid: ``[batch, n]``, bool, False at padding, of all tokens in the cache after the forward.
    """

    def __init__(self, model: nn.Module, valid: torch.Tensor) -> None:
        self._layers = full_attention_layers(model)
        self._valid, self._is_padded = valid, not bool(valid.all())
        self._seen: dict[int, list[_Seen]] = {layer.layer_idx: [] for layer in self._layers}

    @torch.no_grad()
    def __call__(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Checks one attention call; the arguments are those of the attention interface.

        Raises:
            UnsupportedModelError: The call has an argument that ragged attention does not implement.
        """
        refuse_unsupported(layer.module, kwargs)
        excess = None
        if keys.shape[2] == self._valid.shape[1]:
            excess = self._excess(layer.module, query[:, :, -1:], keys, values, output[:, -1:], kwargs)
        self._seen[layer.layer_idx].append(_Seen(keys[:, :, -1].clone(), values[:, :, -1].clone(), excess))

    def finish(self, cache: Any) -> None:
        """Judges what was recorded, once the forward has ended, with the cache as the forward left it.

        Raises:
            UnsupportedModelError: A layer's attention is not that of a ragged cache, was not called exactly once, or
                did not use the pairs that are in the cache.
        """
        for attention in self._layers:
            layer = cache.layers[attention.layer_idx]
            if isinstance(layer, RaggedLayer):
                continue  # a later turn, which ragged attention computed
            where = f"{type(attention.module).__name__} {attention.layer_idx}"
            seen = self._seen[attention.layer_idx]
            if len(seen) != 1:
                raise UnsupportedModelError(
                    f"{where}: expected one call of transformers' attention interface a forward, got {len(seen)}"
                )
            for name, used, held in (("keys", seen[0].keys, layer.keys), ("values", seen[0].values, layer.values)):
                if not _equal(used, held[:, :, -1]):
                    raise UnsupportedModelError(
                        f"{where}: expected attention over the {name} that are in its layer of the cache, got others"
                    )
            excess = 0.0 if seen[0].excess is None else float(seen[0].excess)
            if not excess <= 1:
                raise UnsupportedModelError(
                    f"{where}: expected attention as softmax(scaling * q k^T) v over all tokens, got an output that "
                    f"differs from it by {excess:.3g} times what rounding explains (sinks? a bias? a local pattern?); "
                    "a compressed cache of this model would answer wrongly"
                )

    def _excess(
        self,
        module: nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Returns the largest deviation of any row and head, as a multiple of what rounding can cause.

        It is NaN if our output is NaN and the model's is finite. A head's deviation is relative to its output. Eager
        attention rounds each logit to the model's dtype, and the logits that matter are about as large as their
        log-sum-exp. In measurements, that rounding caused a fifth of what is allowed for it here.
        """
        mask = self._valid[:, None, None, :].to(keys.device) if self._is_padded else None
        options: dict[str, Any] = {"scaling": kwargs.get("scaling"), "softcap": softcap_of(module, kwargs)}
        keys, values = keys.to(query.dtype), values.to(query.dtype)  # autocast may leave them in several
        with torch.autocast(keys.device.type, enabled=False):
            ours, lse = attention_with_lse(query, keys, values, causal=False, mask=mask, **options)
        ours, theirs = ours.transpose(1, 2).float(), output.reshape(ours.transpose(1, 2).shape).float()
        size = ours.norm(dim=-1) + theirs.norm(dim=-1)
        deviation = (ours - theirs).norm(dim=-1) / size.clamp(min=torch.finfo(torch.float32).tiny)
        eps = max(_precision(keys), _autocast_eps(keys.device))
        excess = deviation / (max(2 * eps, 1e-4) + eps / 2 * lse.transpose(1, 2).abs())
        return excess.where(theirs.isfinite().all(dim=-1), 0).amax()  # infinities are the model's own


def _precision(tensor: torch.Tensor) -> float:
    """Returns the relative precision of products; on a GPU, fp32 products may be computed in TF32."""
    eps = torch.finfo(tensor.dtype).eps
    return max(eps, 2**-10) if tensor.is_cuda else eps


def _autocast_eps(device: torch.device) -> float:
    """Returns the relative precision to which autocast casts what attention multiplies; 0 without it."""
    if not torch.is_autocast_enabled(device.type):
        return 0.0
    return torch.finfo(torch.get_autocast_dtype(device.type)).eps


def _equal(used: torch.Tensor, held: torch.Tensor) -> bool:
    same = (used.shape, used.dtype, used.device) == (held.shape, held.dtype, held.device)
    return same and bool(((used == held) | (used.isnan() & held.isnan())).all())
