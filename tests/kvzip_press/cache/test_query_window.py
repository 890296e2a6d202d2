"""The queries beside a tail: whatever moves a row's keys moves its queries, and what is not known is NaN."""

from __future__ import annotations

import pytest
import torch

from kvzip_press.cache.query_window import QueryWindow

BATCH, HEADS, DIM = 2, 3, 4


def empty(size: int | None, batch: int = BATCH) -> QueryWindow:
    return QueryWindow.unknown(torch.empty(batch, HEADS, 1, DIM), size, 0)


def queries(*rows: list[int]) -> torch.Tensor:
    """``[batch, heads, n, dim]``, each query full of its token's number."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, :, None].expand(-1, HEADS, -1, DIM)


def read(window: QueryWindow, *rows: list[int], padding: list[int] | None = None) -> QueryWindow:
    return window.appended(len(rows[0]), None if padding is None else torch.tensor(padding)).filled(queries(*rows))


def tokens(window: QueryWindow) -> list[list[int | None]]:
    numbers = window.queries[:, 0, :, 0].tolist()
    return [[None if x != x else int(x) for x in row] for row in numbers]


def test_all_queries_are_kept_until_an_eviction() -> None:
    """Scores then hold what they said, and the next ones begin at the same address."""
    window = empty(None)
    for token in range(10):
        window = read(window, [token], [token + 100])
    assert tokens(window) == [list(range(10)), list(range(100, 110))]
    after = window.after_eviction()
    assert tokens(after) == [[], []]
    assert after.buffer.data_ptr() == window.buffer.data_ptr()
    assert tokens(read(after, [10], [110]))[0] == [10]


@pytest.mark.parametrize("size", [1, 4])
def test_of_single_tokens_the_last_ones_lie_in_a_ring(size) -> None:
    """Of as many rows and one more, at one address; an eviction changes nothing."""
    window = empty(size)
    for token in range(25):
        after = read(window, [token], [token + 100])
        assert tokens(after)[1] == list(range(100, 101 + token))[-size:]
        assert after.buffer.data_ptr() == window.buffer.data_ptr()
        window = after.after_eviction() if token % 3 == 0 else after
    assert window.buffer.shape[2] == size + 1


@pytest.mark.parametrize("n_tokens", [1, 3, 9])
@pytest.mark.parametrize("padding", [None, [0, 2]])
def test_a_step_that_fails_behind_the_queries_takes_nothing(n_tokens, padding) -> None:
    """The window from before holds what it held, whatever was written meanwhile, twice too."""
    if padding is not None and n_tokens == 1:
        padding = [0, 1]
    window = empty(4)
    for token in range(7):
        window = read(window, [token], [token + 100])
    for _ in range(2):
        read(window, [0] * n_tokens, [0] * n_tokens, padding=padding)
        assert tokens(window) == [[3, 4, 5, 6], [103, 104, 105, 106]]
    assert tokens(read(window, [7], [107])) == [[4, 5, 6, 7], [104, 105, 106, 107]]


def test_static_steps_write_where_the_window_says() -> None:
    """The row behind the newest, which holds none of the last ones."""
    window = read(empty(4), list(range(6)), list(range(100, 106)))
    for token in range(6, 20):
        window.buffer[:, :, window.next_row % window.buffer.shape[2]] = queries([token], [token + 100])[:, :, 0]
        assert tokens(window)[0] == list(range(token - 4, token))
        window = window.wrote(1)
    assert tokens(window) == [[16, 17, 18, 19], [116, 117, 118, 119]]


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
    """Cut off for all rows, or for some; rows that are reordered; copies that do not change; around a ring's end."""
    window = read(read(empty(4), [8, 9, 0], [8, 9, 100]), [1], [101])
    window = read(read(window, [2], [102]), [3], [103])
    assert window.start
    assert tokens(window.truncated(3)) == [[0], [100]]
    assert tokens(window.truncated(9)) == [[], []]
    assert tokens(window.ends_dropped(torch.tensor([0, 3]))) == [[0, 1, 2, 3], [None, None, None, 100]]
    assert tokens(window.rows(torch.tensor([1, 1, 0]))) == [[100, 101, 102, 103]] * 2 + [[0, 1, 2, 3]]
    copy = window.copy()
    assert copy.buffer.shape == window.buffer.shape
    window.buffer.zero_()
    assert tokens(copy)[0] == [0, 1, 2, 3]


def test_tokens_that_are_cropped_have_pushed_others_out() -> None:
    """A ring does not know the queries before these any more, until as many others are read."""
    window = read(read(empty(4), [0, 1, 2, 3], [0, 1, 2, 3]), [7], [7]).truncated(1)
    assert tokens(window)[0] == [1, 2, 3]
    assert tokens(read(window, [4], [4]))[0] == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 3, 9, None])
def test_the_last_queries_of_rows_that_are_padded_at_any_end(size) -> None:
    """Of a prompt: aligned to the right, the newest last."""
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    window = QueryWindow.last_of(queries([-1, -1, 0, 1, 2], [100, 101, 102, -1, -1]), valid, size)
    n = 5 if size is None else min(size, 5)
    expected = [[None, None, 0, 1, 2][-n:], [None, None, 100, 101, 102][-n:]]
    assert tokens(window) == expected
    assert window.known.tolist() == [[token is not None for token in row] for row in expected]


def test_room_is_made_once_and_given_back() -> None:
    window = read(empty(None), list(range(300)), list(range(300))).after_eviction().with_room_for(100)
    assert window.buffer.shape[2] == 100
    assert window.with_room_for(100) is window
    assert window.reserved(100) is window
    assert window.reserved(101).buffer.shape[2] > 100


def test_what_was_made_in_inference_mode_is_copied_before_it_is_written() -> None:
    with torch.inference_mode():
        window = read(empty(4), [0], [100])
    assert tokens(read(window, [1], [101])) == [[0, 1], [100, 101]]
