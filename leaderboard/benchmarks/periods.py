"""Times decode steps of a made cache: over whole periods between two evictions, or without any."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.decoding.step import DecodeStep
from kvzip_press.leaderboard.benchmarks.made_caches import ragged_cache
from kvzip_press.leaderboard.profile.shapes import get_shape, random_model
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.devices import now
from kvzip_press.press import Press

TOKEN = 7
FIRST_STEPS = 4  # until the first eviction, which makes the pool that later ones write to


@dataclass(frozen=True)
class Period:
    """Steps from one eviction to the next.

    Attributes:
        ms: Milliseconds of a step, the mean.
        evicting_ms: Milliseconds of a step that evicts, the mean; the time of the eviction and of a capture that it
            makes necessary is in it.
        peak: The most bytes beside what was allocated before; None on a CPU.
    """

    ms: float
    evicting_ms: float
    peak: int | None


def period(model: Any, press: Press, rows: int, budget: int, buffer: int, *, n_periods: int = 1) -> Period:
    """Times periods of a cache that a press keeps between ``budget`` and ``budget + buffer`` tokens a row.

    The time is taken from the second eviction in the pool on: the first one compiles and loads kernels.

    Raises:
        torch.OutOfMemoryError: Out of memory, also of a capture.
    """
    device = model.device
    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache = ragged_cache(model, rows, budget + buffer - FIRST_STEPS)
    tokens, evicting = torch.full((rows,), TOKEN, device=device), 0.0
    with press(model), stepping(model, cache, FIRST_STEPS + (1 + n_periods) * buffer + 1) as step:
        for _ in range(FIRST_STEPS + buffer):
            step(tokens)
        begin = now(device)
        for _ in range(n_periods):
            for _ in range(buffer - 1):
                step(tokens)
            middle = now(device)
            step(tokens)
            evicting += now(device) - middle
        seconds = now(device) - begin
        check_captured(step, device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return Period(seconds * 1e3 / (n_periods * buffer), evicting * 1e3 / n_periods, peak)


def steps_ms(model: Any, rows: int, n_tokens: int, steps: int) -> float:
    """Returns the mean milliseconds of our steps over a full cache that begins with ``n_tokens`` tokens a row."""
    cache = ragged_cache(model, rows, n_tokens)
    with stepping(model, cache, steps + 1) as step:
        return mean_ms(step, rows, model.device, steps)


def mean_ms(step: Callable[[torch.Tensor], Any], rows: int, device: torch.device, steps: int) -> float:
    """Returns the mean milliseconds of steps, after one that warms up."""
    tokens = torch.full((rows,), TOKEN, device=device)
    step(tokens)
    begin = now(device)
    for _ in range(steps):
        step(tokens)
    return (now(device) - begin) * 1e3 / steps


def stepping(model: Any, cache: Any, n_steps: int) -> DecodeStep:
    """Returns a decode step, on a GPU a captured one.

    Raises:
        torch.OutOfMemoryError: It was not captured.
    """
    step = DecodeStep(model, cache, max_new_tokens=n_steps)
    check_captured(step, model.device)
    return step


def check_captured(step: DecodeStep, device: torch.device) -> None:
    """Raises for a capture that ran out of memory, which is an eager step otherwise."""
    if device.type == "cuda" and not step.captured:
        raise torch.OutOfMemoryError(f"not captured: {step.reason}")


def measured_model(shape: str | None, model: str | None, place: torch.device) -> Any:
    """Returns a model of a published shape with random weights, or one by its name, on a device."""
    if shape is not None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        return random_model(get_shape(shape), place, dtype)
    return load_on(str(model), place)[0]


def allocated(device: torch.device) -> int:
    """Returns the bytes that tensors take on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free_bytes(device: torch.device) -> int:
    """Returns the bytes of a GPU that tensors may still take, those that PyTorch holds for them included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def empty(device: torch.device) -> None:
    """Gives memory back that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
