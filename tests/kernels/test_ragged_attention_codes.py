"""Attention to codes equals attention to the decoded rows, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.kernels.ragged_attention.codes import support, tiles
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.row_codec import Codes, decode_rows, encode_groups, encode_rows, groups_of, rotate

Accurate = Callable[[Tensor, Tensor, Tensor], None]

IMPLS = [None, "tiles", "reference", pytest.param("triton", marks=pytest.mark.triton)]
CODECS = [("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("fp8", "fp8")]
ANY = [*CODECS, ("int4", "int2"), ("int2", "int8")]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 rows of 32 numbers, so that a short segment has several."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 64 * 32 * 4)


def packed(total: int, codec: str, head_dim: int, device: torch.device | str = "cpu") -> Codes:
    rows = torch.randn(total, head_dim)
    rows[::7] = 0
    rows[::5] *= 3
    return encode_rows(rows.to(device), codec)


def arguments(
    lengths: list[int],
    codecs: tuple[str, str] = ("int8", "int8"),
    *,
    n_rows: int = 1,
    n_tail: int | None = None,
    heads: int = 2,
    groups: int = 3,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    batch = len(lengths) // heads
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    keys, values = (packed(sum(lengths), codec, head_dim, device) for codec in codecs)
    given: dict[str, Any] = {"keys": keys, "values": values, "cu_seqlens": bounds}
    given["query"] = (2 * torch.randn(batch, heads * groups, n_rows, head_dim)).to(device, dtype)
    if n_tail is not None:
        tails = torch.randn(2, batch, heads, n_tail, head_dim).to(device, dtype)
        given |= {"tail_keys": tails[0], "tail_values": tails[1]}
    return given


def exact(given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """The decoded rows, unknown to the op, in fp64."""
    wide = {name: x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x for name, x in given.items()}
    wide |= {name: decode_rows(given[name], torch.float64) for name in ("keys", "values")}
    got = ragged_attention(**wide, **options, return_lse=True, impl="reference")
    assert isinstance(got, tuple)
    return got


def assert_equals_decoded(given: dict[str, Any], impl: str | None, **options: Any) -> None:
    got = ragged_attention(**given, **options, return_lse=True, impl=impl)
    for one, expected in zip(got, exact(given, **options), strict=True):
        largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0.0
        # fp32: sums of products with codes of up to 255; bf16: weights and the result are rounded to 8 bits, and so are
        # keys that are decoded, which moves the log-sum-exp
        in_full = one.dtype == torch.float32 and (given["query"].dtype == one.dtype or given["keys"].groups is None)
        tolerance = float(largest) * (2e-5 if in_full else 1.5e-2) + 2e-6
        torch.testing.assert_close(one.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("n_rows", "n_tail"), [(1, None), (1, 0), (1, 1), (3, 9), (40, 65)])
@pytest.mark.parametrize("lengths", [[0, 1, 1, 0], [63, 64, 65, 1], [0, 0, 0, 0], [300, 7, 7, 7]])
@pytest.mark.parametrize("codecs", ANY)
def test_it_equals_attention_to_the_decoded_rows(
    codecs: tuple[str, str], lengths: list[int], n_rows: int, n_tail: int | None
) -> None:
    assert_equals_decoded(arguments(lengths, codecs, n_rows=n_rows, n_tail=n_tail), None)


@pytest.mark.triton
@pytest.mark.parametrize("codecs", [*CODECS, ("int4", "int2")])
def test_the_kernel_equals_attention_to_the_decoded_rows(codecs: tuple[str, str], triton_device: torch.device) -> None:
    """Every width of a word, tiles that end inside a segment, an empty segment, and a tail in the same launch."""
    given = arguments([40, 0], codecs, n_tail=3, groups=2, head_dim=64, device=triton_device)
    assert_equals_decoded(given, "triton")


@pytest.mark.triton
@pytest.mark.parametrize(("head_dim", "groups", "n_rows"), [(80, 1, 1), (128, 16, 1), (32, 2, 9)])
def test_the_kernel_does_every_width_and_many_rows(
    head_dim: int, groups: int, n_rows: int, triton_device: torch.device
) -> None:
    """In bf16, as on a GPU; 80 numbers fill no power of two of words, 32 in nibbles too few."""
    given = arguments(
        [33],
        ("int8", "int4"),
        n_rows=n_rows,
        n_tail=n_rows,
        heads=1,
        groups=groups,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device=triton_device,
    )
    assert_equals_decoded(given, "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_scaling_mask_and_shared_rows_act_as_on_rows(impl: str | None, device: torch.device) -> None:
    given = arguments([33, 5], ("int4", "int8"), n_rows=2, n_tail=4, device=device)
    given |= {name: given[name].repeat(2, 1, 1, 1) for name in ("query", "tail_keys", "tail_values")}
    mask = torch.rand(2, 6, 2, 4, device=device) < 0.5
    options = {"scaling": 0.3, "softcap": 2.0, "tail_mask": mask, "row_index": torch.tensor([0, 0], device=device)}
    assert_equals_decoded(given, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_outside_the_segments_is_read(impl: str | None, device: torch.device) -> None:
    """Rows before and behind have scales of NaN, and so has the room behind the live tail."""
    given = arguments([9, 20, 33, 7], ("int8", "int4"), n_tail=6, device=device)
    given["query"] = given["query"][:1]
    given |= {name: given[name][:1] for name in ("tail_keys", "tail_values")}
    inner = given | {"cu_seqlens": given["cu_seqlens"][1:4] - 9} | {n: given[n][9:62] for n in ("keys", "values")}
    inner |= {name: given[name][:, :, :2] for name in ("tail_keys", "tail_values")}
    expected = exact(inner)
    for name in ("keys", "values"):
        scales = given[name].scales.clone()
        scales[:9] = scales[62:] = torch.nan
        given[name] = Codes(given[name].codes, scales, given[name].codec)
        given[f"tail_{name}"] = given[f"tail_{name}"].clone()
        given[f"tail_{name}"][:, :, 2:] = torch.nan
    given["cu_seqlens"] = given["cu_seqlens"][1:4]
    live = torch.tensor([2], dtype=torch.int32, device=device)
    got = ragged_attention(**given, part_of_storage=True, tail_length=live, return_lse=True, impl=impl)
    for one, expected_one in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), expected_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 40])
@pytest.mark.parametrize("impl", [None, "reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_centred_and_rotated_keys_give_the_logits_of_the_keys(
    impl: str | None, n_rows: int, device: torch.device
) -> None:
    """The query is rotated as the keys were, and its product with their centre comes back as a bias."""
    if impl == "triton" and n_rows > 1:
        pytest.skip("slow in the interpreter, and nothing new")
    given = arguments([40, 9], n_rows=n_rows, n_tail=n_rows, device=device)
    centre = 5 * torch.randn(2, 32, device=device)
    of_segment = torch.repeat_interleave(torch.arange(2, device=device), given["cu_seqlens"].diff())
    keys = torch.randn(49, 32, device=device) + centre[of_segment]
    given["keys"] = encode_rows(rotate(keys - centre[of_segment]), "int8")
    grouped = given["query"].unflatten(1, (2, 3))
    bias = torch.einsum("bhgnd,hd->bhgn", grouped, centre).flatten(1, 2)
    got = ragged_attention(**given, context_query=rotate(given["query"]), context_bias=bias, return_lse=True, impl=impl)
    decoded = rotate(decode_rows(given["keys"])) + centre[of_segment]
    rows = given | {"keys": decoded, "values": decode_rows(given["values"])}
    expected = ragged_attention(**rows, return_lse=True, impl="reference")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codecs", [("int4", "int4"), ("int2", "int2")])
@pytest.mark.parametrize("n_rows", [1, 24])  # times groups: more than two blocks of rows
@pytest.mark.parametrize("impl", [None, pytest.param("triton", marks=pytest.mark.triton)])
def test_keys_a_channel_are_decoded_by_their_groups(
    impl: str | None, n_rows: int, codecs: tuple[str, str], dtype: torch.dtype, device: torch.device
) -> None:
    """KIVI, in segments that end inside a group, with groups that lost members."""
    given = arguments([40, 9], codecs, n_rows=n_rows, n_tail=n_rows, dtype=dtype, device=device)
    groups, count = groups_of(given["cu_seqlens"], 49)
    rows = torch.randn(49, 32, device=device) * torch.rand(32, device=device) * 3 + 1
    given["keys"] = encode_groups(rows, groups.to(device), count, codecs[0])
    assert_equals_decoded(given, impl)
    left = torch.tensor([0, 1, 2, 17, 31, 35, 39, 40, 48], device=device)
    values = given["values"]
    given["keys"] = Codes(given["keys"].codes[left], given["keys"].scales, codecs[0], given["keys"].groups[left])
    given["values"] = Codes(values.codes[left], values.scales[left], codecs[1])
    given["cu_seqlens"] = torch.tensor([0, 7, 9], dtype=torch.int32, device=device)
    assert_equals_decoded(given, impl)


@pytest.mark.parametrize("n_rows", [1, 5])
def test_no_more_than_a_tile_is_ever_decoded(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = tiles.write_numbers

    def recorded(codes: Codes, out: Tensor) -> Any:
        sizes.append(out.numel() * out.element_size())
        return write(codes, out)

    monkeypatch.setattr(tiles, "write_numbers", recorded)
    assert_equals_decoded(arguments([500, 3], n_rows=n_rows, n_tail=n_rows), "tiles")
    assert len(sizes) == 2 * 8  # 503 pairs in tiles of 64: the short segment shares one
    assert max(sizes) == tiles.TILE_BYTES


def test_rows_that_share_a_context_read_it_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another order than in memory, some rows not at all, and in a part of a larger storage."""
    monkeypatch.setattr(tiles, "MAX_LOGITS", 600)
    given = arguments([33, 5, 0, 70, 9, 64], ("int8", "int4"), n_rows=2, n_tail=2)
    for rows in ([2, 1, 2], [1, 1, 1], [0, 1, 2], [1, 2, 0]):
        assert_equals_decoded(given, "tiles", row_index=torch.tensor(rows))


def test_queries_without_rows_give_nothing() -> None:
    out, lse = ragged_attention(**arguments([4, 3], n_rows=0), return_lse=True, impl="tiles")
    assert (out.shape, lse.shape) == ((1, 6, 0, 32), (1, 6, 0))


@pytest.mark.parametrize("n_rows", [3, 40])
def test_rows_in_blocks_and_at_once_agree(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments([200, 3], n_rows=n_rows, n_tail=n_rows)
    expected = ragged_attention(**given, return_lse=True, impl="tiles")
    monkeypatch.setattr(tiles, "MAX_LOGITS", 1000)
    torch.testing.assert_close(ragged_attention(**given, return_lse=True, impl="tiles"), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_far_below_the_largest_count(impl: str | None, device: torch.device) -> None:
    """A pair of a large logit and a small value beside many of small logits and large values."""
    given = arguments([257], heads=1, groups=1, device=device)
    keys, values = torch.zeros(257, 32, device=device), torch.ones(257, 32, device=device)
    keys[0], values[0] = 1.0, 1e-6
    given["query"].fill_(14.0 / 32 * 32**0.5)  # logits of 14 and 0: a weight of 8e-7
    given |= {"keys": encode_rows(keys, "int8"), "values": encode_rows(values, "int8")}
    got = ragged_attention(**given, impl=impl)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got.double(), exact(given)[0], rtol=1e-3, atol=0)


BAD: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = [
    (lambda given: {"values": decode_rows(given["values"])}, TypeError, "expected codes for both or for neither"),
    (lambda given: {"keys": given["keys"][:5]}, ValueError, "values: expected as many rows as keys, 5"),
    (lambda given: {"keys": packed(49, "int8", 16)}, ValueError, r"keys: expected \[total, head_dim\] = \(49, 32\)"),
    (
        lambda given: {"keys": Codes(given["keys"].codes, given["keys"].scales.float(), "int8")},
        TypeError,
        "keys.scales: expected torch.bfloat16",
    ),
    (lambda given: {"context_query": given["query"][..., :8]}, ValueError, "context_query: expected"),
    (lambda given: {"context_query": given["query"].double()}, TypeError, "context_query: expected the dtype of query"),
    (lambda given: {"context_bias": given["query"]}, ValueError, "context_bias: expected"),
    (
        lambda given: {"context_bias": given["query"][..., 0].double()},
        TypeError,
        "context_bias: expected torch.float32",
    ),
    (
        lambda given: {n: decode_rows(given[n]) for n in ("keys", "values")} | {"context_query": given["query"]},
        ValueError,
        "context_query, context_bias: expected only with codes",
    ),
    (lambda given: {"impl": "aten"}, ValueError, "cannot: keys and values are codes"),
    (lambda given: {"impl": "segments"}, ValueError, "there are 1 query rows, not 32 or more"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_inputs_are_named(
    change: Callable[[dict[str, Any]], dict[str, Any]], error: type[Exception], message: str
) -> None:
    given = arguments([40, 9])
    with pytest.raises(error, match=message):
        ragged_attention(**(given | change(given)))


def test_tiles_refuse_rows_of_the_models_dtype() -> None:
    given = arguments([40, 9])
    with pytest.raises(ValueError, match="cannot: keys and values are not codes"):
        ragged_attention(**(given | {n: decode_rows(given[n]) for n in ("keys", "values")}), impl="tiles")


def test_what_the_kernel_cannot_read_is_said_before_a_launch() -> None:
    groups = torch.zeros(9, dtype=torch.int32)
    in_groups = encode_groups(torch.randn(9, 32), groups, 1, "int4")
    in_rows = packed(9, "int4", 32)
    query, bounds = torch.randn(1, 2, 1, 32), torch.tensor([0, 9], dtype=torch.int32)
    int8 = packed(9, "int8", 32)
    refused = [(packed(9, "int2", 32), int8, "keys are int2"), (in_rows, in_groups, "values are int4 in groups")]
    for keys, values, reason in refused:
        assert reason in str(support.reason_against_triton(RaggedInputs(query, keys, values, bounds), None))
    narrow = packed(9, "int4", 6)
    inputs = RaggedInputs(query[..., :6], narrow, narrow, bounds)
    assert "do not fill whole words" in str(support.reason_against_triton(inputs, None))
    assert "float64" in str(support.reason_against_triton(RaggedInputs(query.double(), int8, int8, bounds), None))


@pytest.mark.gpu
@pytest.mark.parametrize("codecs", CODECS)
def test_a_captured_graph_reads_codes_while_the_tail_grows(
    codecs: tuple[str, str], captured: Callable[..., Any]
) -> None:
    given = arguments(
        [3000, 10, 0, 700], codecs, n_tail=64, groups=4, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    length = torch.tensor([1], dtype=torch.int32, device="cuda")

    def run(impl: str) -> Tensor:
        out = ragged_attention(**given, tail_length=length, impl=impl)
        assert isinstance(out, Tensor)
        return out

    got, replay = captured(lambda: run("triton"))
    for live in (1, 2, 33, 64):
        length.fill_(live)
        given["query"].normal_()
        replay()
        torch.testing.assert_close(got, run("reference"), rtol=2e-2, atol=2e-2)
        assert torch.equal(got, run("triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_long_contexts_equal_the_decoded_rows(head_dim: int, codecs: tuple[str, str]) -> None:
    """The sizes that the interpreter is too slow for."""
    given = arguments(
        [32768, 1024, 0, 1],
        codecs,
        n_tail=30,
        heads=4,
        groups=4,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        device="cuda",
    )
    assert_equals_decoded(given, "triton")
