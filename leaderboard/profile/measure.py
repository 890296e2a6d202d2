"""Measures one cache: reads a context, compresses it, and decodes behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.attention.implementation import detach
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.compat import DynamicCache
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.profile.decode import WARMUP_STEPS, plain_ms, stepped_ms
from kvzip_press.leaderboard.profile.rows import BASELINE, DENSE, OURS
from kvzip_press.model.devices import now, synchronize
from kvzip_press.model.structure import full_attention_layers, max_positions, text_config, text_decoder
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.registry import get_press

NO_GRAPH = "a DynamicCache makes new tensors at every step, which a CUDA graph cannot hold"


@dataclass(frozen=True)
class Case:
    """One cache to measure; the fields are those of `ProfileRow`."""

    press: str
    engine: str
    compression_ratio: float
    context_length: int
    decode_tokens: int
    compile: bool = False
    storage: str = "model"


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and the tokenizer for KVzip's prompts (None with random weights)."""

    name: str
    model: Any
    tokenizer: Any = None

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return torch.device(next(self.model.parameters()).device)

    def context(self, length: int, seed: int = 0) -> torch.Tensor:
        """Returns random token ids ``[1, length]``, the same for every press: times do not depend on the text."""
        generator = torch.Generator().manual_seed(seed)
        vocab_size = text_config(self.model).vocab_size
        return torch.randint(3, vocab_size, (1, length), generator=generator).to(self.device)


class Memory:
    """Peak GPU memory beyond what was allocated (the weights) when this object was made; None on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def restart(self) -> None:
        """Forgets the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int | None:
        """Returns the peak in bytes since the last restart."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._base


def measure(subject: Subject, case: Case) -> dict[str, Any]:
    """Measures a case; the figures have the names of `ProfileRow`'s fields.

    The steps of a press of ours are timed in turns with those of the ragged cache that keeps everything, the steps of
    kvpress's with those of a DynamicCache. Either is read anew for that, so that it takes no memory before.

    Raises:
        InvalidArgumentError: More tokens than the model has positions, or a press that refuses.
        torch.OutOfMemoryError: Out of GPU memory. Any other error is passed on too; the caller turns it into a row.
    """
    limit = max_positions(subject.model)
    needed = case.context_length + WARMUP_STEPS + case.decode_tokens
    if limit is not None and needed > limit:
        raise InvalidArgumentError(f"expected context and decoded tokens within {limit} positions, got {needed}")
    if case.engine == OURS:
        return _ours(subject, case)
    return _dense(subject, case) if case.engine == DENSE else _kvpress(subject, case)


def _ours(subject: Subject, case: Case) -> dict[str, Any]:
    press, ids = get_press(case.press, case.compression_ratio), subject.context(case.context_length)
    memory = Memory(subject.device)
    memory.restart()
    synchronize(subject.device)
    done = run_prefill(subject.model, ids, torch.ones_like(ids, dtype=torch.bool), observers=[press])
    done.tokenizer = subject.tokenizer
    figures: dict[str, Any] = {"prefill_seconds": done.seconds, "peak_prefill_bytes": memory.peak()}
    if subject.device.type == "cuda":
        press.score(done)  # kernels are compiled, and cuDNN plans made, for the shapes of this length
    memory.restart()
    begin = now(subject.device)
    done.evict_in_place(press.score(done), storage=case.storage)
    figures |= {"compress_seconds": now(subject.device) - begin, "peak_compress_bytes": memory.peak()}
    cache = RaggedCache.of(done.cache)
    del done  # frees what the press gathered during the prefill too
    figures |= {
        "resident_bytes": cache.resident_bytes,
        "dense_bytes": cache.dense_bytes,
        "kept_fraction": cache.kept_fraction,
    }
    baseline = None if case.press == BASELINE else _kept_whole(subject, ids)
    return figures | stepped_ms(subject.model, cache, baseline, case.decode_tokens, compiled=case.compile)


def _kept_whole(subject: Subject, ids: torch.Tensor) -> RaggedCache:
    """Returns the ragged cache of a context from which nothing was evicted."""
    done = run_prefill(subject.model, ids, torch.ones_like(ids, dtype=torch.bool))
    done.evict_in_place(get_press(BASELINE, 0.0).score(done))
    return RaggedCache.of(done.cache)


def _dense(subject: Subject, case: Case) -> dict[str, Any]:
    """Measures plain Hugging Face: the model's own attention over a DynamicCache."""
    memory = Memory(subject.device)
    memory.restart()
    begin = now(subject.device)
    cache = _read_plainly(subject, subject.context(case.context_length))
    figures: dict[str, Any] = {"prefill_seconds": now(subject.device) - begin, "peak_prefill_bytes": memory.peak()}
    seen = RaggedCache(cache.layers)
    figures |= {"resident_bytes": seen.resident_bytes, "dense_bytes": seen.dense_bytes, "kept_fraction": 1.0}
    return figures | plain_ms([subject.model], [cache], case.decode_tokens) | {"notes": {"graph": NO_GRAPH}}


@torch.no_grad()
def _read_plainly(subject: Subject, ids: torch.Tensor) -> Any:
    model, decoder = subject.model, text_decoder(subject.model)
    detach(model)
    cache = DynamicCache(config=text_config(model))
    decoder(input_ids=ids, use_cache=True, **compat.cache_argument(decoder, cache))
    return cache


def _kvpress(subject: Subject, case: Case) -> dict[str, Any]:
    """Measures kvpress run its own way. It does not separate reading from compressing, so the peak covers both."""
    model, ids = subject.model, subject.context(case.context_length)
    from kvzip_press.presses.kvpress_adapter.original import original_press, run_original

    press = original_press(case.press, case.compression_ratio)
    if press is None:
        raise InvalidArgumentError(f"expected a press that kvpress has too, got {case.press!r}")
    memory = Memory(subject.device)
    memory.restart()
    with run_original(press, model, ids, subject.tokenizer) as run:
        figures = {
            "prefill_seconds": run.prefill_seconds,
            "compress_seconds": run.compress_seconds,
            "peak_compress_bytes": memory.peak(),
            # not the storages: KVzip's replay leaves views of larger ones, which the first decode step frees
            "resident_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in run.cache.layers),
            "dense_bytes": _dense_bytes(model, run.cache, case.context_length),
            "kept_fraction": run.kept_fraction,
            "notes": {"graph": NO_GRAPH},
        }
        return figures | plain_ms([run.model, model], [run.cache, _read_plainly(subject, ids)], case.decode_tokens)


def _dense_bytes(model: Any, cache: Any, n: int) -> int:
    """Returns the bytes of ``n`` tokens in the full-attention layers, plus what the other layers hold."""
    full = {layer.layer_idx for layer in full_attention_layers(model)}
    total = 0
    for layer_idx, layer in enumerate(cache.layers):
        held = layer.keys.nbytes + layer.values.nbytes
        total += held // layer.keys.shape[2] * n if layer_idx in full else held
    return total
