"""The sources of a training's documents: files, data sets, or the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kvzip_press.model.devices import input_device
from kvzip_press.presses.fastkvzip.training.documents import Piece, pieces, read_texts, split, tokenised
from kvzip_press.presses.fastkvzip.training.recipe import Progress, Recipe
from kvzip_press.presses.fastkvzip.training.self_generation import SelfGeneration

Data = tuple[list[Piece], list[Piece]]


def texts_of(sources: Sequence[str], tokenizer: Any, recipe: Recipe) -> tuple[Data, str]:
    """Returns pieces of texts to train on and to evaluate with, and a description of them.

    Raises:
        InvalidArgumentError: Not enough documents, or a source that cannot be read.
    """
    documents = tokenised(read_texts(sources), tokenizer)
    data = split(pieces(documents, recipe.piece_tokens), recipe.tokens, recipe.held_out_tokens)
    names = [Path(source).name if Path(source).exists() else source for source in sources]
    return data, ", ".join(names)


def self_generated(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    folder: Path,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[Data, str]:
    """Returns pieces of text sampled from the model, and a description of them.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        recipe: Gives the number of tokens and the seed.
        folder: Where samples are kept, so that a killed run can continue.
        batch_size: Texts sampled at a time; default 512 on a GPU, 32 on a CPU.
        progress: Called as texts are sampled.
    """
    if batch_size is None:
        batch_size = 512 if input_device(model).type == "cuda" else 32
    sampling = SelfGeneration(seed=recipe.seed, batch_size=batch_size)
    documents = counted(sampling.documents(model, tokenizer, folder), recipe, progress)
    data = split(pieces(documents, recipe.piece_tokens), recipe.tokens, recipe.held_out_tokens)
    return data, f"sampled from the model: {sampling}"


def counted(documents: Iterator[list[int]], recipe: Recipe, progress: Progress | None) -> Iterator[list[int]]:
    """Yields the documents, and reports their tokens to ``progress``."""
    total, done = recipe.tokens + recipe.held_out_tokens, 0
    for ids in documents:
        done += len(ids)
        if progress is not None:
            progress("sampling", min(done, total), total, "tokens")
        yield ids
