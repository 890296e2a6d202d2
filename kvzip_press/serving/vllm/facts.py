"""What an engine has to know of a model to serve its contexts: taken from transformers' model, kept without it.

vLLM fuses and reorders weights, so whether a file of a context was made by its model cannot be seen there. Before the
engine starts, the same files are loaded by transformers once, and what is noted of them goes to all its processes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.cache.file.reading import pair_counts, read_record
from kvzip_press.cache.file.record import DTYPES, NAMES, CacheRecord, settings_of
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError
from kvzip_press.files import json_of, replacing, to_json
from kvzip_press.model.identity import layer_fingerprint
from kvzip_press.model.structure import attention_layers, text_config, text_decoder
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.serving.context import PoolShape
from kvzip_press.serving.packing import check_storage
from kvzip_press.serving.rotation import Rotation
from kvzip_press.serving.shares import Share

_EXPECTED = "expected the facts of a served model, as kvzip_press.serving.vllm.settings wrote them"


@dataclass(frozen=True)
class ServedModel:
    """A model whose contexts are served, and where they are.

    Attributes:
        folder: The folder of contexts.
        pool_bytes: Bytes of the pool, in each process that holds one.
        n_ranks: Number of these processes, which share the heads (tensor parallelism).
        storage: How the pool holds pairs, see :class:`kvzip_press.serving.context.PoolShape`.
        num_attention_heads: Query heads.
        num_key_value_heads: KV heads.
        head_dim: Width of a key and of a value.
        dtype: Their dtype, as safetensors names it.
        config: The settings that decide what keys and values mean.
        fingerprints: For each layer, the fingerprint of the weights that make its keys.
        frequencies: How keys are turned, see :class:`kvzip_press.serving.rotation.Rotation`.
        layouts: Likewise, for each layer.
    """

    folder: str
    pool_bytes: int
    n_ranks: int
    storage: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    dtype: str
    config: dict[str, Any]
    fingerprints: tuple[str, ...]
    frequencies: tuple[float, ...]
    layouts: tuple[str, ...]

    @classmethod
    def of(
        cls, model: nn.Module, folder: str | Path, *, pool_bytes: int, n_ranks: int = 1, storage: str = "model"
    ) -> ServedModel:
        """Returns the facts of a model as transformers loads it.

        Raises:
            InvalidArgumentError: Pools hold nothing in this storage.
            UnsupportedModelError: Its contexts cannot be shared; the message says why.
        """
        shape, rotation = PoolShape.of(model, storage), Rotation.of(model)
        weights = weights_fingerprint(text_decoder(model))
        return cls(
            folder=str(Path(folder).absolute()),
            pool_bytes=pool_bytes,
            n_ranks=n_ranks,
            storage=storage,
            num_attention_heads=int(text_config(model).num_attention_heads),
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            dtype=NAMES[shape.dtype],
            config=settings_of(text_config(model)),
            fingerprints=tuple(layer_fingerprint(layer.module, weights) for layer in attention_layers(model)),
            frequencies=tuple(rotation.frequencies.tolist()),
            layouts=rotation.layouts,
        )

    @property
    def shape(self) -> PoolShape:
        """The shape of a pool with all heads."""
        return PoolShape(len(self.layouts), self.num_key_value_heads, self.head_dim, DTYPES[self.dtype], self.storage)

    @property
    def rotation(self) -> Rotation:
        """How keys are turned."""
        return Rotation(torch.tensor(self.frequencies, dtype=torch.float64), self.layouts)

    def check(self, record: CacheRecord) -> None:
        """Raises CacheMismatchError if another model made a cache, UnsupportedCacheError if the pool cannot hold it."""
        if record.config != self.config:
            differ = sorted(name for name in {*record.config, *self.config} if self._differs(record, name))
            raise CacheMismatchError(f"this cache was made by another model: other settings of {', '.join(differ)}")
        if record.dtype != self.dtype:
            raise CacheMismatchError(f"expected a cache in {self.dtype}, as the model is, got one in {record.dtype}")
        if tuple(layer.fingerprint for layer in record.layers) != self.fingerprints:
            raise CacheMismatchError(
                "this cache was made by another model, or by this one with other weights or adapters (or saved by an "
                "earlier version of kvzip-press, which noted too little of them)"
            )
        check_storage(record, self.storage)

    def check_room(self, path: Path) -> None:
        """Raises InvalidArgumentError if the context of a file would not fit into an empty pool."""
        n_tail = (record := read_record(path)).n_seen - record.n_context
        room = Share(0, self.n_ranks).room(pair_counts(path) + n_tail) * self.shape.pair_bytes
        if room > self.pool_bytes:
            raise InvalidArgumentError(
                f"expected a context that fits into a pool of {self.pool_bytes} bytes, got one of {room}: compress it "
                "further, or serve with a larger --pool-gb"
            )

    def _differs(self, record: CacheRecord, name: str) -> bool:
        return bool(record.config.get(name) != self.config.get(name))

    def write(self, path: Path) -> None:
        """Writes the facts as JSON, for the engine's processes.

        Raises:
            CacheFileError: The file cannot be written.
        """
        with replacing(path) as temporary:
            temporary.write_text(to_json(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> ServedModel:
        """Reads what :meth:`write` wrote.

        Raises:
            CacheMismatchError: It is something else.
        """
        data = json_of(Path(path).read_text(encoding="utf-8"), CacheMismatchError, _EXPECTED)
        lists = ("fingerprints", "frequencies", "layouts")
        facts: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in data.items()}
        return cls(**facts)
