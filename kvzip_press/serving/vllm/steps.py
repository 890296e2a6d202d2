"""What all attention layers of a step have in common: which token reads which context."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kvzip_press.kernels.context_attention import ContextPlan, Turn, context_attention, plan_contexts
from kvzip_press.serving.vllm.replicas import WorkerPool

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Step:
    """A forward of an engine, as its layers see the pool.

    It is made in the first layer: the connector learns what a request reads only after vLLM has built the metadata. On
    a GPU nothing of it waits for the device, so a captured graph makes it anew each time that it runs.

    Attributes:
        worker: The pool.
        plan: Which token reads which context.
        turns: For each layer, how queries are turned before they meet their context.
    """

    worker: WorkerPool
    plan: ContextPlan
    turns: list[Turn | None]

    @classmethod
    def of(cls, worker: WorkerPool, metadata: Any, num_attention_heads: int) -> Step:
        """Returns what layers need, by vLLM's metadata of attention.

        Args:
            worker: The pool.
            metadata: With the number of tokens, where each request's begin, and the blocks of each request. Tokens
                behind the last request fill up a captured graph, and read nothing.
            num_attention_heads: Query heads of this process.
        """
        starts, n_tokens = metadata.query_start_loc, metadata.num_actual_tokens
        rows = worker.row_of_block[metadata.block_table[:, 0]]  # no index_select: rows that fill a graph up may have -1
        if metadata.max_query_len == 1:  # in steps that write: a token a request, in as few launches as there can be
            is_used, rows = starts[1 : n_tokens + 1] > starts[:n_tokens], rows[:n_tokens]
        else:
            tokens = torch.arange(n_tokens, dtype=starts.dtype, device=starts.device)
            rows = rows[torch.searchsorted(starts[1:], tokens, right=True).clamp(max=len(rows) - 1)]
            is_used = tokens < starts[-1]
        return cls._about(torch.where(is_used, rows, 0), worker, num_attention_heads)

    @classmethod
    def of_none(cls, worker: WorkerPool, n_tokens: int, num_attention_heads: int) -> Step:
        """Returns a step whose tokens read no context, which takes as much memory as any of as many tokens."""
        contexts = torch.zeros(n_tokens, dtype=torch.int32, device=worker.pool.begins.device)
        return cls._about(contexts, worker, num_attention_heads)

    @classmethod
    def _about(cls, contexts: torch.Tensor, worker: WorkerPool, num_attention_heads: int) -> Step:
        pool = worker.pool
        plan = plan_contexts(contexts, pool.begins, pool.lengths, num_attention_heads=num_attention_heads)
        turns: list[Turn | None] = [None] * pool.shape.num_layers
        if not pool.shape.has_turned_keys:
            turns = worker.rotation.turns(pool.n_tokens.index_select(0, contexts))
        return cls(worker, plan, turns)

    def attend(self, query: torch.Tensor, layer_name: str, **options: Any) -> torch.Tensor:
        """Computes attention of the step's tokens to their contexts, see :func:`context_attention`."""
        index, pool = layer_index(layer_name), self.worker.pool
        options.update(turn=self.turns[index], return_lse=False)  # where no context is read, nothing is to be written
        out: torch.Tensor = context_attention(query, pool.keys, pool.values, self.plan, index, **options)
        return out


@cache  # asked by each layer of each step that is not in a graph
def layer_index(name: str) -> int:
    """Returns the index in a layer's name."""
    found = _LAYER.search(name)
    assert found is not None, f"a layer's name has its index, {name} has none"
    return int(found[1])
