"""The Triton kernels that encode and decode rows: bit for bit the reference, whatever the shapes and the numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.row_codec import CODECS, Codes, decode_rows, encode_groups, encode_rows, groups_of

View = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Heads of 80 numbers do not fill a power of two, 4 fill one byte of int2, and 131 rows no whole number of programs.
SHAPES = [(131, 64), (2, 3, 37, 80), (1, 4), (2, 2, 5, 128), (0, 64), (1, 2, 1, 3, 256)]


def numbers(shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
    """Rows of all kinds: outliers, an offset, zeros, one number repeated, tiny, huge, and ties between codes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator)
    flat = rows.view(-1, shape[-1])
    flat[0::7, 1] *= 100
    flat[1::7] += 20
    flat[2::21] = 0
    flat[3::21] = flat[3::21, :1]
    flat[4::21] *= 1e-4
    flat[5::21] *= 500
    flat[6::7] = torch.randint(-12, 13, flat[6::7].shape, generator=generator) / 2
    return rows.to(device)


def same(got: Codes, expected: Codes) -> None:
    assert got.codec == expected.codec
    for one, other in ((got.codes, expected.codes), (got.scales, expected.scales)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_codes_and_numbers_are_those_of_the_reference(
    codec: str, dtype: torch.dtype, triton_device: torch.device
) -> None:
    for seed, shape in enumerate(SHAPES):
        rows = numbers(shape, triton_device, seed).to(dtype)
        codes = encode_rows(rows, codec, impl="triton")
        same(codes, encode_rows(rows, codec, impl="reference"))
        for into in DTYPES:
            decoded = decode_rows(codes, into, impl="triton")
            assert torch.equal(decoded, decode_rows(codes, into, impl="reference"))
            assert decoded.dtype == into and decoded.is_contiguous()


@pytest.mark.parametrize("codec", CODECS)
def test_strided_rows_and_stretches_are_read_where_they_lie(
    codec: str, triton_device: torch.device, inside_nan: View
) -> None:
    """As a model makes keys: tokens before heads; what lies beside them is NaN."""
    rows = inside_nan(numbers((2, 9, 3, 32), triton_device)).transpose(1, 2)
    codes = encode_rows(rows, codec, impl="triton")
    same(codes, encode_rows(rows, codec, impl="reference"))
    part = codes[1:2]
    assert torch.equal(decode_rows(part, impl="triton"), decode_rows(codes, impl="reference")[1:2])


@pytest.mark.parametrize("codec", ["int4", "int2"])
def test_groups_are_decoded_as_by_the_reference(codec: str, triton_device: torch.device) -> None:
    groups, count = groups_of(torch.tensor([0, 40, 41, 41, 73], dtype=torch.int32), 73, 32)
    codes = encode_groups(numbers((73, 80), triton_device), groups.to(triton_device), count, codec)
    chosen = Codes(codes.codes[::2], codes.scales, codec, codes.groups[::2])
    for one in (codes, chosen, codes[5:50]):
        for into in DTYPES:
            assert torch.equal(decode_rows(one, into, impl="triton"), decode_rows(one, into, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_rotated_rows_differ_by_a_code_at_most(head_dim: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    """And that seldom: where a sum in another order falls to the other side of a border between two codes."""
    rows = numbers((2, 3, 40, head_dim), triton_device).to(dtype)
    centres = numbers((2, 3, head_dim), triton_device, seed=5).to(dtype)
    for given in (None, centres):
        found, expected = (
            encode_rows(rows, "int4", rotated=True, centres=given, impl=impl) for impl in ("triton", "reference")
        )
        exact = encode_rows(rows.double(), "int4", rotated=True, centres=None if given is None else given.double())
        step = exact.scales[..., :1].double()
        off = (decode_rows(found, torch.float64) - decode_rows(exact, torch.float64)).abs()
        plain = (decode_rows(expected, torch.float64) - decode_rows(exact, torch.float64)).abs()
        assert (off <= 1.05 * step + 2**-7 * decode_rows(exact, torch.float64).abs()).all()
        assert float((off > step / 2).double().mean()) <= max(2e-3, 2 * float((plain > step / 2).double().mean()))


@pytest.mark.parametrize("codec", CODECS)
def test_centres_alone_are_subtracted_exactly(codec: str, triton_device: torch.device) -> None:
    rows, centres = numbers((2, 3, 9, 64), triton_device), numbers((2, 3, 64), triton_device, seed=1).bfloat16()
    codes = encode_rows(rows, codec, centres=centres, impl="triton")
    same(codes, encode_rows(rows, codec, centres=centres, impl="reference"))
    same(codes, encode_rows(rows - centres.float().unsqueeze(-2), codec, impl="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, 64, dtype=torch.float64)}, "the dtype is torch.float64"),
        ({"rows": torch.zeros(64, 64).T}, "do not lie side by side"),
        ({"rows": torch.zeros(3, 8), "rotated": True}, "the kernel rotates rows of 16 to 256 numbers"),
        ({"rows": torch.zeros(1, 2048)}, "head_dim is 2048"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    change: dict[str, Tensor], message: str, triton_device: torch.device
) -> None:
    """By name; and without a name another implementation does it."""
    options = {name: x.to(triton_device) if isinstance(x, Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        encode_rows(**options, codec="int8", impl="triton")
    codes = encode_rows(**options, codec="int8")
    with pytest.raises(ValueError, match=r"the dtype is torch\.float64"):
        decode_rows(codes, torch.float64, impl="triton")
    assert decode_rows(codes, torch.float64).shape == options["rows"].shape
