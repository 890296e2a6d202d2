"""vLLM's KV connector for compressed contexts: tells the scheduler when a request may begin, the worker what it reads.

Nothing goes into vLLM's pages: its scheduler sees requests without contexts, whose tokens begin at position 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.replicas import Orders, SchedulerPool, WorkerPool
from kvzip_press.serving.vllm.requests import context_of

WORKERS: list[WorkerPool] = []  # the worker process's own: its attention layers find it here


@dataclass
class ContextMetadata(KVConnectorMetadata):
    """What the worker does before a step."""

    orders: Orders


class ContextConnector(KVConnectorBase_V1):
    """The connector, in the role of the scheduler or of the worker.

    Raises:
        InvalidArgumentError: An option of the engine does not go with shared contexts; the message says which and why.
        CacheFileError: The folder of contexts cannot be read.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_options(vllm_config)
        served = ServedModel.read(vllm_config.kv_transfer_config.get_from_extra_config("served_model", ""))
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerPool(served)
            return
        device = vllm_config.device_config.device
        self._worker = WorkerPool(served, device=device, n_blocks=kv_cache_config.num_blocks)
        WORKERS[:] = [self._worker]

    # Scheduler ------------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Returns that no tokens are loaded into pages, or None for a request that has to wait for its context."""
        name = context_of(request.kv_transfer_params)
        return (0 if self._scheduler.admit(request.request_id, name) else None), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes which block a request begins with."""
        self._scheduler.start(request.request_id, blocks.get_block_ids()[0][0])

    def build_connector_meta(self, scheduler_output: Any) -> ContextMetadata:
        """Returns what the worker does before this step."""
        return ContextMetadata(self._scheduler.take_orders())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Lets the request's context go; its pages may be freed."""
        self._scheduler.finish(request.request_id)
        return False, None

    # Worker ---------------------------------------------------------------------------------------------------------

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Does what the scheduler decided; ``start_load_kv`` may come after the forward."""
        super().bind_connector_metadata(connector_metadata)
        self._worker.obey(connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def wait_for_save(self) -> None:
        """Does nothing."""


def check_options(vllm_config: Any) -> None:
    """Raises InvalidArgumentError for options of an engine that do not go with contexts outside of its pages."""
    against = {
        "--enable-prefix-caching": (
            vllm_config.cache_config.enable_prefix_caching,
            "one question to two contexts has two sets of keys, which it would take for the same",
        ),
        "--tensor-parallel-size and --pipeline-parallel-size above 1": (
            vllm_config.parallel_config.world_size > 1,
            "each process would have to load its own heads and layers, which is not built",
        ),
        "--speculative-config": (
            vllm_config.speculative_config is not None,
            "drafts would have to read the contexts too",
        ),
        "--enable-lora": (vllm_config.lora_config is not None, "contexts belong to the weights that made them"),
    }
    found = [f"{option}: {why}" for option, (given, why) in against.items() if given]
    if found:
        raise InvalidArgumentError(f"expected an engine that can share contexts, got {'; '.join(found)}")
