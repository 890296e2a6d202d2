"""A token is written into the tail in place, and nothing else is touched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.tail_append import Queries, tail_append

View = Callable[[Tensor], Tensor]
IMPLS = [None, "reference", pytest.param("triton", marks=pytest.mark.triton)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "dims"), [(1, 1, (16, 16)), (2, 3, (80, 80)), (2, 2, (64, 24))])
def test_it_writes_one_row_of_every_head(
    batch: int,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    impl: str | None,
    device: torch.device,
    inside_nan: View,
) -> None:
    tails = [inside_nan(torch.randn(batch, heads, 7, dim, device=device).to(dtype)) for dim in dims]
    expected = [tail.clone() for tail in tails]
    for index in (0, 3, 6):
        # As a model makes them: [batch, 1, heads, head_dim], turned.
        new = [torch.randn(batch, 1, heads, dim, device=device).to(dtype).transpose(1, 2) for dim in dims]
        for tail, token in zip(expected, new, strict=True):
            tail[:, :, index] = token[:, :, 0]
        assert tail_append(*tails, *new, torch.tensor([index], device=device), impl=impl) is None
    for tail, right in zip(tails, expected, strict=True):
        assert torch.equal(tail, right)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "heads", "groups", "dim"), [(1, 2, 1, 16), (2, 2, 3, 24), (1, 1, 4, 80)])
def test_queries_go_into_a_ring_along_with_their_token(
    batch: int, heads: int, groups: int, dim: int, impl: str | None, device: torch.device, inside_nan: View
) -> None:
    room, tails = 5, [inside_nan(torch.randn(batch, heads, 9, dim, device=device)) for _ in range(2)]
    window = inside_nan(torch.randn(batch, heads * groups, room, dim, device=device))
    expected = window.clone()
    for index, shift in ((0, 3), (4, 0), (8, -1), (7, 0)):
        keys, values = (torch.randn(batch, heads, 1, dim, device=device) for _ in range(2))
        query = torch.randn(batch, 1, heads * groups, dim, device=device).transpose(1, 2)
        expected[:, :, (index + shift) % room] = query[:, :, 0]
        where, behind = (torch.tensor([number], device=device) for number in (index, shift))
        tail_append(*tails, keys, values, where, queries=Queries(window, query, behind), impl=impl)
        assert torch.equal(tails[0][:, :, index], keys[:, :, 0]) and torch.equal(tails[1][:, :, index], values[:, :, 0])
        assert torch.equal(window, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.randn(1, 2, 2, 8)}, ValueError, "keys: expected"),
        ({"values": torch.randn(1, 2, 1, 8, dtype=torch.float64)}, TypeError, "values: expected the dtype"),
        ({"tail_values": torch.randn(1, 2, 6, 8)}, ValueError, "tail_values: expected"),
        ({"index": torch.tensor(1)}, ValueError, "index: expected"),
        ({"index": torch.tensor([1], dtype=torch.int32)}, TypeError, "index: expected torch.int64"),
        ({"impl": "fast"}, ValueError, "expected impl"),
        (
            {"queries": Queries(torch.randn(1, 3, 5, 8), torch.randn(1, 3, 1, 8), torch.tensor([0]))},
            ValueError,
            "groups|heads",
        ),
        (
            {"queries": Queries(torch.randn(1, 4, 5, 8), torch.randn(1, 4, 2, 8), torch.tensor([0]))},
            ValueError,
            "new: ",
        ),
        (
            {"queries": Queries(torch.randn(1, 4, 5, 8), torch.randn(1, 4, 1, 8), torch.tensor(0))},
            ValueError,
            "shift: ",
        ),
    ],
)
def test_bad_inputs_are_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {
        "tail_keys": torch.randn(1, 2, 5, 8),
        "tail_values": torch.randn(1, 2, 5, 8),
        "keys": torch.randn(1, 2, 1, 8),
        "values": torch.randn(1, 2, 1, 8),
        "index": torch.tensor([1]),
    }
    with pytest.raises(error, match=message):
        tail_append(**(arguments | change))
