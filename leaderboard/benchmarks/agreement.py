"""Compares presses that evict while the model writes with the full cache, along the tokens that the full cache wrote.

``python -m kvzip_press.leaderboard.benchmarks.agreement --budget 128 --tokens 256`` lets the model write from a full
cache, then reads these tokens once more with each press (`kvzip_press.leaderboard.running.following`). So every press
is asked the same questions, also by a model that is too small to solve anything: how many of its next tokens would be
the same, how many are until the first that is not, and how far its probabilities are from the full cache's (KL
divergence, in nats).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvzip_press.leaderboard.running.following import follow, full_answer
from kvzip_press.loading.by_name import load_model
from kvzip_press.registry import get_press

PRESSES = (
    "random_decode",
    "streaming_llm_decode",
    "knorm_decode",
    "tova_decode",
    "snapkv_decode",
    "h2o",
    "kv_compress",
    "rkv",
)
TEXT = (
    "The harbour office keeps three books. The first book names every ship and the hour at which it came. The second "
    "book names the cargo, box by box, and who paid for it. The third book is about the weather. "
)


def main(
    budget: Annotated[int, typer.Option(help="Tokens' worth of pairs that stay.")] = 128,
    buffer: Annotated[int, typer.Option(help="Tokens between two evictions.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 256,
    repeats: Annotated[int, typer.Option(help="How often the prompt repeats its paragraph.")] = 8,
    allocation: Annotated[str, typer.Option(help="How pairs compete: head, layer, global or adakv.")] = "head",
    seed: Annotated[int | None, typer.Option(help="Samples what is written; default the likeliest tokens.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="Name of a press; several times. Default: all.")] = None,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
) -> None:
    """Compares presses that need nothing but the model."""
    options: dict[str, Any] = {"budget": budget, "buffer": buffer, "allocation": allocation}
    presses = {name: get_press(name, **options) for name in press or PRESSES}  # raises before the model writes
    loaded, tokenizer = load_model(model)
    prompt = tokenizer.encode(TEXT * repeats)
    answer = full_answer(loaded, prompt, tokens, seed=seed)
    title = f"{model}, prompt of {len(prompt)} tokens, budget {budget}, buffer {buffer}, {allocation}"
    table = Table("press", "same tokens", "until the first other", "KL, nats", "most MB", title=title)
    for name, chosen in presses.items():
        found = follow(loaded, chosen, answer)
        one = found.agreement
        numbers = f"{one.share:.3f}", str(one.until_first), f"{one.mean_kl:z.4f}", f"{found.most_bytes / 1e6:.2f}"
        table.add_row(name, *numbers)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
