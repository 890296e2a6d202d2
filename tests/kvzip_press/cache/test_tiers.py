"""Tiers: which pairs get more bits, what both tiers hold, and how a user says how many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import KVzipPress, RaggedCache, RandomPress, compress, compress_in_chunks, prefill
from kvzip_press.cache.codecs.by_name import name_of, storage_named
from kvzip_press.cache.codecs.held import NewPairs
from kvzip_press.cache.codecs.k8v4 import K8V4Rows
from kvzip_press.cache.codecs.tiers import K4V2Rows
from kvzip_press.cache.cold.span import ColdPart
from kvzip_press.cache.file.checks import check_storage
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.errors import CacheFileError, InvalidArgumentError
from kvzip_press.prefilling.eviction import Span
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
TEXT = "The key of the red box is under the mat, and the mat is at the door."
DIM, HEADS, ROWS, TOKENS = 16, 2, 2, 40


def new_pairs(seed: int = 0) -> NewPairs:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, ROWS, HEADS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    keep = torch.rand(ROWS, HEADS, TOKENS, generator=generator) < 0.6
    importance = torch.rand(ROWS, HEADS, TOKENS, generator=generator).mul(8).round() / 8  # many ties
    return NewPairs(keys, values, keep, torch.arange(TOKENS, dtype=torch.int32).expand(ROWS, -1), importance)


def packed(name: str, new: NewPairs) -> PackedPairs:
    kind = storage_named(name)
    importance = new.importance
    return PackedPairs.pack(new.keys, new.values, new.keep, new.positions, storage=kind, importance=importance)


@pytest.mark.parametrize(("name", "share"), [("tiers", 1 / 3), ("tiers:0.25", 0.25), ("tiers:0.9", 0.9)])
def test_a_share_of_the_kept_pairs_of_a_row_is_high(name, share) -> None:
    """The best by importance, of all heads together; ties by head, then position."""
    new = new_pairs()
    high = storage_named(name)(DIM, DIM, torch.float64).high(new)
    for row in range(ROWS):
        kept = [tuple(pair) for pair in new.keep[row].nonzero().tolist()]
        best = sorted(kept, key=lambda pair: (-float(new.importance[row][pair]), pair))[: round(share * len(kept))]
        assert [tuple(pair) for pair in high[row].nonzero().tolist()] == sorted(best)


@pytest.mark.parametrize(("name", "factor"), [("tiers:1/n", 1), ("tiers:12.5/n", 12.5)])
def test_a_threshold_is_one_of_uniform_attention(name, factor) -> None:
    """High is what has at least so many times the weight that uniform attention would give, the unit of importance."""
    new = new_pairs()
    new = replace(new, importance=new.importance * TOKENS)
    high = storage_named(name)(DIM, DIM, torch.float64).high(new)
    assert torch.equal(high, new.keep & (new.importance >= factor))
    assert 0 < int(high.sum()) < int(new.keep.sum())


def test_what_is_protected_is_high_and_so_is_all_that_nobody_ranked() -> None:
    """Although a share may be too small for it."""
    new = new_pairs()
    new.importance[0, :, :30] = torch.inf
    storage = storage_named("tiers:0.1")(DIM, DIM, torch.float64)
    assert torch.equal(storage.high(new)[0], new.keep[0] & (torch.arange(TOKENS) < 30))
    assert torch.equal(storage.high(replace(new, importance=None)), new.keep)


def test_each_tier_holds_its_pairs_as_that_storage_does() -> None:
    """High with keys and values of 8 and 4 bits, low of 4 and 2; in one order of positions."""
    new = new_pairs()
    pairs = packed("tiers", new)
    high = storage_named("tiers")(DIM, DIM, torch.float64).high(new)
    decoded, is_high = pairs.storage.decode(pairs), pairs.columns["is_high"].bool()
    for kind, of_tier, tier in ((K8V4Rows, is_high, high), (K4V2Rows, ~is_high, ~high)):
        mask = new.keep & tier & (new.positions >= 4).unsqueeze(1)
        alone = PackedPairs.pack(new.keys, new.values, mask, new.positions, storage=kind)
        for found, expected in zip(decoded, alone.storage.decode(alone), strict=True):
            assert torch.equal(found[of_tier & (pairs.positions >= 4)], expected)
    assert pairs.nbytes(slice(None)) == sum(tensor.nbytes for tensor in pairs.tensors)
    assert [pairs.parts[name].pair_bytes for name in ("high", "low")] == [30, 20]


def test_a_press_says_what_is_important() -> None:
    """By its scores, in whole contexts and in chunks; a fraction of 0.1 high and 0.2 low is a third of 0.3."""
    model = tiny_model(num_layers=2)
    done = prefill(model, TOKENIZER, TEXT)
    scores = RandomPress(0.7).score(done)
    cache = done.evict(scores, storage="tiers:0.333333")
    for i, layer in cache.ragged_layers():
        is_high, kept = layer.packed.columns["is_high"].bool(), layer.packed.total
        assert abs(int(is_high.sum()) - kept / 3) <= 0.5
        segments = layer.packed.segments_of_entries()
        values = scores.layers[i][0, segments, layer.packed.positions.long()]
        values = values.masked_fill(scores.protected[0, layer.packed.positions.long()], torch.inf)
        assert float(values[is_high].min()) >= float(values[~is_high].max())
    chunks = compress_in_chunks(
        model, TOKENIZER, TEXT, KVzipPress(0.5), chunk_size=16, window_size=8, storage="tiers:0.5"
    )
    assert all(len(x.packed.columns["is_high"].unique()) == 2 for _, x in chunks.ragged_layers())
    assert cache.compression > done.evict(scores, storage="k8v4").compression


def test_only_tiers_ask_how_important_pairs_are(monkeypatch) -> None:
    """Others have nothing made of the scores for them: neither in an eviction nor when evicted pairs come back."""
    done = prefill(tiny_model(num_layers=1), TOKENIZER, TEXT)
    scores = RandomPress(0.7).score(done)
    cold = [done.evict(scores, storage=name, cold="cpu") for name in ("int8", "tiers")]
    monkeypatch.setattr(Span, "protected_first", lambda *_: 1 / 0)
    monkeypatch.setattr(ColdPart, "importance", lambda _: 1 / 0)
    assert done.evict(scores, storage="int8").storage == "int8"
    cold[0].restore(0.3)
    with pytest.raises(ZeroDivisionError):
        done.evict(scores, storage="tiers")
    with pytest.raises(ZeroDivisionError):
        cold[1].restore(0.3)


def test_pairs_stay_in_their_tier(tmp_path) -> None:
    """Later turns are ranked by themselves, by the rule that the cache was made with, which a file keeps."""
    model, path = tiny_model(num_layers=2), tmp_path / "cache.safetensors"
    cache = compress(model, TOKENIZER, TEXT, RandomPress(0.5, storage="tiers:0.20"))
    assert cache.storage == "tiers:0.2"
    cache.save(path)
    cache = RaggedCache.load(path, model)
    assert cache.storage == "tiers:0.2"
    before = {i: x.packed.columns["is_high"].tolist() for i, x in cache.ragged_layers()}
    dense = DynamicCache()
    dense.layers = list(cache.layers)
    with RandomPress(0.5, seed=1)(model), torch.no_grad():
        model(torch.arange(3, 43)[None], past_key_values=dense)
    for i, layer in RaggedCache.of(dense).ragged_layers():
        old = layer.packed.positions < cache.n_seen - 40
        assert layer.packed.columns["is_high"][old].tolist() == before[i]
        new = layer.packed.columns["is_high"][~old]
        assert int(new.sum()) == round(0.2 * len(new))


@pytest.mark.parametrize(
    "name", ["tiers:", "tiers:0", "tiers:1", "tiers:1.5", "tiers:-1/n", "tiers:x", "tiers:0.1,0.2"]
)
def test_rules_that_are_none_are_refused(name) -> None:
    """Where they are given."""
    with pytest.raises(
        InvalidArgumentError, match=r"RandomPress: expected tiers with a share of pairs between 0 and 1"
    ):
        RandomPress(0.5, storage=name)


def test_names_with_parameters() -> None:
    """One rule has one name and one class; other storages have no parameters."""
    assert storage_named("tiers:0.50") is storage_named("tiers:0.5")
    assert [name_of(storage_named(name)) for name in ("tiers", "tiers:0.50", "tiers:2.0/n")] == [
        "tiers",
        "tiers:0.5",
        "tiers:2/n",
    ]
    with pytest.raises(InvalidArgumentError, match="expected nothing behind the name of a storage without parameters"):
        storage_named("int8:4")
    with pytest.raises(InvalidArgumentError, match="expected a head_dim that is a power of two"):
        storage_named("tiers:0.5").check_widths(24, 24)


def test_a_file_whose_tiers_contradict_each_other_is_refused(tmp_path) -> None:
    """Neither written nor read."""
    model = tiny_model(num_layers=1)
    cache = compress(model, TOKENIZER, TEXT, RandomPress(0.5, storage="tiers"))
    [(_, layer)] = cache.ragged_layers()
    is_high = layer.packed.columns["is_high"]
    is_high[int(((is_high == 0) & (layer.packed.positions >= 4)).long().argmax())] = 1
    with pytest.raises(InvalidArgumentError, match="expected as many pairs in the part 'high' as belong there"):
        cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(CacheFileError, match=r"storage 'tiers:9': expected tiers with a share"):
        check_storage("tiers:9")
