"""Times a decode step of one model with a dense and with a compressed cache, side by side in one run.

``python -m kvzip_press.leaderboard.benchmarks.decode --tokens 4096 --removed 0.7`` first checks that nothing changes
when nothing is removed. It then alternates blocks of steps with either cache and with none (the cost of the rest of the
model), and prints the medians and their ratio. ``--storage int8 --storage k8v4`` adds caches of the same pairs that are
stored so, each with its ratio to the one in the model's dtype.
"""

import statistics
from typing import Annotated, Any

import torch
import typer

from kvzip_press import compat
from kvzip_press.attention.implementation import attach, detach
from kvzip_press.compat import DynamicCache
from kvzip_press.errors import KVzipPressError
from kvzip_press.loading.by_name import load_model
from kvzip_press.model.devices import timed
from kvzip_press.model.structure import text_config
from kvzip_press.prefilling.whole import Prefill, run_prefill
from kvzip_press.registry import get_press

BLOCK = 10  # steps of one side before it is the other's turn
RAGGED_TOLERANCE = 2e-2  # of the largest logit: sums run in another order


def main(
    tokens: Annotated[int, typer.Option(help="Context tokens.")] = 4096,
    removed: Annotated[float, typer.Option(help="Fraction of pairs removed.")] = 0.7,
    steps: Annotated[int, typer.Option(help="Decode steps timed on each side.")] = 40,
    press: Annotated[str, typer.Option(help="Press that chooses the pairs.")] = "random",
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    storage: Annotated[list[str] | None, typer.Option(help="Also time the same pairs stored so.")] = None,
) -> None:
    """Times decode steps behind one context."""
    loaded, _ = load_model(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, text_config(loaded).vocab_size, (1, tokens), generator=generator).to(loaded.device)
    done = run_prefill(loaded, ids, torch.ones_like(ids, dtype=torch.bool))
    _check_equal(loaded, done)
    scores = get_press(press, removed).score(done)
    caches = {name: done.evict(scores, storage=name) for name in ("model", *(storage or ()))}
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", "no context", *caches)}
    for _ in range(-(-steps // BLOCK)):
        detach(loaded)
        seconds["dense"] += _block(loaded, done.cache)
        attach(loaded)
        for name, cache in caches.items():
            seconds[name] += _block(loaded, cache)
        seconds["no context"] += _block(loaded, None)
    dense, rest, fast, *others = (statistics.median(times) * 1e3 for times in seconds.values())
    typer.echo(
        f"{model}, {tokens} tokens, {removed:.0%} removed by {press}, {loaded.device.type}, {loaded.dtype}, "
        f"{torch.get_num_threads()} threads: dense {dense:.1f} ms, ragged {fast:.1f} ms, ratio {dense / fast:.2f}; "
        f"no context {rest:.1f} ms, so the context's share: {dense - rest:.1f} ms and {fast - rest:.1f} ms"
    )
    for name, milliseconds in zip(storage or (), others, strict=True):
        typer.echo(f"{name} {milliseconds:.1f} ms, {milliseconds / fast:.2f} of {fast:.1f} ms")


def _block(model: Any, cache: Any) -> list[float]:
    """Times a block of steps, in seconds, after one untimed step that refills the processor's caches."""
    return [_step(model, cache)[1] for _ in range(BLOCK + 1)][1:]


def _check_equal(model: Any, done: Prefill) -> None:
    """Checks that both kinds of cache give the same logits when nothing is removed."""
    none = get_press("none")
    ragged = _step(model, done.evict(none.score(done)))[0]
    detach(model)
    dense_copy = DynamicCache(config=text_config(model))
    for layer_idx, layer in enumerate(done.cache.layers):
        dense_copy.update(layer.keys, layer.values, layer_idx)
    dense = _step(model, dense_copy)[0]
    error = float((ragged - dense).abs().max() / dense.abs().max())
    if error > RAGGED_TOLERANCE:
        raise KVzipPressError(f"expected equal logits where nothing is removed, got a relative error of {error:.3g}")


@torch.no_grad()
def _step(model: Any, cache: Any) -> tuple[torch.Tensor, float]:
    token = torch.tensor([[7]], device=model.device)
    return timed(model.device, lambda: model(token, use_cache=True, **compat.cache_argument(model, cache)).logits)


if __name__ == "__main__":
    typer.run(main)
