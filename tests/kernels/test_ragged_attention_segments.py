"""Ragged attention of many query rows, a dense call a segment, against the reference in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.ragged_attention import ragged_attention, segments

Accurate = Callable[[Tensor, Tensor, Tensor], None]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(
    lengths: list[int], n_tail: int | None, *, heads: int = 2, groups: int = 3, n_rows: int = 256, head_dim: int = 64
) -> dict[str, Any]:
    batch = len(lengths) // heads
    given = {
        "query": 2 * torch.randn(batch, heads * groups, n_rows, head_dim),
        "keys": torch.randn(sum(lengths), head_dim),
        "values": torch.randn(sum(lengths), head_dim),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
    }
    if n_tail is not None:
        given["tail_keys"], given["tail_values"] = torch.randn(2, batch, heads, n_tail, head_dim).unbind(0)
    return given


def run(given: dict[str, Any], impl: str | None, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    there = {n: x.to(device, dtype) if x.is_floating_point() else x.to(device) for n, x in given.items()}
    return ragged_attention(**there, return_lse=True, impl=impl)


def assert_equals_reference(given: dict[str, Any], accurate: Accurate, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    given = {n: x.to(dtype).float() if x.is_floating_point() else x for n, x in given.items()}
    got = run(given, "segments", dtype, device)
    exact, plain = run(given, "reference", torch.float64), run(given, "reference", dtype)
    for one, exact_one, plain_one in zip(got, exact, plain, strict=True):
        accurate(one.cpu(), exact_one, plain_one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 3, 7])
@pytest.mark.parametrize("n_tail", [None, 0, 256, 300])
@pytest.mark.parametrize("lengths", [[0, 1500, 7, 33], [1, 0, 0, 400]])
def test_it_equals_the_reference(
    lengths: list[int], n_tail: int | None, groups: int, device: str, assert_accurate: Accurate
) -> None:
    assert_equals_reference(inputs(lengths, n_tail, groups=groups), assert_accurate, device)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_share_a_context(device: str, assert_accurate: Accurate) -> None:
    given = inputs([0, 9, 900, 33], 256)
    assert_equals_reference({**given, "row_index": torch.tensor([1, 1])}, assert_accurate, device)


def test_it_is_chosen_for_many_rows_and_refuses_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = segments._attend
    monkeypatch.setattr(segments, "_attend", lambda *args: calls.append(args) or attend(*args))
    run(inputs([5, 6], 256, n_rows=256), None, torch.float32)
    assert len(calls) == 2
    run(inputs([5, 6], 256, n_rows=255), None, torch.float32)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="there are 255 query rows, not 256 or more"):
        run(inputs([5, 6], 256, n_rows=255), "segments", torch.float32)
    with pytest.raises(ValueError, match="a mask or a softcap is given"):
        run({**inputs([5, 6], 256), "tail_mask": torch.ones(1, 1, 256, 256).bool()}, "segments", torch.float32)
