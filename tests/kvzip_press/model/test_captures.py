"""A capture is made alone: who computes keeps it from being made, and who comes meanwhile waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvzip_press.model.watching import alone, computing


def test_it_is_made_while_only_this_thread_computes() -> None:
    with computing(), computing(), alone() as is_alone, computing():
        assert is_alone


def test_it_is_not_made_while_another_thread_computes() -> None:
    inside, done = threading.Event(), threading.Event()

    def compute() -> None:
        with computing():
            inside.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(compute)
        inside.wait()
        with alone() as is_alone:
            assert not is_alone
        done.set()
        other.result()
    with alone() as is_alone:
        assert is_alone


def test_who_comes_while_it_is_made_waits_for_its_end() -> None:
    order = []

    def compute() -> None:
        coming.set()
        with computing():
            order.append("computed")

    coming = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with alone() as is_alone:
            assert is_alone
            other = pool.submit(compute)
            coming.wait()
            assert not other.done()
            order.append("captured")
        other.result()
    assert order == ["captured", "computed"]


def is_alone_in_a_thread() -> bool:
    with alone() as is_alone:
        return is_alone


def test_an_error_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), computing(), alone():
        raise ZeroDivisionError
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(is_alone_in_a_thread).result()
