"""Times calls on a GPU with a cold L2, and measures the bandwidth to compare them with."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

L2_BYTES = 60_000_000  # the L2 of an H200
BANDWIDTH_BYTES = 4 << 30
FLUSH_BYTES = 256 << 20
SECONDS = 2.0


class Times(NamedTuple):
    """The time of a call, in microseconds."""

    median: float
    p20: float
    p80: float


def times_of(microseconds: Sequence[float]) -> Times:
    """Returns median and quantiles of at least two measurements."""
    cuts = statistics.quantiles(microseconds, n=5, method="inclusive")
    return Times(statistics.median(microseconds), cuts[0], cuts[3])


def copies_for(bytes_of_a_call: int) -> int:
    """Returns how many copies of the inputs to cycle through: 8 to 32, enough for four times the L2 if 32 are."""
    return min(32, max(8, math.ceil(4 * L2_BYTES / max(1, bytes_of_a_call))))


def time_in_graph(calls: Sequence[Call], replays: int) -> Times:
    """Times calls by replaying one CUDA graph that makes each call once.

    Each call should have its own buffers, and enough calls that the buffers are several times the L2
    (:func:`copies_for`).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return times_of([microseconds / len(calls) for microseconds in _measured(graph.replay, replays)])


def time_eager(call: Call, repeats: int) -> Times:
    """Times a call made from Python, each time after filling the L2 with something else."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    call()
    return times_of(_measured(call, repeats, before=flush.zero_))


def time_on_wall_clock(call: Call, repeats: int) -> Times:
    """Times a call on the wall clock, from idle device to idle device."""
    microseconds = []
    for _ in range(max(2, repeats) + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        microseconds.append((time.perf_counter() - begin) * 1e6)
    return times_of(microseconds[1:])


def read_bandwidth(replays: int) -> float:
    """Returns how many bytes per microsecond a plain sum reads on this GPU, measured now."""
    numbers = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64, device="cuda")
    return BANDWIDTH_BYTES / time_in_graph([numbers.sum], replays).median


def _measured(call: Call, repeats: int, before: Call = lambda: None) -> list[float]:
    """Returns the microseconds of calls after a warm-up call: ``repeats``, or as many as fit 2 s, but at least five."""
    fit = int(SECONDS * 1e6 / _elapsed(call))
    microseconds = []
    for _ in range(min(max(2, repeats), max(5, fit))):
        before()
        microseconds.append(_elapsed(call))
    return microseconds


def _elapsed(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
