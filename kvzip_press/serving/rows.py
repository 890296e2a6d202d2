"""The rows of a running batch: what each request has read and written itself, beside the context that it shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import CacheView, masks_left_out
from kvzip_press.attention.stand_in_layer import StandInLayer
from kvzip_press.decoding.forward import forward
from kvzip_press.kernels.context_attention import ContextPlan, Turn, context_attention, plan_contexts
from kvzip_press.kernels.dense_attention import attention_with_lse
from kvzip_press.serving.pool import ContextPool
from kvzip_press.serving.rotation import Rotation


class Rows:
    """Buffers for the own tokens of up to ``max_rows`` requests, the first ``n`` of which are in use.

    A request's own tokens are at the positions 0, 1 ... of its row; the context before them is in the pool, with its
    keys turned accordingly. Rows that are in use stand together, so a step reads views of the buffers. No buffer ever
    moves, so a step over them can be captured (``row_step.py``).

    Args:
        pool: The contexts.
        rotation: How the model turns keys.
        num_attention_heads: Query heads of the model.
        max_rows: Most requests at a time.
        max_tokens: Most own tokens of each: its question and its answer.

    Attributes:
        keys: ``[num_layers, max_rows, num_key_value_heads, max_tokens, head_dim]``.
        values: Likewise.
        lengths: For each row in use, the number of its own tokens that were read.
        contexts: For each row in use, the row of the pool's tables that it reads.
    """

    def __init__(
        self, pool: ContextPool, rotation: Rotation, *, num_attention_heads: int, max_rows: int, max_tokens: int
    ) -> None:
        shape, self.device = pool.shape, pool.begins.device
        self._rotation = replace(rotation, frequencies=rotation.frequencies.to(self.device))
        self.pool, self.max_rows, self.max_tokens = pool, max_rows, max_tokens
        self.num_attention_heads = num_attention_heads
        size = (shape.num_layers, max_rows, shape.num_key_value_heads, max_tokens, shape.head_dim)
        # zeros: a step reads, hidden by a mask, what no token was written to yet
        self.keys, self.values = (torch.zeros(size, dtype=shape.dtype, device=self.device) for _ in range(2))
        self.lengths: list[int] = []
        self.contexts: list[int] = []

    @property
    def n(self) -> int:
        """Number of rows in use."""
        return len(self.lengths)

    def join(self, model: nn.Module, token_ids: list[int], context_row: int) -> torch.Tensor:
        """Reads a request's first tokens into a new row, the last one.

        If an error is raised, there is no new row.

        Args:
            model: The model, attached.
            token_ids: The tokens, at least one and at most ``max_tokens``.
            context_row: The row of the pool's tables that they read.

        Returns:
            Logits ``[vocabulary]`` of the last of them.
        """
        question = _Question(self, len(token_ids), context_row)
        cache = compat.Cache(layers=[_QuestionLayer(question, index) for index in range(len(self.keys))])
        ids = torch.tensor([token_ids], device=self.device)
        with masks_left_out():
            logits = forward(model, cache, ids, torch.arange(len(token_ids), device=self.device)[None])
        self.lengths.append(len(token_ids))
        self.contexts.append(context_row)
        return logits[0]

    def leave(self, row: int) -> None:
        """Takes a row out of use; the last row takes its place."""
        last = self.n - 1
        if row != last:
            length = self.lengths[last]
            for buffer in (self.keys, self.values):
                buffer[:, row, :, :length] = buffer[:, last, :, :length]
            self.lengths[row], self.contexts[row] = length, self.contexts[last]
        self.lengths.pop()
        self.contexts.pop()

    def reading(self, contexts: torch.Tensor) -> tuple[ContextPlan, list[Turn | None]]:
        """Returns how tokens read the pool; on a GPU without waiting for it, and as kernels that a graph can hold.

        Args:
            contexts: int32 ``[tokens]``, the row of the pool's tables that each token reads.

        Returns:
            Which token reads which pairs, and for each layer how queries are turned before they meet them.
        """
        pool = self.pool
        plan = plan_contexts(contexts, pool.begins, pool.lengths, num_attention_heads=self.num_attention_heads)
        if pool.shape.has_turned_keys:
            return plan, [None] * pool.shape.num_layers
        return plan, self._rotation.turns(pool.n_tokens.index_select(0, contexts))


class _Question:
    """What all layers have in common as they read a question into a new row."""

    def __init__(self, rows: Rows, n_tokens: int, context_row: int) -> None:
        self.rows, self.row, self.n_tokens = rows, rows.n, n_tokens
        contexts = torch.full((n_tokens,), context_row, dtype=torch.int32, device=rows.device)
        self.plan, self.turns = rows.reading(contexts)


class _QuestionLayer(StandInLayer):
    """One layer of a question: writes its tokens into the row, and attends to the context and to them."""

    n_seen = 0

    def __init__(self, question: _Question, layer_idx: int) -> None:
        self._question, self._layer_idx = question, layer_idx

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values ``[1, heads, new tokens, head_dim]`` at the beginning of the row."""
        question = self._question
        for buffer, states in ((question.rows.keys, key_states), (question.rows.values, value_states)):
            buffer[self._layer_idx, question.row, :, : question.n_tokens] = states[0]
        return CacheView.of(self, key_states), CacheView.of(self, value_states)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Computes attention to the context and, causally, to the question itself, and merges both exactly."""
        question, index, pool = self._question, self._layer_idx, self._question.rows.pool
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
        part = slice(question.row, question.row + 1)
        buffers = question.rows.keys, question.rows.values
        own = (buffer[index, part, :, : question.n_tokens] for buffer in buffers)
        out, lse = attention_with_lse(query, *own, causal=True, **options)
        tail = out[0].transpose(0, 1), lse[0].transpose(0, 1)
        plan, turn, tokens = question.plan, question.turns[index], query[0].transpose(0, 1)
        options.update(turn=turn, tail=tail, return_lse=False)
        out = context_attention(tokens, pool.keys, pool.values, plan, index, **options)
        return out.transpose(0, 1)[None]
