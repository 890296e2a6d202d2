"""The Triton kernel of packing and merging, bit for bit against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip_press.kernels.ragged_pack import merge, pack, unpack
from kvzip_press.kernels.ragged_pack.packed import Packed

View = Callable[[Tensor], Tensor]

BLOCK = 64  # rows of a program at these widths; a test says so
LAW = settings(
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device is the same each time
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool, torch.complex128]


def dense(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.float32, head_dims: Any = (8, 6)
) -> list[Tensor]:
    """Random keys [batch, heads, length, head_dim] and values of a head_dim of their own."""
    numbers = (torch.randint(-9, 9, (*shape, head_dim), device=device) for head_dim in head_dims)
    return [(tensor / 0.7 if dtype.is_floating_point else tensor).to(dtype) for tensor in numbers]


def some(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Heads that keep all, nothing and anything between."""
    ratio = torch.tensor([0.0, 0.3, 1.0], device=device)[torch.randint(3, (*shape[1:-1], 1), device=device)]
    return torch.rand(shape, device=device) < ratio


def some_positions(*shape: int, device: torch.device) -> Tensor:
    return torch.randint(1000, shape, dtype=torch.int32, device=device)


def assert_same(got: Packed, expected: Packed) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, True)
        assert torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_packs(keys: Tensor, values: Tensor, keep: Tensor, positions: Tensor | None = None) -> Packed:
    got = pack(keys, values, keep, positions, impl="triton")
    assert_same(got, pack(keys, values, keep, positions, impl="reference"))
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
def test_the_block_of_these_tests_is_that_of_the_kernel() -> None:
    from kvzip_press.kernels.ragged_pack.triton import block_rows

    assert block_rows(torch.zeros(8), torch.zeros(6)) == BLOCK
    assert block_rows(torch.zeros(128, dtype=torch.bfloat16), torch.zeros(1)) == BLOCK
    assert block_rows(torch.zeros(1), torch.zeros(512, dtype=torch.float64)) == 4


@pytest.mark.triton
@pytest.mark.parametrize("positioned", [True, False])
@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_packing_equals_the_reference(
    length: int, positioned: bool, over_nan: None, triton_device: torch.device
) -> None:
    shape = (2, 3, length)
    positions = some_positions(2, length, device=triton_device) if positioned else None
    assert_packs(*dense(shape, triton_device), some(shape, triton_device), positions)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_moves_bit_for_bit(dtype: torch.dtype, triton_device: torch.device) -> None:
    shape = (1, 2, 20)
    keys, values = dense(shape, triton_device, dtype)
    if dtype.is_floating_point:
        keys[0, 0, 3], values[0, 1, 4] = torch.nan, -torch.inf
    assert_packs(keys, values, torch.rand(shape, device=triton_device) < 0.6)


@pytest.mark.triton
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (96, 32), (128, 128), (256, 256), (1, 512), (192, 128)])
def test_every_head_dim_packs(head_dims: tuple[int, int], over_nan: None, triton_device: torch.device) -> None:
    shape = (1, 2, BLOCK + 1)
    keep = torch.rand(shape, device=triton_device) < 0.5
    assert_packs(*dense(shape, triton_device, torch.bfloat16, head_dims), keep)


@pytest.mark.triton
def test_one_long_head_beside_seven_short_ones_packs(triton_device: torch.device) -> None:
    keep = torch.zeros(1, 8, 600, dtype=torch.bool, device=triton_device)
    keep[:, 2] = True
    keep[:, [0, 1, 3, 4, 5, 6, 7], 599] = True
    packed = assert_packs(*dense((1, 8, 600), triton_device), keep)
    assert packed.cu_seqlens.diff().tolist() == [1, 1, 600, 1, 1, 1, 1, 1]


@pytest.mark.triton
@pytest.mark.parametrize("kept", [True, False])
def test_all_or_nothing_kept_is_storage_of_its_own(kept: bool, triton_device: torch.device) -> None:
    keys, values = dense((2, 3, 20), triton_device)
    packed = assert_packs(keys, values, torch.full((2, 3, 20), kept, device=triton_device))
    for tensor in packed:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert not kept or packed.keys.data_ptr() != keys.data_ptr()


@pytest.mark.triton
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_dimensions_may_lie_in_any_order(order: tuple[int, ...], triton_device: torch.device) -> None:
    back = sorted(range(4), key=order.__getitem__)
    turned = [tensor.permute(order).contiguous().permute(back) for tensor in dense((2, 3, 20), triton_device)]
    assert_packs(*turned, some((2, 3, 20), triton_device))


@pytest.mark.triton
def test_strided_and_expanded_views_are_read_in_their_bounds(inside_nan: View, triton_device: torch.device) -> None:
    shape = (2, 3, BLOCK + 1)
    keys, values = dense(shape, triton_device)
    keep = some((3, 2, BLOCK + 1), triton_device).transpose(0, 1)
    positions = some_positions(BLOCK + 1, 4, device=triton_device).T[::2]
    packed = assert_packs(inside_nan(keys), inside_nan(values), keep, positions)
    assert_same(packed, pack(keys, values, keep, positions, impl="reference"))
    assert_packs(keys[:, :1].expand(*shape, 8), values, keep)
    views = [tensor[:, ::2, 1::2, :5] for tensor in dense((2, 6, 40), triton_device)]
    assert_packs(*views, keep[:, :, :20])


def both_merges(
    shape: tuple[int, int, int], n_tail: int, evict: bool, device: torch.device, view: View = lambda tensor: tensor
) -> tuple[Packed, Packed]:
    keys, values = dense(shape, device)
    tail_keys, tail_values = dense((*shape[:2], n_tail), device)
    context = pack(keys, values, some(shape, device), impl="reference")
    arguments = (view(context.keys), view(context.values), *context[2:], view(tail_keys), view(tail_values))
    rest = (some_positions(shape[0], n_tail, device=device), some((*shape[:2], n_tail), device))
    survives = torch.rand(context.keys.shape[0], device=device) < 0.5 if evict else None
    got, expected = (merge(*arguments, *rest, keep_context=survives, impl=impl) for impl in ("triton", "reference"))
    return got, expected


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
    assert not got.keys.isnan().any()


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
    shape: tuple[int, int, int], seed: int, triton_device: torch.device
) -> None:
    torch.manual_seed(seed)
    keys, values = dense(shape, triton_device)
    keep = some(shape, triton_device)
    packed = pack(keys, values, keep, impl="triton")
    columns = torch.arange(shape[2], dtype=torch.int32, device=triton_device).expand(shape)
    for whole, rows in ((keys, packed.keys), (values, packed.values), (columns, packed.positions)):
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
        torch.tensor(numbers, dtype=torch.int32, device=triton_device) for numbers in ([[7]], [far, -1, far - 1], [0])
    )
    _scatter(keys, rows[..., :2], positions, destinations, Packed(out_keys, out_values, out_positions, bounds))
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
    packed = pack(keys, keys[..., :1], keep, impl="triton")
    assert torch.equal(packed.keys, keys[0, 0, -70:-3])
    assert packed.positions.tolist() == list(range(length - 70, length - 3))


@pytest.mark.gpu
@pytest.mark.triton
def test_a_result_of_more_than_two_to_the_31_numbers_is_written() -> None:
    keys = torch.randint(-99, 99, (1, 1, 2**24 + 8, 128), dtype=torch.int8, device="cuda")
    packed = pack(keys, keys[..., :1], torch.ones_like(keys[..., 0], dtype=torch.bool), impl="triton")
    assert torch.equal(packed.keys, keys[0, 0])


@pytest.mark.gpu
@pytest.mark.triton
@pytest.mark.parametrize("op", ["pack", "merge"])
def test_packing_a_layer_needs_little_memory_beside_its_result(op: str) -> None:
    shape, device = (1, 8, 65536), torch.device("cuda")
    keys, values = (torch.randn(*shape, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    keep = torch.rand(shape, device=device) < 0.3
    context = pack(keys, values, torch.ones_like(keep), impl="triton")
    tail = (keys[:, :, :0], values[:, :, :0], some_positions(1, 0, device=device), keep[:, :, :0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if op == "pack":
        packed = pack(keys, values, keep, impl="triton")
    else:
        packed = merge(*context, *tail, keep_context=keep.flatten(), impl="triton")
    result = sum(tensor.numel() * tensor.element_size() for tensor in packed)
    # int32 destinations and what a cumulative sum needs; a merge has int64 row numbers too. A pair itself is 512 bytes.
    indices = keep.numel() * (12 if op == "pack" else 36) + (4 << 20)
    assert torch.cuda.max_memory_allocated() - before <= result + indices


def test_an_explicit_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device = torch.device("cpu")
    keys, values = dense((1, 2, 5), device)
    keep = some((1, 2, 5), device)
    packed = pack(keys, values, keep)
    with pytest.raises(ValueError, match="impl 'triton' can do"):
        pack(keys, values, keep, impl="triton")
    with pytest.raises(ValueError, match="impl 'triton' can do"):
        merge(*packed, keys, values, some_positions(1, 5, device=device), keep, impl="triton")
