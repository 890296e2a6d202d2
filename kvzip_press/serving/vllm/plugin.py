"""vLLM's entry point ``vllm.general_plugins``, and the options with which an engine serves contexts."""

from __future__ import annotations

import os
from typing import Any

from kvzip_press.serving.vllm.requests import FACTS

BACKENDS = {  # by vLLM's names of what they take the place of
    "CPU_ATTN": "kvzip_press.serving.vllm.cpu_backend.ContextAttentionBackend",
    "FLASH_ATTN": "kvzip_press.serving.vllm.cuda_backend.ContextFlashBackend",
}


def register() -> None:
    """Puts attention with contexts in the place of vLLM's own, in processes of an engine that serves them.

    vLLM calls it in each of its processes; in others than :func:`engine_options` prepares, it does nothing.
    """
    if FACTS not in os.environ:
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, path in BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)


def engine_options(path: str) -> dict[str, Any]:
    """Returns the arguments of ``vllm.LLM`` for an engine that serves contexts, and prepares its processes.

    Args:
        path: The file of facts (:meth:`kvzip_press.serving.vllm.facts.ServedModel.write`).
    """
    os.environ[FACTS] = path
    # This process has loaded the model to find out the facts, and looked for GPUs: a fork of it could not use one.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    return {
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "ContextConnector",
            "kv_connector_module_path": "kvzip_press.serving.vllm.connector",
            "kv_role": "kv_consumer",
            "kv_load_failure_policy": "fail",  # a request whose context has gone ends, and is not tried for ever
            "kv_connector_extra_config": {"served_model": path},
        },
    }
