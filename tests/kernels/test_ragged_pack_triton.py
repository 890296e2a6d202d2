"""The Triton kernel of packing and merging, bit for bit against the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip_press.kernels.ragged_pack import Packed, merge, pack

View = Callable[[Tensor], Tensor]
Unpack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

HEAD_DIMS = (64, 60)  # of fp32, for which BLOCK is the block of the kernel
BLOCK = 64  # rows of a program at these widths; a test says so
MOST_ROWS = 1024  # rows of a program for a column of single numbers, likewise
LAW = settings(
    deadline=None,
    max_examples=15,
    derandomize=True,
    # the device is the same each time, and a busy machine is no failure
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = [
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.int8, torch.uint16, torch.bool, torch.complex64, torch.complex128),
]


def dense(
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    head_dims: Sequence[int] = HEAD_DIMS,
) -> list[Tensor]:
    """Random keys [batch, heads, length, head_dim], values of a width of their own, and positions that heads share."""
    numbers = (torch.randint(-9, 9, (*shape, head_dim), device=device) for head_dim in head_dims)
    pairs = [(tensor / 0.7 if dtype.is_floating_point else tensor).to(dtype) for tensor in numbers]
    return [*pairs, some_positions(shape, device)]


def quantized(shape: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    """Columns of four dtypes and three widths: codes, two scales for each, scores, positions that heads share."""
    return [
        torch.randint(-128, 128, (*shape, 96), dtype=torch.int8, device=device),
        torch.randn(*shape, 2, device=device).half(),
        torch.randn(shape, device=device),
        some_positions(shape, device),
    ]


def some(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Heads that keep all, nothing and anything between."""
    ratio = torch.tensor([0.0, 0.3, 1.0], device=device)[torch.randint(3, (*shape[1:-1], 1), device=device)]
    return torch.rand(shape, device=device) < ratio


def some_positions(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """A view that repeats itself for every head."""
    return torch.randint(1000, (shape[0], 1, shape[2]), dtype=torch.int32, device=device).expand(shape)


def tensors(packed: Packed) -> tuple[Tensor, ...]:
    return (*packed.columns, packed.cu_seqlens)


def assert_same(got: Packed, expected: Packed) -> None:
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, True)
        assert torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_packs(columns: Sequence[Tensor], keep: Tensor) -> Packed:
    got = pack(columns, keep, impl="triton")
    assert_same(got, pack(columns, keep, impl="reference"))
    return got


@pytest.fixture
def over_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are allocated over the largest number, or NaN, so that a row that is not written differs."""
    fresh = Tensor.new_empty

    def filled(self: Tensor, *size: Any, **options: Any) -> Tensor:
        tensor = fresh(self, *size, **options)
        return tensor.fill_(torch.nan if tensor.dtype.is_floating_point else 99)

    monkeypatch.setattr(Tensor, "new_empty", filled)


@pytest.mark.triton
def test_the_blocks_of_these_tests_are_those_of_the_kernel() -> None:
    from kvzip_press.kernels.ragged_pack.triton import block_rows, rows_as_bits

    def rows_of(dtype: torch.dtype, *width: int) -> int:
        return block_rows(rows_as_bits(torch.zeros(1, 1, 1, *width, dtype=dtype)))

    assert {rows_of(torch.float32, head_dim) for head_dim in HEAD_DIMS} == {BLOCK}
    assert rows_of(torch.bfloat16, 128) == BLOCK
    assert rows_of(torch.int32) == rows_of(torch.int8) == rows_of(torch.float64, 2) == MOST_ROWS
    assert rows_of(torch.float64, 3) == MOST_ROWS // 2
    assert rows_of(torch.float64, 512) == 4
    assert rows_of(torch.complex128, 512) == 2
    assert rows_of(torch.float64, 4096) == 1


@pytest.mark.triton
@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_packing_equals_the_reference(length: int, over_nan: None, triton_device: torch.device) -> None:
    shape = (2, 3, length)
    assert_packs(dense(shape, triton_device), some(shape, triton_device))


@pytest.mark.triton
@pytest.mark.parametrize("length", [0, 1, MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1])
def test_columns_of_single_numbers_pack(length: int, over_nan: None, triton_device: torch.device) -> None:
    shape = (2, 3, length)
    columns = [torch.randn(shape, device=triton_device), some_positions(shape, triton_device)]
    keep = some(shape, triton_device)
    packed = assert_packs(columns, keep)
    assert torch.equal(packed.columns[0], columns[0][keep])
    assert_packs([columns[0]], keep)


@pytest.mark.triton
@pytest.mark.parametrize("evict", [True, False])
def test_columns_of_any_dtype_and_width_travel_alike(evict: bool, over_nan: None, triton_device: torch.device) -> None:
    shape, tail_shape = (2, 3, 150), (2, 3, 9)
    keep, keep_tail = some(shape, triton_device), some(tail_shape, triton_device)
    columns, tail = quantized(shape, triton_device), quantized(tail_shape, triton_device)
    packed = assert_packs(columns, keep)
    survives = torch.rand(shape, device=triton_device) < 0.5
    merged = merge(packed, tail, keep_tail, keep_context=survives[keep] if evict else None, impl="triton")
    both = [torch.cat(pair, 2) for pair in zip(columns, tail, strict=True)]
    both_keep = torch.cat([keep & survives if evict else keep, keep_tail], 2)
    assert_same(merged, pack(both, both_keep, impl="reference"))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_moves_bit_for_bit(dtype: torch.dtype, triton_device: torch.device) -> None:
    shape = (1, 2, 20)
    keys, values, positions = dense(shape, triton_device, dtype, (8, 6))
    if dtype.is_floating_point:
        keys[0, 0, 3], values[0, 1, 4] = torch.nan, -torch.inf
    columns = [keys, values, values[..., 2], values[..., :0], positions]
    assert_packs(columns, torch.rand(shape, device=triton_device) < 0.6)


@pytest.mark.triton
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (96, 32), (128, 128), (256, 256), (1, 512), (192, 128)])
def test_every_head_dim_packs(head_dims: tuple[int, int], over_nan: None, triton_device: torch.device) -> None:
    from kvzip_press.kernels.ragged_pack.triton import block_rows

    length = 1 + max(block_rows(torch.zeros(head_dim, dtype=torch.bfloat16)) for head_dim in head_dims)
    shape = (1, 2, length)
    keep = torch.rand(shape, device=triton_device) < 0.5
    assert_packs(dense(shape, triton_device, torch.bfloat16, head_dims), keep)


@pytest.mark.triton
def test_one_long_head_beside_seven_short_ones_packs(triton_device: torch.device) -> None:
    keep = torch.zeros(1, 8, 600, dtype=torch.bool, device=triton_device)
    keep[:, 2] = True
    keep[:, [0, 1, 3, 4, 5, 6, 7], 599] = True
    packed = assert_packs(dense((1, 8, 600), triton_device), keep)
    assert packed.cu_seqlens.diff().tolist() == [1, 1, 600, 1, 1, 1, 1, 1]


@pytest.mark.triton
@pytest.mark.parametrize("kept", [True, False])
def test_all_or_nothing_kept_is_storage_of_its_own(kept: bool, triton_device: torch.device) -> None:
    columns = dense((2, 3, 20), triton_device)
    packed = assert_packs(columns, torch.full((2, 3, 20), kept, device=triton_device))
    for tensor in tensors(packed):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if kept:
        assert not {column.data_ptr() for column in packed.columns} & {column.data_ptr() for column in columns}


@pytest.mark.triton
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_dimensions_may_lie_in_any_order(order: tuple[int, ...], triton_device: torch.device) -> None:
    def turned(column: Tensor) -> Tensor:
        there = [dim for dim in order if dim < column.ndim]
        back = sorted(range(column.ndim), key=there.__getitem__)
        return column.permute(there).contiguous().permute(back)

    shape = (2, 3, BLOCK + 1)
    columns = [turned(column) for column in dense(shape, triton_device)]
    assert_packs([*columns, columns[0][..., 0]], some(shape, triton_device))


@pytest.mark.triton
def test_strided_and_expanded_views_are_read_in_their_bounds(inside_nan: View, triton_device: torch.device) -> None:
    shape = (2, 3, BLOCK + 1)
    keys, values, _ = dense(shape, triton_device)
    scores = torch.randn(shape, device=triton_device)
    keep = some((3, 2, BLOCK + 1), triton_device).transpose(0, 1)
    turned = torch.randint(1000, (BLOCK + 1, 4), dtype=torch.int32, device=triton_device).T[::2]
    positions = turned.unsqueeze(1).expand(-1, 3, -1)
    packed = assert_packs([inside_nan(keys), inside_nan(values), inside_nan(scores), positions], keep)
    assert_same(packed, pack([keys, values, scores, positions], keep, impl="reference"))
    for column in (keys, values, scores):
        assert_packs([column[:, :1].expand_as(column), column[:1, :1, :1].expand_as(column)], keep)
    views = [column[:, ::2, 1::2] for column in dense((2, 6, 2 * BLOCK + 2), triton_device)]
    assert_packs([views[0][..., :5], views[1][..., 1:], views[1][..., ::2], views[2]], keep)


def both_merges(
    shape: tuple[int, int, int], n_tail: int, evict: bool, device: torch.device, view: View = lambda tensor: tensor
) -> tuple[Packed, Packed]:
    tail_shape = (*shape[:2], n_tail)
    context = pack(with_scores(dense(shape, device)), some(shape, device), impl="reference")
    *floats, positions = with_scores(dense(tail_shape, device))
    viewed = context._replace(columns=(*map(view, context.columns[:-1]), context.columns[-1]))
    tail, keep_tail = [*map(view, floats), positions], some(tail_shape, device)
    survives = torch.rand(context.columns[0].shape[0], device=device) < 0.5 if evict else None
    got, expected = (
        merge(viewed, tail, keep_tail, keep_context=survives, impl=impl) for impl in ("triton", "reference")
    )
    return got, expected


def with_scores(columns: Sequence[Tensor]) -> list[Tensor]:
    """A column of single numbers before the last one."""
    return [*columns[:-1], torch.randn_like(columns[-1], dtype=torch.float32), columns[-1]]


@pytest.mark.triton
@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize(
    ("length", "n_tail"), [(0, 0), (0, 3), (70, 0), (1, 1), (40, BLOCK - 1), (40, BLOCK), (40, BLOCK + 1), (300, 5)]
)
def test_merging_equals_the_reference(
    length: int, n_tail: int, evict: bool, over_nan: None, triton_device: torch.device
) -> None:
    assert_same(*both_merges((2, 3, length), n_tail, evict, triton_device))


@pytest.mark.triton
def test_a_merge_reads_strided_inputs_in_their_bounds(inside_nan: View, triton_device: torch.device) -> None:
    got, expected = both_merges((2, 3, 20), 5, True, triton_device, inside_nan)
    assert_same(got, expected)
    assert not any(column.isnan().any() for column in got.columns)


@pytest.mark.triton
@LAW
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 70)),
    n_tail=st.integers(0, 9),
    evict=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_merging_any_shape_equals_the_reference(
    shape: tuple[int, int, int], n_tail: int, evict: bool, seed: int, triton_device: torch.device
) -> None:
    torch.manual_seed(seed)
    assert_same(*both_merges(shape, n_tail, evict, triton_device))


@pytest.mark.triton
@LAW
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 70)), seed=st.integers(0, 1000))
def test_unpacking_gives_back_what_was_packed(
    shape: tuple[int, int, int], seed: int, triton_device: torch.device, unpack: Unpack
) -> None:
    torch.manual_seed(seed)
    columns = with_scores(dense(shape, triton_device))
    keep = some(shape, triton_device)
    packed = pack(columns, keep, impl="triton")
    for whole, rows in zip(columns, packed.columns, strict=True):
        padded, mask = unpack(rows, packed.cu_seqlens)
        assert torch.equal(mask.sum(-1), keep.flatten(0, 1).sum(-1))
        assert torch.equal(padded[mask], whole[keep])


@pytest.mark.triton
def test_sources_and_destinations_may_lie_beyond_two_gigabytes(triton_device: torch.device) -> None:
    """Of the large tensors only a few rows are touched: a CPU gives them memory page by page."""
    from kvzip_press.kernels.ragged_pack.triton import _scatter

    apart, far = 2**30, 2**24 + 5
    keys = torch.empty(2 * apart + 128, dtype=torch.int8, device=triton_device).as_strided(
        (1, 3, 1, 128), (1, apart, 1, 1)
    )
    rows = torch.randint(-99, 99, (1, 3, 1, 128), dtype=torch.int8, device=triton_device)
    keys.copy_(rows)
    out_keys, out_values, out_positions = (
        torch.empty(far + 1, *size, dtype=dtype, device=triton_device)
        for size, dtype in (((128,), torch.int8), ((2,), torch.int8), ((), torch.int32))
    )
    positions, destinations, bounds = (
        torch.tensor(numbers, dtype=torch.int32, device=triton_device) for numbers in ([7], [far, -1, far - 1], [0])
    )
    columns = (keys, rows[..., :2], positions.expand(1, 3, 1))
    _scatter(columns, destinations, Packed((out_keys, out_values, out_positions), bounds))
    assert torch.equal(out_keys[far - 1 :], rows[0, [2, 0], 0])
    assert torch.equal(out_values[far - 1 :], rows[0, [2, 0], 0, :2])
    assert out_positions[far - 1 :].tolist() == [7, 7]


@pytest.mark.gpu
@pytest.mark.triton
def test_a_cache_of_more_than_two_to_the_31_numbers_packs() -> None:
    length = 2**24 + 8
    keys = torch.empty(1, 1, length, 128, dtype=torch.float16, device="cuda")
    keys[:, :, -100:] = torch.randn(100, 128, dtype=torch.float16, device="cuda")
    keep = torch.zeros(1, 1, length, dtype=torch.bool, device="cuda")
    keep[:, :, -70:-3] = True
    positions = torch.arange(length, dtype=torch.int32, device="cuda").view(1, 1, length)
    packed = pack([keys, keys[..., :1], positions], keep, impl="triton")
    assert torch.equal(packed.columns[0], keys[0, 0, -70:-3])
    assert torch.equal(packed.columns[1], keys[0, 0, -70:-3, :1])
    assert packed.columns[2].tolist() == list(range(length - 70, length - 3))


@pytest.mark.gpu
@pytest.mark.triton
def test_a_result_of_more_than_two_to_the_31_numbers_is_written() -> None:
    keys = torch.randint(-99, 99, (1, 1, 2**24 + 8, 128), dtype=torch.int8, device="cuda")
    packed = pack([keys, keys[..., :1]], torch.ones_like(keys[..., 0], dtype=torch.bool), impl="triton")
    assert torch.equal(packed.columns[0], keys[0, 0])


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("op", ["pack", "merge"])
def test_packing_a_layer_needs_little_memory_beside_its_result(op: str) -> None:
    shape, device = (1, 8, 65536), torch.device("cuda")
    columns = [torch.randn(*shape, 128, dtype=torch.bfloat16, device=device) for _ in range(2)]
    columns.append(some_positions(shape, device))
    keep = torch.rand(shape, device=device) < 0.3
    context = pack(columns, torch.ones_like(keep), impl="triton")
    tail = [column[:, :, :0] for column in columns]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if op == "pack":
        packed = pack(columns, keep, impl="triton")
    else:
        packed = merge(context, tail, keep[:, :, :0], keep_context=keep.flatten(), impl="triton")
    result = sum(tensor.numel() * tensor.element_size() for tensor in tensors(packed))
    # int32 destinations and what a cumulative sum needs; a merge has int64 row numbers too. A pair itself is 512 bytes.
    indices = keep.numel() * (12 if op == "pack" else 36) + (4 << 20)
    assert torch.cuda.max_memory_allocated() - before <= result + indices


def test_an_explicit_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = torch.device("cpu")
    columns = dense((1, 2, 5), device)
    keep = some((1, 2, 5), device)
    packed = pack(columns, keep)
    with pytest.raises(ValueError, match="impl 'triton' can do"):
        pack(columns, keep, impl="triton")
    with pytest.raises(ValueError, match="impl 'triton' can do"):
        merge(packed, columns, keep, impl="triton")
