"""Storages of few bits: what they lose is bounded, attention to them is that to what they decode to, or they refuse."""

from __future__ import annotations

import pytest
import torch

from kvzip_press import FastKVzipPress, KVzipPress, RaggedCache, RandomPress, compress, compress_in_chunks, prefill
from kvzip_press.cache.codecs.by_name import STORAGES, name_of, storage_named
from kvzip_press.cache.codecs.int4 import Int4
from kvzip_press.cache.codecs.k8v4 import K8V4
from kvzip_press.cache.codecs.parted import FIRST
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.presses.composed import ComposedPress
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = [pytest.mark.any_transformers, pytest.mark.usefixtures("one_thread")]

LOSSY = tuple(name for name in STORAGES if name != "model")
TOKENIZER = ByteTokenizer()
TEXT = "The key of the red box is under the mat, and the mat is at the door."
DIM, HEADS, ROWS = 16, 2, 2


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def span(n: int = 40, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a large constant channel, as models have them, and values."""
    keys, values = drawn(ROWS, HEADS, n, DIM, dtype=dtype), drawn(ROWS, HEADS, n, DIM, seed=1, dtype=dtype)
    keys[..., 3] += 20
    return keys, values


def packed(name: str, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor | None = None) -> PackedPairs:
    keep = torch.ones(keys.shape[:3], dtype=torch.bool) if keep is None else keep
    positions = torch.arange(keys.shape[2], dtype=torch.int32).expand(keys.shape[0], -1)
    importance = drawn(*keys.shape[:3], seed=9, dtype=torch.float32)
    return PackedPairs.pack(keys, values, keep, positions, storage=storage_named(name), importance=importance)


def decoded(pairs: PackedPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs at once: what no storage does."""
    return pairs.storage.decode(pairs)


# What is lost -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSY)
def test_a_number_differs_by_at_most_half_a_step(name) -> None:
    """The steps of 8 and 4 bits, for a row's own range; rotated keys by those of their rotation, as a length."""
    keys, values = span()
    got = decoded(packed(name, keys, values))
    bits = {"int8": "88", "fp8": "ff", "k8v4": "84", "int4": "r4", "kivi4": "44", "kivi2": "22", "tiers": "r2"}[name]
    for kind, exact, found in (("key", keys, got[0]), ("value", values, got[1])):
        rows, form = exact.reshape(-1, DIM), bits[kind == "value"]
        error, spread = (found - rows).abs(), 1.05  # scales are rounded to bf16
        peak, along = rows.abs().amax(-1, keepdim=True), rows
        if name.startswith("kivi") and kind == "key":  # a channel of 32 tokens, and of the 8 that are left
            along = exact.flatten(0, 1).transpose(1, 2).split((32, 8), dim=2)
            peak, step = (
                torch.cat([f(x, form) for x in along], 2).transpose(1, 2).reshape(-1, DIM) for f in (_peak, _step)
            )
        elif form in "42":
            step = _step(rows, form)
        if form == "8":
            assert bool((error <= spread * peak / 254).all())
        elif form == "f":
            assert bool((error <= spread * (rows.abs() / 16 + peak / 28672)).all())
        elif form == "r":
            centred = keys - keys.mean(dim=2, keepdim=True)
            assert bool((error.norm(dim=-1) <= centred.reshape(-1, DIM).norm(dim=-1) * DIM**0.5 / 14).all())
        else:
            assert bool((error <= spread * step / 2 + peak / 256).all())


def _peak(numbers: torch.Tensor, bits: str) -> torch.Tensor:
    return numbers.abs().amax(-1, keepdim=True).expand(numbers.shape)


def _step(numbers: torch.Tensor, bits: str) -> torch.Tensor:
    low, high = numbers.aminmax(dim=-1, keepdim=True)
    return ((high - low) / (2 ** int(bits) - 1)).expand(numbers.shape)


def test_a_channel_that_is_large_for_all_tokens_costs_int4_nothing() -> None:
    """It is in the mean, which is taken off; in the rows' own range it would leave nothing of the others."""
    keys, values = span()
    plain = keys.clone()
    plain[..., 3] -= 20
    errors = [float((decoded(packed("int4", k, values))[0] - k.reshape(-1, DIM)).norm()) for k in (keys, plain)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("name", ["k8v4", "int4", "tiers"])
def test_the_first_tokens_are_exact(name) -> None:
    """As far as a head kept them, and for as long; no others are."""
    keys, values = span()
    keep = torch.ones(ROWS, HEADS, 40, dtype=torch.bool)
    keep[0, 1, :2] = False
    pairs = packed(name, keys, values, keep)
    first = pairs.positions < FIRST
    assert int(first.sum()) == pairs.parts["sinks"].total == ROWS * HEADS * FIRST - 2
    for exact, found in zip((keys[keep], values[keep]), decoded(pairs), strict=True):
        error = (found - exact).abs().amax(-1)
        assert float(error[first].max()) == 0 and float(error[~first].min()) > 0
    kept = pairs.positions != 2
    none = [x[:, :, :0] for x in (keys, values, keep)]
    left = pairs.merge(*none[:2], torch.empty(ROWS, 0, dtype=torch.int32), none[2], kept)
    assert left.parts["sinks"].total == ROWS * HEADS * (FIRST - 1) - 2


def test_a_first_span_of_sinks_alone_leaves_the_mean_key_to_what_comes_next() -> None:
    """A mean of no keys would be kept for the whole context."""
    keys, values = span()
    pairs = packed("int4", keys[:, :, :3], values[:, :, :3])
    positions = torch.arange(3, 40, dtype=torch.int32).expand(ROWS, -1)
    keep = torch.ones(ROWS, HEADS, 37, dtype=torch.bool)
    merged, whole = pairs.merge(keys[:, :, 3:], values[:, :, 3:], positions, keep), packed("int4", keys, values)
    for found, expected in zip(decoded(merged), decoded(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)  # sums of other lengths round otherwise


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("content", [0.0, 3.0, -1e-30, 1e30])
def test_rows_of_equal_numbers_come_back(name, content) -> None:
    """Zeros as zeros, and nothing is divided by nothing."""
    rows = torch.full((ROWS, HEADS, 5, DIM), content)
    for found in decoded(packed(name, rows, rows)):
        torch.testing.assert_close(found, rows.reshape(-1, DIM), rtol=0.02, atol=0)


def _check_layout(held, layout) -> None:
    """Of the pairs, and of each part."""
    shapes = {**layout.columns, **layout.tables}
    tensors = {**held.columns, **held.tables}
    assert {n: (t.dtype, tuple(t.shape[1:])) for n, t in tensors.items() if n != "positions"} == shapes
    assert list(held.parts) == list(layout.parts)
    for name, part in held.parts.items():
        _check_layout(part, layout.parts[name])


@pytest.mark.parametrize("name", LOSSY)
def test_layouts_take_the_bytes_that_the_notes_say(name) -> None:
    """A pair of head_dim 128, with its position."""
    pairs = packed(name, drawn(1, 1, 3, 128), drawn(1, 1, 3, 128))
    of_columns = {"int8": 264, "fp8": 264, "k8v4": 4, "int4": 4, "kivi4": 136, "kivi2": 72, "tiers": 5}
    assert pairs.pair_bytes == of_columns[name]
    exact = 2 * 128 * 8
    of_parts = {"k8v4": [exact, 198], "int4": [exact, 136], "tiers": [exact, 198, 104], "kivi4": [513], "kivi2": [513]}
    assert [part.pair_bytes for part in pairs.parts.values()] == of_parts.get(name, [])
    _check_layout(pairs, pairs.storage.layout())


# Attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"scaling": 0.1}, {"row_index": torch.tensor([1, 0])}], ids=str
)
@pytest.mark.parametrize("name", LOSSY)
def test_attention_is_that_to_what_they_decode_to(name, options) -> None:
    """Heads that kept nothing, one pair, and all; with a tail and without one, for one token and several."""
    keys, values = span()
    keep = drawn(ROWS, HEADS, 40, seed=2) < 0.5
    keep[0, 1], keep[1, 0] = False, torch.arange(40) == 2
    pairs = packed(name, keys, values, keep)
    whole = decoded(pairs)
    for n in (1, 5):
        query, tail = drawn(ROWS, 6, n, DIM, seed=3), (drawn(ROWS, HEADS, 7, DIM, seed=s) for s in (4, 5))
        tail_keys, tail_values = tail
        tails = [(tail_keys, tail_values), *([] if "row_index" in options else [(None, None)])]
        for both in tails:
            expected = ragged_attention(query, *whole, pairs.cu_seqlens, *both, return_lse=True, **options)
            for found, wanted in zip(pairs.attend(query, *both, return_lse=True, **options), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
            found = pairs.attend(query, *both, **options)
            torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSY)
def test_a_part_of_a_pool_is_read_alone(name) -> None:
    """Its tables are its own, and the pairs of the others are not looked at."""
    keys, values = span()
    pairs = packed(name, keys, values)
    query, tail = drawn(1, 6, 1, DIM, seed=3), [drawn(1, HEADS, 3, DIM, seed=s) for s in (4, 5)]
    whole = pairs.attend(query.expand(ROWS, -1, -1, -1), *(x.expand(ROWS, -1, -1, -1) for x in tail))
    for row in range(ROWS):
        own = slice(row * HEADS, (row + 1) * HEADS)
        part = pairs.part(own, slice(None), pairs.cu_seqlens[own.start : own.stop + 1], object())
        got = part.attend(query, *tail, part_of_storage=True)
        torch.testing.assert_close(got, whole[row : row + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LOSSY)
def test_pairs_that_go_later_leave_nothing_behind(name) -> None:
    """A head that has lost a first pair does not add what its value lost; new pairs are encoded beside the old ones."""
    keys, values = span()
    pairs = packed(name, keys[:, :, :30], values[:, :, :30])
    kept = (pairs.positions != 1) & (pairs.positions % 3 != 2)
    positions = torch.arange(30, 40, dtype=torch.int32).expand(ROWS, -1)
    keep = torch.ones(ROWS, HEADS, 10, dtype=torch.bool)
    importance = drawn(ROWS, HEADS, 10, seed=8, dtype=torch.float32)
    merged = pairs.merge(keys[:, :, 30:], values[:, :, 30:], positions, keep, kept, importance=importance)
    for column in pairs.storage.layout().columns:
        old = merged.columns[column][merged.positions < 30]
        assert torch.equal(old, pairs.columns[column][kept])
    for before, after in zip(decoded(pairs), decoded(merged), strict=True):
        assert torch.equal(after[merged.positions < 30], before[kept])
    query = drawn(ROWS, 6, 2, DIM, seed=3)
    expected = ragged_attention(query, *decoded(merged), merged.cu_seqlens)
    torch.testing.assert_close(merged.attend(query, None, None), expected, rtol=1e-9, atol=1e-9)


# Refusals ---------------------------------------------------------------------------------------------------------


def test_names_are_checked_where_they_are_given() -> None:
    """With the nearest one; and every storage has one."""
    assert [name_of(kind) for kind in STORAGES.values()] == list(STORAGES)
    done = prefill(tiny_model(num_layers=1), TOKENIZER, TEXT)
    for refused in (
        lambda: KVzipPress(0.5, storage="int9"),
        lambda: done.evict(RandomPress(0.5).score(done), storage="int9"),
        lambda: compress(done.model, TOKENIZER, TEXT, RandomPress(0.5), storage="int9"),
    ):
        with pytest.raises(
            InvalidArgumentError, match=r"expected a storage out of model, int8.*got 'int9'; did you mean"
        ):
            refused()
    with pytest.raises(InvalidArgumentError, match="storage"):
        RandomPress(0.5, storage=8)


@pytest.mark.parametrize(("kind", "widths"), [(K8V4, (16, 15)), (Int4, (16, 15)), (Int4, (24, 24))])
def test_widths_that_do_not_fit_are_refused_by_the_storage(kind, widths) -> None:
    """Nibbles fill whole bytes, and only powers of two are rotated."""
    with pytest.raises(InvalidArgumentError, match="expected a head_dim that is"):
        kind.check_widths(*widths)


def test_a_model_that_does_not_fit_is_refused_before_it_reads(monkeypatch) -> None:
    """Whichever way a press is applied."""
    model = tiny_model(head_dim=24, num_layers=1)
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: pytest.fail("nothing may be computed"))
    press = RandomPress(0.5, storage="int4")
    for apply in (
        lambda: compress(model, TOKENIZER, TEXT, press),
        lambda: compress(model, TOKENIZER, TEXT, RandomPress(0.5), storage="int4"),
        lambda: compress_in_chunks(model, TOKENIZER, TEXT, press, chunk_size=32, window_size=8),
        lambda: press(model).__enter__(),
    ):
        with pytest.raises(InvalidArgumentError, match="layer 0: expected a head_dim that is a power of two"):
            apply()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_numbers_that_are_not_finite_are_refused_by_layer_and_row(side, wrong) -> None:
    """Before anything is replaced; what is not kept, and the model's own dtype, may hold them."""
    done = prefill(tiny_model(num_layers=2), TOKENIZER, [TEXT, TEXT[:30]])
    scores = RandomPress(0.5).score(done)
    getattr(done.cache.layers[1], side)[1, 0, -1, 3] = wrong  # the last token is kept, or is not
    scores.layers[1][1, 0, -1] = 1e9
    with pytest.raises(InvalidArgumentError, match=rf"layer 1: expected finite {side}.*in row 1, head 0, token 68"):
        done.evict_in_place(scores, storage="int8")
    assert not any(True for _ in RaggedCache(done.cache.layers).ragged_layers())
    assert done.evict(scores).storage == "model"
    scores.layers[1][1, 0, -1] = -1e9
    assert done.evict(scores, storage="int8").storage == "int8"


# How presses name them --------------------------------------------------------------------------------------------


def test_a_press_and_an_eviction_name_a_storage() -> None:
    """The eviction's name goes before the press's; what is kept does not depend on it; figures do."""
    model = tiny_model(num_layers=2)
    done = prefill(model, TOKENIZER, TEXT)
    scores = RandomPress(0.5, storage="int4").score(done)
    by_press, by_name = done.evict(scores), done.evict(scores, storage="int8")
    plain = done.evict(scores, storage="model")
    assert [cache.storage for cache in (by_press, by_name, plain)] == ["int4", "int8", "model"]
    assert str(by_press.kept_positions(1)) == str(plain.kept_positions(1))
    assert by_press.kept_fraction == by_name.kept_fraction == plain.kept_fraction
    assert by_press.compression > by_name.compression > plain.compression > 1
    assert plain.compression == plain.dense_bytes / plain.resident_bytes
    for cache in (
        compress(model, TOKENIZER, TEXT, RandomPress(0.5, storage="int8")),
        compress(model, TOKENIZER, TEXT, RandomPress(0.5), storage="int8"),
        compress_in_chunks(model, TOKENIZER, TEXT, RandomPress(0.5), chunk_size=32, window_size=8, storage="int8"),
    ):
        assert cache.storage == "int8"


def test_a_composition_stores_as_its_presses_say() -> None:
    """Or as it says itself; two names are one too many."""
    assert ComposedPress([RandomPress(0.5), RandomPress(0.5, storage="int8")]).storage == "int8"
    assert ComposedPress([RandomPress(0.5)], storage="k8v4").storage == "k8v4"
    with pytest.raises(InvalidArgumentError, match=r"one storage, got \['int4', 'int8'\]"):
        ComposedPress([RandomPress(0.5, storage="int4"), RandomPress(0.5, storage="int8")])


def test_every_press_of_ours_takes_a_storage() -> None:
    """Also those with arguments of their own."""
    assert FastKVzipPress(0.5, storage="int8").storage == KVzipPress(0.5, storage="int8").storage == "int8"
