"""The pool of contexts: which run each has, who goes when room is needed, what stays; and the free list."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.serving.context import PackedContext, PoolShape
from kvzip_press.serving.free_list import FreeList
from kvzip_press.serving.pool import ContextPool, Held
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.any_transformers

LAW = settings(deadline=None, max_examples=50, derandomize=True)
SHAPE = PoolShape(num_layers=2, num_key_value_heads=3, head_dim=4, dtype=torch.float32)


def context(n_pairs: int, seed: int = 0) -> PackedContext:
    """A context of random pairs, unevenly shared by layers and heads; some heads have none."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(5, (n_pairs,), generator=generator)
    lengths = torch.bincount(owners, minlength=6).view(2, 3).int()
    keys, values = torch.randn(2, n_pairs, 4, generator=generator)
    return PackedContext(keys, values, lengths, n_tokens=3 * n_pairs, n_turns=seed)


def pool_of(n_pairs: int, max_contexts: int = 8) -> ContextPool:
    return ContextPool(SHAPE, n_pairs * SHAPE.pair_bytes + 3, max_contexts=max_contexts)


def held(pool: ContextPool, name: str) -> Held:
    found = pool.hold(name)
    assert found is not None
    return found


def assert_holds(pool: ContextPool, row: int, expected: PackedContext) -> None:
    """The tables lead to the context's pairs, head by head."""
    begin = 0
    for layer in range(2):
        for head in range(3):
            n = int(expected.lengths[layer, head])
            place = int(pool.begins[layer, row, head])
            assert int(pool.lengths[layer, row, head]) == n
            assert torch.equal(pool.keys[place : place + n], expected.keys[begin : begin + n])
            assert torch.equal(pool.values[place : place + n], expected.values[begin : begin + n])
            begin += n


@LAW
@given(st.lists(st.one_of(st.integers(0, 30), st.none()), max_size=60), st.randoms(use_true_random=False))
def test_the_free_list_gives_every_place_once(sizes: list[int | None], random: object) -> None:
    """Against a list of places: what is taken is free and in one piece; neighbours join; None if nothing fits."""
    free, places, taken = FreeList(100), [True] * 100, []
    for size in sizes:
        if size is None:
            if taken:
                begin, n = taken.pop(random.randrange(len(taken)))  # type: ignore[attr-defined]
                free.give(begin, n)
                places[begin : begin + n] = [True] * n
        else:
            begin = free.take(size)
            runs = "".join("1" if place else "0" for place in places).split("0")
            assert (begin is None) == (size > max(len(run) for run in runs))
            if begin is not None and size:
                assert all(places[begin : begin + size]) and begin + size <= 100
                places[begin : begin + size] = [False] * size
                taken.append((begin, size))
        assert free.n_free == sum(places)
        assert free.longest == max(len(run) for run in "".join("1" if p else "0" for p in places).split("0"))
        assert all(one[1] < other[0] for one, other in pairwise(free._stretches))


def test_the_shortest_stretch_that_fits_is_taken() -> None:
    free = FreeList(20)
    assert [free.take(n) for n in (5, 5, 2, 8)] == [0, 5, 10, 12]
    free.give(0, 5)
    free.give(10, 2)
    assert free.take(2) == 10
    assert free.take(6) is None


def test_contexts_lie_side_by_side_and_row_0_is_empty() -> None:
    pool, contexts = pool_of(100), {name: context(n, n) for name, n in (("a", 40), ("b", 1), ("c", 59))}
    assert all(pool.put(name, one) for name, one in contexts.items())
    for name, one in contexts.items():
        reader = held(pool, name)
        assert_holds(pool, reader.row, one)
        assert (reader.n_tokens, reader.n_turns) == (one.n_tokens, one.n_turns)
        assert reader.row != 0
    assert not pool.lengths[:, 0].any()
    assert pool.n_bytes_free == 0
    assert repr(pool) == "ContextPool(3 contexts, 0.0 of 0.0 MB)"
    assert pool.hold("d") is None


def test_who_was_read_longest_ago_goes_first() -> None:
    pool = pool_of(100)
    for name in "abc":
        pool.put(name, context(30))
    pool.release(held(pool, "a"))
    assert pool.names == ["b", "c", "a"]
    assert pool.put("d", context(30))
    assert pool.names == ["c", "a", "d"], "one was enough"
    assert pool.put("e", context(100))
    assert pool.names == ["e"]
    assert_holds(pool, held(pool, "e").row, context(100))


def test_what_is_read_stays_until_the_last_reader_has_gone() -> None:
    pool = pool_of(100)
    pool.put("a", context(60))
    readers = [held(pool, "a"), held(pool, "a")]
    before = pool.names
    assert not pool.put("b", context(50)), "there is room once it is released"
    assert pool.names == before
    pool.release(readers[0])
    assert not pool.put("b", context(50))
    assert pool.put("c", context(40)), "what fits beside it need not wait"
    assert_holds(pool, readers[1].row, context(60))
    pool.release(readers[1])
    assert pool.put("b", context(50))
    assert pool.names == ["c", "b"]


def test_nothing_is_dropped_for_a_context_that_has_to_wait() -> None:
    """Room on both sides of one that is read: 40 and 40, and 50 are wanted in one run."""
    pool = pool_of(100)
    for name, n in (("a", 40), ("b", 20), ("c", 40)):
        pool.put(name, context(n))
    reader = held(pool, "b")
    assert not pool.put("d", context(50))
    assert sorted(pool.names) == ["a", "b", "c"]
    pool.release(reader)
    assert pool.put("d", context(50))


def test_what_is_pinned_stays() -> None:
    pool = pool_of(100)
    pool.put("a", context(60))
    pool.pin("a")
    with pytest.raises(InvalidArgumentError, match=r"a pool of 3200 bytes beside 1920 pinned ones, got 'b' of 1600: "):
        pool.put("b", context(50))
    assert pool.put("c", context(40))
    pool.pin("a", pinned=False)
    assert pool.put("b", context(50))
    assert "a" not in pool.names
    with pytest.raises(
        InvalidArgumentError, match=r"expected a context that is in the pool \(c, b\), got 'a': ask about it first"
    ):
        pool.pin("a")


def test_what_never_fits_is_refused_and_changes_nothing() -> None:
    pool = pool_of(100)
    pool.put("a", context(60))
    with pytest.raises(InvalidArgumentError, match=r"a pool of 3200 bytes beside 0 pinned ones, got 'b' of 3232"):
        pool.put("b", context(101))
    assert pool.names == ["a"]


def test_a_newer_context_takes_a_name_and_readers_of_the_older_finish() -> None:
    pool, old, new = pool_of(100), context(30, 1), context(40, 2)
    pool.put("a", old)
    pool.pin("a")
    reader = held(pool, "a")
    pool.put("a", new)
    later = held(pool, "a")
    assert reader.row != later.row
    assert_holds(pool, reader.row, old)
    assert_holds(pool, later.row, new)
    assert pool.n_bytes_free == 30 * SHAPE.pair_bytes
    pool.release(reader)
    assert pool.n_bytes_free == 60 * SHAPE.pair_bytes
    assert not pool.lengths[:, reader.row].any()
    pool.release(later)
    with pytest.raises(InvalidArgumentError, match="beside 1280 pinned ones"):
        pool.put("b", context(90))


def test_a_dropped_context_can_be_read_on_and_its_room_comes_back() -> None:
    pool = pool_of(100)
    pool.put("a", context(30))
    reader = held(pool, "a")
    pool.drop("a")
    pool.drop("never there")
    assert pool.names == []
    assert_holds(pool, reader.row, context(30))
    pool.release(reader)
    pool.release(Held(0, 0, 0))
    assert pool.n_bytes_free == 100 * SHAPE.pair_bytes


def test_there_are_no_more_contexts_than_rows() -> None:
    pool = pool_of(100, max_contexts=2)
    for name in "abc":
        assert pool.put(name, context(1))
    assert pool.names == ["b", "c"]
    readers = [held(pool, name) for name in "bc"]
    assert not pool.put("d", context(1))
    assert sorted(reader.row for reader in readers) == [1, 2]


@LAW
@given(st.lists(st.tuples(st.sampled_from("putreaddroppin"), st.integers(0, 5), st.integers(0, 60)), max_size=40))
def test_after_any_operations_every_context_is_whole(operations: list[tuple[str, int, int]]) -> None:
    pool, known, readers = pool_of(100, max_contexts=3), {}, []
    for number, (kind, which, n) in enumerate(operations):
        name = "abcdef"[which]
        if kind in "put":
            one = context(n, number)
            if pool.put(name, one):
                known[name] = one
        elif kind in "read" and (reader := pool.hold(name)) is not None:
            readers.append((reader, known[name]))
        elif kind in "drop":
            pool.drop(name)
        elif readers:
            pool.release(readers.pop(which % len(readers))[0])
        for reader, one in readers:
            assert_holds(pool, reader.row, one)
    for name in pool.names:
        assert_holds(pool, held(pool, name).row, known[name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PackedContext(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(2, 3), 1), r"got \(2, 3, 5, 4, "),
        (PackedContext(torch.zeros(2, 4).half(), torch.zeros(2, 4), torch.zeros(2, 3), 1), "torch.float16"),
        (PackedContext(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, 2), 1), r"got \(3, 2, 4, 4, "),
        (PackedContext(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3), 1), "expected 0 keys and values"),
    ],
)
def test_a_context_of_another_shape_is_refused(given: PackedContext, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        pool_of(100).put("a", given)


@pytest.mark.parametrize(("n_bytes", "max_contexts"), [(31, 1), (0, 1), (32 * 2**31, 1), (3200, 0)])
def test_a_pool_has_room_for_a_pair_and_a_context(n_bytes: int, max_contexts: int) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a pool of 32 to"):
        ContextPool(SHAPE, n_bytes, max_contexts=max_contexts)


def test_the_shape_is_that_of_a_models_cache() -> None:
    assert PoolShape.of(tiny_model("qwen3")) == PoolShape(3, 2, 16, torch.float32)
    assert SHAPE.pair_bytes == 32


@pytest.mark.parametrize("architecture", ["gemma3_text", "gemma2"])
def test_sliding_layers_are_refused_with_the_reason(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"sliding windows in layers \[0, 2\]: requests share a context"):
        PoolShape.of(tiny_model(architecture))
