"""Ranking for recall: lists are those made group by group and pair by pair, exact, nested, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.kernels.recall_ranking import recall_ranking, reference
from kvzip_press.kernels.recall_ranking.inputs import RankingInputs

Accurate = Callable[[Tensor, Tensor, Tensor], None]

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.triton)]
HEADS = 2


def divided(
    sizes: list[list[int]], *, members: int = 3, head_dim: int = 16, bounds: bool = False, exact: bool = True
) -> dict[str, Tensor]:
    """The arguments for segments with these sizes (first tokens, then groups); exact: products are whole numbers."""
    table = torch.tensor(sizes).int()
    lengths = table.sum(1).tolist()
    orders = [
        torch.cat([torch.arange(own[0]), own[0] + torch.randperm(length - own[0])])
        for own, length in zip(table.tolist(), lengths, strict=True)
    ]
    shapes = (
        (len(sizes) // HEADS, HEADS * members, head_dim),
        (len(sizes), table.shape[1] - 1, head_dim * (1 + bounds)),
    )
    query, marks = (torch.randint(-3, 4, one).float() if exact else torch.randn(one) for one in shapes)
    if bounds:
        marks = torch.cat(marks.unflatten(-1, (2, -1)).sort(-2, descending=True).values.unbind(-2), -1)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"query": query, "marks": marks, "sizes": table, "order": torch.cat(orders).int(), "cu_seqlens": starts}


def random_sizes(n_segments: int, n_groups: int, n_first: int, largest: int = 8) -> list[list[int]]:
    """A third of the groups is empty; segments have different lengths."""
    sizes = torch.randint(1, largest + 1, (n_segments, n_groups)) * (torch.rand(n_segments, n_groups) > 1 / 3)
    return [[n_first, *own] for own in sizes.tolist()]


def rows_of(index: Tensor, bounds: Tensor) -> list[list[int]]:
    return [own.tolist() for own in index[: int(bounds[-1])].split(bounds.diff().tolist())]


def one_by_one(
    named: dict[str, Tensor], budget: int, *, per_query_head: bool, row_index: Tensor | None = None
) -> list[list[int]]:
    """The lists by the docstring, in fp64: a head's groups sorted by worth, taken whole until the budget is full."""
    query, marks = named["query"].double(), named["marks"].double()
    batch, heads, head_dim = query.shape
    lists = []
    for row in range(batch):
        for head in range(HEADS):
            segment = (row if row_index is None else int(row_index[row])) * HEADS + head
            n_first, *sizes = named["sizes"][segment].tolist()
            begin = int(named["cu_seqlens"][segment])
            order = named["order"][begin:].tolist()
            own = query[row].view(HEADS, heads // HEADS, head_dim)[head]
            if marks.shape[2] == head_dim:
                worth = own @ marks[segment].mT
            else:
                high, low = marks[segment].split(head_dim, -1)
                worth = torch.maximum(own[:, None] * high, own[:, None] * low).sum(-1)
            worth = worth * head_dim**-0.5
            if not per_query_head:
                weights = worth.exp()
                worth = (weights / (weights * torch.tensor(sizes)).sum(-1, keepdim=True)).mean(0, keepdim=True)
            for of_list in worth.tolist():
                room = budget - n_first
                taken = [0] * len(sizes)
                for group in sorted(range(len(sizes)), key=lambda one, of=of_list: (-of[one], one)):
                    taken[group] = min(sizes[group], max(room, 0))
                    room -= taken[group]
                entries, place = list(range(min(n_first, budget))), n_first
                for size, n_taken in zip(sizes, taken, strict=True):
                    entries += range(place, place + n_taken)
                    place += size
                lists.append([begin + order[entry] for entry in entries])
    return lists


def on(device: torch.device, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in named.items()}


CASES: dict[str, Any] = {
    "short": {"n_groups": 9, "n_first": 3},
    "one_group": {"n_groups": 1, "n_first": 0},
    "no_first_tokens": {"n_groups": 33, "n_first": 0},
    "a_power_of_two": {"n_groups": 64, "n_first": 4},
}
SHAPES: dict[str, Any] = {
    "clusters": {},
    "bounds": {"bounds": True},
    "one_member": {"members": 1, "head_dim": 64},
    "seven_members": {"members": 7, "head_dim": 80},
    "wide": {"members": 4, "head_dim": 256},
    "wide_bounds": {"members": 4, "head_dim": 256, "bounds": True},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize(
    ("case", "shape"),
    [*(("short", shape) for shape in SHAPES), *((case, "clusters") for case in CASES if case != "short")],
)
def test_lists_are_those_made_group_by_group(
    case: str, shape: str, per_query_head: bool, impl: str, device: torch.device
) -> None:
    """Products of query heads are whole numbers, so many are equal; what heads choose together has no ties."""
    sizes = random_sizes(4, CASES[case]["n_groups"], CASES[case]["n_first"])
    sizes[1][1:] = [0] * (len(sizes[1]) - 1)  # a segment of first tokens alone
    named = divided(sizes, **SHAPES[shape], exact=per_query_head)
    given = on(device, named)
    for budget in (2, 20, int(named["sizes"].sum(1).max()) + 5):  # the last is more than any segment has
        got = recall_ranking(
            *given.values(), num_key_value_heads=HEADS, budget=budget, per_query_head=per_query_head, impl=impl
        )
        assert got[0].dtype == got[1].dtype == torch.int32 and len(got[0]) == budget * (len(got[1]) - 1)
        assert rows_of(*got) == one_by_one(named, budget, per_query_head=per_query_head)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_share_a_context_list_pairs_of_it(impl: str, device: torch.device) -> None:
    """Several packed rows, or one for all; each batch row gets what it would get alone."""
    for n_rows, index in ((3, [2, 0, 2, 1]), (1, [0, 0, 0, 0])):
        named = divided(random_sizes(n_rows * HEADS, 12, 2), exact=False)
        named["query"] = torch.randn(4, 6, 16)
        rows = torch.tensor(index)
        got = recall_ranking(
            *on(device, named).values(), num_key_value_heads=HEADS, budget=20, row_index=rows.to(device), impl=impl
        )
        assert rows_of(*got) == one_by_one(named, 20, per_query_head=False, row_index=rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_multiplied_exactly(dtype: torch.dtype, impl: str, device: torch.device) -> None:
    """Products are not rounded to the dtype of the model: whole numbers of 13 bits and more stay apart."""
    named = divided(random_sizes(4, 40, 2), head_dim=128)
    named = {**named, "query": named["query"].to(dtype), "marks": (40 * named["marks"]).to(dtype)}
    got = recall_ranking(
        *on(device, named).values(), num_key_value_heads=HEADS, budget=40, per_query_head=True, impl=impl
    )
    assert rows_of(*got) == one_by_one(named, 40, per_query_head=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_query_head", [False, True])
def test_equal_groups_are_taken_in_their_order(per_query_head: bool, impl: str, device: torch.device) -> None:
    named = divided([[2, *[5] * 40]] * 2)
    named["marks"][:] = named["marks"][:, :1]
    given = on(device, named)
    got = recall_ranking(
        *given.values(), num_key_value_heads=HEADS, budget=49, per_query_head=per_query_head, impl=impl
    )
    segments = torch.tensor([[0], [1]]).repeat_interleave(3 if per_query_head else 1, 0)
    expected = named["order"].view(2, -1)[segments[:, 0], :49] + segments * 202
    assert got[0].tolist() == expected.flatten().tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_query_head", [False, True])
def test_nothing_is_read_of_empty_groups_and_of_views(
    per_query_head: bool, impl: str, device: torch.device, inside_nan: Callable[[Tensor], Tensor]
) -> None:
    """Their marks may be NaN, and all tensors views."""
    named = divided(random_sizes(4, 21, 3), exact=False)
    named["marks"][named["sizes"][:, 1:] == 0] = torch.nan
    given = on(device, named)
    given["query"], given["marks"] = inside_nan(given["query"]), inside_nan(given["marks"])
    options: dict[str, Any] = {"num_key_value_heads": HEADS, "budget": 30, "per_query_head": per_query_head}
    clean = {**named, "marks": named["marks"].nan_to_num(0.0)}
    if per_query_head:  # a NaN is above all, and lists nothing
        clean["marks"][named["sizes"][:, 1:] == 0] = 1e3
    assert rows_of(*recall_ranking(*given.values(), **options, impl=impl)) == one_by_one(
        clean, 30, per_query_head=per_query_head
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_larger_budget_lists_all_that_a_smaller_one_lists(impl: str, device: torch.device) -> None:
    """And each list is as long as the budget, or as its segment."""
    named = divided(random_sizes(2, 30, 4), exact=False)
    lengths = named["cu_seqlens"].diff().tolist()
    before: list[set[int]] = [set(), set()]
    for budget in range(1, 40, 9):
        got = recall_ranking(*on(device, named).values(), num_key_value_heads=HEADS, budget=budget, impl=impl)
        lists = rows_of(*got)
        assert [len(one) for one in lists] == [len(set(one)) for one in lists] == [min(budget, n) for n in lengths]
        assert all(less <= set(more) for less, more in zip(before, lists, strict=True))
        before = [set(one) for one in lists]


@pytest.mark.parametrize("impl", IMPLS)
def test_lists_are_read_by_attention_where_they_lie(impl: str, device: torch.device) -> None:
    named = divided(random_sizes(4, 20, 2), exact=False)
    given = on(device, named)
    index, bounds = recall_ranking(*given.values(), num_key_value_heads=HEADS, budget=25, impl=impl)
    keys, values = (torch.randn(len(given["order"]), 16, device=device) for _ in range(2))
    query = given["query"][:, :, None]
    got = ragged_attention(query, keys, values, bounds, pair_index=index)
    rows = index[: int(bounds[-1])].long()
    torch.testing.assert_close(got, ragged_attention(query, keys[rows], values[rows], bounds))


def inputs_of(named: dict[str, Tensor], **others: Any) -> RankingInputs:
    return RankingInputs(
        **named, **{"num_key_value_heads": HEADS, "row_index": None, "per_query_head": True, "scale": 0.25, **others}
    )


@pytest.mark.triton
@pytest.mark.parametrize("n_groups", [31, 32, 33, 1000])
def test_the_same_worths_give_the_same_lists_bit_for_bit(
    n_groups: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties, signed zeros, denormal and infinite numbers, NaN of both signs; lists in one tile and in many."""
    from kvzip_press.kernels.recall_ranking import triton

    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40, 1.0, 1.0])
    special[5].view(torch.int32).bitwise_or_(-(2**31))
    worth = torch.randn(2, 4, n_groups)
    worth = torch.where(torch.rand(worth.shape) < 0.5, special[torch.randint(10, worth.shape)], worth)
    named = on(triton_device, divided(random_sizes(4, n_groups, 5), members=2))
    worth = worth.to(triton_device)
    monkeypatch.setattr(triton, "LIST_TILE", 64)
    for budget in (1, 6, 70, 200):
        given = inputs_of(named, budget=budget)
        expected = reference.listed(given, worth.view(2, HEADS, 2, n_groups))
        got, n_listed = triton.listed(given, worth), int(expected[1][-1])
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[0][:n_listed], expected[0][:n_listed])


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bounds", [False, True])
def test_products_are_as_exact_as_fp32(
    bounds: bool, dtype: torch.dtype, triton_device: torch.device, assert_accurate: Accurate
) -> None:
    from kvzip_press.kernels.recall_ranking import triton

    named = on(triton_device, divided(random_sizes(4, 70, 0), head_dim=96, bounds=bounds, exact=False))
    wide = {"query": named["query"].to(dtype), "marks": named["marks"].to(dtype)}
    given = inputs_of({**named, **wide}, budget=1)
    exact = reference.products(replace(given, query=given.query.double(), marks=given.marks.double()))
    assert_accurate(triton.products(given), exact, reference.products(given))


def test_a_context_without_pairs_is_listed_as_nothing() -> None:
    """No groups at all, and no tokens."""
    empty = divided([[0], [0]])
    index, bounds = recall_ranking(*empty.values(), num_key_value_heads=HEADS, budget=3)
    assert bounds.tolist() == [0, 0, 0] and len(index) == 6


@pytest.mark.triton
def test_the_kernel_too_lists_first_tokens_where_there_are_no_groups(triton_device: torch.device) -> None:
    named = on(triton_device, divided([[4], [2]]))
    got = recall_ranking(*named.values(), num_key_value_heads=HEADS, budget=3, impl="triton")
    assert rows_of(*got) == [[0, 1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget: expected 1 pair or more, got 0"),
        ({"marks": torch.zeros(2, 3, 20)}, ValueError, "marks: expected vectors of head_dim = 16 numbers, or bounds"),
        ({"marks": torch.zeros(2, 3, 16).double()}, TypeError, "marks: expected the dtype of query"),
        ({"sizes": torch.ones(2, 3).int()}, ValueError, r"sizes: expected \[segments, 1 \+ groups\] = \(2, 4\)"),
        ({"sizes": torch.ones(2, 4).int()}, ValueError, r"sizes: expected the sums \[8, 8\], the lengths of the"),
        ({"sizes": torch.full((2, 4), 2)}, TypeError, "sizes: expected torch.int32"),
        ({"order": torch.zeros(9).int()}, ValueError, "cu_seqlens: expected to run from 0 to 9"),
        ({"query": torch.zeros(2, 6, 16)}, ValueError, "marks: expected 4 segments, 2 rows"),
        ({"query": torch.zeros(1, 5, 16)}, ValueError, "query heads: expected a multiple of the 2 key-value heads"),
        ({"row_index": torch.tensor([1])}, ValueError, r"row_index: expected packed rows 0 .. 0, got \[1\]"),
        ({"impl": "cuda"}, ValueError, "recall_ranking: expected impl to be None or one of"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = divided([[2, 2, 2, 2]] * 2) | {"num_key_value_heads": HEADS, "budget": 5} | changes
    with pytest.raises(error, match=message):
        recall_ranking(**arguments)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "the dtype is torch.float64"),
        ({"head_dim": 257}, "head_dim is 257"),
        ({"n_groups": 16385}, "a segment has 16385 groups"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(
    changes: dict[str, Any], message: str, triton_device: torch.device
) -> None:
    sizes = [[1] * (1 + changes.get("n_groups", 3))] * 2
    named = on(triton_device, divided(sizes, members=1, head_dim=changes.get("head_dim", 16)))
    dtype = changes.get("dtype", torch.float32)
    named |= {"query": named["query"].to(dtype), "marks": named["marks"].to(dtype)}
    with pytest.raises(ValueError, match=message):
        recall_ranking(*named.values(), num_key_value_heads=HEADS, budget=2, impl="triton")
    index, bounds = recall_ranking(*named.values(), num_key_value_heads=HEADS, budget=2)
    assert bounds.diff().tolist() == [2, 2] and index.shape == (4,)
