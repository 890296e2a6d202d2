"""vLLM's FlashAttention on a GPU, with contexts: its kernel over the pages, ours over the pool, merged exactly.

Two launches a layer come to vLLM's own: one reads the pool, one merges, where the result of the pages lies. Both, and
what a step needs before its first layer, are part of vLLM's captured graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from kvzip_press.serving.vllm.attention import ReadsContexts


class ContextFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """vLLM's, without cascade attention, whose metadata say half of what requests read."""

    @classmethod
    def get_cudagraph_support(cls, *_: Any, **__: Any) -> AttentionCGSupport:
        """Returns that all requests of a captured step have as many tokens: which one a token is of is captured too.

        The newer model runner captures a token a request, also for steps that may be of any other form.
        """
        return AttentionCGSupport.UNIFORM_BATCH

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Returns False: what requests share lies in the pool, and not in pages."""
        return False


class ContextFlashImpl(ReadsContexts, FlashAttentionImpl):
    """Attends to pages and pool."""

    def attend_to_pages(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, out: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`ReadsContexts`."""
        keys, values = self._pages(kv_cache)
        _, lse = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=metadata.block_table,
            softcap=self.logits_soft_cap,
            return_softmax_lse=True,
            scheduler_metadata=metadata.scheduler_metadata,
            fa_version=self.vllm_flash_attn_version,
            num_splits=metadata.max_num_splits,
        )
        found: torch.Tensor = lse
        return found.t()

    def _pages(self, kv_cache: torch.Tensor) -> list[torch.Tensor]:
        """Returns keys and values, ``[blocks, block_size, heads, head_dim]``, as views of vLLM's buffer."""
        if kv_cache.ndim == 5:  # [blocks, 2, block_size, heads, head_dim], vLLM 0.24
            pages = kv_cache.unbind(1)
        else:  # [blocks, heads, block_size, 2 * head_dim], vLLM 0.32
            pages = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return [canonicalize_singleton_dim_strides(one) for one in pages]


class ContextFlashBackend(FlashAttentionBackend):
    """What vLLM finds under the name of its own FlashAttention."""

    @staticmethod
    def get_impl_cls() -> type[ContextFlashImpl]:
        """Returns the implementation."""
        return ContextFlashImpl

    @staticmethod
    def get_builder_cls() -> type[ContextFlashMetadataBuilder]:
        """Returns the builder of its metadata."""
        return ContextFlashMetadataBuilder
