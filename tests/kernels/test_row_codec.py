"""Rows in 8, 4 and 2 bits: how far a decoded number may be from the original, and which inputs are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip_press.kernels.row_codec import (
    CODECS,
    Codes,
    decode_rows,
    encode_groups,
    encode_rows,
    groups_of,
    plane_factors,
    rotate,
    row_scales,
    write_numbers,
)

View = Callable[[Tensor], Tensor]

LAW = settings(deadline=None, max_examples=30, derandomize=True)
STEPS = {"int8": 254, "int4": 15, "int2": 3}  # between the ends of the range


def largest_error(rows: Tensor, codec: str) -> Tensor:
    """What the docstring of ``encode_rows`` allows for each number, in fp64; 2**-8 is what rounding to bf16 does."""
    exact = rows.double()
    bf16 = 1 + 2**-8
    if codec == "fp8":
        scale = exact.abs().amax(-1, keepdim=True) / 448 * bf16
        return torch.maximum(exact.abs() / 16, scale / 1024)
    if codec == "int8":
        return (exact.abs().amax(-1, keepdim=True) / 127 * bf16 / 2).expand_as(exact)
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    zero = torch.maximum(low.abs(), high.abs()) * 2**-8 / (7 if codec == "int4" else 1)
    return (((high - low) / STEPS[codec] + zero) * bf16 / 2).expand_as(exact)


def rows_of(kind: str, n: int = 40, head_dim: int = 64) -> Tensor:
    rows = torch.randn(n, head_dim)
    if kind == "outlier channel":
        rows[:, 3] *= 100
    elif kind == "biased":
        rows += 20
    elif kind == "tiny":
        rows *= 1e-30
    elif kind == "huge":
        rows *= 1e30
    elif kind == "constant":
        rows = rows[:, :1].expand(-1, head_dim).clone()
    return rows


KINDS = ["normal", "outlier channel", "biased", "tiny", "huge", "constant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", CODECS)
def test_a_decoded_number_is_within_half_a_step(codec: str, kind: str, device: torch.device) -> None:
    rows = rows_of(kind).to(device)
    decoded = decode_rows(encode_rows(rows, codec), torch.float64)
    error = (decoded - rows.double()).abs()
    assert (error <= largest_error(rows, codec) * (1 + 1e-6)).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zeros_stay_zeros(codec: str, dtype: torch.dtype) -> None:
    codes = encode_rows(torch.zeros(3, 2, 64, dtype=dtype), codec)
    assert torch.equal(decode_rows(codes, dtype), torch.zeros(3, 2, 64, dtype=dtype))
    assert codes.scales.float().isfinite().all()


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_a_zero_in_a_row_stays_a_zero(codec: str) -> None:
    rows = torch.randn(5, 64)
    rows[:, ::3] = 0
    assert not decode_rows(encode_rows(rows, codec))[:, ::3].any()


@pytest.mark.parametrize("codec", ["int4", "int2"])
def test_equal_bf16_numbers_are_exact(codec: str) -> None:
    """Their zero is the number itself."""
    rows = torch.randn(9, 1, dtype=torch.bfloat16).expand(-1, 64)
    assert torch.equal(decode_rows(encode_rows(rows, codec), torch.bfloat16), rows)


@pytest.mark.parametrize("codec", CODECS)
def test_a_second_encoding_changes_nothing(codec: str) -> None:
    once = decode_rows(encode_rows(torch.randn(20, 64), codec))
    torch.testing.assert_close(
        decode_rows(encode_rows(once, codec)), once, rtol=2e-2, atol=2e-2 * float(once.abs().max())
    )


@pytest.mark.parametrize(("codec", "bits"), [("int8", 8.125), ("fp8", 8.125), ("int4", 4.25), ("int2", 2.25)])
def test_a_number_of_128_takes_these_bits(codec: str, bits: float) -> None:
    codes = encode_rows(torch.randn(7, 128), codec)
    assert codes.nbytes * 8 == bits * 7 * 128
    assert (codes.shape, codes.head_dim) == ((7, 128), 128)


def test_nibbles_of_a_byte_are_half_a_row_apart() -> None:
    """The layout that kernels and files rely on."""
    rows = torch.arange(16.0).repeat(2)[None] - 8
    codes = encode_rows(rows, "int4")
    assert torch.equal(codes.scales.float(), torch.tensor([[1.0, 0.0]]))
    assert codes.codes.tolist() == [[17 * number for number in range(16)]]


@pytest.mark.parametrize("codec", CODECS)
def test_strided_rows_are_encoded_as_they_are(codec: str, inside_nan: View) -> None:
    rows = torch.randn(2, 3, 5, 32)
    plain, strided = encode_rows(rows, codec), encode_rows(inside_nan(rows), codec)
    assert torch.equal(plain.codes.view(torch.uint8), strided.codes.view(torch.uint8))
    assert torch.equal(plain.scales, strided.scales)


@pytest.mark.parametrize("codec", CODECS)
def test_a_stretch_of_rows_is_a_view_and_decodes_to_the_same(codec: str) -> None:
    codes = encode_rows(torch.randn(20, 64), codec)
    part = codes[3:9]
    assert part.codes.data_ptr() == codes.codes[3:].data_ptr()
    assert torch.equal(decode_rows(part), decode_rows(codes)[3:9])


@pytest.mark.parametrize("head_dim", [64, 36])
@pytest.mark.parametrize("codec", CODECS)
def test_numbers_with_factor_scale_and_zero_are_the_rows(codec: str, head_dim: int) -> None:
    """Whether a row's bytes are whole words of 64 bits or not; a plane is a stretch of the row."""
    codes = encode_rows(torch.randn(20, head_dim), codec)[3:]
    factors = plane_factors(codes)
    numbers = write_numbers(codes, torch.full((len(factors), 17, head_dim // len(factors)), torch.nan).double())
    scale, zero = row_scales(codes, torch.float64)
    assert scale is not None
    split = numbers * torch.tensor(factors)[:, None, None] * scale.unsqueeze(-1)
    rows = split.transpose(0, 1).flatten(1) + (0 if zero is None else zero.unsqueeze(-1))
    torch.testing.assert_close(rows, decode_rows(codes, torch.float64))


@pytest.mark.parametrize("codec", ["int4", "int2"])
def test_numbers_of_groups_are_the_rows(codec: str) -> None:
    groups, count = groups_of(torch.tensor([0, 40, 73], dtype=torch.int32), 73, 32)
    codes = encode_groups(rows_of("outlier channel", 73), groups, count, codec)[35:70]
    assert row_scales(codes, torch.float64) == (None, None) and set(plane_factors(codes)) == {1.0}
    n_planes = CODECS[codec].numbers_a_byte
    numbers = write_numbers(codes, torch.full((n_planes, 35, 64 // n_planes), torch.nan).double())
    torch.testing.assert_close(numbers.transpose(0, 1).flatten(1), decode_rows(codes, torch.float64))
    write_numbers(codes[:0], numbers[:, :0])


@LAW
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4), size=st.integers(1, 40))
def test_no_group_crosses_a_segment_or_is_too_large(lengths: list[int], size: int) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    groups, count = groups_of(bounds, sum(lengths), size)
    assert groups.dtype == torch.int32
    expected: list[int] = []
    for length in lengths:
        first = expected[-1] + 1 if expected else 0
        expected += [first + number // size for number in range(length)]
    assert groups.tolist() == expected
    assert count == (expected[-1] + 1 if expected else 0)


@pytest.mark.parametrize("codec", ["int4", "int2"])
def test_an_outlier_channel_of_a_group_costs_the_others_nothing(codec: str) -> None:
    """Keys a channel (KIVI), beside keys a row."""
    rows = rows_of("outlier channel", 73)
    groups, count = groups_of(torch.tensor([0, 40, 41, 73], dtype=torch.int32), 73, 32)
    codes = encode_groups(rows, groups, count, codec)
    error = (decode_rows(codes, torch.float64) - rows).abs()
    for group in range(count):
        own = groups == group
        assert (error[own] <= largest_error(rows[own].T, codec).T * (1 + 1e-6)).all()
    by_row = (decode_rows(encode_rows(rows, codec)) - rows).abs()
    others = torch.arange(64) != 3
    assert error[:, others].mean() < by_row[:, others].mean() / 5
    selected = Codes(codes.codes[::2], codes.scales, codec, groups[::2])
    assert torch.equal(decode_rows(selected), decode_rows(codes)[::2])


def test_a_group_of_one_row_is_exact() -> None:
    rows = torch.randn(3, 8, dtype=torch.bfloat16)
    groups, count = groups_of(torch.tensor([0, 1, 3], dtype=torch.int32), 3, 1)
    assert torch.equal(decode_rows(encode_groups(rows, groups, count, "int4"), torch.bfloat16), rows)


@pytest.mark.parametrize("head_dim", [1, 64, 256])
def test_a_rotation_is_its_own_inverse_and_keeps_products(head_dim: int) -> None:
    queries, keys = torch.randn(2, 5, head_dim, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(keys)), keys)
    torch.testing.assert_close(rotate(queries) @ rotate(keys).T, queries @ keys.T)


def test_a_rotation_spreads_an_outlier() -> None:
    rows = torch.zeros(1, 64)
    rows[0, 5] = 8.0
    assert torch.equal(rotate(rows).abs(), torch.ones(1, 64))


ROWS = torch.zeros(4, 6)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: encode_rows(ROWS, "int3"), ValueError, "codec: expected one of"),
    (lambda: encode_rows(ROWS.int(), "int8"), TypeError, "rows: expected a floating-point"),
    (lambda: encode_rows(ROWS[:, :5], "int4"), ValueError, "a multiple of 2.*got 5"),
    (lambda: encode_rows(ROWS, "int2"), ValueError, "a multiple of 4.*got 6"),
    (lambda: encode_rows(ROWS[:, :0], "int8"), ValueError, "got 0"),
    (lambda: encode_rows(ROWS, "int8", impl="cuda"), ValueError, "expected impl to be None or one of"),
    (lambda: encode_groups(ROWS, torch.zeros(4, dtype=torch.int32), 1, "int8"), ValueError, "'int4' or 'int2'"),
    (lambda: encode_groups(ROWS, torch.zeros(4), 1, "int4"), TypeError, "groups: expected torch.int32"),
    (lambda: encode_groups(ROWS, torch.zeros(3, dtype=torch.int32), 1, "int4"), ValueError, "groups: expected"),
    (lambda: groups_of(torch.zeros(1, dtype=torch.int32), 0, 0), ValueError, "group_size: expected 1 or more"),
    (lambda: rotate(ROWS), ValueError, "power of two, got 6"),
    (lambda: decode_rows(Codes(ROWS, ROWS[:, 0], "int8")), TypeError, "codes.codes: expected torch.int8"),
    (lambda: decode_rows(Codes(ROWS.char(), ROWS[:, 0], "int8")), TypeError, "codes.scales: expected torch.bfloat16"),
    (lambda: decode_rows(Codes(ROWS.char(), ROWS[:3, 0].bfloat16(), "int8")), ValueError, "codes.scales: expected"),
    (lambda: decode_rows(Codes(ROWS.byte(), ROWS[:, 0].bfloat16(), "int4")), ValueError, "codes.scales: expected"),
    (lambda: decode_rows(Codes(ROWS.byte(), ROWS[:, 0].bfloat16(), "int5")), ValueError, "codec: expected one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_inputs_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "fp8"])
def test_nothing_is_made_on_another_device_than_that_of_the_codes(codec: str) -> None:
    """With a default device that the codes are not on, as a CPU is beside a GPU."""
    codes = encode_rows(torch.randn(5, 32), codec)
    factors = plane_factors(codes)
    expected = write_numbers(codes, torch.empty(len(factors), 5, 32 // len(factors)))
    numbers = torch.empty_like(expected)
    with torch.device("meta"):
        write_numbers(codes, numbers)
        decoded = decode_rows(codes, torch.float32)
    torch.testing.assert_close(numbers, expected)
    torch.testing.assert_close(decoded, decode_rows(codes, torch.float32))
