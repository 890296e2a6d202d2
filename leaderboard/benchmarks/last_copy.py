"""Which copy of a repeated paragraph a press keeps, and whether the model can still say the paragraph once more.

``python -m kvzip_press.leaderboard.benchmarks.last_copy --kept 0.25`` gives the model the task `repeated_paragraph`,
with a budget of that fraction of the prompt. R-KV is meant for such a text: of pairs that repeat each other it spares
the newest. The table has the part of what a press kept of the prompt that lies in the first copy, in one between (the
mean) and in the last, and the part of the paragraph that the model then says in order, beside the full cache.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.compat import DynamicCache, cache_argument
from kvzip_press.leaderboard.benchmarks.following import samples_of
from kvzip_press.leaderboard.running.contexts import prompt_ids
from kvzip_press.leaderboard.running.decode_phase import generate_evicting
from kvzip_press.leaderboard.samples.task import Question
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_model
from kvzip_press.model.chat import chat_frame, encode
from kvzip_press.model.structure import text_config
from kvzip_press.press import Press
from kvzip_press.registry import get_press

PRESSES = ("random_decode", "streaming_llm_decode", "snapkv_decode", "h2o", "rkv")


def main(
    kept: Annotated[float, typer.Option(help="Budget, as a fraction of the prompt.")] = 0.25,
    contexts: Annotated[int, typer.Option(help="Paragraphs.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of all copies of one.")] = 400,
    buffer: Annotated[int, typer.Option(help="Tokens between two evictions.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the paragraphs.")] = 1,
    press: Annotated[list[str] | None, typer.Option(help="Name of a press; several times.")] = None,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
) -> None:
    """Asks each press for each paragraph, and prints the means."""
    names = press or list(PRESSES)
    for name in names:
        get_press(name, budget=1000, buffer=buffer)  # raises before the model is loaded
    loaded, tokenizer = load_model(model)
    task: Any = get_task("repeated_paragraph", preset="smollm2")
    samples = samples_of(tokenizer, task, contexts, tokens, seed)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("full cache", *names)}
    for sample in track(samples, description="paragraphs", transient=True):
        (question,) = sample.questions
        prompt = prompt_ids(tokenizer, question)
        for name, values in found.items():
            options = {} if name == "full cache" else {"budget": round(kept * len(prompt)), "buffer": buffer}
            chosen = get_press("none" if name == "full cache" else name, **options)
            ids, _, _ = generate_evicting(loaded, tokenizer, chosen, prompt, question.max_new_tokens)
            shares = parts_of_copies(_kept(loaded, chosen, prompt), *_copies(tokenizer, question))
            values.append((*shares, task.score(tokenizer.decode(ids), question)))
    table = Table(
        "press",
        "of the first copy",
        "of one between",
        "of the last",
        "said",
        title=f"{model}, {kept:.0%} of the prompt",
    )
    for name, values in found.items():
        table.add_row(name, *(f"{statistics.mean(column):.2f}" for column in zip(*values, strict=True)))
    Console().print(table)


def parts_of_copies(positions: torch.Tensor, begin: int, size: int, n_copies: int) -> tuple[float, float, float]:
    """Returns the parts of kept pairs that lie in the first copy, in one between (the mean), and in the last.

    Args:
        positions: int ``[pairs]``, of all heads and layers.
        begin: Where the first copy begins.
        size: Tokens of a copy.
        n_copies: Number of copies, at least 3.
    """
    copy = (positions.long() - begin).div(size, rounding_mode="floor")
    counts = torch.bincount(copy[(copy >= 0) & (copy < n_copies)], minlength=n_copies) / len(positions)
    return float(counts[0]), float(counts[1:-1].mean()), float(counts[-1])


def _copies(tokenizer: Any, question: Question) -> tuple[int, int, int]:
    n_copies = int(question.tags["copies"])
    return len(chat_frame(tokenizer).prefix), len(encode(tokenizer, question.text)) // n_copies, n_copies


@torch.no_grad()
def _kept(model: Any, press: Press, prompt: list[int]) -> torch.Tensor:
    cache = DynamicCache(config=text_config(model))
    with press(model):
        ids = torch.tensor([prompt], device=model.device)
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(model, cache))
    return torch.cat([layer.packed.positions for _, layer in RaggedCache.of(cache).ragged_layers()])


if __name__ == "__main__":
    typer.run(main)
