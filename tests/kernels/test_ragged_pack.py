"""Packing, unpacking, merging and selecting rows, each against a loop over heads and positions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip_press.kernels.ragged_pack import merge, pack, select_rows, unpack

View = Callable[[Tensor], Tensor]
Packed = tuple[Tensor, Tensor, Tensor, Tensor]

LAW = settings(deadline=None, max_examples=25, derandomize=True)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 70))


def dense(batch_size: int, heads: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random keys [batch, heads, length, 8] and values of a head_dim of their own."""
    keys, values = (torch.randn(batch_size, heads, length, head_dim).to(dtype) for head_dim in (8, 6))
    return keys, values


def random_keep(batch_size: int, heads: int, length: int) -> Tensor:
    """Heads that keep all, nothing and anything between."""
    return torch.rand(batch_size, heads, length) < torch.tensor([0.0, 0.3, 1.0])[torch.randint(3, (heads, 1))]


def by_loop(keys: Tensor, values: Tensor, keep: Tensor, positions: Tensor | None) -> Packed:
    """What packing means, pair by pair."""
    batch_size, heads, length = keep.shape
    rows: list[tuple[Tensor, Tensor, int]] = []
    bounds = [0]
    for row in range(batch_size):
        for head in range(heads):
            for index in range(length):
                if keep[row, head, index]:
                    position = index if positions is None else int(positions[row, index])
                    rows.append((keys[row, head, index], values[row, head, index], position))
            bounds.append(len(rows))
    packed_keys = torch.stack([row[0] for row in rows]) if rows else keys.new_empty(0, keys.shape[3])
    packed_values = torch.stack([row[1] for row in rows]) if rows else values.new_empty(0, values.shape[3])
    positions = torch.tensor([row[2] for row in rows], dtype=torch.int32)
    return packed_keys, packed_values, positions, torch.tensor(bounds, dtype=torch.int32)


def assert_same(got: Packed, expected: Packed) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_owned(packed: Packed, *sources: Tensor) -> None:
    """Each tensor has storage of exactly its own size, and shares none."""
    for tensor in packed:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    addresses = [tensor.untyped_storage().data_ptr() for tensor in (*packed, *sources) if tensor.numel()]
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
def test_packing_keeps_exactly_the_kept_pairs_in_order(length: int, dtype: torch.dtype, device: torch.device) -> None:
    keys, values = dense(2, 4, length, dtype)
    keep = random_keep(2, 4, length)
    positions = torch.randint(1000, (2, length), dtype=torch.int32)
    got = pack(*(tensor.to(device) for tensor in (keys, values, keep, positions)))
    assert_owned(got)
    assert_same(tuple(tensor.cpu() for tensor in got), by_loop(keys, values, keep, positions))


def test_positions_count_up_where_none_are_given() -> None:
    keys, values = dense(2, 3, 20)
    keep = random_keep(2, 3, 20)
    assert_same(pack(keys, values, keep), by_loop(keys, values, keep, None))


def test_one_long_head_beside_seven_short_ones_packs() -> None:
    keys, values = dense(1, 8, 600)
    keep = torch.zeros(1, 8, 600, dtype=torch.bool)
    keep[:, 2] = True
    keep[:, [0, 1, 3, 4, 5, 6, 7], 5] = True
    packed = pack(keys, values, keep)
    assert_same(packed, by_loop(keys, values, keep, None))
    assert packed.cu_seqlens.diff().tolist() == [1, 1, 600, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kept", [True, False])
def test_all_or_nothing_kept_is_storage_of_its_own(kept: bool) -> None:
    keys, values = dense(2, 3, 20)
    positions = torch.arange(20, dtype=torch.int32).expand(2, -1)
    packed = pack(keys, values, torch.full((2, 3, 20), kept), positions)
    assert_owned(packed, keys, values, positions)
    assert packed.keys.shape == (120 if kept else 0, 8)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_dimensions_may_lie_in_any_order(order: tuple[int, ...]) -> None:
    keys, values = dense(2, 3, 20)
    keep = random_keep(2, 3, 20)
    back = sorted(range(4), key=order.__getitem__)
    turned = [tensor.permute(order).contiguous().permute(back) for tensor in (keys, values)]
    assert_same(pack(*turned, keep), by_loop(keys, values, keep, None))


def test_strided_and_expanded_views_are_read_in_their_bounds(inside_nan: View) -> None:
    keys, values = dense(2, 3, 20)
    keep = random_keep(2, 3, 20)
    expected = by_loop(keys, values, keep, None)
    assert_same(pack(inside_nan(keys), inside_nan(values), keep), expected)
    shared = keys[:, :1].expand(2, 3, 20, 8)
    assert_same(pack(shared, values, keep), by_loop(shared, values, keep, None))
    every_second = dense(2, 6, 40)
    views = [tensor[:, ::2, 1::2, :5] for tensor in every_second]
    assert_same(pack(views[0], views[1], keep), by_loop(views[0], views[1], keep, None))


@LAW
@given(shape=SHAPES, extra=st.integers(0, 5), seed=st.integers(0, 1000))
def test_unpacking_gives_back_what_was_packed(shape: tuple[int, int, int], extra: int, seed: int) -> None:
    torch.manual_seed(seed)
    keys, values = dense(*shape)
    keep = random_keep(*shape)
    packed = pack(keys, values, keep)
    longest = int(keep.sum(-1).max()) if shape[2] else 0
    for whole, one in ((keys, packed.keys), (values, packed.values)):
        padded, mask = unpack(one, packed.cu_seqlens, None if extra == 0 else longest + extra)
        assert padded.shape == (shape[0] * shape[1], longest + extra, whole.shape[3])
        assert torch.equal(mask.sum(-1), keep.flatten(0, 1).sum(-1))
        assert not padded[~mask].any()
        back = torch.zeros_like(whole)
        back[keep] = padded[mask]
        assert torch.equal(back, whole * keep.unsqueeze(-1))


def test_positions_unpack_too() -> None:
    keep = torch.tensor([[[True, False, True], [False, True, False]]])
    packed = pack(*dense(1, 2, 3), keep)
    padded, mask = unpack(packed.positions, packed.cu_seqlens)
    assert padded.tolist() == [[0, 2], [1, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


@LAW
@given(shape=SHAPES, n_tail=st.integers(0, 9), evict=st.booleans(), seed=st.integers(0, 1000))
def test_a_merge_equals_packing_the_concatenation(
    shape: tuple[int, int, int], n_tail: int, evict: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    batch_size, heads, length = shape
    keys, values = dense(*shape)
    tail_keys, tail_values = dense(batch_size, heads, n_tail)
    keep, survives = random_keep(*shape), torch.rand(*shape) < 0.5
    keep_tail = random_keep(batch_size, heads, n_tail)
    positions = torch.randint(99, (batch_size, length + n_tail), dtype=torch.int32)
    merged = merge(
        *pack(keys, values, keep, positions[:, :length]),
        tail_keys,
        tail_values,
        positions[:, length:],
        keep_tail,
        keep_context=survives[keep] if evict else None,
    )
    assert_owned(merged, keys, values, tail_keys, tail_values)
    both_keys, both_values = torch.cat([keys, tail_keys], 2), torch.cat([values, tail_values], 2)
    both_keep = torch.cat([keep & survives if evict else keep, keep_tail], 2)
    assert_same(merged, pack(both_keys, both_values, both_keep, positions))


def test_a_merge_reads_strided_tails_in_their_bounds(inside_nan: View) -> None:
    packed = pack(*dense(2, 3, 20), random_keep(2, 3, 20))
    tail_keys, tail_values = dense(2, 3, 5)
    rest = (torch.arange(10, dtype=torch.int32).view(2, 5), random_keep(2, 3, 5))
    expected = merge(*packed, tail_keys, tail_values, *rest)
    assert_same(merge(*packed, inside_nan(tail_keys), inside_nan(tail_values), *rest), expected)


@LAW
@given(
    shape=SHAPES,
    picks=st.lists(st.integers(0, 2), max_size=5),
    seed=st.integers(0, 1000),
)
def test_selecting_rows_equals_packing_the_selected_rows(
    shape: tuple[int, int, int], picks: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    keys, values = dense(*shape)
    keep = random_keep(*shape)
    rows = torch.tensor([pick % shape[0] for pick in picks], dtype=torch.int64)
    packed = pack(keys, values, keep)
    selected = select_rows(*packed, rows, shape[1])
    assert_owned(selected, *packed)
    assert_same(selected, pack(keys[rows], values[rows], keep[rows]))


def test_every_op_runs_where_its_tensors_are(device: torch.device) -> None:
    keys, values = (tensor.to(device) for tensor in dense(2, 3, 20))
    keep = random_keep(2, 3, 20).to(device)
    packed = pack(keys[:, :, :15], values[:, :, :15], keep[:, :, :15])
    positions = torch.arange(15, 20, dtype=torch.int32, device=device).expand(2, -1)
    merged = merge(*packed, keys[:, :, 15:], values[:, :, 15:], positions, keep[:, :, 15:])
    assert_same(merged, pack(keys, values, keep))
    selected = select_rows(*merged, torch.tensor([1, 0, 1], device=device), 3)
    assert_same(selected, pack(keys[[1, 0, 1]], values[[1, 0, 1]], keep[[1, 0, 1]]))
    assert unpack(merged.keys, merged.cu_seqlens)[0].device == device


I32, I64 = torch.int32, torch.int64
DENSE = (torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 6), torch.ones(2, 3, 5, dtype=torch.bool))
PACKED: dict[str, Any] = {
    "keys": torch.zeros(9, 8),
    "values": torch.zeros(9, 6),
    "positions": torch.zeros(9, dtype=I32),
    "cu_seqlens": torch.tensor([0, 1, 2, 3, 4, 5, 9], dtype=I32),
}
TAIL: dict[str, Any] = {
    "tail_keys": DENSE[0],
    "tail_values": DENSE[1],
    "tail_positions": torch.zeros(2, 5, dtype=I32),
    "keep_tail": DENSE[2],
}
BAD_PACKED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"keys": torch.zeros(9)}, ValueError, "keys: expected"),
    ({"values": torch.zeros(8, 6)}, ValueError, "values: expected"),
    ({"values": torch.zeros(9, 6, device="meta")}, ValueError, "values: expected device"),
    ({"positions": torch.zeros(9)}, TypeError, "positions: expected torch.int32"),
    ({"positions": torch.zeros(8, dtype=I32)}, ValueError, "positions: expected"),
    ({"cu_seqlens": torch.tensor([0, 9])}, TypeError, "cu_seqlens: expected torch.int32"),
    ({"cu_seqlens": torch.tensor([0, 1, 2, 3, 4, 5, 8], dtype=I32)}, ValueError, "cu_seqlens: expected to run"),
    ({"cu_seqlens": torch.tensor([0, 1, 2, 1, 4, 5, 9], dtype=I32)}, ValueError, "cu_seqlens: expected values"),
    ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(3, 5, 8)}, ValueError, "keys: expected"),
        ({"keys": 1}, TypeError, "keys: expected a tensor"),
        ({"values": torch.zeros(2, 3, 4, 6)}, ValueError, "values: expected"),
        ({"values": torch.zeros(2, 3, 5, 6, device="meta")}, ValueError, "values: expected device"),
        ({"keep": torch.ones(2, 3, 4, dtype=torch.bool)}, ValueError, "keep: expected"),
        ({"keep": torch.ones(2, 3, 5)}, TypeError, "keep: expected torch.bool"),
        ({"positions": torch.zeros(5, dtype=I32)}, ValueError, "positions: expected"),
        ({"positions": torch.zeros(2, 5, dtype=I64)}, TypeError, "positions: expected torch.int32"),
        ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
    ],
)
def test_packing_names_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(zip(("keys", "values", "keep"), DENSE, strict=True))
    with pytest.raises(error, match=message):
        pack(**(arguments | change))


def test_more_pairs_than_int32_counts_are_refused() -> None:
    keys = torch.zeros(1).expand(1, 1, 2**31, 1)
    with pytest.raises(ValueError, match="pairs: expected at most"):
        pack(keys, keys, torch.zeros(1, dtype=torch.bool).expand(1, 1, 2**31))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": 1}, TypeError, "packed: expected a tensor"),
        ({"packed": torch.tensor(1)}, ValueError, "packed: expected"),
        ({"packed": torch.zeros(8, 2)}, ValueError, "cu_seqlens: expected to run from 0 to 8"),
        ({"max_len": 3}, ValueError, "max_len: expected at least the longest segment, 4"),
        ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
    ],
)
def test_unpacking_names_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"packed": PACKED["keys"], "cu_seqlens": PACKED["cu_seqlens"]}
    with pytest.raises(error, match=message):
        unpack(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_PACKED,
        ({"cu_seqlens": torch.tensor([0, 9], dtype=I32)}, ValueError, "cu_seqlens: expected"),
        ({"tail_keys": torch.zeros(2, 3, 5, 7)}, ValueError, "tail_keys: expected"),
        ({"tail_keys": DENSE[0].half()}, TypeError, "tail_keys: expected the dtype of keys"),
        ({"tail_values": torch.zeros(2, 3, 4, 6)}, ValueError, "tail_values: expected"),
        ({"tail_values": DENSE[1].half()}, TypeError, "tail_values: expected the dtype of values"),
        ({"tail_positions": torch.zeros(2, 5)}, TypeError, "tail_positions: expected torch.int32"),
        ({"tail_positions": torch.zeros(5, dtype=I32)}, ValueError, "tail_positions: expected"),
        ({"keep_tail": torch.ones(2, 3, 5)}, TypeError, "keep_tail: expected torch.bool"),
        ({"keep_context": torch.ones(8, dtype=torch.bool)}, ValueError, "keep_context: expected"),
        ({"keep_context": torch.ones(9)}, TypeError, "keep_context: expected torch.bool"),
    ],
)
def test_a_merge_names_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    merge(**(PACKED | TAIL))
    with pytest.raises(error, match=message):
        merge(**(PACKED | TAIL | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_PACKED,
        ({"rows": torch.tensor([[0]])}, ValueError, "rows: expected"),
        ({"rows": torch.tensor([0], dtype=I32)}, TypeError, "rows: expected torch.int64"),
        ({"rows": torch.tensor([2])}, ValueError, "rows: expected packed rows 0 .. 1"),
        ({"rows": torch.tensor([-1])}, ValueError, "rows: expected packed rows 0 .. 1"),
        ({"num_heads": 4}, ValueError, "num_heads: expected a divisor"),
        ({"num_heads": 0}, ValueError, "num_heads: expected a divisor"),
    ],
)
def test_selecting_rows_names_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = PACKED | {"rows": torch.tensor([1, 1]), "num_heads": 3}
    select_rows(**arguments)
    with pytest.raises(error, match=message):
        select_rows(**(arguments | change))
