"""The pool of this process, which attention layers find here."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.replicas import WorkerPool

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
