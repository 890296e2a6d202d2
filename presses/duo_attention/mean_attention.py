"""Scores heads for DuoAttention without training, by kvpress's method: how far back a head's mean query attends.

DuoAttention trains one gate per head for hours. kvpress (`on_the_fly_scoring`) takes each head's mean query and mean
key over a text, before RoPE. It puts the query at the end of ``length`` copies of the key, which differ only in their
distance, and takes the area under the cumulated attention as the score: it is high if the head looks far back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.heads.scores import HeadScores, check_texts
from kvzip_press.model.chat import encode
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import full_attention_layers, layer_index
from kvzip_press.model.watching import before_forward
from kvzip_press.prefilling.whole import run_prefill


def compute_head_scores(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Reads each text and averages the heads' areas over the texts.

    Args:
        model: A causal language model whose attention has ``q_proj`` and ``k_proj``.
        tokenizer: Its tokenizer.
        texts: One text or more, each of at least ``length`` tokens; no chat template is put around them.
        length: Number of keys that the mean query sees.
        progress: Called after every text with how many are done and how many there are.

    Raises:
        InvalidArgumentError: No text, a text that is too short, or one longer than the model's positions.
        UnsupportedModelError: The model's attention is built differently.
    """
    rows = [encode(tokenizer, text) for text in check_texts(texts)]
    if length < 1 or min(len(ids) for ids in rows) < length:
        raise InvalidArgumentError(
            f"expected length >= 1 and texts of at least as many tokens, got {length} and {[len(ids) for ids in rows]}"
        )
    areas = []
    for done, ids in enumerate(rows, start=1):
        input_ids = torch.tensor([ids], device=input_device(model))
        with _areas(model, length) as seen:
            run_prefill(model, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
        areas.append(torch.stack([seen[layer.layer_idx].cpu() for layer in full_attention_layers(model)]))
        if progress is not None:
            progress(done, len(rows))
    values = torch.stack(areas).mean(dim=0)
    return HeadScores.of_texts(values, model, tokenizer, texts, method="duo-attention on the fly", length=length)


@contextmanager
def _areas(model: nn.Module, length: int) -> Iterator[dict[int, torch.Tensor]]:
    """Collects ``layer_idx -> [heads]``, fp32, while open, for the row that a forward pass reads."""
    areas: dict[int, torch.Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        cos, sin = kwargs["position_embeddings"]  # RoPE of positions 0, 1, ..., those of the copies of the mean key
        areas[layer_index(module)] = _area(module, hidden_states, cos[0, :length].float(), sin[0, :length].float())

    with ExitStack() as stack:
        for layer in full_attention_layers(model):
            stack.enter_context(before_forward(layer.module, look))
        yield areas


def _area(module: Any, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns the areas ``[heads]``, fp32, means over each group; ``cos`` and ``sin`` are ``[length, rotary_dim]``."""
    query, key = _mean(module, "q", hidden_states), _mean(module, "k", hidden_states)
    last = _rotated(query, cos[-1], sin[-1]).unflatten(0, (len(key), -1))
    keys = _rotated(key.unsqueeze(1), cos, sin)
    scaling = getattr(module, "scaling", None) or module.head_dim**-0.5
    attention = (last @ keys.transpose(1, 2) * scaling).softmax(dim=-1)
    return attention.cumsum(dim=-1).mean(dim=(1, 2))


def _mean(module: Any, kind: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """Returns ``[number of heads, head_dim]``, fp32: the mean projection over the tokens, before RoPE."""
    projection, norm = (getattr(module, f"{kind}_{name}", None) for name in ("proj", "norm"))
    if not isinstance(projection, nn.Module):
        raise UnsupportedModelError(f"expected attention with q_proj and k_proj, got {type(module).__name__}")
    projected = projection(hidden_states[0]).unflatten(-1, (-1, module.head_dim))
    states: torch.Tensor = projected if norm is None else norm(projected)
    return states.float().mean(dim=0)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE to the first ``rotary_dim`` elements of the last dimension."""
    turning, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    one, other = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-other, one], dim=-1) * sin
    return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], dim=-1)
