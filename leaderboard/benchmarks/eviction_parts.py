"""What an eviction while the model writes spends its time with, on the device and on the host, as a text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from kvzip_press.decoding.eviction import DecodeEviction, decode_eviction_in
from kvzip_press.leaderboard.benchmarks.made_caches import ragged_cache
from kvzip_press.leaderboard.benchmarks.periods import FIRST_STEPS, TOKEN, stepping
from kvzip_press.model import devices
from kvzip_press.press import Press

N_EVICTIONS = 3  # that are timed, and as many that are profiled
N_LINES = 25


@dataclass
class Spent:
    """What evictions took.

    Attributes:
        seconds: Of each that was timed, without a profiler.
        host: ``name -> [calls, microseconds]`` of those that were profiled, without what a call calls in turn.
        device: The same of kernels and copies.
        busy_us: Microseconds in which the device did something.
        span_us: Microseconds from its first beginning to its last end.
    """

    seconds: list[float] = field(default_factory=list)
    host: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    device: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    busy_us: float = 0.0
    span_us: float = 0.0

    def add(self, events: Iterable[Any]) -> None:
        """Adds the events of a profiler."""
        runs = []
        for event in events:
            on_host = event.device_type.name == "CPU"
            if not on_host:
                runs.append((event.time_range.start, event.time_range.end))
            calls = (self.host if on_host else self.device)[event.name]
            calls[0] += 1
            calls[1] += event.self_cpu_time_total if on_host else event.time_range.elapsed_us()
        if runs:
            self.busy_us += _covered(runs)
            self.span_us += max(end for _, end in runs) - min(start for start, _ in runs)

    def text(self) -> str:
        """Returns means of an eviction: sums, then what took most time on the device and on the host."""
        waits = sum(calls for name, (calls, _) in self.host.items() if "StreamSynchronize" in name)
        launches = sum(calls for calls, _ in self.device.values())
        sums = {
            "ms without a profiler": sum(self.seconds) / max(len(self.seconds), 1) * 1e3,
            "launches": launches / N_EVICTIONS,
            "waits for the device": waits / N_EVICTIONS,
            "ms in which the device was busy": self.busy_us / 1e3 / N_EVICTIONS,
            "ms between, in which it was not": (self.span_us - self.busy_us) / 1e3 / N_EVICTIONS,
        }
        lines = [f"{value:9.3f}  {name}" for name, value in sums.items()]
        for title, calls in (("device", self.device), ("host", self.host)):
            lines += ["", f"by time of the {title}: ms, calls, name", *_longest(calls)]
        return "\n".join(lines) + "\n"


def spent(model: Any, press: Press, rows: int, budget: int, buffer: int) -> Spent:
    """Times and profiles evictions of a cache that is kept between ``budget`` and ``budget + buffer`` tokens a row.

    Raises:
        torch.OutOfMemoryError: Out of memory, also of a capture.
    """
    result, device = Spent(), model.device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    cache = ragged_cache(model, rows, budget + buffer - FIRST_STEPS)
    tokens = torch.full((rows,), TOKEN, device=device)

    def timed(written: Callable[[], bool]) -> bool:
        evicted, seconds = devices.timed(device, written)
        result.seconds.append(seconds)
        return evicted

    def profiled(written: Callable[[], bool]) -> bool:
        devices.synchronize(device)  # the step itself is over
        with profile(activities=activities) as seen:
            evicted = written()
            devices.synchronize(device)
        result.add(seen.events() or ())
        return evicted

    n_steps = FIRST_STEPS + (1 + 2 * N_EVICTIONS) * buffer
    with press(model), stepping(model, cache, n_steps + 1) as step:
        eviction = decode_eviction_in(model, cache)
        assert eviction is not None, f"expected a press that evicts while the model writes, got {press!r:.80}"
        for _ in range(FIRST_STEPS + buffer):
            step(tokens)
        for watch in [timed] * N_EVICTIONS + [profiled] * N_EVICTIONS:
            for _ in range(buffer - 1):
                step(tokens)
            with _watched(eviction, watch):
                step(tokens)
    return result


@contextmanager
def _watched(eviction: DecodeEviction, watch: Callable[[Callable[[], bool]], bool]) -> Iterator[None]:
    """While open, ``watch`` is called with what is done behind a step, in its place."""
    written = eviction.written
    vars(eviction)["written"] = lambda: watch(written)
    try:
        yield
    finally:
        del vars(eviction)["written"]


def _covered(runs: list[tuple[float, float]]) -> float:
    """Returns how long any of some runs lasts, given where each begins and ends."""
    covered, reached = 0.0, -float("inf")
    for start, end in sorted(runs):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def _longest(calls: dict[str, list[float]]) -> list[str]:
    most = sorted(calls.items(), key=lambda item: -item[1][1])[:N_LINES]
    return [f"{us / 1e3 / N_EVICTIONS:9.3f} {n / N_EVICTIONS:7.1f}  {name:.110}" for name, (n, us) in most]
