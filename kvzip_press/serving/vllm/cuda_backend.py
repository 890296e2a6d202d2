"""vLLM's FlashAttention on a GPU, with contexts: its kernel over the pages, ours over the pool, merged exactly.

Two launches a layer come to vLLM's own: one reads the pool, one merges, where the result of the pages lies. Both, and
what a step needs before its first layer, are part of vLLM's captured graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.serving.vllm.steps import Step
from kvzip_press.serving.vllm.workers import WORKERS, worker_for


@dataclass
class ContextFlashMetadata(FlashAttentionMetadata):
    """vLLM's, and which token of the step reads which context, from the first layer on."""

    step: Step | None = None


class ContextFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """Leaves the step to the first layer: the connector learns what a request reads only after this."""

    def build(self, *args: Any, **kwargs: Any) -> ContextFlashMetadata:
        """Returns the metadata of a step."""
        built = super().build(*args, **kwargs)
        return ContextFlashMetadata(**{one.name: getattr(built, one.name) for one in fields(built)})

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Returns False: what requests share lies in the pool, and not in pages."""
        return False


class ContextFlashImpl(FlashAttentionImpl):
    """Attends to pages and pool."""

    reads_contexts = True

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Allocates the pool, with the first layer.

        Raises:
            InvalidArgumentError: The layer attends in a way that cannot be merged with a context.
        """
        super().process_weights_after_loading(act_dtype)
        against = {
            "sliding windows": tuple(self.sliding_window or (-1, -1)) != (-1, -1),
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
        }
        if found := [name for name, given in against.items() if given]:
            raise InvalidArgumentError(f"expected plain causal attention, got a model with {', '.join(found)}")
        worker_for(get_current_vllm_config())

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
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        n_tokens = attn_metadata.num_actual_tokens
        query, out = query[:n_tokens], output[:n_tokens]
        if attn_metadata.step is None:
            attn_metadata.step = Step.of(WORKERS[0], attn_metadata, self.num_heads)
        tail = out, self._attend_to_pages(query, kv_cache, attn_metadata, out).t()
        options = {"scaling": self.scale, "softcap": self.logits_soft_cap or None}
        attn_metadata.step.attend(query, layer.layer_name, tail=tail, out=out, **options)
        return output

    def _attend_to_pages(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, out: torch.Tensor
    ) -> torch.Tensor:
        """Writes attention to the requests' own tokens, and returns its log-sum-exp ``[heads, tokens]``."""
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
        return found

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
