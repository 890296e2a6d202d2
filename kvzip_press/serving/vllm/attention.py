"""What layers of attention share on a GPU and on a CPU: pages for own tokens, this process's pool for contexts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.replicas import WorkerPool
from kvzip_press.serving.vllm.steps import Step

WORKERS: list[WorkerPool] = []  # one at most


def served_by(vllm_config: Any) -> ServedModel:
    """Returns the model that an engine serves contexts of, by its configuration."""
    return ServedModel.read(vllm_config.kv_transfer_config.get_from_extra_config("served_model", ""))


def worker_for(vllm_config: Any) -> WorkerPool:
    """Returns this process's pool, made when it is first asked for.

    On a GPU that is while weights are loaded, so that vLLM counts its memory before it takes the rest for pages.
    """
    served = served_by(vllm_config)
    if not WORKERS or WORKERS[0].served != served:
        rank = get_tensor_model_parallel_rank()
        WORKERS[:] = [WorkerPool(served, device=vllm_config.device_config.device, rank=rank)]
    return WORKERS[0]


class ReadsContexts:
    """Stands in front of vLLM's class of a layer, whose attention to pages it merges with attention to the pool.

    A backend says how it attends to pages, in :meth:`attend_to_pages`; all else is here.

    Attributes:
        reads_contexts: True, by which the connector knows these layers.
    """

    reads_contexts = True
    num_heads: int
    scale: float
    logits_soft_cap: float | None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Allocates the pool, with the first layer.

        Raises:
            InvalidArgumentError: The layer attends in a way that cannot be merged with a context.
        """
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]  # vLLM's, behind this one
        if found := [name for name, given in against(self).items() if given]:
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
        if attn_metadata is None:  # vLLM measures memory: what our kernels take for as many tokens is to be counted too
            Step.of_none(WORKERS[0], len(query), self.num_heads).attend(query, layer.layer_name)
            own: Any = super()
            return own.forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        n_tokens = attn_metadata.num_actual_tokens
        query, out = query[:n_tokens], output[:n_tokens]
        tail = out, self.attend_to_pages(query, kv_cache, attn_metadata, out)
        options = {"scaling": self.scale, "softcap": self.logits_soft_cap or None}
        step_of(attn_metadata, self.num_heads).attend(query, layer.layer_name, tail=tail, out=out, **options)
        return output

    def attend_to_pages(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, out: torch.Tensor
    ) -> torch.Tensor:
        """Writes attention of the requests' tokens to their own pages, and returns its log-sum-exp.

        Args:
            query: ``[tokens, heads, head_dim]``.
            kv_cache: vLLM's pages of this layer.
            metadata: vLLM's, of the step.
            out: ``[tokens, heads, head_dim]``, where it is written.

        Returns:
            ``[tokens, heads]``, fp32 for 16 bits and fp32. What stands behind the last request's tokens is undefined.
        """
        raise NotImplementedError


def against(impl: Any) -> dict[str, bool]:
    """Returns what a layer may have that cannot be merged with a context, and whether it has it."""
    window = impl.sliding_window  # an integer on a CPU, left and right on a GPU
    return {
        "sliding windows": (window if isinstance(window, tuple) else (window,))[0] not in (None, -1),
        "ALiBi": impl.alibi_slopes is not None,
        "attention sinks": impl.sinks is not None,
        "attention that is not a decoder's": str(getattr(impl.attn_type, "value", impl.attn_type)) != "decoder",
        "layers that read another layer's keys": impl.kv_sharing_target_layer_name is not None,
        "heads of 256 numbers in FlashAttention 4, whose pages have a form of their own": bool(
            getattr(impl, "fa4_hd256", False)
        ),
        "answers that do not depend on the batch (VLLM_BATCH_INVARIANT), which sums over contexts do": bool(
            getattr(impl, "batch_invariant_enabled", False)
        ),
    }


def step_of(metadata: Any, num_attention_heads: int) -> Step:
    """Returns which token reads which context, noted with vLLM's metadata of a step when its first layer asks.

    It cannot be noted when vLLM builds the metadata, since the connector learns only afterwards what a request reads.
    What was noted by a warm-up must not be read by a graph that is captured with the same metadata: the graph would
    answer about the contexts of the warm-up for ever. It is noted anew, inside the graph.

    Args:
        metadata: vLLM's, one object for the layers of a step.
        num_attention_heads: Query heads of this process.

    Raises:
        InvalidArgumentError: The step is not one of plain causal attention.
    """
    captured = is_captured(metadata.query_start_loc.device)
    noted: tuple[Step, bool] | None = vars(metadata).get("kvzip_press_step")
    if noted is None or noted[1] != captured:
        _check(metadata)
        noted = Step.of(WORKERS[0], metadata, num_attention_heads), captured
        metadata.kvzip_press_step = noted
    return noted[0]


def is_captured(device: torch.device) -> bool:
    """Returns whether what is launched now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check(metadata: Any) -> None:
    others = ("rswa_prefix_lens", "mm_prefix_query_range_tensor", "mm_prefix_range_tensor")
    found = [name for name in others if getattr(metadata, name, None) is not None]
    if getattr(metadata, "causal", True) is not True:
        found.append("causal")
    if found:
        raise InvalidArgumentError(f"expected a step of plain causal attention, got one with {', '.join(found)}")
