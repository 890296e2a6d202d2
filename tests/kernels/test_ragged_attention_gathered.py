"""Attention to listed pairs of a packed context: it is attention to a copy of these pairs, and reads no others."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.kernels.row_codec import encode_rows

Accurate = Callable[[Tensor, Tensor, Tensor], None]

IMPLS = [None, "reference", pytest.param("triton", marks=pytest.mark.triton)]
SHAPES = {"short": ([9, 0, 3, 1], [5, 0, 3, 0]), "around_a_block": ([80, 150, 70, 90], [63, 65, 64, 90])}


def listed(lengths: list[int], counts: list[int], *, room: int = 3) -> tuple[Tensor, Tensor]:
    """Lists ``counts`` pairs of each segment in a random order, with room behind that names no pair; and the bounds."""
    chosen = [
        start + torch.randperm(stop - start)[:count]
        for (start, stop), count in zip(pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]), counts, strict=True)
    ]
    index = torch.cat([*chosen, torch.full((room,), 2**31 - 1)])
    return index.int(), torch.tensor([0, *counts]).cumsum(0).int()


def tensors(
    lengths: list[int], n_tail: int, n_rows: int, *, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    batch = len(lengths) // 2
    named = {
        "query": torch.randn(batch, 6, n_rows, head_dim),
        "keys": torch.randn(sum(lengths), head_dim),
        "values": torch.randn(sum(lengths), head_dim),
        "tail_keys": torch.randn(batch, 2, n_tail, head_dim),
        "tail_values": torch.randn(batch, 2, n_tail, head_dim),
    }
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def copied(named: dict[str, Tensor], index: Tensor, bounds: Tensor) -> dict[str, Tensor]:
    """The same call over a copy of the listed pairs."""
    rows = index[: int(bounds[-1])].long()
    return {**named, "keys": named["keys"][rows], "values": named["values"][rows]}


def on(device: torch.device, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in named.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n_rows", "n_tail"), [(1, 0), (1, 65), (3, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_to_a_copy_and_reads_no_pair_that_is_not_listed(
    shape: str, n_rows: int, n_tail: int, impl: str | None, device: torch.device
) -> None:
    """The other pairs, and the room behind the live tail, are NaN; the room behind the list names no pair."""
    lengths, counts = SHAPES[shape]
    named = tensors(lengths, n_tail, n_rows)
    index, bounds = listed(lengths, counts)
    expected = ragged_attention(cu_seqlens=bounds, **copied(named, index, bounds), return_lse=True, impl="reference")
    hidden = torch.ones(sum(lengths), dtype=torch.bool)
    hidden[index[: int(bounds[-1])].long()] = False
    named["keys"][hidden] = named["values"][hidden] = torch.nan
    options: dict[str, Any] = {"return_lse": True, "impl": impl}
    if n_tail:
        room = torch.full((len(lengths) // 2, 2, 7, 16), torch.nan)
        named |= {name: torch.cat([named[name], room], 2) for name in ("tail_keys", "tail_values")}
        options["tail_length"] = torch.tensor([n_tail], dtype=torch.int32, device=device)
    got = ragged_attention(cu_seqlens=bounds.to(device), pair_index=index.to(device), **on(device, named), **options)
    torch.testing.assert_close(tuple(one.cpu() for one in got), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_masks_softcaps_and_heads_that_see_one_tail_work_as_without_a_list(
    impl: str | None, device: torch.device
) -> None:
    """As a list for each query head is read: the tail is a view that these heads share."""
    lengths, counts = [40, 30, 50, 20], [20, 30, 17, 0]
    named = tensors(lengths, 4, 1)
    named["query"] = named["query"][:, :2]
    named |= {name: named[name][:, :1].expand(-1, 2, -1, -1) for name in ("tail_keys", "tail_values")}
    index, bounds = listed(lengths, counts)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])[:, None, None]
    options: dict[str, Any] = {"softcap": 3.0, "scaling": 0.7}
    expected = ragged_attention(
        cu_seqlens=bounds, **copied(named, index, bounds), tail_mask=mask, **options, impl="reference"
    )
    moved = {**on(device, named), "tail_mask": mask.to(device)}
    got = ragged_attention(cu_seqlens=bounds.to(device), pair_index=index.to(device), **moved, **options, impl=impl)
    assert isinstance(got, Tensor) and isinstance(expected, Tensor)
    torch.testing.assert_close(got.cpu(), expected)


@pytest.mark.triton
@pytest.mark.parametrize(("head_dim", "dtype"), [(80, torch.bfloat16), (128, torch.float16)])
@pytest.mark.parametrize("wide", [False, True])
def test_it_equals_fp64_with_offsets_of_both_widths(
    wide: bool,
    head_dim: int,
    dtype: torch.dtype,
    triton_device: torch.device,
    assert_accurate: Accurate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvzip_press.kernels.ragged_attention import triton

    if wide:
        monkeypatch.setattr(triton, "MAX_OFFSET", 0)
    lengths, counts = [90, 70], [70, 33]
    named = tensors(lengths, 20, 1, head_dim=head_dim, dtype=dtype)
    index, bounds = listed(lengths, counts)
    alone = copied(named, index, bounds)
    exact, plain = (
        ragged_attention(cu_seqlens=bounds, **{n: t.to(kind) for n, t in alone.items()}, impl="reference")
        for kind in (torch.float64, dtype)
    )
    moved = on(triton_device, named)
    got = ragged_attention(
        cu_seqlens=bounds.to(triton_device), pair_index=index.to(triton_device), **moved, impl="triton"
    )
    assert isinstance(got, Tensor) and isinstance(exact, Tensor) and isinstance(plain, Tensor)
    assert_accurate(got.cpu(), exact, plain)


@pytest.mark.gpu
def test_a_captured_graph_follows_a_list_that_changes(captured: Callable[..., Any]) -> None:
    """Other pairs, and other numbers of them, in each replay, at the same addresses."""
    lengths, room = [3000, 200, 5000, 700], 2048
    named = on(torch.device("cuda"), tensors(lengths, 8, 1, head_dim=128, dtype=torch.bfloat16))
    first = [512, 200, 512, 512]
    held = [one.cuda() for one in listed(lengths, first, room=room - sum(first))]
    options: dict[str, Any] = {**named, "pair_index": held[0], "cu_seqlens": held[1]}

    def run(impl: str) -> Tensor:
        out = ragged_attention(**options, impl=impl)
        assert isinstance(out, Tensor)
        return out

    got, replay = captured(lambda: run("triton"))
    for counts in (first, [1, 0, 5, 512], [300, 100, 512, 7]):
        index, bounds = listed(lengths, counts, room=room - sum(counts))
        held[0].copy_(index)
        held[1].copy_(bounds)
        replay()
        torch.testing.assert_close(got, run("reference"), rtol=2e-2, atol=2e-2)
        assert torch.equal(got, run("triton"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pair_index": torch.tensor([0, 1, 2, 3])}, TypeError, "pair_index: expected torch.int32"),
        ({"pair_index": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "pair_index: expected \\[listed pairs\\]"),
        ({"pair_index": torch.zeros(8, dtype=torch.int32)[::2]}, ValueError, "contiguous tensor, got strides"),
        (
            {"pair_index": torch.tensor([0, 1, 2, 8]).int()},
            ValueError,
            "expected pairs 0 .. 7 of the storage, got 0",
        ),
        ({"pair_index": torch.tensor([0, 1]).int()}, ValueError, "cu_seqlens: expected to run within 0 .. 2"),
        ({"row_index": torch.tensor([0])}, ValueError, "expected no row_index beside it"),
        (
            {name: encode_rows(torch.randn(8, 16), "int8") for name in ("keys", "values")},
            TypeError,
            "expected keys and values in a dtype of the model, got codes",
        ),
    ],
)
def test_a_list_that_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    named: dict[str, Any] = {**tensors([4, 4], 1, 1), "pair_index": torch.tensor([0, 1, 2, 3]).int()}
    named["cu_seqlens"] = torch.tensor([0, 2, 4]).int()
    with pytest.raises(error, match=message):
        ragged_attention(**{**named, **change})
