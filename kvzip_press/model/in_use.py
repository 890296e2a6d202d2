"""Who is computing: while a CUDA graph is captured, no other thread of this package may.

A capture that meets another thread's allocations or launches fails, and takes that thread's work with it (seen on an
H200: illegal memory accesses). So calls that compute say so, a capture is made only when no other thread is inside
one, and a call that comes while one is made waits for it: some decode steps long.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CHANGED = threading.Condition()
_DEPTHS: dict[int, int] = {}  # how many calls deep each thread is
_ALONE: set[int] = set()  # the thread that captures


@contextmanager
def computing() -> Iterator[None]:
    """Says that this thread computes while this is open; waits first while another thread captures."""
    me = threading.get_ident()
    with _CHANGED:
        _CHANGED.wait_for(lambda: not _ALONE - {me})
        _DEPTHS[me] = _DEPTHS.get(me, 0) + 1
    try:
        yield
    finally:
        with _CHANGED:
            _DEPTHS[me] -= 1
            if not _DEPTHS[me]:
                del _DEPTHS[me]


@contextmanager
def alone() -> Iterator[bool]:
    """Keeps other threads from computing while this is open; yields False, and does nothing, if one already is."""
    me = threading.get_ident()
    with _CHANGED:
        is_alone = not (set(_DEPTHS) - {me} or _ALONE)
        if is_alone:
            _ALONE.add(me)
    try:
        yield is_alone
    finally:
        if is_alone:
            with _CHANGED:
                _ALONE.discard(me)
                _CHANGED.notify_all()
