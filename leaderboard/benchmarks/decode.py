"""A decode step of the same model with a dense and with a compressed cache, side by side in one run.

``python -m kvzip_press.leaderboard.benchmarks.decode --tokens 4096 --removed 0.7``: checks first that nothing changes
when nothing is removed, then alternates steps of both caches and prints the medians and their ratio.
"""

import statistics
import time
from typing import Annotated, Any

import torch
import typer

from kvzip_press.attention import attach, detach
from kvzip_press.compat import DynamicCache
from kvzip_press.loading import load_model
from kvzip_press.models import text_config
from kvzip_press.prefilling import Prefill, run_prefill, synchronize
from kvzip_press.registry import get_press

RAGGED_TOLERANCE = 2e-2  # of the largest logit: sums run in another order


def main(
    tokens: Annotated[int, typer.Option(help="Context tokens.")] = 4096,
    removed: Annotated[float, typer.Option(help="Fraction of pairs removed.")] = 0.7,
    steps: Annotated[int, typer.Option(help="Decode steps timed on each side.")] = 40,
    press: Annotated[str, typer.Option(help="Press that chooses the pairs.")] = "random",
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
) -> None:
    """Times decode steps behind one context."""
    loaded, _ = load_model(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, text_config(loaded).vocab_size, (1, tokens), generator=generator).to(loaded.device)
    done = run_prefill(loaded, ids, torch.ones_like(ids, dtype=torch.bool))
    _check_equal(loaded, done)
    chosen = get_press(press, removed)
    ragged = done.evict(chosen.score(done))
    seconds: dict[str, list[float]] = {"dense": [], "ragged": []}
    for _ in range(steps):
        detach(loaded)
        seconds["dense"].append(_step(loaded, done.cache)[1])
        attach(loaded)
        seconds["ragged"].append(_step(loaded, ragged)[1])
    dense, fast = (statistics.median(times) * 1e3 for times in seconds.values())
    typer.echo(
        f"{model}, {tokens} tokens, {removed:.0%} removed by {press}, {loaded.device.type}, {loaded.dtype}, "
        f"{torch.get_num_threads()} threads: dense {dense:.1f} ms, ragged {fast:.1f} ms, ratio {dense / fast:.2f}"
    )


def _check_equal(model: Any, done: Prefill) -> None:
    """Nothing removed: the same logits from both kinds of cache."""
    none = get_press("none")
    ragged = _step(model, done.evict(none.score(done)))[0]
    detach(model)
    dense_copy = DynamicCache(config=text_config(model))
    for layer_idx, layer in enumerate(done.cache.layers):
        dense_copy.update(layer.keys, layer.values, layer_idx)
    dense = _step(model, dense_copy)[0]
    error = float((ragged - dense).abs().max() / dense.abs().max())
    if error > RAGGED_TOLERANCE:
        raise typer.Exit(f"expected equal logits, got a relative error of {error:.3g}")  # type: ignore[arg-type]


@torch.no_grad()
def _step(model: Any, cache: Any) -> tuple[torch.Tensor, float]:
    token = torch.tensor([[7]], device=model.device)
    synchronize(model.device)
    begin = time.perf_counter()
    logits = model(token, past_key_values=cache, use_cache=True).logits
    synchronize(model.device)
    return logits, time.perf_counter() - begin


if __name__ == "__main__":
    typer.run(main)
