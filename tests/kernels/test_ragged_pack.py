"""Packing, merging and selecting rows, each against a loop over heads and positions."""

import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip_press.kernels.ragged_pack import Packed, merge, pack, select_rows

View = Callable[[Tensor], Tensor]
Unpack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

LAW = settings(deadline=None, max_examples=25, derandomize=True)
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 70))
RARE_DTYPES = [torch.float64, torch.float8_e4m3fn, torch.bool, torch.uint16, torch.complex64, torch.complex128]


def dense(batch_size: int, heads: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random keys [batch, heads, length, 8], values of a width of their own, scores, and positions that heads share."""
    shape = (batch_size, heads, length)
    keys, values = (torch.randn(*shape, head_dim).to(dtype) for head_dim in (8, 6))
    positions = torch.randint(1000, (batch_size, 1, length), dtype=torch.int32)
    return [keys, values, torch.randn(shape), positions.expand(shape)]


def quantized(*shape: int) -> list[Tensor]:
    """Columns of four dtypes and three widths: codes [.., 8], two scales each, scores and shared positions."""
    return [
        torch.randint(-128, 128, (*shape, 8), dtype=torch.int8),
        torch.randn(*shape, 2).half(),
        torch.randn(shape),
        torch.randint(1000, (shape[0], 1, shape[2]), dtype=torch.int32).expand(shape),
    ]


def random_keep(batch_size: int, heads: int, length: int) -> Tensor:
    """Heads that keep all, nothing and anything between."""
    return torch.rand(batch_size, heads, length) < torch.tensor([0.0, 0.3, 1.0])[torch.randint(3, (heads, 1))]


def by_loop(columns: Sequence[Tensor], keep: Tensor) -> Packed:
    """What packing means, pair by pair."""
    batch_size, heads, length = keep.shape
    kept: list[tuple[int, int, int]] = []
    bounds = [0]
    for row, head in product(range(batch_size), range(heads)):
        kept += [(row, head, index) for index in range(length) if keep[row, head, index]]
        bounds.append(len(kept))
    packed = [column.new_empty(len(kept), *column.shape[3:]) for column in columns]
    for number, pair in enumerate(kept):
        for one, column in zip(packed, columns, strict=True):
            one[number] = column[pair]
    return Packed(tuple(packed), torch.tensor(bounds, dtype=torch.int32))


def tensors(packed: Packed) -> tuple[Tensor, ...]:
    return (*packed.columns, packed.cu_seqlens)


def assert_same(got: Packed, expected: Packed) -> None:
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def assert_owned(packed: Packed, *sources: Tensor) -> None:
    """Each tensor has storage of exactly its own size, and shares none."""
    for tensor in tensors(packed):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    both = (*tensors(packed), *sources)
    addresses = [tensor.untyped_storage().data_ptr() for tensor in both if tensor.numel()]
    assert len(addresses) == len(set(addresses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
def test_packing_keeps_exactly_the_kept_pairs_in_order(length: int, dtype: torch.dtype, device: torch.device) -> None:
    columns = dense(2, 4, length, dtype)
    keep = random_keep(2, 4, length)
    got = pack([column.to(device) for column in columns], keep.to(device))
    assert_owned(got)
    assert_same(Packed(tuple(column.cpu() for column in got.columns), got.cu_seqlens.cpu()), by_loop(columns, keep))


def test_one_long_head_beside_seven_short_ones_packs() -> None:
    columns = dense(1, 8, 600)
    keep = torch.zeros(1, 8, 600, dtype=torch.bool)
    keep[:, 2] = True
    keep[:, [0, 1, 3, 4, 5, 6, 7], 5] = True
    packed = pack(columns, keep)
    assert_same(packed, by_loop(columns, keep))
    assert packed.cu_seqlens.diff().tolist() == [1, 1, 600, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kept", [True, False])
def test_all_or_nothing_kept_is_storage_of_its_own(kept: bool) -> None:
    columns = dense(2, 3, 20)
    packed = pack(columns, torch.full((2, 3, 20), kept))
    assert_owned(packed, *columns)
    total = 120 if kept else 0
    assert [tuple(column.shape) for column in packed.columns] == [(total, 8), (total, 6), (total,), (total,)]


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_dimensions_may_lie_in_any_order(order: tuple[int, ...]) -> None:
    columns = dense(2, 3, 20)
    keep = random_keep(2, 3, 20)

    def turned(column: Tensor) -> Tensor:
        there = [dim for dim in order if dim < column.ndim]
        back = sorted(range(column.ndim), key=there.__getitem__)
        return column.permute(there).contiguous().permute(back)

    assert_same(pack([turned(column) for column in columns], keep), by_loop(columns, keep))


def test_strided_and_expanded_views_are_read_in_their_bounds(inside_nan: View) -> None:
    *floats, positions = dense(2, 3, 20)
    keep = random_keep(2, 3, 20)
    expected = by_loop([*floats, positions], keep)
    assert_same(pack([*map(inside_nan, floats), positions], keep), expected)
    shared = [column[:, :1].expand_as(column) for column in floats]
    assert_same(pack(shared, keep), by_loop(shared, keep))
    once = [column[:1, :1, :1].expand_as(column) for column in floats]
    assert_same(pack(once, keep), by_loop(once, keep))
    keys, values, scores, positions = (column[:, ::2, 1::2] for column in dense(2, 6, 40))
    views = [keys[..., :5], values[..., 1:], values[..., ::2], scores, positions]
    assert_same(pack(views, keep), by_loop(views, keep))


def test_columns_of_any_dtype_and_width_travel_alike() -> None:
    columns, tail = quantized(2, 3, 40), quantized(2, 3, 7)
    keep, keep_tail = random_keep(2, 3, 40), random_keep(2, 3, 7)
    packed = pack(columns, keep)
    assert_same(packed, by_loop(columns, keep))
    both = [torch.cat(pair, 2) for pair in zip(columns, tail, strict=True)]
    merged = merge(packed, tail, keep_tail)
    assert_same(merged, by_loop(both, torch.cat([keep, keep_tail], 2)))
    rows = [1, 0, 1]
    selected = select_rows(merged, torch.tensor(rows), 3)
    assert_same(selected, by_loop([column[rows] for column in both], torch.cat([keep, keep_tail], 2)[rows]))


@pytest.mark.parametrize("width", [(), (0,), (1,), (3,)])
@pytest.mark.parametrize("dtype", RARE_DTYPES, ids=str)
def test_a_single_column_of_any_dtype_and_width_travels_alone(dtype: torch.dtype, width: tuple[int, ...]) -> None:
    column = torch.randint(2, (2, 3, 25, *width)).to(dtype)
    keep = random_keep(2, 3, 25)
    packed = pack((column[:, :, :20],), keep[:, :, :20])
    assert_owned(packed, column)
    assert_same(packed, by_loop([column[:, :, :20]], keep[:, :, :20]))
    merged = merge(packed, (column[:, :, 20:],), keep[:, :, 20:])
    assert_same(merged, by_loop([column], keep))
    assert_same(select_rows(merged, torch.tensor([1]), 3), by_loop([column[1:]], keep[1:]))


@LAW
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_unpacking_gives_back_what_was_packed(shape: tuple[int, int, int], seed: int, unpack: Unpack) -> None:
    torch.manual_seed(seed)
    columns = dense(*shape)
    keep = random_keep(*shape)
    packed = pack(columns, keep)
    for whole, one in zip(columns, packed.columns, strict=True):
        padded, mask = unpack(one, packed.cu_seqlens)
        assert torch.equal(mask.sum(-1), keep.flatten(0, 1).sum(-1))
        back = torch.zeros_like(whole).contiguous()
        back[keep] = padded[mask]
        assert torch.equal(back, whole * keep.view(*keep.shape, *[1] * (whole.ndim - 3)))


@LAW
@given(shape=SHAPES, n_tail=st.integers(0, 9), evict=st.booleans(), seed=st.integers(0, 1000))
def test_a_merge_equals_packing_the_concatenation(
    shape: tuple[int, int, int], n_tail: int, evict: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    columns, tail = dense(*shape), dense(*shape[:2], n_tail)
    keep, survives = random_keep(*shape), torch.rand(*shape) < 0.5
    keep_tail = random_keep(*shape[:2], n_tail)
    merged = merge(pack(columns, keep), tail, keep_tail, keep_context=survives[keep] if evict else None)
    assert_owned(merged, *columns, *tail)
    both = [torch.cat(pair, 2) for pair in zip(columns, tail, strict=True)]
    assert_same(merged, pack(both, torch.cat([keep & survives if evict else keep, keep_tail], 2)))


def test_a_merge_reads_strided_inputs_in_their_bounds(inside_nan: View) -> None:
    context = pack(dense(2, 3, 20), random_keep(2, 3, 20))
    *floats, positions = dense(2, 3, 5)
    keep_tail = random_keep(2, 3, 5)
    expected = merge(context, [*floats, positions], keep_tail)
    viewed = context._replace(columns=(*map(inside_nan, context.columns[:3]), context.columns[3]))
    assert_same(merge(viewed, [*map(inside_nan, floats), positions], keep_tail), expected)


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
    columns = dense(*shape)
    keep = random_keep(*shape)
    rows = torch.tensor([pick % shape[0] for pick in picks], dtype=torch.int64)
    packed = pack(columns, keep)
    selected = select_rows(packed, rows, shape[1])
    assert_owned(selected, *tensors(packed))
    assert_same(selected, pack([column[rows] for column in columns], keep[rows]))


def test_every_op_runs_where_its_tensors_are(device: torch.device) -> None:
    columns = [column.to(device) for column in dense(2, 3, 20)]
    keep = random_keep(2, 3, 20).to(device)
    packed = pack([column[:, :, :15] for column in columns], keep[:, :, :15])
    merged = merge(packed, [column[:, :, 15:] for column in columns], keep[:, :, 15:])
    assert_same(merged, pack(columns, keep))
    rows = [1, 0, 1]
    selected = select_rows(merged, torch.tensor(rows, device=device), 3)
    assert_same(selected, pack([column[rows] for column in columns], keep[rows]))
    assert {tensor.device for tensor in tensors(selected)} == {device}


I32, I64 = torch.int32, torch.int64
KEYS, VALUES, POSITIONS = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 6), torch.zeros(2, 3, 5, dtype=I32)
KEEP = torch.ones(2, 3, 5, dtype=torch.bool)
PACKED = (torch.zeros(9, 8), torch.zeros(9, 6), torch.zeros(9, dtype=I32))
CONTEXT = Packed(PACKED, torch.tensor([0, 1, 2, 3, 4, 5, 9], dtype=I32))


def with_columns(*columns: Any) -> dict[str, Any]:
    return {"context": CONTEXT._replace(columns=columns)}


def with_bounds(*bounds: int, dtype: torch.dtype = I32) -> dict[str, Any]:
    return {"context": CONTEXT._replace(cu_seqlens=torch.tensor(bounds, dtype=dtype))}


BAD_CONTEXT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"context": tuple(CONTEXT)}, TypeError, "context: expected a Packed, got tuple"),
    (
        {"context": CONTEXT._replace(columns=PACKED[0])},
        TypeError,
        "columns: expected a sequence of tensors, got Tensor",
    ),
    (with_columns(), ValueError, "columns: expected one column or more, got none"),
    (with_columns(torch.zeros(9, 8, 1), *PACKED[1:]), ValueError, "columns[0]: expected [total(, dim)], got"),
    (with_columns(torch.tensor(1), *PACKED[1:]), ValueError, "columns[0]: expected [total(, dim)], got"),
    (with_columns(PACKED[0], 1, PACKED[2]), TypeError, "columns[1]: expected a tensor [total(, dim)], got int"),
    (with_columns(PACKED[0], torch.zeros(8, 6), PACKED[2]), ValueError, "columns[1]: expected [total, dim] = (9, 6)"),
    (
        with_columns(PACKED[0], torch.zeros(9, 6, device="meta"), PACKED[2]),
        ValueError,
        "columns[1]: expected device cpu, got meta",
    ),
    (with_columns(*PACKED[:2], torch.zeros(8, dtype=I32)), ValueError, "columns[2]: expected [total] = (9,)"),
    (with_bounds(0, 9, dtype=I64), TypeError, "cu_seqlens: expected torch.int32"),
    (with_bounds(0, 1, 2, 3, 4, 5, 8), ValueError, "cu_seqlens: expected to run"),
    (with_bounds(0, 1, 2, 1, 4, 5, 9), ValueError, "cu_seqlens: expected values"),
    ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"columns": KEYS}, TypeError, "columns: expected a sequence of tensors, got Tensor"),
        ({"columns": []}, ValueError, "columns: expected one column or more, got none"),
        (
            {"columns": [torch.zeros(5, 8), VALUES]},
            ValueError,
            "columns[0]: expected [batch, num_key_value_heads, n(, dim)], got shape (5, 8)",
        ),
        ({"columns": [1, VALUES]}, TypeError, "columns[0]: expected a tensor [batch, num_key_value_heads, n(, dim)]"),
        (
            {"columns": [KEYS, torch.zeros(2, 3, 4, 6)]},
            ValueError,
            "columns[1]: expected [batch, num_key_value_heads, n, dim] = (2, 3, 5, 6), got shape (2, 3, 4, 6)",
        ),
        ({"columns": [KEYS, VALUES.to("meta")]}, ValueError, "columns[1]: expected device cpu, got meta"),
        ({"columns": [KEYS, VALUES, POSITIONS[:, 0]]}, ValueError, "columns[2]: expected"),
        (
            {"columns": [KEYS, VALUES, POSITIONS[:, :1]]},
            ValueError,
            "columns[2]: expected [batch, num_key_value_heads, n] = (2, 3, 5), got shape (2, 1, 5)",
        ),
        ({"keep": KEEP[:, :, 1:]}, ValueError, "keep: expected"),
        ({"keep": torch.ones(2, 3, 5)}, TypeError, "keep: expected torch.bool"),
        ({"keep": KEEP.to("meta")}, ValueError, "keep: expected device"),
        ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
    ],
)
def test_packing_names_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"columns": [KEYS, VALUES, POSITIONS], "keep": KEEP}
    pack(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        pack(**(arguments | change))


def test_more_pairs_than_int32_counts_are_refused() -> None:
    column = torch.zeros(1).expand(1, 1, 2**31, 1)
    keep = torch.zeros(1, dtype=torch.bool).expand(1, 1, 2**31)
    with pytest.raises(ValueError, match="pairs: expected at most"):
        pack([column], keep)
    context = Packed((torch.zeros(1).expand(2**30, 1),), torch.tensor([0, 2**30], dtype=I32))
    with pytest.raises(ValueError, match="pairs: expected at most"):
        merge(context, [column[:, :, : 2**30]], keep[:, :, : 2**30])
    with pytest.raises(ValueError, match="pairs: expected at most"):
        select_rows(context, torch.tensor([0, 0]), 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_CONTEXT,
        (with_bounds(0, 9), ValueError, "cu_seqlens: expected [batch * num_key_value_heads + 1] = (7,)"),
        ({"tail": [KEYS, VALUES]}, ValueError, "tail: expected as many columns as the context has, 3, got 2"),
        ({"tail": [KEYS, VALUES, POSITIONS, POSITIONS]}, ValueError, "tail: expected as many columns as the context"),
        ({"tail": []}, ValueError, "tail: expected one column or more"),
        ({"tail": KEYS}, TypeError, "tail: expected a sequence of tensors"),
        (
            {"tail": [torch.zeros(2, 3, 5, 7), VALUES, POSITIONS]},
            ValueError,
            "tail[0]: expected [batch, num_key_value_heads, t, dim] = (2, 3, 5, 8), got shape (2, 3, 5, 7)",
        ),
        ({"tail": [KEYS[..., 0], VALUES, POSITIONS]}, ValueError, "tail[0]: expected"),
        ({"tail": [KEYS.half(), VALUES, POSITIONS]}, TypeError, "tail[0]: expected the dtype of columns[0]"),
        ({"tail": [KEYS, VALUES[:, :, 1:], POSITIONS]}, ValueError, "tail[1]: expected"),
        ({"tail": [KEYS, VALUES.half(), POSITIONS]}, TypeError, "tail[1]: expected the dtype of columns[1]"),
        ({"tail": [KEYS, VALUES, POSITIONS.float()]}, TypeError, "tail[2]: expected the dtype of columns[2]"),
        ({"tail": [KEYS, VALUES, POSITIONS[:, 0]]}, ValueError, "tail[2]: expected"),
        ({"tail": [KEYS, VALUES, POSITIONS.unsqueeze(-1)]}, ValueError, "tail[2]: expected"),
        ({"keep_tail": torch.ones(2, 3, 5)}, TypeError, "keep_tail: expected torch.bool"),
        ({"keep_context": torch.ones(8, dtype=torch.bool)}, ValueError, "keep_context: expected"),
        ({"keep_context": torch.ones(9)}, TypeError, "keep_context: expected torch.bool"),
    ],
)
def test_a_merge_names_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"context": CONTEXT, "tail": [KEYS, VALUES, POSITIONS], "keep_tail": KEEP}
    merge(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        merge(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_CONTEXT,
        ({"rows": torch.tensor([[0]])}, ValueError, "rows: expected"),
        ({"rows": torch.tensor([0], dtype=I32)}, TypeError, "rows: expected torch.int64"),
        ({"rows": torch.tensor([2])}, ValueError, "rows: expected packed rows 0 .. 1"),
        ({"rows": torch.tensor([-1])}, ValueError, "rows: expected packed rows 0 .. 1"),
        ({"num_heads": 4}, ValueError, "num_heads: expected a divisor"),
        ({"num_heads": 0}, ValueError, "num_heads: expected a divisor"),
    ],
)
def test_selecting_rows_names_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"context": CONTEXT, "rows": torch.tensor([1, 1]), "num_heads": 3}
    select_rows(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        select_rows(**(arguments | change))
