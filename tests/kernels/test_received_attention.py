"""Received attention: what a plain loop over queries in fp64 adds up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.received_attention import received_attention, reference

View = Callable[[Tensor], Tensor]
IMPLS = [None, "reference", pytest.param("triton", marks=pytest.mark.triton)]
BLOCK = 64  # query rows and keys of a tile in half precision
NEVER = 2**62


def made(
    n_rows: int,
    n: int,
    head_dim: int = 16,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries at the end of a row whose keys lie at all positions, some queries and keys of which are not there."""
    query = (3 * torch.randn(batch, heads * groups, n_rows, head_dim)).to(dtype)
    keys = torch.randn(batch, heads, n, head_dim).to(dtype)
    positions = (torch.arange(n_rows) + max(n - n_rows // 2, 0)).expand(batch, -1)
    unknown = torch.rand(batch, n_rows) < 0.2
    seen_from = torch.arange(n).expand(batch, heads, -1).masked_fill(torch.rand(batch, heads, n) < 0.2, NEVER)
    return query.masked_fill(unknown[:, None, :, None], torch.nan), keys, positions.masked_fill(unknown, -1), seen_from


def one_by_one(
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    seen_from: Tensor,
    *,
    squared: bool,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    groups = query.shape[1] // keys.shape[1]
    sums = torch.zeros(seen_from.shape, dtype=torch.float64)
    for b, head, row in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        sees = seen_from[b, head // groups] <= positions[b, row]
        if not sees.any():
            continue
        logits = scaling * (keys[b, head // groups][sees].double() @ query[b, head, row].double())
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        sums[b, head // groups, sees] += logits.softmax(-1) ** (2 if squared else 1)
    return sums


def check(given: tuple[Tensor, ...], impl: str | None, device: torch.device, **options: Any) -> Tensor:
    """Asserts that the sums are those of the loop, to a few units in the last place of each probability."""
    found = received_attention(*(each.to(device) for each in given), impl=impl, **options)
    scaling = options.get("scaling", given[0].shape[-1] ** -0.5)
    expected = one_by_one(
        *given, squared=options.get("squared", False), scaling=scaling, softcap=options.get("softcap")
    )
    assert (found.shape, found.dtype, found.is_contiguous()) == (expected.shape, torch.float32, True)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=3e-5, atol=1e-7)
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("n_rows", [0, 1, 8, BLOCK // 2 + 1, BLOCK])
def test_it_adds_up_what_a_loop_does_at_every_length(
    n_rows: int, n: int, impl: str | None, device: torch.device
) -> None:
    check(made(n_rows, n), impl, device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "groups"), [(8, 1), (80, 3), (128, 4), (256, 7)])
def test_it_does_in_every_width_and_dtype(
    head_dim: int, groups: int, dtype: torch.dtype, impl: str | None, device: torch.device
) -> None:
    check(made(9, 70, head_dim, batch=2, groups=groups, dtype=dtype), impl, device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"squared": True}, {"softcap": 2.0}, {"scaling": 0.5, "squared": True}], ids=str)
def test_squares_softcap_and_scaling(options: dict[str, Any], impl: str | None, device: torch.device) -> None:
    check(made(20, 90, batch=2), impl, device, **options)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_any_strides(impl: str | None, device: torch.device, inside_nan: View) -> None:
    query, keys, positions, seen_from = made(12, 70, batch=2)
    query = inside_nan(query.nan_to_num().transpose(1, 2).contiguous()).transpose(1, 2)
    check((query, inside_nan(keys), positions[:1].expand(2, -1), seen_from[:, :1].expand(-1, 2, -1)), impl, device)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_that_see_nothing_pay_nothing(impl: str | None, device: torch.device) -> None:
    query, keys, positions, seen_from = made(5, 30)
    assert not check((query, keys, torch.full_like(positions, -1), seen_from), impl, device).any()
    assert not check((query, keys, positions, torch.full_like(seen_from, NEVER)), impl, device).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_that_is_seen_is_not_hidden(impl: str | None, device: torch.device) -> None:
    """An eviction refuses it; a small score would lose the pair in silence."""
    query, keys, positions, seen_from = (each.to(device) for each in made(5, 30))
    query, positions = torch.randn_like(query), positions.clamp(min=0)
    query[0, 0, -1, 3] = torch.nan
    sums = received_attention(query, keys, positions, seen_from, impl=impl)
    assert sums[0, 0].isnan().any() and not sums[0, 1].isnan().any()


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    given = made(20, 50)
    whole = check(given, "reference", device)
    monkeypatch.setattr(reference, "MOST_LOGITS", 3 * 4 * 50)
    torch.testing.assert_close(check(given, "reference", device), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.randn(1, 2, 6, 4)}, ValueError, "keys: expected"),
        ({"keys": torch.randn(1, 3, 6, 8)}, ValueError, "query heads: expected"),
        ({"query_positions": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, "query_positions: expected"),
        ({"seen_from": torch.zeros(1, 2, 6, dtype=torch.int32)}, TypeError, "seen_from: expected torch.int64"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"impl": "fast"}, ValueError, "expected impl"),
    ],
)
def test_bad_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "query": torch.randn(1, 4, 3, 8),
        "keys": torch.randn(1, 2, 6, 8),
        "query_positions": torch.zeros(1, 3, dtype=torch.int64),
        "seen_from": torch.zeros(1, 2, 6, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        received_attention(**(arguments | change))
