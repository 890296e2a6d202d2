"""A frozen twin of a model that forgets: attention to a pair decays with the pair's age, as its gate says.

The logit of query t for the pair at i gets ``(t - i) log beta_i`` added, so a pair counts ``beta_i ** (t - i)`` times.
Gradients reach the gates through the whole model; the model itself is not changed, and its weights get none.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kvzip_press import compat
from kvzip_press.attention.implementation import attach, refuse_unsupported, softcap_of
from kvzip_press.model.structure import full_attention_layers, text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.presses.decoding.trimkv.gates import activation_of, log_beta

Gates = Mapping[int, Mapping[str, torch.Tensor]]

_NAME = "kvzip_press_decayed"
_QUERIES = 256  # whose attention is in memory at a time
_REMEMBERED = 1024  # tokens; of a longer text, layers are computed once more on the way back


@dataclass
class _Reading:
    """What one forward reads with, and what it finds: for each layer, how many pairs each head holds in effect."""

    gates: Gates
    entering: dict[int, torch.Tensor] = field(default_factory=dict)  # log beta of the layer that runs
    held: dict[int, torch.Tensor] = field(default_factory=dict)


class DecayedModel:
    """A model whose full-attention layers forget as gates say; layers with a sliding window are as they were.

    Args:
        model: A causal language model; it is attached (:func:`kvzip_press.attach`), and otherwise not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        attach(model)
        compat.register_attention(_NAME, _attend, None)
        self._act = activation_of(model)
        self._reading = _Reading({})
        self.twin: Any = _frozen(twin_of(model))
        originals = {layer.layer_idx: layer.module for layer in full_attention_layers(model)}
        for layer in full_attention_layers(self.twin):
            module: Any = layer.module
            module.config = copy.copy(module.config)  # the decoder's own still says how masks are made
            module.config._attn_implementation = _NAME
            module.decayed = functools.partial(self._attend, layer.layer_idx, originals[layer.layer_idx])
            module.register_forward_pre_hook(functools.partial(self._enter, layer.layer_idx), with_kwargs=True)
        decoder: Any = text_decoder(self.twin)
        self._decoder, self._whole = decoder, [layer.forward for layer in decoder.layers]

    def read(self, input_ids: torch.Tensor, gates: Gates) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a text from an empty cache.

        Args:
            input_ids: int64 ``[1, n]``.
            gates: Tensors of each layer by name, fp32; those that record gradients get them.

        Returns:
            The hidden states that enter the head ``[1, n, hidden_size]``, in the model's dtype, and how many pairs
            are held in effect when token t is read, the sum over i of ``beta_i ** (t - i)``, fp32
            ``[layers, num_key_value_heads, n]``.
        """
        self._reading = reading = _Reading(gates)
        again = torch.is_grad_enabled() and input_ids.shape[1] > _REMEMBERED
        for layer, whole in zip(self._decoder.layers, self._whole, strict=True):
            layer.forward = functools.partial(_computed_again, whole) if again else whole
        output = self._decoder(input_ids=input_ids, use_cache=False, return_dict=True)
        return output[0], torch.stack([reading.held[layer_idx].to(input_ids.device) for layer_idx in gates])

    def _enter(self, layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        gate = {name: tensor.to(states.device) for name, tensor in self._reading.gates[layer_idx].items()}
        with torch.autocast(states.device.type, enabled=False):
            self._reading.entering[layer_idx] = log_beta(gate, states, self._act)

    def _attend(
        self,
        layer_idx: int,
        original: nn.Module,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        refuse_unsupported(original, kwargs)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        of_pairs = self._reading.entering.pop(layer_idx)
        output, held = decayed_attention(query, keys, values, of_pairs, scaling, softcap_of(original, kwargs))
        self._reading.held.setdefault(layer_idx, held)  # the first is the forward's own, a second its recomputation
        return output


def decayed_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    of_pairs: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes causal attention that decays, a slice of queries at a time, in fp32.

    Args:
        query: ``[1, num_attention_heads, n, head_dim]``, after RoPE.
        keys: ``[1, num_key_value_heads, n, head_dim]``, after RoPE.
        values: The same shape.
        of_pairs: ``log beta``, fp32 ``[1, num_key_value_heads, n]``.
        scaling: Factor of the logits.
        softcap: Bound of the logits, before the decay; None for none.

    Returns:
        ``[1, n, num_attention_heads, head_dim]`` in the query's dtype, and the sum over i of ``beta_i ** (t - i)``,
        fp32 ``[num_key_value_heads, n]``.
    """
    n = query.shape[2]
    again = torch.is_grad_enabled() and n > _QUERIES  # on the way back, a slice's probabilities are computed anew
    outputs, sums = [], []
    for first in range(0, n, _QUERIES):
        end = min(first + _QUERIES, n)
        part = (query[:, :, first:end], keys[:, :, :end], values[:, :, :end], of_pairs[:, :, :end], scaling, softcap)
        output, held = _computed_again(_slice, *part) if again else _slice(*part)
        outputs.append(output)
        sums.append(held)
    return torch.cat(outputs, dim=1), torch.cat(sums, dim=-1)


def _slice(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    of_pairs: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last queries of a text, over all that is there for them."""
    heads, end, rows = keys.shape[1], keys.shape[2], query.shape[2]
    logits = scaling * (query.unflatten(1, (heads, -1)).float() @ keys.float().transpose(-1, -2).unsqueeze(2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    columns = torch.arange(end, device=query.device)
    ages = columns[end - rows :, None] - columns
    decay = (of_pairs.unsqueeze(2) * ages).masked_fill(ages < 0, -torch.inf)
    attention = (logits + decay.unsqueeze(2)).softmax(dim=-1)
    output = (attention @ values.float().unsqueeze(2)).flatten(1, 2).transpose(1, 2)
    return output.to(query.dtype), decay.exp().sum(dim=-1)[0]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,  # noqa: ARG001  # one text without padding: what can be seen is what came before
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The registered attention function; the twin's modules have what to do."""
    return module.decayed(query, key, value, {**kwargs, "dropout": dropout}), None


def _computed_again(function: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _frozen(twin: nn.Module) -> nn.Module:
    """Gives a twin's modules the same tensors as parameters that record no gradients."""
    for module in twin.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001  # no public name
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)  # noqa: SLF001
    return twin.eval()
