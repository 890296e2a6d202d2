"""Attention to parts equals attention to all their pairs, decoded, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.ragged_attention import Part, parted_attention, ragged_attention
from kvzip_press.kernels.row_codec import Codes, decode_rows, encode_groups, encode_rows, groups_of

IMPLS = [None, "merged", pytest.param("triton", marks=pytest.mark.triton)]
HEADS, GROUPS, DIM = 2, 3, 32
#: Pairs of each segment in each part: exact ones, and one or two parts of codes.
SINKS_AND_OTHERS = [[4, 0, 4, 1], [61, 7, 0, 0]]
TIERS = [[4, 4, 0, 4], [0, 33, 0, 70], [90, 1, 0, 3]]


def rows(total: int, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(total, DIM) * scale
    drawn[::7] = 0
    return drawn


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def codes_of(total: int, codec: str, lengths: list[int]) -> Codes:
    if codec.startswith("grouped "):
        groups, count = groups_of(bounds_of(lengths), total)
        return encode_groups(rows(total, 3.0), groups, count, codec.removeprefix("grouped "))
    return encode_rows(rows(total), codec)


def parts_of(lengths: list[list[int]], codecs: list[tuple[str, str]], dtype: torch.dtype) -> list[Part]:
    """The first ones exact, if there are as many lengths more than codecs."""
    parts = []
    if len(lengths) > len(codecs):
        total = sum(lengths[0])
        parts.append(Part(rows(total).to(dtype), rows(total).to(dtype), bounds_of(lengths[0])))
    for of_part, codec in zip(lengths[len(parts) :], codecs, strict=True):
        keys, values = (codes_of(sum(of_part), one, of_part) for one in codec)
        parts.append(Part(keys, values, bounds_of(of_part)))
    return parts


def moved(part: Part, device: torch.device) -> Part:
    def to(x: Tensor | Codes | None) -> Any:
        if not isinstance(x, Codes):
            return None if x is None else x.to(device)
        groups = None if x.groups is None else x.groups.to(device)
        return Codes(x.codes.to(device), x.scales.to(device), x.codec, groups)

    return Part(
        *(to(getattr(part, name)) for name in ("keys", "values", "cu_seqlens", "context_query", "context_bias"))
    )


def exact(
    query: Tensor, parts: list[Part], tail: tuple[Tensor, Tensor] | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """All pairs decoded, put together segment by segment, in fp64; queries of a part that are others are given up."""

    def decoded(x: Tensor | Codes) -> Tensor:
        return decode_rows(x, torch.float64) if isinstance(x, Codes) else x.double()

    whole = []
    for which in ("keys", "values"):
        of_parts = [decoded(getattr(part, which)).split(part.cu_seqlens.diff().tolist()) for part in parts]
        whole.append(torch.cat([piece for segment in zip(*of_parts, strict=True) for piece in segment]))
    bounds = torch.stack([part.cu_seqlens for part in parts]).sum(0).int()
    both = () if tail is None else tuple(x.double() for x in tail)
    got = ragged_attention(query.double(), *whole, bounds, *both, return_lse=True, impl="reference", **options)
    assert isinstance(got, tuple)
    return got


def assert_equals_decoded(
    parts: list[Part],
    impl: str | None,
    device: torch.device,
    *,
    n_rows: int = 1,
    n_tail: int | None = 3,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    **options: Any,
) -> None:
    query = (2 * torch.randn(batch, HEADS * GROUPS, n_rows, DIM)).to(device, dtype)
    tail = None if n_tail is None else tuple(torch.randn(2, batch, HEADS, n_tail, DIM).to(device, dtype))
    parts = [moved(part, device) for part in parts]
    got = parted_attention(query, parts, *(tail or ()), return_lse=True, impl=impl, **options)
    for one, expected in zip(got, exact(query, parts, tail, **options), strict=True):  # type: ignore[arg-type]
        largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0.0
        tolerance = float(largest) * (2e-5 if one.dtype == torch.float32 else 1.5e-2) + 2e-6
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=tolerance)


FORMS = [
    (SINKS_AND_OTHERS, [("int8", "int4")]),
    (SINKS_AND_OTHERS, [("int4", "int4")]),
    (TIERS, [("int8", "int4"), ("int4", "int2")]),
    (TIERS[1:], [("int8", "int4"), ("int4", "int2")]),
    (TIERS, [("grouped int2", "int2"), ("fp8", "fp8")]),
]


@pytest.mark.parametrize(("n_rows", "n_tail"), [(1, None), (1, 0), (1, 40), (5, 9)])
@pytest.mark.parametrize(("lengths", "codecs"), FORMS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_it_equals_attention_to_all_pairs(
    impl: str | None,
    lengths: list[list[int]],
    codecs: list[tuple[str, str]],
    n_rows: int,
    n_tail: int | None,
    device: torch.device,
) -> None:
    parts = parts_of(lengths, codecs, torch.float32)
    assert_equals_decoded(parts, impl, device, n_rows=n_rows, n_tail=n_tail)


@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_scaling_mask_shared_rows_and_dtypes(impl: str | None, device: torch.device) -> None:
    parts = parts_of(TIERS, [("int8", "int4"), ("int4", "int2")], torch.float32)
    assert_equals_decoded(parts, impl, device, softcap=3.0, scaling=0.3)
    mask = torch.rand(2, 1, 2, 5) < 0.6
    assert_equals_decoded(parts, impl, device, n_rows=2, n_tail=5, tail_mask=mask.to(device))
    for index in ([1, 0], [1, 1, 0]):
        shared = torch.tensor(index, device=device)
        assert_equals_decoded(parts, impl, device, batch=len(index), row_index=shared)
    half = parts_of(TIERS, [("int8", "int4"), ("int4", "int2")], torch.bfloat16)
    assert_equals_decoded(half, impl, device, dtype=torch.bfloat16, n_tail=33)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_meets_the_keys_of_a_part_is_its_own(impl: str | None, device: torch.device) -> None:
    """A rotation of queries and keys changes nothing, and a centre comes back with the bias."""
    turn = torch.linalg.qr(torch.randn(DIM, DIM))[0]
    query, centre = torch.randn(2, HEADS * GROUPS, 1, DIM), torch.randn(DIM)
    keys = torch.randn(111, DIM)
    lengths = [[4, 4, 0, 4], [40, 1, 70, 0]]
    coded = encode_rows(((keys - centre) @ turn).contiguous(), "int8")
    options = {"context_query": query @ turn, "context_bias": query @ centre}
    first, *_ = parts_of([lengths[0], [0] * 4], [("int8", "int8")], torch.float32)
    values = encode_rows(torch.randn(111, DIM), "int8")
    parts = [first, Part(coded, values, bounds_of(lengths[1]), **options)]
    tail = torch.randn(2, 2, HEADS, 3, DIM)
    given = [query.to(device), [moved(part, device) for part in parts], *tail.to(device)]
    got = parted_attention(*given, impl=impl)
    back = decode_rows(coded) @ turn.T + centre
    straight = [first, Part(back, decode_rows(values), bounds_of(lengths[1]))]
    expected, _ = exact(query, straight, tuple(tail))
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_outside_the_segments_is_read(impl: str | None, device: torch.device) -> None:
    """Parts of a pool, whose other pairs are NaN or huge, and a tail that has room for more."""
    parts = [moved(part, device) for part in parts_of(TIERS, [("int8", "int8"), ("int4", "int2")], torch.float32)]
    query, tail = torch.randn(1, HEADS * GROUPS, 1, DIM, device=device), torch.randn(2, 1, HEADS, 8, DIM, device=device)
    own = [Part(part.keys, part.values, part.cu_seqlens[2:]) for part in parts]  # the second row's segments
    expected = parted_attention(query, own, *tail[:, :, :, :5], part_of_storage=True, impl=impl)
    exact_keys, first = parts[0].keys, int(parts[0].cu_seqlens[2])
    assert isinstance(exact_keys, Tensor)
    exact_keys[:first] = torch.nan
    for part in parts[1:]:
        for codes in (part.keys, part.values):
            assert isinstance(codes, Codes)
            codes.scales[: int(part.cu_seqlens[2])] = torch.nan
    tail[:, :, :, 5:] = torch.nan
    length = torch.tensor([5], dtype=torch.int32, device=device)
    got = parted_attention(query, own, *tail, tail_length=length, part_of_storage=True, impl=impl)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, expected)
    assert bool(got.isfinite().all())


BAD: list[tuple[Callable[[list[Part]], list[Part]], type[Exception], str]] = [
    (lambda parts: [], ValueError, "parts: expected one or more, got none"),
    (lambda parts: parts[::-1], TypeError, "parts: expected codes behind the first part"),
    (
        lambda parts: [parts[0], Part(parts[1].keys, parts[1].values, parts[1].cu_seqlens[:-1])],
        ValueError,
        "cu_seqlens",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_inputs_are_named(change: Callable[[list[Part]], list[Part]], error: type[Exception], message: str) -> None:
    parts = parts_of(SINKS_AND_OTHERS, [("int8", "int4")], torch.float32)
    tail = torch.randn(2, 2, HEADS, 3, DIM)
    with pytest.raises(error, match=message):
        parted_attention(torch.randn(2, HEADS * GROUPS, 1, DIM), change(parts), *tail)


@pytest.mark.triton
def test_the_kernel_says_what_it_cannot_do(triton_device: torch.device) -> None:
    parts = [
        moved(part, triton_device) for part in parts_of(TIERS, [("int8", "int4"), ("int4", "int2")], torch.float32)
    ]
    query = torch.randn(2, HEADS * GROUPS, 1, DIM, device=triton_device)
    tail = torch.randn(2, 2, HEADS, 30, DIM, device=triton_device)
    for given, reason in (
        ([*parts, parts[1]], "there are 3 parts of codes, not 1 to 2"),
        (parts[:1], "there are 0 parts of codes"),
    ):
        with pytest.raises(ValueError, match=reason):
            parted_attention(query, given, *tail, impl="triton")
    with pytest.raises(ValueError, match="there are 90 query rows, not up to 64"):
        parted_attention(query.expand(-1, -1, 30, -1), parts, *tail, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "codecs"), FORMS, ids=str)
def test_a_captured_graph_reads_parts_while_the_tail_grows(
    lengths: list[list[int]], codecs: list[tuple[str, str]], captured: Callable[..., Any]
) -> None:
    longer = [[40 * n for n in part] for part in lengths]
    longer[0] = lengths[0] if len(lengths) > len(codecs) else longer[0]
    cuda = torch.device("cuda")
    parts = [moved(part, cuda) for part in parts_of(longer, codecs, torch.bfloat16)]
    query = torch.randn(2, HEADS * GROUPS, 1, DIM, device=cuda, dtype=torch.bfloat16)
    tail = torch.randn(2, 2, HEADS, 64, DIM, device=cuda, dtype=torch.bfloat16)
    length = torch.tensor([1], dtype=torch.int32, device=cuda)

    def run(impl: str) -> Tensor:
        out = parted_attention(query, parts, *tail, tail_length=length, impl=impl)
        assert isinstance(out, Tensor)
        return out

    got, replay = captured(lambda: run("triton"))
    for live in (1, 2, 33, 64):
        length.fill_(live)
        query.normal_()
        replay()
        expected, _ = exact(query, parts, tuple(tail[:, :, :, :live]))
        torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)
