"""vLLM's attention on a CPU, with contexts: pages for a request's own tokens, the pool for its context, merged exactly.

vLLM's own CPU kernel gives no log-sum-exp and keeps its pages in an order of its own. So pages are written and read
here, in plain rows; vLLM allocates and schedules them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from kvzip_press.kernels.dense_attention import attention_with_lse, merge_attention
from kvzip_press.serving.vllm.steps import Step
from kvzip_press.serving.vllm.workers import WORKERS


@dataclass
class ContextAttentionMetadata(CPUAttentionMetadata):
    """vLLM's, and which token of the step reads which context, from the first layer on."""

    step: Step | None = None


class ContextMetadataBuilder(CPUAttentionMetadataBuilder):
    """Leaves the step to the first layer: the connector learns what a request reads only after this."""

    def build(self, *args: Any, **kwargs: Any) -> ContextAttentionMetadata:
        """Returns the metadata of a step."""
        built = super().build(*args, **kwargs)
        return ContextAttentionMetadata(**{one.name: getattr(built, one.name) for one in fields(built)})


class ContextAttentionImpl(CPUAttentionBackendImpl):
    """Attends to pages and pool."""

    reads_contexts = True

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        """Writes new keys and values ``[tokens, heads, head_dim]`` into their slots."""
        written = slot_mapping[: len(key)] >= 0
        slots = slot_mapping[: len(key)][written]
        for pages, states in zip(_pages(kv_cache), (key, value), strict=True):
            size = pages.shape[2]
            pages[slots // size, :, slots % size] = states[: len(written)][written]

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Writes attention ``[tokens, heads, head_dim]`` to ``output`` and returns it."""
        if attn_metadata is None:  # while vLLM measures memory
            return output
        [worker] = WORKERS
        n_tokens = attn_metadata.num_actual_tokens
        starts = attn_metadata.query_start_loc.tolist()
        query, softcap = query[:n_tokens], self.logits_soft_cap or None
        if attn_metadata.step is None:
            attn_metadata.step = Step.of(worker, attn_metadata, self.num_heads)
        options = {"scaling": self.scale, "softcap": softcap}
        context, context_lse = attn_metadata.step.attend(query, layer.layer_name, **options)
        pages = _pages(kv_cache)
        for row, (start, stop) in enumerate(pairwise(starts)):
            if stop == start:
                continue
            own = (_own(one, attn_metadata, row) for one in pages)
            tokens = slice(start, stop)
            tail, tail_lse = attention_with_lse(query[tokens].transpose(0, 1)[None], *own, causal=True, **options)
            parts = (context[tokens].transpose(0, 1)[None], context_lse[tokens].transpose(0, 1)[None])
            output[tokens] = merge_attention(*parts, tail, tail_lse)[0][0].transpose(0, 1)
        return output


class ContextAttentionBackend(CPUAttentionBackend):
    """What vLLM finds under the name of its own CPU backend."""

    @staticmethod
    def get_impl_cls() -> type[ContextAttentionImpl]:
        """Returns the implementation."""
        return ContextAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ContextMetadataBuilder]:
        """Returns the builder of its metadata."""
        return ContextMetadataBuilder


def _pages(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values, ``[blocks, heads, block_size, head_dim]``, as views of vLLM's buffer."""
    n_blocks, n_heads, block_size, _ = kv_cache.size()
    keys, values = kv_cache.view(n_blocks, n_heads, 2 * block_size, -1).chunk(2, dim=2)
    return keys, values


def _own(pages: torch.Tensor, metadata: Any, row: int) -> torch.Tensor:
    """Returns the tokens of a request, ``[1, heads, n, head_dim]``, gathered from its pages."""
    n = int(metadata.seq_lens[row])
    blocks = metadata.block_table[row, : -(-n // pages.shape[2])].long()
    return pages[blocks].transpose(0, 1).flatten(1, 2)[None, :, :n]
