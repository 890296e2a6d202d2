"""The order in which pairs compete in a pool of all layers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvzip_press.cache.pair_pool import _rank

PAIRS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 4)), min_size=1, max_size=40
)


@given(PAIRS)
def test_ranks_go_by_value_then_position_then_order_in_each_pool(pairs) -> None:
    """Few values and positions, so that nearly all are tied."""
    got = _rank(*(torch.tensor(column) for column in zip(*pairs, strict=True)))
    order = sorted(range(len(pairs)), key=lambda i: (pairs[i][0], -pairs[i][1], pairs[i][2], i))
    seen: dict[int, int] = {}
    for i in order:
        pool = pairs[i][0]
        assert int(got[i]) == seen.get(pool, 0)
        seen[pool] = seen.get(pool, 0) + 1
