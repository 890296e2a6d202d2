"""What the Triton kernel of ragged attention adds: a live tail length, a split over programs, graphs, large sizes."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.ragged_attention import ragged_attention, support
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs

Accurate = Callable[[Tensor, Tensor, Tensor], None]

IMPLS = [None, "reference", pytest.param("triton", marks=pytest.mark.triton)]


def tensors(
    lengths: list[int],
    n_tail: int,
    *,
    n_rows: int = 1,
    heads: int = 2,
    groups: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """Query, packed keys and values, cu_seqlens, tail keys and values."""
    batch = len(lengths) // heads
    query = torch.randn(batch, heads * groups, n_rows, head_dim)
    packed, tail = torch.randn(2, sum(lengths), head_dim), torch.randn(2, batch, heads, n_tail, head_dim)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    query, *pairs = (x.to(device, dtype) for x in (query, *packed, *tail))
    return query, pairs[0], pairs[1], bounds, pairs[2], pairs[3]


def in_their_own_precision(
    query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, tail_keys: Tensor, tail_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Out and lse with every step in the inputs' dtype."""
    batch, heads, n_tail, _ = tail_keys.shape
    grouped = query.unflatten(1, (heads, -1))
    out, lse = torch.empty_like(grouped), torch.empty_like(grouped[..., 0])
    future = torch.ones(query.shape[2], n_tail, dtype=torch.bool, device=query.device).triu(n_tail - query.shape[2] + 1)
    for segment, (start, stop) in enumerate(pairwise(bounds.tolist())):
        row, head = divmod(segment, heads)
        own_keys = torch.cat([keys[start:stop], tail_keys[row, head]])
        own_values = torch.cat([values[start:stop], tail_values[row, head]])
        logits = grouped[row, head] @ own_keys.T * query.shape[-1] ** -0.5
        logits[..., stop - start :].masked_fill_(future, -torch.inf)
        out[row, head], lse[row, head] = logits.softmax(-1) @ own_values, logits.logsumexp(-1)
    assert batch * heads == bounds.numel() - 1
    return out.flatten(1, 2), lse.flatten(1, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("live", [3, 63, 64, 65])
def test_room_behind_the_live_tail_is_not_read(live: int, n_rows: int, impl: str | None, device: torch.device) -> None:
    """With ``tail_length`` the result is that of the tail cut there; what lies behind is NaN."""
    query, keys, values, bounds, tail_keys, tail_values = tensors([40, 0, 5, 7], 80, n_rows=n_rows, device=device)
    expected = ragged_attention(
        query, keys, values, bounds, tail_keys[:, :, :live], tail_values[:, :, :live], return_lse=True, impl=impl
    )
    tail_keys[:, :, live:] = tail_values[:, :, live:] = torch.nan
    length = torch.tensor([live], dtype=torch.int32, device=device)
    got = ragged_attention(
        query, keys, values, bounds, tail_keys, tail_values, tail_length=length, return_lse=True, impl=impl
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (torch.tensor([9], dtype=torch.int32), ValueError, "expected 3 .. 8 tokens, got 9"),
        (torch.tensor([2], dtype=torch.int32), ValueError, "expected 3 .. 8 tokens, got 2"),
        (torch.tensor([4]), TypeError, "tail_length: expected torch.int32"),
        (torch.tensor(4, dtype=torch.int32), ValueError, "tail_length: expected"),
    ],
)
def test_a_bad_tail_length_is_refused(length: Tensor, error: type[Exception], message: str) -> None:
    """Out of range, of another dtype or shape."""
    with pytest.raises(error, match=message):
        ragged_attention(*tensors([4, 4], 8, n_rows=3), tail_length=length)


@pytest.mark.triton
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("groups", "n_rows"), [(1, 1), (7, 1), (16, 1), (4, 9)])
def test_it_equals_fp64_at_every_head_dim_and_group(
    groups: int, n_rows: int, head_dim: int, triton_device: torch.device, assert_accurate: Accurate
) -> None:
    """bf16 as a GPU computes it, against the reference in fp64."""
    inputs = tensors(
        [130, 1], 20, n_rows=n_rows, groups=groups, head_dim=head_dim, dtype=torch.bfloat16, device=triton_device
    )
    exact_inputs = tuple(x if x.dtype == torch.int32 else x.double() for x in inputs)
    got = ragged_attention(*inputs, return_lse=True, impl="triton")
    exact = ragged_attention(*exact_inputs, return_lse=True, impl="reference")
    for one, exact_one, plain_one in zip(got, exact, in_their_own_precision(*inputs), strict=True):
        assert_accurate(one, exact_one, plain_one)


@pytest.mark.triton
@pytest.mark.parametrize("programs_per_sm", [1, 2, 7])
def test_the_number_of_programs_changes_only_rounding(programs_per_sm: int, triton_device: torch.device) -> None:
    """However the pairs are shared out, also with more segments than programs and with empty ones."""
    from kvzip_press.kernels.ragged_attention import triton
    from kvzip_press.kernels.ragged_attention.tuning import Config

    inputs = tensors([300, 0, 1, 17, 0, 90], 5, device=triton_device)
    expected = ragged_attention(*inputs, return_lse=True, impl="reference")
    config = Config(16, 16, 4, 2, programs_per_sm)
    got = triton.ragged_attention(RaggedInputs(*inputs), scaling=0.25, softcap=None, config=config)
    torch.testing.assert_close(got, expected)


@pytest.mark.triton
@pytest.mark.parametrize("n_segments", [33, 600])
def test_more_segments_than_programs(n_segments: int, triton_device: torch.device) -> None:
    """Each gets a program of its own, the empty ones too. The interpreter, which has one processor, needs fewer."""
    n_segments = n_segments if triton_device.type == "cuda" else min(n_segments, 66)
    inputs = tensors([n % 4 for n in range(n_segments)], 2, heads=3, groups=1, device=triton_device)
    expected = ragged_attention(*inputs, return_lse=True, impl="reference")
    torch.testing.assert_close(ragged_attention(*inputs, return_lse=True, impl="triton"), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": torch.randn(1, 6, 1, 16, dtype=torch.float64)}, "float64"),
        ({"values": torch.randn(8, 24)}, "value_head_dim 24"),
        ({"query": torch.randn(1, 6, 1, 264), "values": torch.randn(8, 264)}, "head_dim 264"),
        ({"keys": torch.randn(16, 8).T}, "not contiguous"),
    ],
)
def test_what_the_kernel_cannot_do_is_said_before_a_launch(change: dict[str, Tensor], reason: str) -> None:
    """Another implementation is chosen then; one that is named raises."""
    query, keys, values, bounds, tail_keys, tail_values = tensors([4, 4], 3)
    named = {"query": query, "keys": keys, "values": values} | change
    inputs = RaggedInputs(named["query"], named["keys"], named["values"], bounds, tail_keys, tail_values)
    assert reason in str(support.reason_against_triton(inputs, None))


def test_a_cpu_tensor_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that is named never falls back."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl 'triton' can do, got one that it cannot: the (device is cpu|package)"):
        ragged_attention(*tensors([4, 4], 3), impl="triton")


@pytest.mark.gpu
def test_a_captured_graph_goes_on_while_the_tail_grows(captured: Callable[..., Any]) -> None:
    """One graph, replayed with other queries, other tail tokens and a longer live tail."""
    query, keys, values, bounds, tail_keys, tail_values = tensors(
        [3000, 10, 0, 700], 64, groups=4, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    length = torch.tensor([1], dtype=torch.int32, device="cuda")

    def run(impl: str) -> Tensor:
        out = ragged_attention(query, keys, values, bounds, tail_keys, tail_values, tail_length=length, impl=impl)
        assert isinstance(out, Tensor)
        return out

    got, replay = captured(lambda: run("triton"))
    for live in (1, 2, 33, 64):
        length.fill_(live)
        query.normal_()
        replay()
        torch.testing.assert_close(got, run("reference"), rtol=2e-2, atol=2e-2)
        assert torch.equal(got, run("triton"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [[32768, *[1024] * 7], [0, 0, 131072, 1, 5, 64, 63, 65], [4096] * 8], ids=["skew", "one", "equal"]
)
def test_long_contexts_equal_fp64(lengths: list[int], assert_accurate: Accurate) -> None:
    """The sizes that the interpreter is too slow for."""
    inputs = tensors(lengths, 30, heads=8, groups=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    exact = ragged_attention(*(x if x.dtype == torch.int32 else x.double() for x in inputs), impl="reference")
    got = ragged_attention(*inputs, impl="triton")
    assert isinstance(got, Tensor) and isinstance(exact, Tensor)
    assert_accurate(got, exact, in_their_own_precision(*inputs)[0])


@pytest.mark.gpu
def test_more_numbers_than_int32_counts_are_addressed() -> None:
    """total * head_dim > 2**31: the last head's pairs lie behind the 2**31st number."""
    total, head_dim = 2**24 + 64, 128
    keys = torch.zeros(total, head_dim, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros_like(keys)
    keys[-64:].normal_()
    values[-64:].normal_()
    bounds = torch.tensor([0, total - 64, total], dtype=torch.int32, device="cuda")
    query = torch.randn(1, 8, 1, head_dim, dtype=torch.bfloat16, device="cuda")
    got = ragged_attention(query, keys, values, bounds, impl="triton")
    assert isinstance(got, Tensor)
    alone = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    expected = ragged_attention(query[:, 4:], keys[-64:], values[-64:], alone, impl="reference")
    torch.testing.assert_close(got[:, 4:], expected, rtol=2e-2, atol=2e-2)
    assert not got[:, :4].any()
