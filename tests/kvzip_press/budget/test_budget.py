"""Budgets are exact, whatever the scores, the ties, the lengths and the ratio."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvzip_press import KVzipPress, Press, RaggedCache, RandomPress
from kvzip_press.budget.allocation import allocate
from kvzip_press.budget.allocators import AdaKV, Decided, Global, PerHead, PerLayer
from kvzip_press.budget.amount import Ratio, Tokens, check_compression_ratio
from kvzip_press.budget.candidates import Candidates
from kvzip_press.budget.joined_layers import by_head
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select, top_mask
from kvzip_press.budget.spending import kth_largest, kth_largest_by_bits, top_counts
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.any_transformers

laws = settings(deadline=None, max_examples=60, derandomize=True)
ratios = st.floats(0, 1, exclude_max=True, allow_nan=False)
CLASSES = {cls.name: cls for cls in (Global, PerLayer, PerHead, AdaKV)}  # others: test_allocators.py
ALLOCATIONS = tuple(CLASSES)


def make_scores(seed, ratio, allocation, *, batch=1, layers=3, heads=2, n=20, n_sink=0, levels=None) -> Scores:
    """Random scores; few ``levels`` make many ties."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(layers, batch, heads, n, generator=generator)
    values = values if levels is None else (values * levels).floor() / levels
    protected = torch.zeros(batch, n, dtype=torch.bool)
    protected[:, :n_sink] = True
    return Scores({2 * i: values[i] for i in range(layers)}, protected, Policy.of(ratio, allocation))


def pools(scores: Scores, allocation: str, kept: torch.Tensor) -> torch.Tensor:
    """Kept pairs ``[layers, batch, heads]`` summed over each pool."""
    dims = {"global": (0, 2), "layer": (2,), "head": (), "adakv": (2,)}[allocation]
    return kept.sum(dim=dims) if dims else kept


@laws
@given(
    seed=st.integers(0, 99),
    amount=st.one_of(ratios.map(Ratio), st.integers(1, 40).map(Tokens)),
    n_sink=st.integers(0, 5),
    counts=st.booleans(),
    n_held=st.integers(0, 5),
)
def test_counts_of_heads_alone_are_those_of_their_pools(seed, amount, n_sink, counts, n_held) -> None:
    """What follows from numbers, for rows of many heads, is what each head would be given as a pool of its own."""
    scores = replace(make_scores(seed, 0.5, "head", batch=3, n_sink=n_sink), protected_count=counts)
    generator = torch.Generator().manual_seed(seed)
    standing = {i: torch.rand(values.shape, generator=generator) < 0.4 for i, values in scores.layers.items()}
    standing[2][1, 0] = False  # a head without a pair
    held = {i: torch.full(values.shape[:2], n_held) for i, values in scores.layers.items()}
    rows = Candidates.of_rows(scores.layers, standing, standing, scores.protected, scores.charged, held)
    got = PerHead().counts_of_rows(rows, amount)
    expected = [PerHead().counts(row, amount) for row in rows]
    for layer_idx, of_layer in got.items():
        torch.testing.assert_close(of_layer, torch.stack([row[layer_idx] for row in expected]))


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
    size = {"global": layers * heads, "layer": heads, "head": 1, "adakv": heads}[allocation]
    free = max(n - n_sink, 0)
    floor = {"global": layers, "layer": 1, "head": 1, "adakv": 1}[allocation] if n_sink == 0 else 0
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
        Scores(
            {i: v[1:, :, 7:] for i, v in scores.layers.items()}, scores.protected[1:, 7:], Policy.of(0.6, allocation)
        ),
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
    scores = Scores(free.layers, free.protected, Policy.of(0.5, "head"), protected_count=True)
    keep = select(scores, torch.ones(1, 20, dtype=torch.bool))
    assert all((mask.sum(-1) == 10).all() and mask[..., :4].all() for mask in keep.values())


def test_a_press_with_its_own_counts_keeps_them() -> None:
    """Counts given by a press are spent as they are, and another ratio is refused."""
    free = make_scores(0, 0.5, "global")
    counts = {i: torch.tensor([[3, 7]]) for i in free.layers}
    scores = Scores(free.layers, free.protected, Policy(Ratio(0.5), Decided(per_head=counts)))
    assert allocate(scores, torch.ones(1, 20, dtype=torch.bool))[0].tolist() == [[3, 7]]
    with pytest.raises(InvalidArgumentError, match="decides its own budget"):
        scores.asked_for(0.7)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.5", None, True])
def test_ratio_out_of_range_is_refused(ratio) -> None:
    """Anything but a number in [0, 1) raises and names what came."""
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\), got"):
        check_compression_ratio(ratio)


def test_scores_that_are_not_numbers_are_refused() -> None:
    """NaN scores, and scores of the wrong shape, raise at construction."""
    protected = torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(InvalidArgumentError, match="finite"):
        Scores({0: torch.full((1, 2, 4), torch.nan)}, protected, Policy.of(0.5))
    with pytest.raises(InvalidArgumentError, match="expected scores"):
        Scores({0: torch.zeros(1, 2, 5)}, protected, Policy.of(0.5))
    with pytest.raises(InvalidArgumentError, match="allocation"):
        Scores({0: torch.zeros(1, 2, 4)}, protected, Policy.of(0.5, "heads"))
    with pytest.raises(InvalidArgumentError, match="expected a Policy"):
        Scores({0: torch.zeros(1, 2, 4)}, protected, 0.5)


budgets = st.integers(1, 70)
ONE_ROW = {n: torch.ones(1, n, dtype=torch.bool) for n in range(1, 65)}


def policy(scores: Scores, **changes) -> Scores:
    """The scores under another policy; what is not named stays as it is, but for the ratio, which goes."""
    inside = changes.pop("protected_count", scores.protected_count)
    own, allocation = scores.policy.allocation, scores.policy.allocation
    names = {cls: name for name, cls in CLASSES.items()}
    now = {
        "allocation": names[type(own)],
        "safeguard": own.safeguard,
        "min_kept_per_head": allocation.min_kept_per_head,
    }
    return replace(scores, policy=Policy.of(**{**now, **changes}), protected_count=inside)


def same_ratio(scores: Scores, **changes) -> Scores:
    return policy(scores, compression_ratio=scores.policy.compression_ratio, **changes)


def kept_per_head(scores: Scores) -> torch.Tensor:
    """``[layers, heads]`` kept pairs of one row."""
    keep = select(scores, ONE_ROW[scores.protected.shape[1]])
    return torch.stack([mask[0].sum(-1) for mask in keep.values()])


@laws
@given(
    seed=st.integers(0, 99),
    budget=budgets,
    allocation=st.sampled_from(ALLOCATIONS),
    n=st.integers(1, 64),
    n_sink=st.integers(0, 5),
    inside=st.booleans(),
    min_kept=st.integers(0, 9),
    levels=st.sampled_from([None, 1, 3]),
)
def test_a_budget_in_tokens_is_kept_exactly(seed, budget, allocation, n, n_sink, inside, min_kept, levels) -> None:
    """A pool keeps budget * heads pairs, protected ones inside or on top; a short context stays whole."""
    layers, heads = 3, 2
    scores = make_scores(seed, 0.0, allocation, layers=layers, heads=heads, n=n, n_sink=n_sink, levels=levels)
    kept = kept_per_head(policy(scores, budget=budget, protected_count=inside, min_kept_per_head=min_kept))
    n_sink = min(n_sink, n)
    if inside:
        each = max(min(budget, n), n_sink)
    else:
        each = n_sink + min(budget, n - n_sink)
    size = {"global": layers * heads, "layer": heads, "head": 1, "adakv": heads}[allocation]
    assert (pools(scores, allocation, kept[:, None]) == each * size).all()
    assert (kept.sum(1) >= 1).all()


@laws
@given(
    seed=st.integers(0, 99),
    amounts=st.tuples(budgets, budgets),
    allocation=st.sampled_from(ALLOCATIONS),
    n=st.integers(1, 64),
    safeguard=st.sampled_from([0.0, 0.2, 0.55, 1.0]),
    min_kept=st.integers(0, 9),
    levels=st.sampled_from([None, 1, 3]),
)
def test_larger_budget_in_tokens_keeps_a_superset(seed, amounts, allocation, n, safeguard, min_kept, levels) -> None:
    """So it is for every allocation, AdaKV's growing floors and floors that the budget cuts included."""
    scores = make_scores(seed, 0.0, allocation, n=n, levels=levels, heads=3)
    small, large = (
        select(policy(scores, budget=b, safeguard=safeguard, min_kept_per_head=min_kept), ONE_ROW[n])
        for b in sorted(amounts)
    )
    assert all((small[i] & ~large[i]).sum() == 0 for i in small)


@laws
@given(seed=st.integers(0, 99), step=st.integers(1, 255), safeguard=st.sampled_from([0.2, 0.55, 1.0]))
def test_a_safeguard_that_moves_by_one_pair_takes_nothing_back(seed, step, safeguard) -> None:
    """With four heads of very different scores, one pair more in the budget is one pair more kept."""
    values = torch.rand(1, 4, 64, generator=torch.Generator().manual_seed(seed)) - 10.0 * torch.arange(4)[None, :, None]
    scores = Scores({0: values}, ~ONE_ROW[64], Policy.of(0.0, "adakv", safeguard=safeguard))
    few, more = (select(scores.asked_for(1 - (step + d) / 256), ONE_ROW[64])[0] for d in (0, 1))
    assert int((few & ~more).sum()) == 0 and int(more.sum() - few.sum()) == 1


@laws
@given(
    seed=st.integers(0, 99),
    ratio=ratios,
    n=st.integers(1, 64),
    safeguard=st.floats(0, 1),
    levels=st.sampled_from([None, 1, 3]),
)
def test_adakv_safeguards_a_part_of_the_equal_share(seed, ratio, n, safeguard, levels) -> None:
    """Each head keeps at least that part, rounded down; without a safeguard it is a layer's competition."""
    scores = make_scores(seed, ratio, "adakv", n=n, levels=levels, heads=4)
    scores.layers[0][:, 0] -= 5  # a head that would lose everything
    kept = kept_per_head(same_ratio(scores, safeguard=safeguard))
    budget = max(round((1 - ratio) * 4 * n), 1)
    assert (kept.sum(1) == budget).all()
    assert (kept >= math.floor(Fraction(str(safeguard)) * budget / 4)).all()
    assert torch.equal(
        kept_per_head(same_ratio(scores, safeguard=0.0)), kept_per_head(same_ratio(scores, allocation="layer"))
    )


def test_adakv_by_hand() -> None:
    """Two heads, 10 of 20 pairs, alpha 0.4: the weak head gets its two, the strong one the other eight."""
    strong, weak = torch.arange(10, 20).float(), torch.arange(10).float()
    scores = Scores({0: torch.stack([strong, weak])[None]}, ~ONE_ROW[10], Policy.of(0.5, "adakv", safeguard=0.4))
    assert kept_per_head(scores).tolist() == [[8, 2]]
    assert kept_per_head(same_ratio(scores, safeguard=1.0)).tolist() == [[5, 5]]
    assert kept_per_head(same_ratio(scores, safeguard=0.0)).tolist() == [[10, 0]]


@laws
@given(
    seed=st.integers(0, 99),
    ratio=ratios,
    allocation=st.sampled_from(ALLOCATIONS),
    min_kept=st.integers(0, 70),
    n=st.integers(1, 64),
)
def test_every_head_keeps_its_floor_inside_the_budget(seed, ratio, allocation, min_kept, n) -> None:
    """The sum does not change; heads keep the floor, or, where the budget is too small, equal parts up to one pair."""
    scores = make_scores(seed, ratio, allocation, n=n)
    for values in scores.layers.values():
        values[:, 0] -= 5
    floored = kept_per_head(same_ratio(scores, min_kept_per_head=min_kept))
    free = kept_per_head(scores)
    assert torch.equal(pools(scores, allocation, floored[:, None]), pools(scores, allocation, free[:, None]))
    size = {"global": 6, "layer": 2, "head": 1, "adakv": 2}[allocation]
    budget = int(pools(scores, allocation, free[:, None]).flatten()[0])
    assert (floored >= min(min_kept, n, budget // size)).all()


@laws
@given(
    seed=st.integers(0, 99),
    per_layer=st.lists(ratios, min_size=3, max_size=3),
    n=st.integers(1, 64),
    allocation=st.sampled_from(["layer", "head", "adakv"]),
)
def test_each_layer_keeps_its_own_ratio(seed, per_layer, n, allocation) -> None:
    """A layer's kept pairs are those of that ratio alone."""
    scores = make_scores(seed, 0.0, allocation, n=n)
    own = select(policy(scores, layer_ratios=dict(zip((0, 2, 4), per_layer, strict=True))), ONE_ROW[n])
    for layer_idx, ratio in zip((0, 2, 4), per_layer, strict=True):
        assert torch.equal(own[layer_idx], select(scores.asked_for(ratio), ONE_ROW[n])[layer_idx])


def test_layer_ratios_that_do_not_fit_are_refused() -> None:
    """Other layers than were scored, a pool of all layers, and a second amount raise, naming what came."""
    scores = make_scores(0, 0.0, "layer")
    for wrong, got in (({0: 0.5, 2: 0.5}, "[0, 2]"), ([0.5] * 5, "[0, 1, 2, 3, 4]")):
        with pytest.raises(InvalidArgumentError, match=re.escape(f"layers [0, 2, 4], got them for {got}")):
            policy(scores, layer_ratios=wrong)
    ratios_of_all = dict.fromkeys((0, 2, 4), 0.5)
    with pytest.raises(InvalidArgumentError, match="global"):
        policy(scores, layer_ratios=ratios_of_all, allocation="global")
    with pytest.raises(InvalidArgumentError, match="only one of"):
        policy(scores, layer_ratios=ratios_of_all, budget=5)
    assert scores.asked_for(budget=5).asked_for(0.5).policy.amount == Ratio(0.5)


@laws
@given(
    seed=st.integers(0, 99),
    ratio=ratios,
    allocation=st.sampled_from(ALLOCATIONS),
    order=st.permutations(range(4)),
    min_kept=st.integers(0, 9),
)
def test_permuted_heads_have_permuted_counts(seed, ratio, allocation, order, min_kept) -> None:
    """No head is preferred for its place."""
    scores = same_ratio(make_scores(seed, ratio, allocation, heads=4), min_kept_per_head=min_kept)
    moved = replace(scores, layers={i: values[:, list(order)] for i, values in scores.layers.items()})
    assert torch.equal(kept_per_head(scores)[:, list(order)], kept_per_head(moved))


@laws
@given(seed=st.integers(0, 99), ratio=ratios, allocation=st.sampled_from(ALLOCATIONS), min_kept=st.integers(0, 9))
def test_a_budget_is_spent_among_the_pairs_that_are_left(seed, ratio, allocation, min_kept) -> None:
    """With any pairs left out, heads of different sizes keep exactly the ratio of what is left of their pool."""
    scores = make_scores(seed, ratio, allocation, n_sink=3)
    left = {
        i: torch.rand(v.shape, generator=torch.Generator().manual_seed(seed + i)) < 0.4
        for i, v in scores.layers.items()
    }
    keep = select(same_ratio(scores, min_kept_per_head=min_kept), ONE_ROW[20], among=left)
    assert all(
        (mask & ~left[i]).sum() == 0 and (left[i] & scores.protected[:, None] & ~mask).sum() == 0
        for i, mask in keep.items()
    )
    free = torch.stack([(mask & ~scores.protected[:, None]).sum(-1) for mask in left.values()])
    sinks = torch.stack([(mask & scores.protected[:, None]).sum(-1) for mask in left.values()])
    kept = pools(scores, allocation, torch.stack([mask.sum(-1) for mask in keep.values()]) - sinks)
    expected = torch.tensor([round((1 - ratio) * x) for x in pools(scores, allocation, free).flatten().tolist()])
    bare = (pools(scores, allocation, sinks) == 0) & (pools(scores, allocation, free) > 0)
    if allocation != "global":
        expected = torch.maximum(expected, bare.flatten().long())
        assert torch.equal(kept.flatten(), expected)
    else:
        assert int(expected) <= int(kept) <= int(expected) + 3


def test_a_budget_counts_what_earlier_turns_left() -> None:
    """What is held is taken off; when nothing is left, each layer still keeps a pair of the span."""
    scores = policy(make_scores(0, 0.0, "layer"), budget=8)
    held = {i: torch.tensor([[5, 2]]) for i in scores.layers}
    keep = select(scores, ONE_ROW[20], held=held)
    assert all(int(mask.sum()) == 16 - 7 for mask in keep.values())
    full = select(scores, ONE_ROW[20], held={i: pairs + 50 for i, pairs in held.items()})
    assert all(int(mask.sum()) == 1 for mask in full.values())


@pytest.mark.parametrize("options", [
    {"budget": 0}, {"budget": -3}, {"budget": 2.5}, {"budget": True}, {"budget": "64"},
    {"compression_ratio": 0.5, "budget": 64}, {"budget": 64, "layer_ratios": [0.5]},
    {"compression_ratio": 0.5, "layer_ratios": [0.5], "allocation": "layer"},
    {"layer_ratios": [0.5]}, {"layer_ratios": [1.0], "allocation": "layer"},
    {"layer_ratios": {"0": 0.5}, "allocation": "layer"}, {"layer_ratios": 0.5, "allocation": "layer"},
    {"safeguard": -0.1}, {"safeguard": 1.1}, {"safeguard": math.nan}, {"safeguard": None},
    {"compression_ratio": None}, {"min_kept_per_head": -1}, {"min_kept_per_head": 1.5}, {"allocation": "ada"},
])  # fmt: skip
@pytest.mark.parametrize("press", [RandomPress, KVzipPress])
def test_bad_policies_are_refused_when_a_press_is_made(press, options) -> None:
    """Values out of range and values that contradict each other raise at once and say what came."""
    with pytest.raises(InvalidArgumentError, match=r"expected .* got"):
        press(**options)


def test_presses_are_values() -> None:
    """Presses with equal budgets are equal and hash alike, layer ratios given either way included."""
    one = RandomPress(allocation="layer", layer_ratios=[0.1, 0.2], min_kept_per_head=2)
    two = RandomPress(allocation="layer", layer_ratios={1: 0.2, 0: 0.1}, min_kept_per_head=2)
    assert one == two and hash(one) == hash(two) and replace(one) == one
    assert one != replace(one, layer_ratios=[0.1, 0.3])


class Forgetful(Press):
    """A press that knows nothing of budgets."""

    def score(self, prefill) -> Scores:
        return Scores(prefill.blank_scores(), prefill.protected(0), Policy.of(self.compression_ratio, "head"))


def prefilled(n: int = 30):
    ids = torch.randint(3, 128, (1, n), generator=torch.Generator().manual_seed(0))
    return run_prefill(tiny_model(), ids, torch.ones_like(ids, dtype=torch.bool))


def seqlens(cache) -> torch.Tensor:
    """``[layers, heads]`` kept context pairs of row 0."""
    return torch.stack([layer.packed.seqlens[0] for _, layer in RaggedCache.of(cache).ragged_layers()])


def test_every_press_takes_a_budget() -> None:
    """Also one whose scorer does not look at it; and every eviction takes one instead of the press's."""
    done = prefilled()
    assert (seqlens(done.evict(Forgetful(budget=7).score(done))) == 7).all()
    assert (seqlens(done.evict(Forgetful(budget=100).score(done))) == 30).all()
    scores = RandomPress(0.5, n_sink=2).score(done)
    assert int(seqlens(done.evict(scores, budget=9)).sum()) == 6 * (9 + 2)
    assert (seqlens(done.evict(scores, allocation="head", budget=9)) == 11).all()
    assert int(seqlens(done.evict(scores.asked_for(budget=9), compression_ratio=0.5)).sum()) == 12 + round(0.5 * 6 * 28)
    for wrong in ({"compression_ratio": 0.5, "budget": 9}, {"budget": 0}):
        with pytest.raises(InvalidArgumentError, match="expected"):
            done.evict(scores, **wrong)


@pytest.mark.parametrize("n_sink", [0, 4])
def test_a_budget_bounds_a_conversation(n_sink) -> None:
    """Turns share a budget: what is held of earlier turns, and what was said between, is taken off the last one's."""
    model, cache = tiny_model(), DynamicCache()
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(1))
    press = RandomPress(budget=40, n_sink=n_sink)
    with torch.no_grad():
        with press(model):
            model(ids[:, :30], past_key_values=cache)
        assert (seqlens(cache) == 30).all()  # shorter than the budget
        for step in range(3):
            model(ids[:, step : step + 1], past_key_values=cache)
        for held in (6 * (40 + n_sink), 6 * (40 + n_sink) + 3):  # the third turn finds it full: one pair a layer
            with press(model):
                model(ids[:, 30:55], past_key_values=cache)
            assert int(seqlens(cache).sum()) == held


@pytest.mark.parametrize("n", [1, 2, 63, 4097])
def test_the_kth_largest_by_bits_is_what_sorting_finds(n) -> None:
    """It is the GPU's way; infinities, both zeros, subnormals and negative scores have their place in the order."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(n)) ** 3
    for offset, value in enumerate((0.0, -0.0, torch.inf, -torch.inf, 1e-42, -1e-42, 3.4e38)):
        values[offset::11] = value
    ordered = values.sort(descending=True).values
    for k in {1, 2, n // 3 + 1, n // 2 + 1, n} & set(range(1, n + 1)):
        assert kth_largest_by_bits(values.view(1, -1), k) == kth_largest(values, k) == ordered[k - 1]


class Pyramid(PerLayer):
    """A user's own: the first layer keeps more than the last, exactly as much in all."""

    def asked(self, amount, layers, n_pairs, n_heads, n_held=0) -> int:
        return amount.pairs(layers, n_pairs, n_heads, n_held) + {0: 2, 2: 0, 4: -2}[layers[0]]


def test_an_allocation_of_a_user_s_own_is_an_object() -> None:
    """It needs no name, and brings its own floors."""
    press = RandomPress(0.5, allocation=Pyramid(min_kept_per_head=3))
    scores = replace(make_scores(0, 0.5, "layer"), policy=press.policy)
    assert kept_per_head(scores).sum(1).tolist() == [22, 20, 18]
    assert kept_per_head(scores).min() >= 3
    assert scores.asked_for(allocation="layer").policy == scores.policy  # it is one of that name
    assert kept_per_head(scores.asked_for(allocation="adakv")).sum(1).tolist() == [20, 20, 20]
    with pytest.raises(InvalidArgumentError, match="floors as arguments of"):
        RandomPress(0.5, allocation=Pyramid(), min_kept_per_head=2)


class Forgets(PerLayer):
    def pools(self, heads):
        return super().pools(heads)[1:]


class CountsTwice(PerLayer):
    def pools(self, heads):
        return [*super().pools(heads), *super().pools(heads)]


class AllAtOnce(PerLayer):
    def pools(self, heads):
        return [[pool[0] for pool in super().pools(heads)]]


@pytest.mark.parametrize(
    ("allocation", "options", "match"),
    [
        (Forgets(), {"compression_ratio": 0.5}, r"every head in one of them, got \(layer, head\) \(0, 0\) in 0"),
        (CountsTwice(), {"compression_ratio": 0.5}, r"\(0, 0\) in 2"),
        (AllAtOnce(), {"layer_ratios": {0: 0.1, 2: 0.5, 4: 0.9}}, r"a pool of the layers \[0, 2, 4\]"),
    ],
)
def test_pools_that_would_lose_something_are_refused(allocation, options, match) -> None:
    """A head in no pool would keep nothing, a ratio for each layer is none for all."""
    scores = replace(make_scores(0, 0.5, "layer"), policy=Policy.of(allocation=allocation, **options))
    with pytest.raises(InvalidArgumentError, match=match):
        select(scores, ONE_ROW[20])


DECIDED = {0: torch.tensor([[3, 7]]), 2: torch.tensor([[3, 7]]), 4: torch.tensor([[3, 7]])}


@pytest.mark.parametrize(
    ("per_head", "match"),
    [
        ({0: DECIDED[0]}, "of these layers"),
        ({**DECIDED, 2: torch.tensor([3, 7])}, r"2: \(2,\)"),
        ({**DECIDED, 2: [[3, 7]]}, "class 'list'"),
        ({**DECIDED, 2: torch.tensor([[3.0, 7.0]])}, "int64"),
        ({**DECIDED, 4: torch.tensor([[3, 21]])}, "0 to 20, the unprotected pairs of head 1 of layer 4, got 21"),
        ({**DECIDED, 4: torch.tensor([[-1, 7]])}, "got -1"),
    ],
)
def test_decided_counts_that_cannot_be_kept_are_refused(per_head, match) -> None:
    """Of other layers or shapes, or of more pairs than there are."""
    free = make_scores(0, 0.5, "global")
    with pytest.raises(InvalidArgumentError, match=match):
        select(replace(free, policy=Policy(Ratio(0.5), Decided(per_head=per_head))), ONE_ROW[20])


def test_what_a_press_hands_over_cannot_be_asked_for() -> None:
    """Decided counts are no way to spend a budget."""
    for wrong in (Decided(), PerLayer, None, 3):
        with pytest.raises(InvalidArgumentError, match=r"expected (an )?allocation"):
            RandomPress(0.5, allocation=wrong)


def test_layers_that_are_handled_together_give_what_each_gives_alone() -> None:
    """Tensors of their own, too: of several rows, parts of a joined tensor could not be seen in another shape."""
    layers = {i: torch.randn(2, heads, 5) for i, heads in ((3, 2), (4, 1), (7, 3))}
    (doubled,) = by_head(lambda values: (2 * values,), layers)
    assert list(doubled) == [3, 4, 7]
    for i, values in layers.items():
        assert torch.equal(doubled[i], 2 * values) and doubled[i].is_contiguous()
