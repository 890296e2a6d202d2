"""Scores of heads by KVzip: the scores of their pairs over texts, reduced by the maximum over each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvzip_press.chat import encode
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.head_scores import HeadScores, check_texts
from kvzip_press.models import full_attention_layers
from kvzip_press.prefilling import prefill
from kvzip_press.press import Press
from kvzip_press.registry import get_press


def compute_head_scores(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    chunk_size: int = 2048,
    n_last: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> HeadScores:
    """Reads each text, scores its pairs with KVzip, takes the maximum over its tokens, and the mean over the texts.

    With one text and ``n_last=0`` that is the paper. KVzip merges the scores of several texts by their maximum, which
    one outlier decides; the mean did a little better on SmolLM2.

    The last tokens of a text are left out. The replay's prompt follows directly upon them, so heads that only look at
    what was just read give them high scores too, and those would be their maximum; what a head is asked here is
    whether it looks back at the context. Measured on SmolLM2: see the decision on heads in ``kvzip_press/DESIGN.md``.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: One text of a kind that the model will see, or several; each longer than ``n_last`` tokens.
        chunk_size: Context tokens replayed at a time.
        n_last: Last tokens of each text that are left out; 0 is KVzip.
        progress: Called after every forward with how many are done and how many there are.

    Raises:
        InvalidArgumentError: No text, one of ``n_last`` tokens or less, or one longer than the model's positions.
    """
    lengths = [len(encode(tokenizer, text)) for text in check_texts(texts)]
    if n_last < 0 or min(lengths) <= n_last:
        raise InvalidArgumentError(f"expected n_last >= 0 and texts of more tokens, got {n_last} and {lengths} tokens")
    press = get_press("kvzip", 0.0, chunk_size=chunk_size)
    total = sum(1 + -(-length // chunk_size) for length in lengths)
    with _counting(model, lambda done: progress and progress(done, total)):
        values = torch.stack([_of_text(model, tokenizer, text, press, n_last) for text in texts]).mean(dim=0)
    return HeadScores.of_texts(values, model, tokenizer, texts, method="kvzip", chunk_size=chunk_size, n_last=n_last)


def _of_text(model: nn.Module, tokenizer: Any, text: str, press: Press, n_last: int) -> torch.Tensor:
    """``[full_attention_layers, num_key_value_heads]``: the best pair of each head between prefix and last tokens."""
    done = prefill(model, tokenizer, text)
    scores = press.score(done)
    first, end = int(scores.protected.sum()), done.valid.shape[1] - n_last
    return torch.stack([values[0, :, first:end].amax(dim=-1).cpu() for values in scores.layers.values()])


@contextmanager
def _counting(model: nn.Module, say: Callable[[int], object]) -> Iterator[None]:
    """While open, says after each forward how many there were."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        say(done)

    hook = full_attention_layers(model)[0].module.register_forward_hook(count)  # a replay ends before the decoder does
    try:
        yield
    finally:
        hook.remove()
