"""The queries beside a tail: whatever moves a row's keys moves its queries, and what is not known is NaN."""

from __future__ import annotations

import pytest
import torch

from kvzip_press.cache.query_window import QueryWindow

BATCH, HEADS, DIM = 2, 3, 4


def empty(size: int | None, batch: int = BATCH) -> QueryWindow:
    return QueryWindow(torch.empty(batch, HEADS, 0, DIM), size)


def queries(*rows: list[int]) -> torch.Tensor:
    """``[batch, heads, n, dim]``, each query full of its token's number."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, :, None].expand(-1, HEADS, -1, DIM)


def read(window: QueryWindow, *rows: list[int], padding: list[int] | None = None) -> QueryWindow:
    return window.appended(len(rows[0]), None if padding is None else torch.tensor(padding)).filled(queries(*rows))


def tokens(window: QueryWindow) -> list[list[int | None]]:
    numbers = window.queries[:, 0, :, 0].tolist()
    return [[None if x != x else int(x) for x in row] for row in numbers]


@pytest.mark.parametrize("size", [4, None])
def test_single_tokens_are_kept_until_an_eviction(size) -> None:
    """Then the last ``size`` stay, at the same address; none if scores hold what they said."""
    window = empty(size)
    for token in range(10):
        window = read(window, [token], [token + 100])
    assert tokens(window) == [list(range(10)), list(range(100, 110))]
    after = window.after_eviction()
    assert tokens(after) == ([[6, 7, 8, 9], [106, 107, 108, 109]] if size else [[], []])
    assert after.buffer.data_ptr() == window.buffer.data_ptr()
    assert tokens(read(after, [10], [110]))[0] == ([6, 7, 8, 9, 10] if size else [10])


def test_of_a_block_the_last_ones_are_kept() -> None:
    """A long question does not leave the queries of all its tokens, unless all are looked at."""
    numbers = list(range(2, 9)), list(range(102, 109))
    assert tokens(read(read(empty(4), [0], [100]), *numbers)) == [[5, 6, 7, 8], [105, 106, 107, 108]]
    assert tokens(read(read(empty(None), [0], [100]), *numbers))[0] == [0, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("size", [6, None])
def test_a_row_s_earlier_queries_move_over_its_padding(size) -> None:
    """As its keys do: no gap, and nothing known on the left."""
    window = read(read(empty(size), [0, 1], [100, 101]), [2, 3, 4], [-1, -1, 104], padding=[0, 2])
    assert tokens(window) == [[0, 1, 2, 3, 4], [None, None, 100, 101, 104]]


def test_a_window_that_is_smaller_than_a_padded_block_has_each_row_s_last_queries() -> None:
    window = read(read(empty(3), [0, 1], [100, 101]), [2, 3, 4, 5], [-1, -1, -1, 105], padding=[0, 3])
    assert tokens(window) == [[3, 4, 5], [100, 101, 105]]


def test_a_query_that_never_came_is_not_known() -> None:
    """A forward that failed behind the keys, or a token that was read where no query is seen."""
    window = read(read(empty(4), [0], [100]).appended(1), [2], [102])
    assert tokens(window) == [[0, None, 2], [100, None, 102]]


def test_queries_go_with_their_tokens() -> None:
    """Cut off for all rows, or for some; rows that are reordered; copies that do not change."""
    window = read(empty(8), [0, 1, 2, 3], [100, 101, 102, 103])
    assert tokens(window.truncated(3)) == [[0], [100]]
    assert tokens(window.truncated(9)) == [[], []]
    assert tokens(window.ends_dropped(torch.tensor([0, 3]))) == [[0, 1, 2, 3], [None, None, None, 100]]
    assert tokens(window.rows(torch.tensor([1, 1, 0]))) == [[100, 101, 102, 103]] * 2 + [[0, 1, 2, 3]]
    copy = window.copy()
    window.buffer.zero_()
    assert tokens(copy)[0] == [0, 1, 2, 3]


def test_room_is_made_once_and_given_back() -> None:
    window = read(empty(None), list(range(300)), list(range(300))).after_eviction().with_room_for(100)
    assert window.buffer.shape[2] == 100
    assert window.with_room_for(100) is window
    assert window.reserved(100) is window
    assert window.reserved(101).buffer.shape[2] > 100


def test_queries_do_not_pile_up_where_nothing_is_evicted_any_more() -> None:
    """Behind the press, say: the last ones are enough."""
    window = empty(4)
    for token in range(2000):
        window = read(window, [token], [token])
    assert window.buffer.shape[2] < 1200 and tokens(window)[0][-4:] == [1996, 1997, 1998, 1999]


def test_what_was_made_in_inference_mode_is_copied_before_it_is_written() -> None:
    with torch.inference_mode():
        window = read(empty(4), [0], [100])
    assert tokens(read(window, [1], [101])) == [[0, 1], [100, 101]]
