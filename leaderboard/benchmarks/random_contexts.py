"""vLLM's connector over contexts of random pairs: every name is one, and no file is read.

In a file of its own, since each of vLLM's processes imports it by name.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kvzip_press.kernels.benchmarks.cases import uneven_lengths
from kvzip_press.serving.arena import empty_rows
from kvzip_press.serving.context import PackedContext
from kvzip_press.serving.folder import ContextFile
from kvzip_press.serving.vllm import replicas
from kvzip_press.serving.vllm.attention import served_by
from kvzip_press.serving.vllm.connector import ContextConnector
from kvzip_press.serving.vllm.facts import ServedModel


class RandomContexts(ContextConnector):
    """The connector; ``kv_connector_extra_config`` has "context" (tokens) and "kept" besides."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        settings = vllm_config.kv_transfer_config.get_from_extra_config
        use_random_contexts(served_by(vllm_config), settings("context", 1), settings("kept", 1.0))
        super().__init__(vllm_config, role, kv_cache_config)


class _AnyContext:
    """A folder that has every name."""

    def __init__(self, *_: object) -> None:
        """Takes what a folder takes."""

    def find(self, name: str) -> ContextFile:
        """Returns a file that nothing reads."""
        return ContextFile(Path(name), (0, 0, 0))


def random_lengths(num_layers: int, num_heads: int, context: int, kept: float) -> torch.Tensor:
    """Returns how many pairs each head keeps of a context, int32 ``[layers, heads]``."""
    lengths = uneven_lengths(num_layers * num_heads, context, kept, 1.0)
    return torch.tensor(lengths, dtype=torch.int32).view(num_layers, num_heads)


def use_random_contexts(served: ServedModel, context: int, kept: float) -> None:
    """Lets the pools of this process find a context of random pairs under every name.

    Args:
        served: The model.
        context: Tokens of a context.
        kept: The fraction of pairs that is kept of them.
    """
    shape = served.shape
    lengths = random_lengths(shape.num_layers, shape.num_key_value_heads, context, kept)
    held: dict[tuple[int, int], PackedContext] = {}

    def packed(_: Path, packing: Any, heads: slice) -> PackedContext:
        key = heads.start, heads.stop
        if key not in held:  # once: contexts of the same pairs take as long as those of others
            own = lengths[:, heads]
            size = int(own.sum()), shape.head_dim, shape.dtype, shape.storage, packing.device
            rows = [empty_rows(*size) for _ in range(2)]
            for one in rows:
                for tensor in (one,) if isinstance(one, torch.Tensor) else (one.codes, one.scales):
                    tensor.random_(-100, 100) if tensor.dtype == torch.int8 else tensor.normal_(0.0, 0.1)
            held[key] = PackedContext(rows[0], rows[1], own, context)
        return held[key]

    module: Any = replicas
    module.ContextFolder = _AnyContext
    module.read_record = lambda _: SimpleNamespace(n_seen=0, n_context=0, turn_starts=())
    module.pair_counts = lambda _: lengths
    module.packed_pairs = packed
