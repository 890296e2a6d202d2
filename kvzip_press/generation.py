"""Questions to a compressed cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from kvzip_press.attention import attach
from kvzip_press.chat import chat_frame, encode
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.models import text_config
from kvzip_press.ragged_cache import RaggedCache


def answer(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str,
    answer_prefix: str = "",
    max_new_tokens: int = 64,
) -> str:
    """Answers a question about a compressed context, greedily. The cache is unchanged afterwards.

    Args:
        model: The model that made the cache.
        tokenizer: Its tokenizer.
        cache: From ``compress``, ``Prefill.evict`` or ``RaggedCache.of``.
        question: The question; it follows the context in the user's turn after an empty line.
        answer_prefix: How the answer begins; not part of what is returned.
        max_new_tokens: Most tokens to generate.

    Raises:
        CacheMismatchError: The cache was made by another model.
        InvalidArgumentError: Context, question and answer exceed the model's positions.
    """
    ids = question_ids(tokenizer, question, answer_prefix)
    generated = greedy(model, cache.fork(), ids, max_new_tokens=max_new_tokens, eos_ids=eos_ids(model, tokenizer))
    return str(tokenizer.decode(generated, skip_special_tokens=True)).strip()


def question_ids(tokenizer: Any, question: str, answer_prefix: str = "") -> list[int]:
    """Ids of a question that follows a context: the question, the end of the user's turn, the answer's beginning."""
    text = "\n\n" + question.strip()
    return [*encode(tokenizer, text), *chat_frame(tokenizer).suffix, *encode(tokenizer, answer_prefix)]


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer, by the model's generation config and the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return ids | ({tokenizer.eos_token_id} - {None})


@torch.no_grad()
def greedy(model: Any, cache: Any, input_ids: list[int], *, max_new_tokens: int, eos_ids: Collection[int]) -> list[int]:
    """Greedy decoding of one sequence behind a cache, which grows by what is read and written.

    Returns:
        The generated ids, without the one that ended them.
    """
    attach(model)
    position = cache.get_seq_length()
    _check_positions(model, position + len(input_ids) + max_new_tokens)
    device = model.get_input_embeddings().weight.device
    step = torch.tensor([input_ids], device=device)
    generated: list[int] = []
    for _ in range(max_new_tokens):
        positions = torch.arange(position, position + step.shape[1], device=device)[None]
        output = model(input_ids=step, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        position += step.shape[1]
        token = int(output.logits[0, -1].argmax())
        if token in eos_ids:
            break
        generated.append(token)
        step = torch.tensor([[token]], device=device)
    return generated


def _check_positions(model: Any, needed: int) -> None:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise InvalidArgumentError(
            f"expected context, question and answer within the model's {limit} positions, got up to {needed}"
        )
