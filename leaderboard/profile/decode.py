"""Times a decode step in milliseconds: eager, in a CUDA graph, and compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.model.devices import synchronize

WARMUP_STEPS = 3
TOKEN = 7  # the time does not depend on which token is read


def stepped_ms(model: Any, cache: RaggedCache, n_tokens: int, *, compiled: bool) -> dict[str, Any]:
    """Times our decode step on forks of a cache.

    Args:
        model: The model that made the cache.
        cache: The cache, of one row; it is not changed.
        n_tokens: Number of timed steps, after `WARMUP_STEPS` untimed ones.
        compiled: Whether the compiled step is timed too.

    Returns:
        ``decode_ms_eager``, ``decode_ms_graph``, ``decode_ms_compiled``, and ``notes``, which say why one of the last
        two is None or why the compiled step was not in a CUDA graph.
    """
    notes: dict[str, str] = {}
    eager, _ = _timed(model, cache, n_tokens, graph=False)
    graph = _attempt("graph", notes, lambda: _timed(model, cache, n_tokens, only_captured=True))
    figures = {"decode_ms_eager": eager, "decode_ms_graph": graph, "notes": notes}
    if compiled:
        figures["decode_ms_compiled"] = _attempt(
            "compiled", notes, lambda: _timed(model, cache, n_tokens, compile=True)
        )
    return figures


@torch.no_grad()
def plain_ms(model: Any, cache: Any, n_tokens: int) -> float:
    """Times the model's own forward on a cache, which grows."""
    token = torch.full((1, 1), TOKEN, device=model.device)
    return _median_ms(
        lambda: model(token, use_cache=True, **compat.cache_argument(model, cache)).logits, model.device, n_tokens
    )


def _attempt(name: str, notes: dict[str, str], measure: Callable[[], tuple[float | None, str | None]]) -> float | None:
    """Measures a figure that may fail without losing the others: ``notes[name]`` then says why."""
    try:
        milliseconds, reason = measure()
    except Exception as error:  # noqa: BLE001  # capture and compilers raise of all kinds; the eager figure stays
        milliseconds, reason = None, one_line(error)
    if reason is not None:
        notes[name] = reason
    return milliseconds


def _timed(
    model: Any, cache: RaggedCache, n_tokens: int, *, only_captured: bool = False, **options: Any
) -> tuple[float | None, str | None]:
    """Returns milliseconds, and why the step was eager; with ``only_captured`` an eager step is not timed (None)."""
    from kvzip_press.decoding.step import DecodeStep

    token = torch.full((1,), TOKEN, device=model.device)
    with DecodeStep(model, cache.fork(), max_new_tokens=WARMUP_STEPS + n_tokens, **options) as step:
        if only_captured and not step.captured:
            return None, step.reason or "not captured"
        return _median_ms(lambda: step(token), model.device, n_tokens), step.reason


def _median_ms(step: Callable[[], Any], device: torch.device, n_tokens: int) -> float:
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(n_tokens):
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e3


def one_line(error: BaseException) -> str:
    """Formats an error as one line, to fit a cell of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
