"""The rows of a running batch: what each request has read and written itself, beside the context that it shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import CacheView, masks_left_out
from kvzip_press.attention.stand_in_layer import StandInLayer
from kvzip_press.decoding.forward import forward
from kvzip_press.kernels.context_attention import ContextPlan, Turn, context_attention, plan_contexts
from kvzip_press.kernels.dense_attention import attention_with_lse, merge_attention
from kvzip_press.serving.pool import ContextPool
from kvzip_press.serving.rotation import Rotation


class Rows:
    """Buffers for the own tokens of up to ``max_rows`` requests, the first ``n`` of which are in use.

    A request's own tokens are at the positions 0, 1 ... of its row; the context before them is in the pool, with its
    keys turned accordingly. Rows that are in use stand together, so a step reads views of the buffers.

    Args:
        pool: The contexts.
        rotation: How the model turns keys.
        num_attention_heads: Query heads of the model.
        max_rows: Most requests at a time.
        max_tokens: Most own tokens of each: its question and its answer.

    Attributes:
        n: Number of rows in use.
        lengths: For each row in use, the number of its own tokens that were read.
    """

    def __init__(
        self, pool: ContextPool, rotation: Rotation, *, num_attention_heads: int, max_rows: int, max_tokens: int
    ) -> None:
        shape, device = pool.shape, pool.keys.device
        self._rotation = rotation
        self.pool, self.max_rows, self.max_tokens = pool, max_rows, max_tokens
        self._num_attention_heads = num_attention_heads
        size = (shape.num_layers, max_rows, shape.num_key_value_heads, max_tokens, shape.head_dim)
        # zeros: a step reads, hidden by a mask, what no token was written to yet
        self.keys, self.values = (torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2))
        self.contexts = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.lengths: list[int] = []

    @property
    def n(self) -> int:
        """Number of rows in use."""
        return len(self.lengths)

    def join(self, model: nn.Module, token_ids: list[int], context_row: int) -> torch.Tensor:
        """Reads a request's first tokens into a new row, the last one.

        If an error is raised, there is no new row.

        Args:
            model: The model, attached.
            token_ids: The tokens, at least one.
            context_row: The row of the pool's tables that they read.

        Returns:
            Logits ``[vocabulary]`` of the last of them.
        """
        row = self.n
        self.contexts[row] = context_row
        logits = self._forward(model, torch.tensor([token_ids]), slice(row, row + 1), [0])
        self.lengths.append(len(token_ids))
        return logits[0]

    def step(self, model: nn.Module, token_ids: list[int]) -> torch.Tensor:
        """Reads one token in each row; if an error is raised, none.

        Returns:
            Logits ``[n, vocabulary]``.
        """
        logits = self._forward(model, torch.tensor(token_ids)[:, None], slice(0, self.n), self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def leave(self, row: int) -> None:
        """Takes a row out of use; the last row takes its place."""
        last = self.n - 1
        if row != last:
            length = self.lengths[last]
            for buffer in (self.keys, self.values):
                buffer[:, row, :, :length] = buffer[:, last, :, :length]
            self.contexts[row] = self.contexts[last].clone()
            self.lengths[row] = length
        self.lengths.pop()

    def _forward(self, model: nn.Module, token_ids: torch.Tensor, rows: slice, lengths: list[int]) -> torch.Tensor:
        n_new = token_ids.shape[1]
        token_ids = token_ids.to(self.keys.device)
        positions = torch.tensor(lengths, device=token_ids.device)[:, None] + torch.arange(
            n_new, device=token_ids.device
        )
        contexts = self.contexts[rows].repeat_interleave(n_new)
        plan = plan_contexts(
            contexts, self.pool.begins, self.pool.lengths, num_attention_heads=self._num_attention_heads
        )
        turns: list[Turn | None] = [None] * len(self.keys)
        if not self.pool.shape.has_turned_keys:
            turns = self._rotation.turns(self.pool.n_tokens[contexts])
        step = _Step(self, rows, positions, max(lengths) + n_new, plan, turns)
        cache = compat.Cache(layers=[_RowsLayer(step, index) for index in range(len(self.keys))])
        with masks_left_out():
            return forward(model, cache, token_ids, positions)


class _Step:
    """What all layers of one forward have in common.

    Args:
        rows: The buffers.
        part: Which rows of them are read.
        positions: int64 ``[rows, new tokens]``, where the new tokens go.
        n_seen: Number of columns that the longest row has after the step.
        plan: Which new token reads which context.
        turns: For each layer, how queries are turned before they meet their context.
    """

    def __init__(
        self,
        rows: Rows,
        part: slice,
        positions: torch.Tensor,
        n_seen: int,
        plan: ContextPlan,
        turns: list[Turn | None],
    ) -> None:
        self.rows, self.part, self.positions, self.n_seen = rows, part, positions, n_seen
        self.plan, self.turns = plan, turns
        columns = torch.arange(n_seen, device=positions.device)
        only_new = positions.shape[1] == n_seen
        self.visible = None if only_new else (columns <= positions[..., None])[:, None]  # [rows, 1, new tokens, n_seen]


class _RowsLayer(StandInLayer):
    """One layer of a step: writes the new tokens into their rows, and attends to context and own tokens."""

    def __init__(self, step: _Step, layer_idx: int) -> None:
        self._step, self._layer_idx = step, layer_idx
        self.n_seen = step.n_seen - step.positions.shape[1]
        buffers = (buffer[layer_idx, step.part] for buffer in (step.rows.keys, step.rows.values))
        self._keys, self._values = buffers  # [rows, heads, max_tokens, head_dim]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values ``[rows, heads, new tokens, head_dim]`` behind those of their rows."""
        index = self._step.positions[:, None, :, None]
        for buffer, states in ((self._keys, key_states), (self._values, value_states)):
            buffer.scatter_(2, index.expand_as(states), states.to(buffer.dtype))
        live = slice(0, self._step.n_seen)
        return CacheView.of(self, self._keys[:, :, live]), CacheView.of(self, self._values[:, :, live])

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Computes attention to each row's context and to its own tokens so far, and merges both exactly."""
        step, pool = self._step, self._step.rows.pool
        n_rows, _, n_new, _ = query.shape
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
        tokens = query.transpose(1, 2).flatten(0, 1)
        turn = step.turns[self._layer_idx]
        context, context_lse = context_attention(
            tokens, pool.keys, pool.values, step.plan, self._layer_idx, turn=turn, **options
        )
        own = (buffer[:, :, : step.n_seen] for buffer in (self._keys, self._values))
        causal = step.visible is None
        tail, tail_lse = attention_with_lse(query, *own, causal=causal, mask=step.visible, **options)
        context = context.unflatten(0, (n_rows, n_new)).transpose(1, 2)
        context_lse = context_lse.unflatten(0, (n_rows, n_new)).transpose(1, 2)
        return merge_attention(context, context_lse, tail, tail_lse)[0]
