"""The benchmarks of recall: what is found is counted as it says, and every way of reading is measured."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kvzip_press import ClusterRecall, compress, get_press, with_recall
from kvzip_press.cache.recall.ranking import listed
from kvzip_press.cache.recall.recalled_pairs import RecalledPairs
from kvzip_press.leaderboard.benchmarks.recall import found_by, observed, ways
from kvzip_press.leaderboard.benchmarks.recall_time import compared
from kvzip_press.leaderboard.profile.measure import Subject
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = tiny_model(num_layers=2)
TEXT = "The key of the red box is under the mat, and the mat is at the door of the house."


@pytest.mark.parametrize("per_query_head", [False, True])
def test_what_is_found_is_counted_pair_by_pair(per_query_head: bool) -> None:
    """The share of the top pairs of each head and step, the attention of what is listed over that of the top, and what
    the step before had listed too.
    """
    recall = ClusterRecall(budget=20, n_sink=2, full_layers=1, cluster_size=6, per_query_head=per_query_head)
    cache = with_recall(compress(MODEL, ByteTokenizer(), TEXT, get_press("none")), recall)
    _, queries = observed(MODEL, cache, [[5, 6], [7]], [[8, 9, 10], [11, 12, 13]])
    assert {layer: one.shape for layer, one in queries.items()} == dict.fromkeys((0, 1), torch.Size([4, 4, 1, 16]))
    packed = dict(cache.ragged_layers())[1].packed
    assert isinstance(packed, RecalledPairs)
    keys = packed.columns["keys"].double().view(2, -1, 16)
    found, mass, lists = [], [], []
    for step, head in product(range(4), range(4)):
        index, _ = listed(recall, packed.groups, queries[1][step : step + 1], 2, width=packed.width)
        number = head if per_query_head else head // 2
        own = {int(pair) - head // 2 * keys.shape[1] for pair in index[20 * number : 20 * (number + 1)]}
        lists.append(own)
        weights = (keys[head // 2] @ queries[1][step, head, 0].double() / 4).softmax(0).tolist()
        top = set(sorted(range(len(weights)), key=lambda i: -weights[i])[:20])
        found.append(len(own & top) / 20)
        mass.append(sum(weights[i] for i in own) / sum(weights[i] for i in top))
    again = sum(len(own & before) for own, before in zip(lists[4:], lists[:-4], strict=True)) / (12 * 20)
    assert 0 < again < 1
    assert found_by(packed, queries[1]) == pytest.approx((sum(found) / 16, sum(mass) / 16, again), abs=1e-5)


def test_every_way_is_compared_at_the_same_budget() -> None:
    assert {recall.budget for recall in ways(64, [80, 40]).values()} == {64}
    assert len(ways(64, [80, 40])) == 6


def test_times_and_bytes_of_every_way_are_measured() -> None:
    model = tiny_model(num_layers=3)
    table = compared(Subject("tiny", model), context_length=90, budget=20, steps=2)
    cells = [list(column.cells) for column in table.columns]
    assert len(cells[0]) == 6 and cells[0][-1] == "clusters, from host memory"
    assert all(float(str(one)) > 0 for one in cells[2])
