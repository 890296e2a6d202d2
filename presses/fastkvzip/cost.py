"""Measures what gates cost on a large model with random weights: in the prefill, and to train.

``python -m kvzip_press.presses.fastkvzip.cost`` (the shape of Llama 3.1 8B, 65536 tokens) times prefills with and
without gates, alternately, then KVzip's scoring of a document and the optimiser's steps. It prints how long a million
tokens and the published 5000 steps would take. Times do not depend on the weights' values.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press.model.devices import input_device, timed
from kvzip_press.model.structure import full_attention_layers, text_config
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.presses.fastkvzip.fast_press import FastKVzipPress
from kvzip_press.presses.fastkvzip.gate import LayerGate
from kvzip_press.presses.fastkvzip.gates import Gates
from kvzip_press.presses.fastkvzip.training.features import features_of
from kvzip_press.presses.fastkvzip.training.optimise import Optimiser, initial
from kvzip_press.presses.fastkvzip.training.recipe import Recipe
from kvzip_press.presses.fastkvzip.training.shards import Shards
from kvzip_press.testing import ByteTokenizer

MILLION = 1_000_000


def main(
    tokens: Annotated[int, typer.Option(help="Context tokens of the prefill.")] = 65536,
    repeats: Annotated[int, typer.Option(help="Prefills of each kind.")] = 5,
    document: Annotated[int, typer.Option(help="Tokens of a document of the training.")] = 16384,
    steps: Annotated[int, typer.Option(help="Optimiser steps timed.")] = 50,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 32,
    hidden_size: Annotated[int, typer.Option(help="Its heads have 128 dimensions, four share a KV head.")] = 4096,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Times prefill and training, and prints a table."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _random_model(hidden_size, layers, place)
    table = Table("measured", "value", title=f"{layers} layers of {hidden_size}, random weights, bf16, {place}")
    for name, value in {**_prefill(model, tokens, repeats), **_training(model, document, steps)}.items():
        table.add_row(name, value)
    Console().print(table)


def _random_model(hidden_size: int, layers: int, place: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=hidden_size // 512,
        vocab_size=32000,
        max_position_embeddings=131072,
    )
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def _gate_shape(model: Any) -> tuple[int, int, int]:
    config = text_config(model)
    heads = config.num_key_value_heads
    return config.hidden_size, heads, config.num_attention_heads // heads


def _prefill(model: Any, tokens: int, repeats: int) -> dict[str, str]:
    gates = [LayerGate(*_gate_shape(model), dtype=torch.bfloat16) for _ in full_attention_layers(model)]
    press, device = FastKVzipPress(0.7, gate=Gates(gates)), input_device(model)
    ids = torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(repeats + 1):  # the first of each kind warms up
        for watched in (False, True):
            observers = [press] if watched else []
            done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool), observers=observers)
            seconds[watched] += [done.seconds] if turn else []
    plain, gated = (statistics.median(seconds[watched]) for watched in (False, True))
    overhead = f"{gated - plain:.4f} s, {(gated - plain) / plain:.2%} of the prefill (goal: at most 1.5 %)"
    return {f"prefill of {tokens} tokens": f"{plain:.4f} s", "gates in it": overhead}


def _training(model: Any, document: int, steps: int) -> dict[str, str]:
    ids = torch.randint(3, 1000, (document,), generator=torch.Generator().manual_seed(1)).tolist()
    features_of(model, ByteTokenizer(), ids[: document // 4])  # warms up
    (hidden, scores), reading = timed(input_device(model), features_of, model, ByteTokenizer(), ids)
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder), tuple(hidden), *_gate_shape(model)[:2])
        _, writing = timed(input_device(model), shards.append, hidden, scores)
    recipe, device = Recipe(), input_device(model)
    shape = (*_gate_shape(model), recipe.dim, recipe.n_sink)
    optimiser = Optimiser(recipe, initial(shape, len(hidden), recipe.seed), device)
    features = [x.to(device) for x in hidden.values()], [x.T.contiguous().to(device) for x in scores.values()]
    optimiser.run(*features, range(3))
    _, stepping = timed(device, optimiser.run, *features, range(steps))
    hours = (MILLION / document * (reading + writing) + recipe.steps * stepping / steps) / 3600
    fits = 20e9 / shards.token_bytes
    return {
        f"reading and KVzip's scores of {document} tokens": f"{reading:.3f} s, {document / reading:.0f} tokens/s",
        "their features to disk": f"{writing:.3f} s, {shards.token_bytes / 1e3:.0f} kB a token: 20 GB hold {fits:.0f}",
        f"optimiser step, all layers, {recipe.batch_size} tokens": f"{stepping / steps * 1e3:.1f} ms",
        f"extrapolated to {MILLION} tokens, {recipe.steps} steps": f"{hours:.2f} GPU-hours (goal: at most 0.5)",
    }


if __name__ == "__main__":
    typer.run(main)
