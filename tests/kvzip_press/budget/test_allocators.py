"""Allocations that fix what layers and heads get, keep whole pages, or say what stays: their laws, and their papers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip_press import RandomPress, compress_in_chunks
from kvzip_press.budget.allocation import allocate
from kvzip_press.budget.allocators import (
    ALLOCATIONS,
    Allocation,
    Levelled,
    Pages,
    Pyramid,
    SkippingLayers,
    Table,
    Threshold,
    Tolerance,
    allocation_of,
)
from kvzip_press.budget.candidates import Candidates
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.budget.share_file import read_shares, write_shares
from kvzip_press.errors import CacheFileError, InvalidArgumentError
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.testing import ByteTokenizer, tiny_model

LAYERS, HEADS = 4, 3
laws = settings(deadline=None, max_examples=60, derandomize=True)
ratios = st.floats(0, 1, exclude_max=True, allow_nan=False)
numbers = st.floats(0, 100, allow_nan=False)
tables = st.lists(st.lists(numbers, min_size=HEADS, max_size=HEADS), min_size=LAYERS, max_size=LAYERS)
floors = st.integers(0, 9)
pyramids = st.builds(Pyramid, min_kept_per_head=floors, beta=st.sampled_from([1, 1.5, 20, 1000]))
of_tables = st.builds(
    lambda shares, floor: Table(min_kept_per_head=floor, shares=shares),
    tables.filter(lambda rows: any(map(any, rows))),
    floors,
)
LEVELLED = st.one_of(pyramids, of_tables)
PAGES = st.builds(Pages, min_kept_per_head=floors, page_size=st.sampled_from([1, 3, 16, 64]))

pytestmark = [pytest.mark.any_transformers, pytest.mark.usefixtures("one_thread")]


def make_scores(
    seed: int,
    allocation: Allocation,
    ratio: float = 0.0,
    *,
    n: int = 40,
    n_sink: int = 0,
    inside: bool = False,
    levels: int | None = None,
) -> Scores:
    """Random scores, of heads that differ; few ``levels`` make many ties."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(LAYERS, 1, HEADS, n, generator=generator) ** (1 + torch.arange(HEADS)[None, None, :, None])
    values = values if levels is None else (values * levels).floor() / levels
    protected = torch.zeros(1, n, dtype=torch.bool)
    protected[:, :n_sink] = True
    layers = {2 * i: values[i] for i in range(LAYERS)}
    return Scores(layers, protected, Policy.of(ratio, allocation), protected_count=inside)


def kept_of(scores: Scores, **options: Any) -> torch.Tensor:
    """``[layers, heads]``, the kept pairs of one row; every selected set is checked to be within what there is."""
    valid = torch.ones_like(scores.protected)
    keep = select(scores, valid, **options)
    for mask in keep.values():
        assert bool(mask[:, :, scores.protected[0]].all())  # what is protected stays
    return torch.stack([mask[0].sum(-1) for mask in keep.values()])


# ------------------------------------------------------------------------------------------------------------- levels


@laws
@given(
    seed=st.integers(0, 99), ratio=ratios, allocation=LEVELLED, n=st.integers(1, 64), n_sink=st.integers(0, 5),
    inside=st.booleans(), levels=st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_the_whole_keeps_exactly_what_was_asked(seed, ratio, allocation, n, n_sink, inside, levels) -> None:
    """Of all heads together; a layer without protected pairs keeps one, a head no more than it has."""
    scores = make_scores(seed, allocation, ratio, n=n, n_sink=n_sink, inside=inside, levels=levels)
    kept, n_heads, n_sink = kept_of(scores), LAYERS * HEADS, min(n_sink, n)
    least = n_heads * n_sink + (0 if n_sink else LAYERS)
    outside = 0 if inside else n_heads * n_sink
    asked = outside + round((1 - ratio) * (n_heads * n - outside))
    assert int(kept.sum()) == min(max(asked, least), n_heads * n)
    assert bool((kept.sum(1) >= 1).all()) and int(kept.max()) <= n


@laws
@given(
    seed=st.integers(0, 99), budgets=st.tuples(st.integers(1, 70), st.integers(1, 70)), step=st.booleans(),
    allocation=st.one_of(LEVELLED, PAGES), n=st.integers(1, 64), levels=st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_a_larger_budget_keeps_a_superset(seed, budgets, step, allocation, n, levels) -> None:
    """Also one that is larger by a pair, and where floors do not fit."""
    scores, valid = make_scores(seed, allocation, n=n, levels=levels), torch.ones(1, n, dtype=torch.bool)
    if step:
        total = n * LAYERS * HEADS
        pairs = min(budgets[0], total - 1)
        asked = [scores.asked_for(1 - (pairs + more) / total) for more in (0, 1)]
    else:
        asked = [scores.asked_for(budget=budget) for budget in sorted(budgets)]
    small, large = (select(one, valid) for one in asked)
    assert all(not bool((small[i] & ~large[i]).any()) for i in small)


@laws
@given(seed=st.integers(0, 99), ratio=ratios, allocation=LEVELLED, floor=st.integers(0, 50), n=st.integers(1, 64))
def test_every_head_keeps_its_floor_inside_the_budget(seed, ratio, allocation, floor, n) -> None:
    scores = make_scores(seed, replace(allocation, min_kept_per_head=floor), ratio, n=n)
    kept = kept_of(scores)
    assert bool((kept >= min(floor, n, int(kept.sum()) // (LAYERS * HEADS))).all())


@laws
@given(
    seed=st.integers(0, 99), ratio=ratios, allocation=st.one_of(pyramids, PAGES), order=st.permutations(range(HEADS))
)  # fmt: skip
def test_permuted_heads_have_permuted_counts(seed, ratio, allocation, order) -> None:
    """No head is preferred for its place."""
    scores = make_scores(seed, allocation, ratio)
    moved = replace(scores, layers={i: values[:, list(order)] for i, values in scores.layers.items()})
    assert torch.equal(kept_of(scores)[:, list(order)], kept_of(moved))


@laws
@given(seed=st.integers(0, 99), ratio=ratios, allocation=st.one_of(LEVELLED, PAGES))
def test_a_budget_is_spent_among_the_pairs_that_are_left(seed, ratio, allocation) -> None:
    """With any pairs left out, as after another press, the ratio is one of what is left."""
    scores = make_scores(seed, allocation, ratio)
    generator = torch.Generator().manual_seed(seed)
    left = {i: torch.rand(v.shape, generator=generator) < 0.4 for i, v in scores.layers.items()}
    keep = select(scores, torch.ones_like(scores.protected), among=left)
    assert all(not bool((mask & ~left[i]).any()) for i, mask in keep.items())
    asked = round((1 - ratio) * sum(int(mask.sum()) for mask in left.values()))
    kept = sum(int(mask.sum()) for mask in keep.values())
    assert asked - allocation.rounding <= kept <= max(asked, LAYERS * (1 + allocation.rounding))


def test_rows_of_different_length_have_their_own_line() -> None:
    one, two = make_scores(1, Pyramid(), 0.6), make_scores(2, Pyramid(), 0.6)
    layers = {i: torch.cat([one.layers[i], two.layers[i]]) for i in one.layers}
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :15] = False
    together = allocate(replace(one, layers=layers, protected=torch.zeros_like(valid)), valid)
    alone = allocate(
        replace(one, layers={i: v[:, :, 15:] for i, v in two.layers.items()}, protected=torch.zeros(1, 25) > 0),
        valid[1:, 15:],
    )  # fmt: skip
    assert all(torch.equal(together[i][1], alone[i][0]) for i in alone)


def pyramid_line(c: float, n: int, n_layers: int, beta: float) -> list[float]:
    """PyramidKV's code, unrounded: ``c`` pairs a head besides the window, ``n`` at most."""
    least = c / beta
    most = 2 * c - least
    if most >= n:
        most, least = n, 2 * c - n
    return [most - layer * (most - least) / (n_layers - 1) for layer in range(n_layers)]


@pytest.mark.parametrize("beta", [2, 20])
@pytest.mark.parametrize("budget", [3, 10, 25, 39])
def test_a_pyramid_is_the_paper_s_line(budget: int, beta: int) -> None:
    kept = kept_of(make_scores(0, Pyramid(beta=beta)).asked_for(budget=budget))
    for layer, wanted in zip(kept.tolist(), pyramid_line(budget, 40, LAYERS, beta), strict=True):
        assert max(layer) - min(layer) <= 1 and all(abs(pairs - wanted) <= 1 for pairs in layer)


def test_a_pyramid_by_hand() -> None:
    """20 of 40 pairs a head, of which the first layer gets 39 times what the last gets: 39, 26.3, 13.7 and 1."""
    kept = kept_of(make_scores(0, Pyramid()).asked_for(budget=20))
    assert kept.tolist() == [[39] * 3, [26] * 3, [14] * 3, [1] * 3]
    one_layer = Scores({0: torch.rand(1, 2, 10)}, torch.zeros(1, 10, dtype=torch.bool), Policy.of(0.5, Pyramid()))
    assert kept_of(one_layer).tolist() == [[5, 5]]


def test_shares_are_proportions_until_a_head_is_full() -> None:
    shares = [[1, 1, 1], [2, 2, 2], [0, 0, 0], [1, 1, 100]]
    kept = kept_of(make_scores(0, Table(shares=shares)).asked_for(budget=10))
    assert int(kept.sum()) == 120
    assert kept[3, 2] == 40 and bool((kept[1] >= 2 * kept[0] - 1).all()) and int(kept[2].sum()) == 1
    full = kept_of(make_scores(0, Table(shares=shares)).asked_for(budget=39))  # a share of 0 is served last
    assert int(full.sum()) == 39 * 12 and bool((full[[0, 1, 3]] == 40).all())


def test_layers_that_are_skipped_stay_whole() -> None:
    kept = kept_of(make_scores(0, SkippingLayers(layers=(0, 4)), 0.25))
    assert kept.tolist() == [[40] * 3, [20] * 3, [40] * 3, [20] * 3]


class Stuck(Levelled):
    def curve(self, row: Candidates, sizes: torch.Tensor) -> Any:
        return lambda level: torch.zeros_like(sizes)


def test_a_curve_that_reaches_no_budget_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="a curve that reaches 240 pairs"):
        kept_of(make_scores(0, Stuck(), 0.5))


# ------------------------------------------------------------------------------------------------------------- tables


def test_lu_kv_s_curves_are_followed(tmp_path: Path) -> None:
    """At a ratio that the curve has, heads keep what it says, as kvpress rounds it, but for a pair."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.rand(LAYERS, HEADS, generator=generator) + 0.5
    kept = torch.arange(99, 0, -1)[:, None, None] / 100
    curve = 1 - kept**shape  # of fractions removed, growing with the ratio
    np.save(tmp_path / "curve.npy", curve.double().numpy())
    table = Table(shares=str(tmp_path / "curve.npy"))
    ratio = float(curve[69].mean())
    got = kept_of(make_scores(0, table, ratio, n=60))
    assert bool(((got - (1 - curve[69]) * 60).abs() <= 1).all()) and int(got.sum()) == round((1 - ratio) * 720)
    assert bool((kept_of(make_scores(0, table, 0.0)) == 40).all())
    assert hash(table) == hash(Table(shares=curve.double().tolist())) and repr(table) == "Table([99, 4, 3])"


def test_a_table_goes_through_a_file(tmp_path: Path) -> None:
    shares = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(0)).double()
    write_shares(tmp_path / "folder" / "shares.json", shares, {"model": "tiny"})
    assert torch.equal(read_shares(tmp_path / "folder" / "shares.json"), shares)
    assert Table(shares=tmp_path / "folder" / "shares.json") == Table(shares=shares.tolist())
    by_layer = torch.rand(7, HEADS).tolist()  # rows of all layers: those that are scored are taken
    table = Table(shares=by_layer)
    rows = [by_layer[i] for i in (0, 2, 4, 6)]
    assert torch.equal(kept_of(make_scores(0, table, 0.5)), kept_of(make_scores(0, Table(shares=rows), 0.5)))
    with pytest.raises(CacheFileError):
        write_shares(tmp_path / "folder" / "shares.json" / "x", shares, {})


WRONG_TABLES: dict[str, tuple[Any, str]] = {
    "nothing": ((), r"got \(0,\)"),
    "a list": ([1, 2], r"got \(2,\)"),
    "text": ([["a"]], "as numbers"),
    "ragged": ([[1.0], [1.0, 2.0]], "as numbers"),
    "negative": ([[1.0, -1.0]], "at least 0"),
    "infinite": ([[1.0, math.inf]], "at least 0"),
    "all zero": ([[0.0, 0.0]], "not all of them 0"),
    "a curve of percents": ([[[50.0]]] * 99, "fractions removed"),
    "98 ratios": ([[[0.5]]] * 98, r"got \(98, 1, 1\)"),
}


@pytest.mark.parametrize(("shares", "match"), WRONG_TABLES.values(), ids=WRONG_TABLES.keys())
def test_tables_of_something_else_are_refused(shares: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        Table(shares=shares)


@pytest.mark.parametrize(
    "shares", [[[1.0] * 3] * 3, [[1.0] * 2] * 4, [[1.0] * 3] * 6], ids=["layers", "heads", "index"]
)
def test_a_table_for_another_model_is_refused(shares: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="was it made for another model"):
        kept_of(make_scores(0, Table(shares=shares), 0.5))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    good = {"format": "kvzip_press_head_shares", "shares": [[1.0, 2.0]]}
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "ints.npy", np.ones((99, 1, 1), dtype=np.int64))
    whole = (tmp_path / "ints.npy").read_bytes()
    contents = {
        "objects.npy": None,
        "ints.npy": None,
        "cut.npy": whole[: len(whole) // 2],
        "other.json": json.dumps({"shares": [[1.0]]}).encode(),
        "text.json": b"shares",
        "no rows.json": json.dumps({**good, "shares": 3}).encode(),
        "ragged.json": json.dumps({**good, "shares": [[1.0], [1.0, 2.0]]}).encode(),
        "names.json": json.dumps({**good, "shares": [["a"]]}).encode(),
        "nan.json": b'{"format": "kvzip_press_head_shares", "shares": [[NaN]]}',
    }
    for name, data in contents.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidArgumentError, match="expected shares"):
            Table(shares=tmp_path / name)
    with pytest.raises(InvalidArgumentError, match="FileNotFoundError"):
        Table(shares="no such file")
    with pytest.raises(InvalidArgumentError, match="expected shares"):
        Table(shares=tmp_path)


# -------------------------------------------------------------------------------------------------------------- pages


@laws
@given(
    seed=st.integers(0, 99), ratio=ratios, page_size=st.sampled_from([1, 3, 16]), n=st.integers(1, 64),
    n_sink=st.integers(0, 5), levels=st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_heads_keep_whole_pages_within_the_budget(seed, ratio, page_size, n, n_sink, levels) -> None:
    """All of it but less than a page; only a layer that would be left empty takes more."""
    scores = make_scores(seed, Pages(page_size=page_size), ratio, n=n, n_sink=n_sink, inside=True, levels=levels)
    kept, n_sink = kept_of(scores), min(n_sink, n)
    assert all(pairs in (0, n) or pairs % page_size == 0 or pairs == n_sink for pairs in kept.flatten().tolist())
    budget = max(round((1 - ratio) * LAYERS * HEADS * n), LAYERS * HEADS * n_sink)
    at_least = budget - (page_size - 1)
    assert at_least <= int(kept.sum()) <= max(budget, 0 if n_sink else LAYERS * page_size)


def test_the_cheapest_pages_go_first() -> None:
    """By the definition: take away the page whose best pair is worst, again and again."""
    scores = make_scores(3, Pages(page_size=8), 0.6)
    pages = []
    for i, values in enumerate(scores.layers.values()):
        for head in range(HEADS):
            best_first = sorted(values[0, head].tolist(), reverse=True)
            pages += [(best_first[start], i, head) for start in range(0, 40, 8)]
    pages.sort()
    while 8 * len(pages) > round(0.4 * 40 * LAYERS * HEADS):
        pages.pop(0)
    expected = torch.zeros(LAYERS, HEADS, dtype=torch.int64)
    for _, i, head in pages:
        expected[i, head] += 8
    assert torch.equal(kept_of(scores), expected)


def test_pages_of_one_pair_are_a_global_budget() -> None:
    scores = make_scores(5, Pages(page_size=1), 0.7)
    assert torch.equal(kept_of(scores), kept_of(scores.asked_for(allocation="global")))


# ----------------------------------------------------------------------------------------------------------- outcomes


def with_attention(scores: Scores, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    layers = {i: torch.rand(v.shape, generator=generator) ** 4 for i, v in scores.layers.items()}
    return replace(scores, attention=layers)


@laws
@given(
    seed=st.integers(0, 99), tolerance=st.sampled_from([0.01, 0.05, 0.3, 0.9]), n=st.integers(1, 40),
    n_sink=st.integers(0, 5), per=st.sampled_from(["head", "layer"]), levels=st.sampled_from([None, 3]),
)  # fmt: skip
def test_the_shortest_set_within_the_tolerance_stays(seed, tolerance, n, n_sink, per, levels) -> None:
    """By trying every length; one head's, or the mean of the heads of a layer."""
    scores = make_scores(seed, Tolerance(tolerance=tolerance, per=per), n=n, n_sink=n_sink, levels=levels)
    scores = with_attention(scores, seed)
    kept = kept_of(scores) - min(n_sink, n)
    for i, (layer_idx, values) in enumerate(scores.layers.items()):
        norms = []
        for head in range(HEADS):
            order = values[0, head, n_sink:].argsort(descending=True, stable=True)
            paid = scores.attention[layer_idx][0, head, n_sink:][order].double()
            norms.append(torch.stack([paid[:k].square().sum().sqrt() for k in range(max(n - n_sink, 0) + 1)]))
        each = torch.stack(norms)
        each = each.mean(0, keepdim=True).expand_as(each) if per == "layer" else each
        for head in range(HEADS):
            fits = each[head, -1] - each[head] <= tolerance * each[head, -1]
            expected = int(fits.nonzero()[0])
            assert int(kept[i, head]) in (expected, max(expected, 1) if n_sink == 0 else expected)


@laws
@given(
    seed=st.integers(0, 99), threshold=st.floats(-0.1, 1.1), n=st.integers(1, 40), n_sink=st.integers(0, 5),
    floor=floors,
)  # fmt: skip
def test_a_threshold_keeps_what_reaches_it(seed, threshold, n, n_sink, floor) -> None:
    """And floors, and a pair of a layer that would be left empty."""
    scores = make_scores(seed, Threshold(threshold=threshold, min_kept_per_head=floor), n=n, n_sink=n_sink)
    kept, free = kept_of(scores), torch.stack([v[0, :, n_sink:] for v in scores.layers.values()])
    expected = (free >= threshold).sum(-1).clamp(min=min(floor, free.shape[-1])) + min(n_sink, n)
    bare = expected.sum(1) == 0
    assert torch.equal(kept[~bare], expected[~bare]) and bool((kept[bare].sum(1) == 1).all())


@pytest.mark.parametrize("allocation", [Threshold(threshold=0.5), Tolerance()])
def test_an_outcome_takes_no_amount(allocation: Allocation) -> None:
    for options in ({"compression_ratio": 0.5}, {"budget": 9}, {"layer_ratios": [0.5]}):
        with pytest.raises(InvalidArgumentError, match="no ratio and no budget with allocation"):
            RandomPress(allocation=allocation, **options)
    scores = make_scores(0, allocation)
    with pytest.raises(InvalidArgumentError, match="is an outcome"):
        scores.asked_for(0.5)
    assert scores.asked_for(0.5, "global").policy == Policy.of(0.5, "global")


def test_a_prefill_knows_what_its_last_token_looks_at() -> None:
    """For every press, and an eviction that asks for it; the kept fraction is the prompt's."""
    model = tiny_model(num_layers=2)
    ids = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, :20] = False
    done = run_prefill(model, ids, valid)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids[:1, 20:], output_attentions=True).attentions
    for layer_idx, paid in done.last_attention().items():
        expected = attentions[layer_idx][0, :, -1].view(2, 2, -1).amax(1)
        torch.testing.assert_close(paid[0, :, 20:], expected, rtol=1e-4, atol=1e-6)
        assert not bool(paid[0, :, :20].any())
    kept = [done.evict(RandomPress(allocation=Tolerance(tolerance=t)).score(done)).kept_fraction for t in (0.5, 0.05)]
    assert 0 < kept[0] < kept[1] < 1
    asked = done.evict(RandomPress().score(done), allocation="tolerance")
    assert asked.kept_fraction == kept[1]


def test_a_context_in_chunks_has_no_last_token_yet() -> None:
    model, text = tiny_model(num_layers=1), "The night ferry leaves at 21:40. " * 4
    press = RandomPress(allocation=Tolerance())
    with pytest.raises(InvalidArgumentError, match="not in chunks"):
        compress_in_chunks(model, ByteTokenizer(), text, press, chunk_size=40, window_size=8)
    halves = RandomPress(allocation=Threshold(threshold=0.5))
    cache = compress_in_chunks(model, ByteTokenizer(), text, halves, chunk_size=40, window_size=8)
    assert 0.3 < cache.kept_fraction < 0.7


# -------------------------------------------------------------------------------------------------------------- names


def test_names_make_allocations_and_mappings_bring_arguments() -> None:
    """As in a grid's file; a press stays a value."""
    press = RandomPress(0.5, allocation={"name": "pages", "page_size": 64, "min_kept_per_head": 2})
    assert press.allocation == Pages(page_size=64, min_kept_per_head=2)
    assert hash(press) == hash(replace(press))
    assert allocation_of("pyramid", min_kept_per_head=3) == Pyramid(min_kept_per_head=3)
    assert set(ALLOCATIONS) >= {"pyramid", "table", "pages", "tolerance", "threshold"}


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ({"name": "pages", "pagesize": 64}, "did you mean 'page_size'"),
        ({"page_size": 64}, "one of"),
        ({"name": "pages", "page_size": 0}, "page_size"),
        ({"name": "pages", "page_size": True}, "page_size"),
        ({"name": "pyramid", "beta": 0.5}, "beta"),
        ({"name": "pyramid", "beta": "20"}, "beta"),
        ({"name": "tolerance", "tolerance": 1}, "tolerance"),
        ({"name": "tolerance", "per": "token"}, "per"),
        ({"name": "threshold", "threshold": math.inf}, "finite"),
        ("threshold", r"Threshold\(threshold=-4.0\)"),
        ("table", "budgets profile"),
    ],
)
def test_wrong_arguments_are_refused(given_: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        RandomPress(allocation=given_)


def test_layer_ratios_need_layers_that_do_not_compete() -> None:
    for name in ("pyramid", "pages"):
        with pytest.raises(InvalidArgumentError, match=f'got "{name}", where layers compete'):
            RandomPress(allocation=name, layer_ratios=[0.5, 0.5])
