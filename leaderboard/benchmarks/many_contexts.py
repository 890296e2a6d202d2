"""Measures many compressed contexts beside one model on one GPU: a whole decode step, and how many contexts fit.

``python -m kvzip_press.leaderboard.benchmarks.many_contexts --shape llama3.1-8b --tokens 32768 --removed 0.7``

Contexts are random numbers and every head keeps a share of its own, since neither time nor memory depends on the
values. A step decodes one token behind each context of a batch. The floor beside it is the time in which the weights
and the kept pairs are read once at the bandwidth that a plain sum reaches in this run. Then contexts are made until no
more fit, and one token is decoded behind the last of them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press.attention.implementation import attach
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.step import DecodeStep
from kvzip_press.kernels.benchmarks.timing import read_bandwidth
from kvzip_press.leaderboard.benchmarks.made_caches import made_layer
from kvzip_press.leaderboard.benchmarks.periods import empty, free_bytes, measured_model
from kvzip_press.leaderboard.profile.decode import TOKEN, WARMUP_STEPS
from kvzip_press.model.devices import timed
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.terminal import plain

FREE_BYTES = 2 << 30  # left for a decode step when contexts fill the card


def main(
    shape: Annotated[str, typer.Option(help="Random weights of this published shape.")] = "llama3.1-8b",
    tokens: Annotated[int, typer.Option(help="Tokens of a context.")] = 32768,
    removed: Annotated[float, typer.Option(help="Fraction of pairs removed.")] = 0.7,
    batch: Annotated[list[int] | None, typer.Option(help="Contexts decoded together; several times.")] = None,
    storage: Annotated[list[str] | None, typer.Option(help="Storages; several times.")] = None,
    steps: Annotated[int, typer.Option(help="Decode steps timed.")] = 20,
    compile: Annotated[bool, typer.Option(help="Also the compiled step.")] = True,  # noqa: A002
    fill: Annotated[bool, typer.Option(help="Also make contexts until the card is full.")] = True,
    kernels: Annotated[int, typer.Option(help="Names so many kernels of a step, the longest; 0 for none.")] = 0,
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the measurements and prints them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = measured_model(shape, None, device)
    attach(model)
    bandwidth = read_bandwidth(20) * 1e6 if device.type == "cuda" else None
    weights = sum(weight.nbytes for weight in model.parameters())
    rows: list[dict[str, Any]] = []
    try:
        for name in storage or ["model", "int8", "k8v4", "int4"]:
            if fill and device.type == "cuda":  # first: captured graphs keep memory of their own
                rows.append({"storage": name, "tokens": tokens, "removed": removed})
                rows[-1] |= _filled(model, tokens, removed, name)
                empty(device)
                print(json.dumps(rows[-1]), flush=True)
        for name in storage or ["model", "int8", "k8v4", "int4"]:
            for n_rows in batch or [1, 32]:
                rows.append({"storage": name, "contexts": n_rows, "tokens": tokens, "removed": removed})
                try:
                    cache = random_contexts(model, tokens, removed, n_rows, name)
                    rows[-1] |= _step_times(model, cache, steps, compiled=compile, n_kernels=kernels)
                    rows[-1] |= {"resident_bytes": cache.resident_bytes, "dense_bytes": cache.dense_bytes}
                    if bandwidth is not None:
                        rows[-1]["floor_ms"] = (weights + cache.resident_bytes) / bandwidth * 1e3
                    del cache
                except torch.OutOfMemoryError as error:
                    rows[-1]["error"] = str(error).splitlines()[0]
                empty(device)
                print(json.dumps(rows[-1]), flush=True)
    finally:
        if output is not None:
            card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
            made_by = {"shape": shape, "device": card, "torch": torch.__version__, "weights_bytes": weights}
            output.write_text(json.dumps({**made_by, "bandwidth": bandwidth, "rows": rows}, indent=1) + "\n")
    Console().print(_table(rows))


@torch.no_grad()
def random_contexts(model: Any, tokens: int, removed: float, n_rows: int, storage: str, seed: int = 0) -> RaggedCache:
    """Returns a cache of ``n_rows`` contexts of random pairs, of which each head kept a share of its own.

    Args:
        model: Its full-attention layers, which must be all of its layers, get a ragged layer each.
        tokens: Tokens of each context.
        removed: Fraction of pairs removed, over all heads.
        n_rows: Number of contexts.
        storage: Name of the storage of kept pairs.
        seed: Seed of pairs and shares.
    """
    device, dtype = model.device, model.dtype
    generator = torch.Generator(device).manual_seed(seed)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)[None]
    layers = []
    for layer in full_attention_layers(model):
        module: Any = layer.module
        size = n_rows, module.config.num_key_value_heads, tokens
        shares = torch.rand(size[:2], generator=generator, device=device) + 0.2
        shares = (shares * ((1 - removed) / shares.mean())).clamp(max=1.0)
        packed = []
        for row in range(n_rows):  # one row at a time: what is dense of a batch would not fit
            pairs = [torch.randn(1, *size[1:], module.head_dim, generator=generator, device=device) for _ in range(2)]
            drawn = torch.rand(1, *size[1:], generator=generator, device=device)
            keep = drawn < shares[row, :, None]
            keys, values = (pair.to(dtype) for pair in pairs)
            packed.append(
                PackedPairs.pack(keys, values, keep, positions, storage=storage_named(storage), importance=drawn)
            )
        joined = PackedPairs.joined(packed, sum(one.total for one in packed), packed[0])
        layers.append(made_layer(module, joined, tokens))
    return RaggedCache(layers)


def _step_times(model: Any, cache: RaggedCache, steps: int, *, compiled: bool, n_kernels: int) -> dict[str, Any]:
    """Returns milliseconds of a captured step, median and quartiles; of the compiled one too, and of its kernels."""
    on_gpu = model.device.type == "cuda"
    kinds: dict[str, dict[str, Any]] = {"graph": {}} if on_gpu else {"eager": {"graph": False}}
    if compiled and on_gpu:
        kinds["compiled"] = {"compile": True}
    token = torch.full((cache.batch_size,), TOKEN, device=model.device)
    figures: dict[str, Any] = {}
    for kind, options in kinds.items():
        n_tokens = WARMUP_STEPS + steps + 3
        with DecodeStep(model, cache.fork(), max_new_tokens=n_tokens, **options) as step:
            if on_gpu and not step.captured:
                figures[f"{kind}_reason"] = step.reason
            times = [timed(model.device, step, token)[1] * 1e3 for _ in range(WARMUP_STEPS + steps)]
            low, median, high = statistics.quantiles(times[WARMUP_STEPS:], n=4, method="inclusive")
            figures |= {f"{kind}_ms": median, f"{kind}_ms_quartiles": [low, high]}
            if n_kernels and on_gpu:
                figures[f"{kind}_kernels"] = _kernels(step, token, n_kernels)
    return figures


def _kernels(step: DecodeStep, token: torch.Tensor, n_kernels: int) -> list[tuple[str, int, float]]:
    """Returns the kernels of a step that take longest: name, launches, milliseconds in all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step(token)
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda kernel: -kernel.device_time_total)
    named = [(kernel.key[:90], kernel.count, kernel.device_time_total / 1e3) for kernel in kernels]
    return [*named[:n_kernels], ("all kernels", sum(n for _, n, _ in named), sum(ms for _, _, ms in named))]


@torch.no_grad()
def _filled(model: Any, tokens: int, removed: float, storage: str) -> dict[str, Any]:
    """Copies a context until no more fit, and decodes behind the last one."""
    first = random_contexts(model, tokens, removed, 1, storage)
    contexts = [first]
    try:
        while free_bytes(model.device) > first.resident_bytes + FREE_BYTES:
            copied = first.fork()
            for _, layer in copied.ragged_layers():
                layer.packed = PackedPairs.of(
                    layer.packed.each(torch.Tensor.clone), layer.packed.num_heads, layer.packed.storage
                )
            contexts.append(copied)
    except torch.OutOfMemoryError:
        pass
    with DecodeStep(model, contexts[-1], max_new_tokens=1) as step:
        logits = step(torch.full((1,), TOKEN, device=model.device))
        finite = bool(logits.isfinite().all())
    return {
        "fit": len(contexts),
        "decodes": finite,
        "context_bytes": first.resident_bytes,
        "allocated_bytes": torch.cuda.memory_allocated(),
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    names = "storage", "contexts", "graph ms", "compiled ms", "floor ms", "GB resident", "fit"
    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        step, giga = row.get("graph_ms", row.get("eager_ms")), row.get("resident_bytes", row.get("context_bytes"))
        figures = [(step, 1), (row.get("compiled_ms"), 1), (row.get("floor_ms"), 1), (giga and giga / 1e9, 2)]
        cells = ["" if value is None else f"{value:.2f}" for value, _ in figures]
        table.add_row(plain(row["storage"]), str(row.get("contexts", "")), *cells, str(row.get("fit", "")))
    return table


if __name__ == "__main__":
    typer.run(main)
