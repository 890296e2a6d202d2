"""Budgets are exact, whatever the scores, the ties, the lengths and the ratio."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip_press.budget import ALLOCATIONS, allocate, check_compression_ratio, top_counts
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.scores import Scores
from kvzip_press.selection import select, top_mask

laws = settings(deadline=None, max_examples=60, derandomize=True)
ratios = st.floats(0, 1, exclude_max=True, allow_nan=False)


def make_scores(seed, ratio, allocation, *, batch=1, layers=3, heads=2, n=20, n_sink=0, levels=None) -> Scores:
    """Random scores; few ``levels`` make many ties."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(layers, batch, heads, n, generator=generator)
    values = values if levels is None else (values * levels).floor() / levels
    protected = torch.zeros(batch, n, dtype=torch.bool)
    protected[:, :n_sink] = True
    return Scores({2 * i: values[i] for i in range(layers)}, protected, ratio, allocation)


def pools(scores: Scores, allocation: str, kept: torch.Tensor) -> torch.Tensor:
    """Kept pairs ``[layers, batch, heads]`` summed over each pool."""
    dims = {"global": (0, 2), "layer": (2,), "head": ()}[allocation]
    return kept.sum(dim=dims) if dims else kept


@laws
@given(
    seed=st.integers(0, 99),
    ratio=ratios,
    allocation=st.sampled_from(ALLOCATIONS),
    n=st.integers(1, 64),
    n_sink=st.integers(0, 5),
    levels=st.sampled_from([None, 1, 3]),
)
def test_kept_is_exactly_the_budget(seed, ratio, allocation, n, n_sink, levels) -> None:
    """Kept = protected + round((1 - ratio) * n) of every pool, at least one pair a layer, at every length and ratio."""
    layers, heads = 3, 2
    scores = make_scores(seed, ratio, allocation, n=n, n_sink=n_sink, levels=levels)
    valid = torch.ones(1, n, dtype=torch.bool)
    keep = select(scores, valid)
    kept = torch.stack([keep[i].sum(-1) for i in keep])
    size = {"global": layers * heads, "layer": heads, "head": 1}[allocation]
    free = max(n - n_sink, 0)
    floor = {"global": layers, "layer": 1, "head": 1}[allocation] if n_sink == 0 else 0
    expected = max(round((1 - ratio) * size * free), min(floor, size * free)) + size * min(n_sink, n)
    assert (pools(scores, allocation, kept) == expected).all()
    assert (kept.sum(dim=2) >= 1).all()
    assert all(mask[..., :n_sink].all() for mask in keep.values())


@laws
@given(seed=st.integers(0, 99), ratios=st.tuples(ratios, ratios), allocation=st.sampled_from(ALLOCATIONS))
def test_larger_budget_keeps_a_superset(seed, ratios, allocation) -> None:
    """What a small budget keeps, a larger one keeps too, ties included."""
    high, low = max(ratios), min(ratios)
    valid = torch.ones(1, 20, dtype=torch.bool)
    small = select(make_scores(seed, high, allocation, levels=3), valid)
    large = select(make_scores(seed, low, allocation, levels=3), valid)
    assert all((small[i] & ~large[i]).sum() == 0 for i in small)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_ratio_zero_keeps_everything(allocation) -> None:
    """Nothing removed is nothing removed."""
    valid = torch.ones(2, 20, dtype=torch.bool)
    assert all(mask.all() for mask in select(make_scores(0, 0.0, allocation, batch=2), valid).values())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_rows_have_their_own_budget_and_padding_is_never_kept(allocation) -> None:
    """A padded row keeps what the row alone keeps."""
    scores = make_scores(3, 0.6, allocation, batch=2, levels=4)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :7] = False
    together = select(scores, valid)
    alone = select(
        Scores({i: v[1:, :, 7:] for i, v in scores.layers.items()}, scores.protected[1:, 7:], 0.6, allocation),
        valid[1:, 7:],
    )
    for layer_idx, mask in together.items():
        assert mask[1, :, :7].sum() == 0
        assert torch.equal(mask[1, :, 7:], alone[layer_idx][0])


def test_equal_scores_go_by_lower_position() -> None:
    """With all scores equal the first positions stay, in all layers and heads alike."""
    scores = make_scores(0, 0.5, "global", levels=1)
    keep = select(scores, torch.ones(1, 20, dtype=torch.bool))
    assert all(mask[..., :10].all() and not mask[..., 10:].any() for mask in keep.values())


@laws
@given(seed=st.integers(0, 99), budget=st.integers(1, 60), levels=st.sampled_from([1, 2, 5, 1000]))
def test_top_counts_equal_a_stable_sort(seed, budget, levels) -> None:
    """Counts agree with sorting all entries by score, then column, then row."""
    values = (torch.rand(4, 15, generator=torch.Generator().manual_seed(seed)) * levels).floor()
    order = sorted((-float(values[r, c]), c, r) for r in range(4) for c in range(15))[:budget]
    expected = torch.bincount(torch.tensor([r for _, _, r in order]), minlength=4)
    counts = top_counts(values, budget)
    assert counts.tolist() == expected.tolist()
    mask = top_mask(values[None], counts[None], torch.ones(1, 15, dtype=torch.bool))[0]
    assert sorted((c, r) for _, c, r in order) == sorted((c, r) for r, c in mask.nonzero().tolist())


def test_protected_pairs_count_inside_the_budget_when_the_paper_says_so() -> None:
    """With protected_count a pool keeps round((1 - ratio) * all) in total."""
    free = make_scores(0, 0.5, "head", n_sink=4)
    scores = Scores(free.layers, free.protected, 0.5, "head", protected_count=True)
    keep = select(scores, torch.ones(1, 20, dtype=torch.bool))
    assert all((mask.sum(-1) == 10).all() and mask[..., :4].all() for mask in keep.values())


def test_a_press_with_its_own_counts_keeps_them() -> None:
    """Counts given by a press are spent as they are, and another ratio is refused."""
    free = make_scores(0, 0.5, "global")
    counts = {i: torch.tensor([[3, 7]]) for i in free.layers}
    scores = Scores(free.layers, free.protected, 0.5, counts=counts)
    assert allocate(scores, torch.ones(1, 20, dtype=torch.bool))[0].tolist() == [[3, 7]]
    with pytest.raises(InvalidArgumentError, match="decides its own budget"):
        scores.with_policy(0.7, None)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.5", None, True])
def test_ratio_out_of_range_is_refused(ratio) -> None:
    """Anything but a number in [0, 1) raises and names what came."""
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\), got"):
        check_compression_ratio(ratio)


def test_scores_that_are_not_numbers_are_refused() -> None:
    """NaN scores, and scores of the wrong shape, raise at construction."""
    protected = torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(InvalidArgumentError, match="finite"):
        Scores({0: torch.full((1, 2, 4), torch.nan)}, protected, 0.5)
    with pytest.raises(InvalidArgumentError, match="expected scores"):
        Scores({0: torch.zeros(1, 2, 5)}, protected, 0.5)
    with pytest.raises(InvalidArgumentError, match="allocation"):
        allocate(Scores({0: torch.zeros(1, 2, 4)}, protected, 0.5, "heads"), ~protected)
