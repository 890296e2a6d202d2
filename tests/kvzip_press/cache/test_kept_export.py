"""The exported positions are those of the cache, readable with numpy alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, RandomPress
from kvzip_press.cache.file import kept_export
from kvzip_press.errors import CacheFileError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.testing import tiny_model

N, PADDING = 64, 7


@pytest.fixture
def cache() -> RaggedCache:
    """Two rows of a hybrid model, the second with padding; three tokens behind the context."""
    model, cache = tiny_model("gemma3_text"), DynamicCache()
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :PADDING] = 0
    with torch.no_grad(), RandomPress(0.6)(model):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(torch.randint(3, 128, (2, N)), attention_mask=mask, position_ids=positions, past_key_values=cache)
    with torch.no_grad():
        model(torch.randint(3, 128, (2, 3)), past_key_values=cache)
    return RaggedCache.of(cache)


def test_the_lines_of_the_docstring_read_it_back(cache, tmp_path, monkeypatch) -> None:
    """What the documentation shows runs as it stands, and finds each head's positions."""
    monkeypatch.chdir(tmp_path)
    cache.export_kept("kept.npz")
    lines = [line[8:] for line in str(kept_export.export_kept.__doc__).splitlines() if line.startswith(" " * 8)]
    code = "\n".join(line for line in lines if "=" in line)
    assert len(code.splitlines()) == 5
    for row, heads in enumerate(cache.kept_positions(3)):
        for head, positions in enumerate(heads):
            names = {"np": np, "r": row, "h": head}
            exec(code, names)  # the documentation's own lines
            assert names["positions"].tolist() == positions.tolist()


def test_every_array_is_int32_and_nothing_else_is_there(cache, tmp_path) -> None:
    """Compressed layers only; positions are those of RoPE, here without padding; the lengths count columns."""
    path = tmp_path / "kept"  # no suffix is added
    cache.export_kept(path)
    with np.load(path) as kept:
        arrays = dict(kept)
    parts = {f"layer{layer}_{part}" for layer in (1, 3) for part in ("positions", "cu_seqlens")}
    assert set(arrays) == parts | {"num_rows", "n_context", "n_seen"}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int32)}
    assert [int(arrays[name]) for name in ("num_rows", "n_context", "n_seen")] == [2, N, N + 3]
    for layer in (1, 3):
        bounds = arrays[f"layer{layer}_cu_seqlens"]
        assert np.array_equal(np.diff(bounds).reshape(2, -1), cache.seqlens(layer).numpy())
        assert arrays[f"layer{layer}_positions"][bounds[2] :].max() < N - PADDING


def test_pages_of_a_head_are_found_as_the_design_says(cache, tmp_path) -> None:
    """Page p of a segment begins 64 p rows behind it and ends with the segment; together they are the layer."""
    cache.export_kept(tmp_path / "kept.npz")
    kept = np.load(tmp_path / "kept.npz")
    bounds, pages = kept["layer1_cu_seqlens"], []
    for segment in range(len(bounds) - 1):
        for page in range(-(-(bounds[segment + 1] - bounds[segment]) // 64)):
            begin = bounds[segment] + 64 * page
            pages.append(kept["layer1_positions"][begin : min(begin + 64, bounds[segment + 1])])
    assert np.array_equal(np.concatenate(pages), kept["layer1_positions"])
    assert all(0 < len(page) <= 64 for page in pages)


def test_what_cannot_be_exported_is_refused(cache, tmp_path) -> None:
    """No compressed layer, layers that disagree, a folder that is not there: and no file is left."""
    with pytest.raises(UnsupportedCacheError, match="ragged"):
        RaggedCache([cache.layers[0]]).export_kept(tmp_path / "kept.npz")
    with pytest.raises(CacheFileError, match="nowhere"):
        cache.export_kept(tmp_path / "nowhere" / "kept.npz")
    cache.layers[1].tail.truncate(1)
    with pytest.raises(InvalidArgumentError, match="tokens seen"):
        cache.export_kept(tmp_path / "kept.npz")
    assert list(tmp_path.iterdir()) == []
