"""Bytes held = bytes kept, at 8k tokens, for our presses and for those of kvpress that by themselves only mask keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvzip_press import RaggedCache, RaggedPress, get_press
from kvzip_press.testing import ByteTokenizer, tiny_model

N = 8192
PRESSES = [
    pytest.param("kvzip", {"tokenizer": ByteTokenizer()}, id="kvzip"),
    pytest.param("kvzip_local", {"tokenizer": ByteTokenizer()}, id="kvzip_local"),
    pytest.param("random", {}, id="random"),
    pytest.param("snapkv", {}, id="snapkv"),
    pytest.param("adakv_expected_attention", {}, id="adakv_expected_attention", marks=pytest.mark.kvpress),
]


@pytest.mark.parametrize(("name", "options"), PRESSES)
def test_resident_bytes_follow_the_kept_fraction(name, options) -> None:
    """resident / dense is within 2 % of the kept fraction, and no storage is larger than what is seen of it."""
    check(get_press(name, 0.7, **options), kept=0.3)


@pytest.mark.kvpress
def test_duo_attention_frees_what_its_streaming_heads_lose(monkeypatch, kvpress) -> None:
    """Three of four heads keep 4 sink and 64 recent tokens only; kvpress by itself holds every byte."""
    pattern = (4, 64, np.array([[0.9, 0.1], [0.2, 0.3]]))
    monkeypatch.setattr(kvpress.DuoAttentionPress, "load_attention_pattern", staticmethod(lambda model: pattern))
    check(RaggedPress(kvpress.DuoAttentionPress(head_compression_ratio=0.75)), kept=(N + 3 * 68) / (4 * N))


def check(press, *, kept: float) -> None:
    model = tiny_model(num_layers=2, head_dim=64)
    ids = torch.randint(3, 128, (1, N), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), press(model):
        cache = RaggedCache.of(model(ids, logits_to_keep=1).past_key_values)
    assert cache.resident_bytes / cache.dense_bytes == pytest.approx(cache.kept_fraction, rel=0.02)
    assert cache.kept_fraction == pytest.approx(kept, abs=0.002)
    for _, layer in cache.ragged_layers():
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in layer.tensors)
