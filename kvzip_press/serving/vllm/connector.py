"""vLLM's KV connector for compressed contexts: tells the scheduler when a request may begin, the worker what it reads.

Nothing goes into vLLM's pages: its scheduler sees requests without contexts, whose tokens begin at position 0.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.serving.vllm.attention import served_by, worker_for
from kvzip_press.serving.vllm.replicas import Orders, SchedulerPool
from kvzip_press.serving.vllm.requests import context_of

logger = logging.getLogger(__name__)


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
        served = served_by(vllm_config)
        check_options(vllm_config, served.n_ranks)
        self._layers = vllm_config.compilation_config.static_forward_context
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerPool(served)
            return
        self._failed: dict[str, int] = {}
        self._worker = worker_for(vllm_config)
        self._worker.begin(kv_cache_config.num_blocks)

    # Scheduler ------------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Lets no request begin before its context is there.

        vLLM 0.32 does not heed what a connector says of requests that must not read cached pages (those for
        probabilities of their prompt), and starts them. There are no cached pages here: nothing else depends on it.
        """
        request.skip_reading_prefix_cache = False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Returns that no tokens are loaded into pages, or None for a request that has to wait for its context.

        Nothing is raised, which would end the engine. A request whose context cannot be read gets pages for one token
        that is said to be loaded beside the steps. The worker reports that this failed, and vLLM ends the request with
        an error before it is in any step.
        """
        try:
            admitted = self._scheduler.admit(request.request_id, context_of(request.kv_transfer_params))
        except KVzipPressError as error:
            logger.debug("request %s cannot begin: %s", request.request_id, error)
            return 1, True
        return (0 if admitted else None), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes which block a request begins with, or that it ends because its context cannot be read."""
        first_block = blocks.get_block_ids()[0][0]
        if num_external_tokens:
            logger.error(
                "request %s ends, about what cannot be read: %r", request.request_id, request.kv_transfer_params
            )
            self._scheduler.fail(request.request_id, first_block)
        else:
            self._scheduler.start(request.request_id, first_block)

    def build_connector_meta(self, scheduler_output: Any) -> ContextMetadata:
        """Returns what the worker does before this step."""
        return ContextMetadata(self._scheduler.take_orders())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Lets the request's context go; its pages may be freed."""
        self._scheduler.finish(request.request_id)
        return False, None

    # Worker ---------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Refuses an engine whose attention would not look at the contexts.

        Raises:
            InvalidArgumentError: Another backend was chosen for a layer.
        """
        impls = {name: getattr(self._layers.get(name), "impl", None) for name in kv_caches}
        others = sorted({type(one).__name__ for one in impls.values() if not getattr(one, "reads_contexts", False)})
        if others:
            raise InvalidArgumentError(
                f"expected vLLM's own attention, FlashAttention on a GPU, which reads contexts here, got "
                f"{', '.join(others)}: leave --attention-backend out, or take FLASH_ATTN; it needs 16 bits on a GPU"
            )

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Does what the scheduler decided; ``start_load_kv`` may come after the forward."""
        super().bind_connector_metadata(connector_metadata)
        self._failed = connector_metadata.orders.failed
        self._worker.obey(connector_metadata.orders)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Returns that nothing was sent, and as received what failed, see :meth:`get_block_ids_with_load_errors`."""
        return None, set(self._failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Returns the blocks of requests whose context cannot be read, in the step in which they got them."""
        return set(self._failed.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def wait_for_save(self) -> None:
        """Does nothing."""


def check_options(vllm_config: Any, n_ranks: int) -> None:
    """Raises InvalidArgumentError for options of an engine that do not go with contexts outside of its pages.

    Args:
        vllm_config: vLLM's configuration.
        n_ranks: Processes that share the heads of contexts.
    """
    against = {
        "--enable-prefix-caching": (
            vllm_config.cache_config.enable_prefix_caching,
            "one question to two contexts has two sets of keys, which it would take for the same",
        ),
        "--kv-cache-dtype": (
            vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            "queries would be rounded to 8 bits, and the pool reads them whole",
        ),
        f"--tensor-parallel-size other than {n_ranks}": (
            vllm_config.parallel_config.tensor_parallel_size != n_ranks,
            "a context's room was reckoned for others: give it to kvzip-press serve, or n_ranks to ServedModel.of",
        ),
        "--pipeline-parallel-size above 1": (
            vllm_config.parallel_config.world_size != vllm_config.parallel_config.tensor_parallel_size,
            "each process would have to load its own layers, which is not built",
        ),
        "--decode-context-parallel-size above 1": (
            vllm_config.parallel_config.decode_context_parallel_size > 1,
            "tokens of a request would lie in several processes",
        ),
        "--speculative-config": (
            vllm_config.speculative_config is not None,
            "drafts would have to read the contexts too",
        ),
        "--enable-lora": (vllm_config.lora_config is not None, "contexts belong to the weights that made them"),
        "--enable-sleep-mode": (
            vllm_config.model_config.enable_sleep_mode,
            "the pool would be thrown away with the weights, and its tables would go on naming what was in it",
        ),
        "--enable-dbo": (
            vllm_config.parallel_config.use_ubatching,
            "two halves of a step, on two streams, would share what is noted once a step",
        ),
    }
    found = [f"{option}: {why}" for option, (given, why) in against.items() if given]
    if found:
        raise InvalidArgumentError(f"expected an engine that can share contexts, got {'; '.join(found)}")
