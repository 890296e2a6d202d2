"""Compares presses that evict while the model writes with the full cache, along the tokens that the full cache wrote.

``python -m kvzip_press.leaderboard.benchmarks.agreement --budget 128 --tokens 256`` lets the model write from a full
cache, then reads these tokens once more with each press, token by token. So every press is asked the same questions,
also by a model that is too small to solve anything: how many of its next tokens would be the same, how many are until
the first that is not, and how far its probabilities are from the full cache's (KL divergence, in nats).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.compat import DynamicCache
from kvzip_press.leaderboard.running.agreement import Agreement
from kvzip_press.loading.by_name import load_model
from kvzip_press.model.structure import text_config
from kvzip_press.press import Press
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


@torch.no_grad()
def written(model: Any, prompt: torch.Tensor, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lets a model write the most likely tokens from a full cache.

    Args:
        model: The model.
        prompt: int64 ``[1, n]``.
        n_tokens: Number of tokens, at least 1.

    Returns:
        The tokens, int64 ``[1, n_tokens]``, and the logits of each, ``[n_tokens, vocabulary]``.
    """
    cache, token, tokens, logits = DynamicCache(config=text_config(model)), prompt, [], []
    for _ in range(n_tokens):
        logits.append(_step(model, cache, token))
        token = logits[-1].argmax(dim=-1)[None, None]
        tokens.append(token)
    return torch.cat(tokens, dim=1), torch.stack(logits)


@torch.no_grad()
def agreement(
    model: Any, press: Press, prompt: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor
) -> tuple[Agreement, int]:
    """Reads a prompt and the tokens that :func:`written` returned inside a press, and compares each step's logits.

    Args:
        model: The model.
        press: The press.
        prompt: int64 ``[1, n]``.
        tokens: int64 ``[1, n_tokens]``.
        logits: ``[n_tokens, vocabulary]``, of the full cache.

    Returns:
        How the press agrees with the full cache, and the most bytes that the cache held between two tokens, queries and
        room in its tails included.
    """
    steps = list(_steps(model, press, prompt, tokens))
    ours = torch.stack([step for step, _ in steps]).float().log_softmax(dim=-1)
    return Agreement.of(logits.float().log_softmax(dim=-1), ours), max(held for _, held in steps)


def _steps(model: Any, press: Press, prompt: torch.Tensor, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    cache = DynamicCache(config=text_config(model))
    with press(model):
        for given in (prompt, *tokens[:, :-1].split(1, dim=1)):
            yield _step(model, cache, given), RaggedCache.of(cache).resident_bytes


def _step(model: Any, cache: Any, token_ids: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def main(
    budget: Annotated[int, typer.Option(help="Tokens' worth of pairs that stay.")] = 128,
    buffer: Annotated[int, typer.Option(help="Tokens between two evictions.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 256,
    repeats: Annotated[int, typer.Option(help="How often the prompt repeats its paragraph.")] = 8,
    allocation: Annotated[str, typer.Option(help="How pairs compete: head, layer, global or adakv.")] = "head",
    press: Annotated[list[str] | None, typer.Option(help="Name of a press; several times. Default: all.")] = None,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
) -> None:
    """Compares presses that need nothing but the model."""
    options: dict[str, Any] = {"budget": budget, "buffer": buffer, "allocation": allocation}
    presses = {name: get_press(name, **options) for name in press or PRESSES}  # raises before the model writes
    loaded, tokenizer = load_model(model)
    prompt = torch.tensor([tokenizer.encode(TEXT * repeats)], device=loaded.device)
    text, logits = written(loaded, prompt, tokens)
    title = f"{model}, prompt of {prompt.shape[1]} tokens, budget {budget}, buffer {buffer}, {allocation}"
    table = Table("press", "same tokens", "until the first other", "KL, nats", "most MB", title=title)
    for name, chosen in presses.items():
        one, most_bytes = agreement(loaded, chosen, prompt, text, logits)
        numbers = f"{one.share:.3f}", str(one.until_first), f"{one.mean_kl:.4f}", f"{most_bytes / 1e6:.2f}"
        table.add_row(name, *numbers)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
