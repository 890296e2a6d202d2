"""vLLM's attention on a CPU, with contexts.

vLLM's own CPU kernel gives no log-sum-exp and keeps its pages in an order of its own. So pages are written and read
here, in plain rows; vLLM allocates and schedules them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from kvzip_press.kernels.dense_attention import attention_with_lse
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.serving.vllm.attention import ReadsContexts


class ContextAttentionImpl(ReadsContexts, CPUAttentionBackendImpl):
    """Attends to pages and pool."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        """Writes new keys and values ``[tokens, heads, head_dim]`` into their slots."""
        written = slot_mapping[: len(key)] >= 0
        slots = slot_mapping[: len(key)][written]
        for pages, states in zip(_pages(kv_cache), (key, value), strict=True):
            size = pages.shape[2]
            pages[slots // size, :, slots % size] = states[: len(written)][written]

    def attend_to_pages(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, out: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`ReadsContexts`."""
        pages = _pages(kv_cache)
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=accumulation_dtype(query.dtype))
        for row, (start, stop) in enumerate(pairwise(metadata.query_start_loc.tolist())):
            if stop == start:
                continue
            keys, values = (_own(one, metadata, row) for one in pages)
            tokens, softcap = query[start:stop].transpose(0, 1)[None], self.logits_soft_cap or None
            got, own_lse = attention_with_lse(tokens, keys, values, causal=True, scaling=self.scale, softcap=softcap)
            out[start:stop], lse[start:stop] = got[0].transpose(0, 1), own_lse[0].t()
        return lse


class ContextAttentionBackend(CPUAttentionBackend):
    """What vLLM finds under the name of its own CPU backend."""

    @staticmethod
    def get_impl_cls() -> type[ContextAttentionImpl]:
        """Returns the implementation."""
        return ContextAttentionImpl


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
