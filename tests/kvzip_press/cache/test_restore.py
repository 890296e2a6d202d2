"""Eviction that can be undone: what was evicted comes back as if less had been evicted, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import KVzipPress, RaggedCache, RandomPress, answer, compress, compress_in_chunks, prefill
from kvzip_press.attention.implementation import attach
from kvzip_press.budget.allocators import ALLOCATIONS, SkippingLayers, Table
from kvzip_press.cache.codecs.by_name import STORAGES
from kvzip_press.cache.file.reading import read_record
from kvzip_press.decoding.forward import read
from kvzip_press.errors import CacheFileError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
MODEL = tiny_model(num_layers=2)
TEXT = "The key of the red box is under the mat, and the mat is at the door of the house."
ROWS = [TEXT, "A short one.", TEXT[:40]]
PRESS = RandomPress(0.8, seed=3)
ENCODING_ALONE = [name for name, kind in STORAGES.items() if kind(16, 16, torch.float32).encodes_alone]
# Those that spend an amount; "table" has no shares of its own.
SPENDING = [kind.name for kind in ALLOCATIONS.values() if not kind.is_outcome and kind is not Table]
SPENDING = [*SPENDING, Table(shares=[[1.0, 3.0], [2.0, 2.0]])]


def same(one: RaggedCache, other: RaggedCache) -> None:
    """Compares everything that two caches hold of their contexts, by the bits."""
    assert [i for i, _ in one.ragged_layers()] == [i for i, _ in other.ragged_layers()]
    for (i, layer), (_, expected) in zip(one.ragged_layers(), other.ragged_layers(), strict=True):
        got, wanted = layer.packed.by_name(), expected.packed.by_name()
        assert list(got) == list(wanted)
        for name, tensor in wanted.items():
            assert got[name].dtype == tensor.dtype, (i, name)
            assert got[name].shape == tensor.shape, (i, name)
            assert got[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), (i, name)
        assert layer.packed.storage == expected.packed.storage
        facts = ("n_context", "n_protected", "n_padding", "context_ends")
        assert [getattr(layer, name) for name in facts] == [getattr(expected, name) for name in facts]


def logits(model: Any, cache: RaggedCache) -> torch.Tensor:
    attach(model)
    return read(model, cache.fork(), torch.arange(5, 9).repeat(cache.batch_size, 1))


@pytest.fixture(params=["memory", "file"])
def cold(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return "cpu" if request.param == "memory" else tmp_path / "evicted"


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("allocation", SPENDING, ids=lambda one: one if isinstance(one, str) else one.name)
def test_a_restored_cache_is_one_of_which_less_was_evicted(storage: str, allocation: Any) -> None:
    done = prefill(MODEL, TOKENIZER, ROWS)
    scores = PRESS.score(done)
    options: dict[str, Any] = {"allocation": allocation, "storage": storage}
    cache, before = done.evict(scores, **options, cold="cpu"), done.evict(scores, **options)
    same(cache, before)
    for ratio in (0.6, 0.55, 0.0):
        cache.restore(ratio)
        same(cache, done.evict(scores, ratio, **options))
    for ratio in (0.3, 0.8):
        cache.shrink(ratio)
        same(cache, done.evict(scores, ratio, **options))
    assert logits(MODEL, cache).equal(logits(MODEL, before))


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3"])
def test_it_is_so_for_every_model_with_floors_and_scores_that_are_carried(architecture: str, cold: Any) -> None:
    model = tiny_model(architecture, num_layers=2, dtype=torch.bfloat16)
    done = prefill(model, TOKENIZER, ROWS)
    press = RandomPress(0.9, "adakv", min_kept_per_head=2)
    scores = replace(press.score(done), carried=True)
    cache = done.evict(scores, cold=cold)
    cache.restore(0.4)
    same(cache, done.evict(scores, 0.4))
    assert logits(model, cache).equal(logits(model, done.evict(scores, 0.4)))


def test_protected_pairs_that_count_and_a_budget_in_tokens_go_the_same_way() -> None:
    done = prefill(MODEL, TOKENIZER, ROWS)
    scores = RandomPress(budget=6).score(done)
    window = torch.zeros_like(scores.protected)
    window[:, -4:] = True
    scores = replace(scores, protected=window, protected_count=window)
    cache = done.evict(scores, cold="cpu")
    cache.restore(0.5)
    same(cache, done.evict(scores, 0.5))


def test_compress_and_with_press_keep_what_they_evict(cold: Any) -> None:
    press = KVzipPress(0.8)
    cache = compress(MODEL, TOKENIZER, TEXT, press, cold=cold)
    cache.restore(0.3)
    same(cache, compress(MODEL, TOKENIZER, TEXT, replace(press, compression_ratio=0.3)))
    ids = torch.tensor([TOKENIZER.encode(TEXT)])
    inside, less = DynamicCache(), DynamicCache()
    with PRESS(MODEL, cold="cpu"), torch.no_grad():
        MODEL(ids, past_key_values=inside)
    with replace(PRESS, compression_ratio=0.3)(MODEL), torch.no_grad():
        MODEL(ids, past_key_values=less)
    RaggedCache.of(inside).restore(0.3)
    same(RaggedCache.of(inside), RaggedCache.of(less))


def test_turns_that_were_kept_since_stay_as_they_were_read(cold: Any) -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, PRESS, cold=cold)
    answer(MODEL, TOKENIZER, cache, "Where is it?", max_new_tokens=4, keep=True)
    turns, seen = cache.turn_starts, cache.n_seen
    tails = [layer.tail.keys.clone() for _, layer in cache.ragged_layers()]
    cache.restore()
    same(cache, compress(MODEL, TOKENIZER, TEXT, replace(PRESS, compression_ratio=0.0)))
    assert (cache.turn_starts, cache.n_seen) == (turns, seen)
    assert all(tail.equal(layer.tail.keys) for tail, (_, layer) in zip(tails, cache.ragged_layers(), strict=True))


def rearranged(cache: RaggedCache) -> None:
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)


def beams(cache: RaggedCache) -> None:
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    cache.batch_select_indices(torch.tensor([1, 2]))


@pytest.mark.parametrize("change", [rearranged, beams])
def test_what_was_evicted_follows_the_rows(change: Callable[[RaggedCache], None]) -> None:
    done = prefill(MODEL, TOKENIZER, ROWS)
    scores = PRESS.score(done)
    cache, expected = done.evict(scores, cold="cpu"), done.evict(scores, 0.35)
    change(cache)
    change(expected)
    cache.restore(0.35)
    same(cache, expected)
    assert logits(MODEL, cache).equal(logits(MODEL, expected))


def test_forks_share_what_was_evicted_and_restore_by_themselves(cold: Any) -> None:
    done = prefill(MODEL, TOKENIZER, TEXT)
    scores = PRESS.score(done)
    cache = done.evict(scores, cold=cold)
    fork = cache.fork()
    assert fork.cold_bytes == cache.cold_bytes
    fork.restore(0.2)
    same(cache, done.evict(scores))
    fork.forget_evicted()
    assert fork.cold_bytes == 0
    cache.restore(0.5)
    same(cache, done.evict(scores, 0.5))
    same(fork, done.evict(scores, 0.2))


def two_turns(press: RandomPress, first: str | None = None, second: str | None = None) -> RaggedCache:
    """A context and a later turn of another length, compressed by ``with press(model, cold=first or second):``."""
    cache = DynamicCache()
    ids = torch.tensor([TOKENIZER.encode(TEXT)])
    with torch.no_grad():
        with press(MODEL, cold=first):
            MODEL(ids, past_key_values=cache)
        MODEL(ids[:, 3:4], past_key_values=cache)
        with press(MODEL, cold=second):
            MODEL(ids[:, 5:30], past_key_values=cache)
    return RaggedCache.of(cache)


@pytest.mark.parametrize("storage", ENCODING_ALONE)
def test_each_compressed_turn_comes_back_by_itself(storage: str) -> None:
    press = replace(PRESS, storage=storage)
    before = two_turns(press)
    cache = two_turns(press, first="cpu", second="cpu")
    same(cache, before)
    cache.restore(0.0)
    counts = [layer.packed.seqlens for _, layer in cache.ragged_layers()]
    assert all(bool((count == len(TEXT) + 1 + 25).all()) for count in counts)
    cache.shrink(0.8)
    same(cache, before)  # the pairs of the later turn were made behind what was kept then
    one = two_turns(press, first="cpu")
    one.restore(0.0)
    assert one.kept_fraction < 1.0
    _, layer = next(iter(one.ragged_layers()))
    assert layer.packed.head_positions(0, 0)[: len(TEXT)].equal(torch.arange(len(TEXT), dtype=torch.int32))
    one.shrink(0.8)
    same(one, before)


def test_a_storage_that_encodes_pairs_by_what_is_kept_refuses_later_turns() -> None:
    press = replace(PRESS, storage="int4")
    with pytest.raises(InvalidArgumentError, match="later turn"):
        two_turns(press, second="cpu")
    cache = two_turns(press, first="cpu")
    with pytest.raises(UnsupportedCacheError, match="later turn"):
        cache.restore(0.0)


def test_bytes_on_the_device_and_elsewhere_are_told_apart(cold: Any) -> None:
    done = prefill(MODEL, TOKENIZER, TEXT)
    scores = PRESS.score(done)
    cache, plain = done.evict(scores, cold=cold), done.evict(scores)
    assert (cache.resident_bytes, plain.cold_bytes) == (plain.resident_bytes, 0)
    layers = [layer.packed for _, layer in cache.ragged_layers()]
    gone = sum(packed.pair_bytes * (2 * cache.n_seen - len(packed.positions)) for packed in layers)
    assert cache.cold_bytes == gone + len(layers) * (2 * cache.n_seen + 3) * 4  # scores of all pairs, and cu_seqlens
    assert f"MB evicted in {'host memory' if cold == 'cpu' else cold}" in repr(cache)
    assert "evicted" not in repr(plain)


def test_a_ratio_in_the_other_direction_or_out_of_range_is_refused_and_changes_nothing() -> None:
    done = prefill(MODEL, TOKENIZER, TEXT)
    scores = PRESS.score(done)
    cache = done.evict(scores, cold="cpu")
    cache.restore(0.5)
    cases = [
        (cache.restore, 0.7, "shrink does"),
        (cache.shrink, 0.3, "restore does"),
        (cache.shrink, 0.9, r"stayed at first, under Ratio\(compression_ratio=0.8\)"),
        (cache.restore, 1.0, r"in \[0, 1\)"),
    ]
    for call, ratio, message in cases:
        with pytest.raises(InvalidArgumentError, match=message):
            call(ratio)
    same(cache, done.evict(scores, 0.5))


def test_a_cache_without_evicted_pairs_says_how_to_keep_them() -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, PRESS)
    with pytest.raises(UnsupportedCacheError, match=r"cold='cpu'"):
        cache.restore()


def test_pairs_that_were_lost_otherwise_are_noticed() -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, PRESS, cold="cpu")
    for _, layer in cache.ragged_layers():
        layer.packed = layer.packed.emptied(1)
    with pytest.raises(UnsupportedCacheError, match="in neither"):
        cache.restore()


def test_a_file_that_changed_is_noticed_and_the_cache_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "evicted"
    cache = compress(MODEL, TOKENIZER, TEXT, PRESS, cold=path)
    whole = path.read_bytes()
    for at in (9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CacheFileError, match="evicted"):
            cache.restore()
    compress(MODEL, TOKENIZER, TEXT, replace(PRESS, seed=4), cold=path)
    with pytest.raises(CacheFileError, match="it was replaced"):
        cache.restore()
    path.unlink()
    with pytest.raises(CacheFileError, match="no such file"):
        cache.restore()
    same(cache, compress(MODEL, TOKENIZER, TEXT, PRESS))
    path.write_bytes(whole)
    cache.restore()
    assert cache.kept_fraction == 1.0


@pytest.mark.parametrize("cold", ["cuda", "cuda:0", "", 7])
def test_a_place_that_is_none_is_refused_before_the_context_is_read(cold: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="expected cold='cpu'"):
        compress(MODEL, TOKENIZER, TEXT, PRESS, cold=cold)


@pytest.mark.parametrize("read", [compress, compress_in_chunks])
def test_a_place_that_cannot_be_written_is_refused_before_the_context_is_read(
    read: Callable[..., RaggedCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_anything(*_: object, **__: object) -> None:
        pytest.fail("the context was read")

    monkeypatch.setattr(MODEL, "forward", read_anything)
    for place, said in ((tmp_path, "which is a folder"), (tmp_path / "none" / "new", "none does not exist")):
        for cold in (place, str(place)):
            with pytest.raises(InvalidArgumentError, match=rf"expected cold= to be a file .*{said}"):
                read(MODEL, TOKENIZER, TEXT, PRESS, cold=cold)
    assert not list(tmp_path.iterdir())


def test_a_press_that_decides_its_own_counts_and_a_file_for_several_prefills_are_refused(tmp_path: Path) -> None:
    from kvzip_press.budget.allocators import Decided
    from kvzip_press.budget.policy import Policy

    done = prefill(MODEL, TOKENIZER, TEXT)
    scores = PRESS.score(done)
    counts = {i: torch.full((1, 2), 5) for i in scores.layers}
    decided = replace(scores, policy=Policy(scores.policy.amount, Decided(per_head=counts)))
    with pytest.raises(InvalidArgumentError, match="decides itself"):
        done.evict(decided, cold="cpu")
    with (
        pytest.raises(InvalidArgumentError, match="expected cold=None or cold='cpu'"),
        PRESS(MODEL, cold=tmp_path / "a"),
    ):
        pass


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
def test_a_saved_cache_keeps_what_was_evicted(storage: str, cold: Any, tmp_path: Path) -> None:
    """With rows of padding, in any storage: what comes back after it was loaded is what would have come back before."""
    done = prefill(MODEL, TOKENIZER, ROWS)
    scores = PRESS.score(done)
    cache = done.evict(scores, storage=storage, cold=cold)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.save(tmp_path / "cache")
    loaded = RaggedCache.load(tmp_path / "cache", MODEL)
    same(loaded, cache)
    assert loaded.cold_bytes == cache.cold_bytes
    for ratio in (0.5, 0.0):
        loaded.restore(ratio)
        cache.restore(ratio)
        same(loaded, cache)
    loaded.shrink(0.8)
    loaded.save(tmp_path / "again")
    again = RaggedCache.load(tmp_path / "again", MODEL)
    again.restore()
    same(again, cache)


@pytest.mark.parametrize(
    ("amount", "allocation"),
    [
        ({"budget": 12}, "layer"),
        ({"compression_ratio": 0.8}, Table(shares=[[1.0, 3.0], [2.0, 2.0]])),
        ({"compression_ratio": 0.8}, {"name": "pages", "page_size": 4}),
    ],
    ids=["budget", "table", "pages"],
)
def test_a_saved_cache_knows_how_it_was_evicted(amount: Any, allocation: Any, tmp_path: Path) -> None:
    """Amount and allocation, and which of the protected pairs are inside the budget."""
    done = prefill(MODEL, TOKENIZER, ROWS[0])
    counted = done.first_tokens(2)
    scores = replace(PRESS.score(done), protected=done.first_tokens(4), protected_count=counted)
    cache = done.evict(scores, **amount, allocation=allocation, cold="cpu")
    cache.save(tmp_path / "cache")
    loaded = RaggedCache.load(tmp_path / "cache", MODEL)
    loaded.restore(0.3)
    cache.restore(0.3)
    same(loaded, cache)


def test_each_compressed_turn_of_a_saved_cache_comes_back(tmp_path: Path) -> None:
    cache: Any = DynamicCache()
    with RandomPress(0.7)(MODEL, cold="cpu"), torch.no_grad():
        for text in ("The key of the red box is here", "and the mat is at the door"):
            MODEL(torch.tensor([TOKENIZER.encode(text)]), past_key_values=cache)
    whole = RaggedCache.of(cache)
    whole.save(tmp_path / "cache")
    loaded = RaggedCache.load(tmp_path / "cache", MODEL)
    loaded.restore(0.2)
    whole.restore(0.2)
    same(loaded, whole)


def test_a_cache_is_not_saved_over_the_file_of_its_evicted_pairs(tmp_path: Path) -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, PRESS, cold="cpu")
    cache.save(tmp_path / "cache")
    loaded = RaggedCache.load(tmp_path / "cache", MODEL)
    with pytest.raises(InvalidArgumentError, match="would lose them for this cache"):
        loaded.save(tmp_path / ".." / tmp_path.name / "cache")
    cache.save(tmp_path / "cache", press="another")
    with pytest.raises(CacheFileError, match="it was replaced"):
        loaded.restore()
    loaded.forget_evicted()
    loaded.save(tmp_path / "cache")
    assert RaggedCache.load(tmp_path / "cache", MODEL).cold_bytes == 0


def test_an_allocation_of_ones_own_is_not_saved_with_what_it_evicted(tmp_path: Path) -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, RandomPress(0.5, allocation=SkippingLayers(layers=(0,))), cold="cpu")
    with pytest.raises(UnsupportedCacheError, match=r"expected an allocation out of global.*forget_evicted"):
        cache.save(tmp_path / "cache")
    cache.forget_evicted()
    cache.save(tmp_path / "cache")


def _changed(record: Any, **values: Any) -> Any:
    return replace(record, cold=(replace(record.cold[0], **values),))


def test_evicted_pairs_that_contradict_their_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stranger could write them: with digests that fit."""
    from kvzip_press.cache.file import cold_parts, writing

    cache = compress(MODEL, TOKENIZER, TEXT, PRESS, cold="cpu")
    cache.save(tmp_path / "cache")
    record = read_record(tmp_path / "cache")
    for values in (
        {"rows": (1,)},
        {"rows": (0, 0)},
        {"counted": "many"},
        {"amount": {"compression_ratio": 7}},
        {"amount": {"size": 1}},
        {"allocation": {"name": "table", "shares": "/etc/passwd"}},
        {"allocation": {"name": "nobody"}},
    ):
        with pytest.raises(CacheFileError):
            cold_parts.check_cold(_changed(record, **values))
    own = writing.cold_in

    def spoilt(name: str, value: torch.Tensor) -> Any:
        def cold_in(layers: Any) -> Any:
            records, tensors = own(layers)
            assert name in tensors and tensors[name].dtype == value.dtype
            return records, {**tensors, name: value}

        return cold_in

    _, tensors = own(dict(cache.ragged_layers()))
    monkeypatch.setattr(writing, "cold_in", spoilt("cold.0.positions", tensors["cold.0.positions"] + 2**30))
    with pytest.raises(InvalidArgumentError, match=r"this cache would not be read again: .* to ascend over the tokens"):
        cache.save(tmp_path / "spoilt")
    for name, value in {
        "cold.0.positions": tensors["cold.0.positions"].flip(1),
        "cold.0.valid": torch.zeros_like(tensors["cold.0.valid"]),
        "cold.0.1.positions": tensors["cold.0.1.positions"] + 1000,
        "cold.0.0.positions": tensors["cold.0.0.positions"].flip(0),
        "cold.0.0.cu_seqlens": tensors["cold.0.0.cu_seqlens"].flip(0),
        "cold.0.0.keys": tensors["cold.0.0.keys"][:, :4],
        "cold.0.1.every_score": tensors["cold.0.1.every_score"][..., 1:],
    }.items():
        monkeypatch.setattr(writing, "cold_in", spoilt(name, value))
        monkeypatch.setattr(writing, "cold_parts", lambda *_: None)  # a writer of ours would refuse most of them
        cache.save(tmp_path / "spoilt")
        with pytest.raises(CacheFileError):
            RaggedCache.load(tmp_path / "spoilt", MODEL)
