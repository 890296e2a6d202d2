"""A step of a running batch: one token in each row, over static memory, captured if that is possible.

What differs from step to step (each row's token, its position and the context that it reads) lies in one small tensor
on the device, which is filled before each step; all else follows from it there. So a row may join, leave or change its
context, and contexts may come and go in the pool, without a new capture. There is a graph for each of the sizes 1, 2,
4 ... and ``max_rows``, made when it is first used: rows behind those in use read no context and a token of their own.
One graph for all sizes would let a single user wait for the tiles, logits and weights' products of ``max_rows``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.attention.implementation import CacheView, masks_left_out
from kvzip_press.attention.stand_in_layer import StandInLayer
from kvzip_press.decoding import capture
from kvzip_press.decoding.forward import forward
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.context_attention import ContextPlan, Turn, context_attention, plan_contexts
from kvzip_press.kernels.dense_attention import attention_with_lse
from kvzip_press.serving.rows import Rows

logger = logging.getLogger(__name__)

_TOKEN, _POSITION, _CONTEXT = range(3)  # columns of the inputs


class RowStep:
    """Reads one token in each row that is in use.

    Args:
        model: The model, attached.
        rows: The rows.
        graph: Whether steps are captured: None if possible, False never, True or an error is raised.

    Attributes:
        reason: Why steps are not captured; None if they are, or will be when the first one runs.

    Raises:
        InvalidArgumentError: ``graph=True``, and a graph is impossible.
    """

    def __init__(self, model: nn.Module, rows: Rows, *, graph: bool | None = None) -> None:
        self._model, self._rows, self._is_required = model, rows, graph is True
        self._inputs = torch.zeros(rows.max_rows, 3, dtype=torch.int64, device=rows.device)
        self._own = _OwnTokens(rows)
        self._graphs: dict[int, capture.Captured] = {}
        self._weights: list[tuple[torch.Tensor, int]] = []  # and where graphs read them
        against = capture.reason_against(model, rows.device)
        self.reason = "graph=False was asked for" if graph is False else against
        self._can_be_captured = self.reason is None
        if not self._can_be_captured:
            self._fall_back(self.reason, is_news=graph is None and rows.device.type == "cuda")

    @property
    def captured(self) -> bool:
        """Whether there is a graph that steps replay."""
        return bool(self._graphs)

    def __call__(self, token_ids: list[int]) -> torch.Tensor:
        """Reads a token in each row in use, behind those that :attr:`Rows.lengths` counts; does not count it.

        So a step that was interrupted before its tokens were looked at can be run again.

        Returns:
            Logits ``[n, vocabulary]``, valid until the next call.

        Raises:
            InvalidArgumentError: A row has no room for another token; or ``graph=True``, and the capture failed.
        """
        rows, n = self._rows, self._rows.n
        if max(rows.lengths) >= rows.max_tokens:
            raise InvalidArgumentError(f"expected rows of less than {rows.max_tokens} tokens, got {rows.lengths}")
        size = self._size(n) if self._can_be_captured else n
        self._fill(token_ids, size)
        graph = self._graph(size) if self._can_be_captured else None
        return self._run(n, max(rows.lengths) + 1) if graph is None else graph.replay()[:n]

    def close(self) -> None:
        """Drops all graphs; later steps run without."""
        self._graphs.clear()
        self._weights.clear()
        self._can_be_captured, self.reason = False, "the session is closed"

    def _size(self, n: int) -> int:
        """Returns the rows of the smallest graph that has room for ``n``."""
        return min(1 << (n - 1).bit_length(), self._rows.max_rows)

    def _fill(self, token_ids: list[int], size: int) -> None:
        """Tells the device what the rows read; those that are not in use read token 0 at position 0."""
        rows = self._rows
        inputs = [list(row) for row in zip(token_ids, rows.lengths, rows.contexts, strict=True)]
        inputs += [[0, 0, 0]] * (size - len(inputs))
        # pinned: the device fetches it while this goes on; PyTorch reuses such memory once it was fetched
        staged = torch.tensor(inputs, dtype=torch.int64, pin_memory=rows.device.type == "cuda")
        self._inputs[:size].copy_(staged, non_blocking=True)

    def _graph(self, size: int) -> capture.Captured | None:
        """Returns the graph of a size, captured if need be; None if it cannot be now."""
        if any(tensor.data_ptr() != address for tensor, address in self._weights):
            self._graphs.clear()  # the model was moved: they would read memory that is others' now
        if size not in self._graphs:
            self.reason = capture.reason_after(lambda: self._capture(size))
            if self.reason not in (None, capture.OTHERS_COMPUTE):  # others end, what failed fails again
                self._graphs.clear()
                self._weights.clear()
                self._can_be_captured = self._is_required  # who requires graphs hears of it at each step
                self._fall_back(self.reason, is_news=True)
        return self._graphs.get(size)

    def _capture(self, size: int) -> None:
        """Captures a step of ``size`` rows; what its trials write, the real step that follows overwrites."""
        if not self._graphs:
            tensors = *self._model.parameters(), *self._model.buffers()
            self._weights = [(tensor, tensor.data_ptr()) for tensor in tensors]
        memory = next((graph.memory for graph in self._graphs.values()), None)  # graphs are replayed one by one
        room = self._rows.max_tokens
        self._graphs[size] = capture.captured(lambda: self._run(size, room), self._rows.device, memory=memory)

    def _fall_back(self, reason: str | None, *, is_news: bool) -> None:
        if self._is_required:
            raise InvalidArgumentError(f"expected a model whose steps a CUDA graph can hold, but {reason}")
        if is_news:
            logger.warning("a session's steps run without a CUDA graph: %s", reason)

    @torch.no_grad()
    def _run(self, size: int, n_live: int) -> torch.Tensor:
        """Launches the kernels of a step of the first ``size`` rows, which have at most ``n_live`` tokens after it."""
        rows, inputs = self._rows, self._inputs[:size]
        positions = inputs[:, _POSITION, None]
        plan, turns = rows.reading(inputs[:, _CONTEXT].int())
        step = _Step(rows, positions, n_live, plan, turns, self._own.plan(inputs[:, _POSITION]))
        cache = compat.Cache(layers=[_RowsLayer(step, index) for index in range(len(rows.keys))])
        with masks_left_out():
            return forward(self._model, cache, inputs[:, _TOKEN, None], positions)


class _OwnTokens:
    """The rows' own tokens as the attention to a pool takes them: each row is a context that one token reads.

    Attributes:
        begins: int32 ``[1, max_rows + 1, heads]``, where the tokens of each row and head begin in one layer's buffer;
            row 0 is empty. Layers are alike, so one plan serves them all.
        lengths: int32, likewise, how many they are in the step that runs.
    """

    def __init__(self, rows: Rows) -> None:
        _, max_rows, n_heads, max_tokens, _ = rows.keys.shape
        places = torch.arange(max_rows * n_heads, dtype=torch.int32, device=rows.device) * max_tokens
        self.begins = torch.zeros(1, max_rows + 1, n_heads, dtype=torch.int32, device=rows.device)
        self.begins[0, 1:] = places.view(max_rows, n_heads)
        self.lengths = torch.zeros_like(self.begins)
        self._tokens = torch.arange(1, max_rows + 1, dtype=torch.int32, device=rows.device)
        self._num_attention_heads = rows.num_attention_heads

    def plan(self, positions: torch.Tensor) -> ContextPlan:
        """Returns which token reads which row, for tokens ``[size]`` at these positions of theirs."""
        size = positions.shape[0]
        self.lengths[0, 1 : size + 1] = (positions + 1).int()[:, None]
        heads = self._num_attention_heads
        return plan_contexts(self._tokens[:size], self.begins, self.lengths, num_attention_heads=heads)


@dataclass(frozen=True)
class _Step:
    """What all layers of one step have in common.

    Attributes:
        rows: The buffers.
        positions: int64 ``[size, 1]``, where each row's token goes.
        n_live: Columns of the buffers that are read, at most.
        plan: Which token reads which context.
        turns: For each layer, how queries are turned before they meet their context.
        own: Which token reads which row.
    """

    rows: Rows
    positions: torch.Tensor
    n_live: int
    plan: ContextPlan
    turns: list[Turn | None]
    own: ContextPlan


class _RowsLayer(StandInLayer):
    """One layer of a step: writes each row's token, and attends to context and own tokens."""

    def __init__(self, step: _Step, layer_idx: int) -> None:
        self._step, self._layer_idx = step, layer_idx
        self.n_seen = step.n_live - 1
        size = len(step.positions)
        buffers = (buffer[layer_idx, :size] for buffer in (step.rows.keys, step.rows.values))
        self._keys, self._values = buffers  # [size, heads, max_tokens, head_dim]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes keys and values ``[size, heads, 1, head_dim]`` behind those of their rows."""
        index = self._step.positions[:, None, :, None]
        for buffer, states in ((self._keys, key_states), (self._values, value_states)):
            buffer.scatter_(2, index.expand_as(states), states.to(buffer.dtype))
        return CacheView.of(self, self._keys), CacheView.of(self, self._values)

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
        step, index, pool = self._step, self._layer_idx, self._step.rows.pool
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
        tail = self._own_attention(query, options)
        plan, turn, tokens = step.plan, step.turns[index], query[:, :, 0]
        options.update(turn=turn, tail=tail, return_lse=False)
        out = context_attention(tokens, pool.keys, pool.values, plan, index, **options)
        return out[:, :, None]

    def _own_attention(self, query: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns attention to the rows' own tokens, ``[size, num_attention_heads, head_dim]``, and its log-sum-exp."""
        step = self._step
        if step.own.work is not None:  # Triton reads what each row has; without it, a loop over rows would be slow
            keys, values = (buffer[self._layer_idx].flatten(0, 2) for buffer in (step.rows.keys, step.rows.values))
            return context_attention(query[:, :, 0], keys, values, step.own, 0, **options)
        live = (buffer[:, :, : step.n_live] for buffer in (self._keys, self._values))
        visible = torch.arange(step.n_live, device=query.device) <= step.positions[..., None]
        out, lse = attention_with_lse(query, *live, causal=False, mask=visible[:, None], **options)
        return out[:, :, 0], lse[:, :, 0]
