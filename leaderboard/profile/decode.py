"""Times decode steps in milliseconds, in turns with those of another cache: eager, in a CUDA graph, and compiled.

Clocks, heat and neighbours change during a run, so two caches that are timed one after the other differ even if they
are the same. In turns both meet the same conditions, and the ratios of the turns say how certain a gain is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kvzip_press import compat
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.errors import first_line_of
from kvzip_press.model.devices import timed

WARMUP_STEPS = 3
TOKEN = 7  # the time does not depend on which token is read
_QUARTILES = (25, 50, 75)

Step = Callable[[], Any]


@dataclass(frozen=True)
class Turns:
    """Milliseconds of the steps of a cache, and how many times as fast they were as the baseline's in the same turns.

    Attributes:
        low_ms: The lower quartile of the cache's steps.
        high_ms: The upper quartile.
        baseline_ms: The median of the baseline's steps; None, as what follows, if there was no baseline.
        speedup_low: The lower quartile, over turns, of the baseline's time over the cache's.
        speedup: The median.
        speedup_high: The upper quartile.
    """

    low_ms: float
    high_ms: float
    baseline_ms: float | None = None
    speedup_low: float | None = None
    speedup: float | None = None
    speedup_high: float | None = None


def stepped_ms(
    model: Any, cache: RaggedCache, baseline: RaggedCache | None, n_tokens: int, *, compiled: bool
) -> dict[str, Any]:
    """Times our decode step on forks of a cache, and on forks of a baseline in turns with it.

    Args:
        model: The model that made the caches.
        cache: The cache, of one row; it is not changed.
        baseline: What it is compared with, eager and in a CUDA graph; None for nothing.
        n_tokens: Number of timed steps, after `WARMUP_STEPS` untimed ones.
        compiled: Whether the compiled step is timed too.

    Returns:
        ``decode_ms_eager``, ``decode_ms_graph``, ``decode_ms_compiled``, their ``turns``, and ``notes``, which say why
        one of the last two is None or why the compiled step was not in a CUDA graph.
    """
    both = [cache] if baseline is None else [cache, baseline]
    wanted: dict[str, tuple[Sequence[RaggedCache], dict[str, Any]]] = {
        "eager": (both, {"graph": False}),
        "graph": (both, {"only_captured": True}),
    }
    if compiled:
        wanted["compiled"] = ([cache], {"compile": True})  # to compile the baseline as well takes another minute
    figures: dict[str, Any] = {"turns": {}, "notes": {}}
    for mode, (caches, options) in wanted.items():
        try:
            times, reason = _timed(model, caches, n_tokens, **options)
        except Exception as error:
            if mode == "eager":
                raise
            # capture and compilers raise of all kinds; the eager figure stays
            times, reason = None, first_line_of(error)
        if reason is not None and mode != "eager":
            figures["notes"][mode] = reason
        figures[f"decode_ms_{mode}"] = None if times is None else times.pop("ms")
        if times is not None:
            figures["turns"][mode] = times
    return figures


def plain_ms(models: Sequence[Any], caches: Sequence[Any], n_tokens: int) -> dict[str, Any]:
    """Times the models' own forwards on their caches, which grow, in turns.

    Args:
        models: The model to time, and that of the baseline, if there is one.
        caches: Their caches.
        n_tokens: Number of timed steps.

    Returns:
        ``decode_ms_eager`` and its ``turns``.
    """
    timed = _in_turns([_plain(*pair) for pair in zip(models, caches, strict=True)], models[0].device, n_tokens)
    return {"decode_ms_eager": timed.pop("ms"), "turns": {"eager": timed}}


def _plain(model: Any, cache: Any) -> Step:
    token = torch.full((1, 1), TOKEN, device=model.device)

    @torch.no_grad()
    def step() -> Any:
        return model(token, use_cache=True, **compat.cache_argument(model, cache)).logits

    return step


def _timed(
    model: Any, caches: Sequence[RaggedCache], n_tokens: int, *, only_captured: bool = False, **options: Any
) -> tuple[dict[str, Any] | None, str | None]:
    """Returns times, and why the step was eager; with ``only_captured`` an eager step is not timed (None)."""
    from kvzip_press.decoding.step import DecodeStep

    token = torch.full((1,), TOKEN, device=model.device)
    with ExitStack() as stack:
        steps = [
            stack.enter_context(DecodeStep(model, cache.fork(), max_new_tokens=WARMUP_STEPS + n_tokens, **options))
            for cache in caches
        ]
        if only_captured and not all(step.captured for step in steps):
            return None, next(step.reason for step in steps if not step.captured) or "not captured"
        return _in_turns([_on(step, token) for step in steps], model.device, n_tokens), steps[0].reason


def _on(step: Callable[[torch.Tensor], Any], token: torch.Tensor) -> Step:
    return lambda: step(token)


def _in_turns(steps: Sequence[Step], device: torch.device, n_tokens: int) -> dict[str, Any]:
    """Returns the median ``ms`` of the first step, and the fields of its `Turns` with the second, if there is one."""
    for _ in range(WARMUP_STEPS):
        for step in steps:
            step()
    ms = np.array([[timed(device, step)[1] * 1e3 for step in steps] for _ in range(n_tokens)])
    low, median, high = np.percentile(ms[:, 0], _QUARTILES).tolist()
    if len(steps) == 1:
        return {"ms": median, **asdict(Turns(low, high))}
    speedups = np.percentile(ms[:, 1] / ms[:, 0], _QUARTILES).tolist()
    return {"ms": median, **asdict(Turns(low, high, float(np.median(ms[:, 1])), *speedups))}
