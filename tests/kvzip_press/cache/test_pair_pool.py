"""Which pairs of a pool win, against a sort of all of them in Python; and what a pool takes while it is made."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvzip_press.budget.policy import Policy
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.pair_pool.cutting import cut
from kvzip_press.cache.pair_pool.pair_list import PairList

LAYERS, ROWS, HEADS = 2, 2, 2
PAIRS = st.lists(
    st.tuples(st.integers(0, LAYERS * ROWS * HEADS - 1), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9)),
    min_size=1,
    max_size=40,
    unique_by=lambda pair: (pair[0], pair[2]),
)


@settings(deadline=None, derandomize=True)
@given(PAIRS, st.integers(1, 6), st.sampled_from(["global", "layer", "head"]), st.integers(0, 3), st.integers(7, 10))
def test_a_row_keeps_its_best_pairs_ties_by_position_then_layer_then_head(pairs, budget, allocation, first, last):
    """Few values and positions, so that nearly all are tied; the other row is left alone."""
    segment, score, position = (torch.tensor(column) for column in zip(*pairs, strict=True))
    every = PairList(
        segment, position.int(), score, torch.ones_like(segment, dtype=torch.bool), (LAYERS, ROWS, HEADS), (0, 3)
    )
    kept = every.alive.clone()
    cut(every, kept, torch.tensor([1]), torch.tensor([[first, last]]), Policy.of(budget=budget, allocation=allocation))

    def pool_of(pair) -> tuple[int, ...]:
        layer, head = pair[0] // (ROWS * HEADS), pair[0] % HEADS
        return {"global": (), "layer": (layer,), "head": (layer, head)}[allocation]

    size = {"global": LAYERS * HEADS, "layer": HEADS, "head": 1}[allocation] * budget
    mine = [pair for pair in pairs if pair[0] // HEADS % ROWS == 1]
    expected = {pair for pair in pairs if pair not in mine}
    for pool in {pool_of(pair) for pair in mine}:
        members = [pair for pair in mine if pool_of(pair) == pool]
        safe = {pair for pair in members if pair[2] < first or pair[2] >= last}
        rest = sorted((p for p in members if p not in safe), key=lambda p: (-p[1], p[2], p[0]))
        bare = {p[0] // (ROWS * HEADS) for p in rest} - {p[0] // (ROWS * HEADS) for p in safe}
        best = [next(p for p in rest if p[0] // (ROWS * HEADS) == layer) for layer in sorted(bare)]
        rest = best + [p for p in rest if p not in best]  # no layer is left empty
        expected |= safe | set(rest[: max(size - len(safe), len(bare))])
    assert {pair for pair, stays in zip(pairs, kept.tolist(), strict=True) if stays} == expected


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is open, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and (memory := output.untyped_storage()).data_ptr() not in self.sizes:
            self.sizes[memory.data_ptr()] = memory.nbytes()
            weakref.finalize(memory, self.sizes.pop, memory.data_ptr())
            self.most = max(self.most, sum(self.sizes.values()))
        return output


def test_pairs_that_are_made_one_by_one_are_joined_in_the_memory_of_the_whole_and_of_one() -> None:
    """While a pool is made, its old pairs lie in memory besides: a third copy would not fit where two do."""
    n_layers, ones = 8, torch.ones(1, 2, 500, dtype=torch.bool)
    pairs = torch.randn(2, 1, 2, 500, 64)
    layer = PackedPairs.pack(*pairs, ones, torch.arange(500, dtype=torch.int32)[None])
    layer = replace(layer, pool=object())  # so that it is copied
    size = sum(tensor.nbytes for tensor in layer.tensors)
    with Live() as live:
        made = (layer.frozen() for _ in range(n_layers))
        joined = PackedPairs.joined(made, n_layers * layer.total, layer)
    assert joined.seqlens.tolist() == [[500, 500]] * n_layers
    assert joined.cu_seqlens[-1] == joined.total == n_layers * layer.total
    assert live.most < (n_layers + 1.1) * size


@pytest.mark.parametrize("allocation", ["global", "head"])
def test_one_row_is_cut_in_the_memory_of_its_own_numbers(allocation) -> None:
    """One more row, for what is not cut, took half as much again."""
    n_heads, n_positions = 16, 2000
    there = torch.rand(n_heads, n_positions, generator=torch.Generator().manual_seed(0)) < 0.5
    segment, position = there.nonzero().unbind(1)
    alive, score = torch.ones_like(segment, dtype=torch.bool), torch.rand(len(segment))
    every = PairList(segment, position.int(), score, alive, (n_heads // 2, 1, 2), tuple(range(n_heads // 2)), 2000)
    kept, safe = alive.clone(), torch.tensor([[4, 1990]])
    with Live() as live:
        cut(every, kept, torch.tensor([0]), safe, Policy.of(budget=500, allocation=allocation))
    assert kept.sum() == 500 * n_heads
    assert live.most < 40 * n_heads * n_positions  # bytes: 33 a number, most of them of the sort that ranks pairs
