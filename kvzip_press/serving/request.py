"""A question on its way: waiting for a row, or answered in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.decoding.answering import question_ids
from kvzip_press.decoding.sampling import most_likely
from kvzip_press.serving.pool import NO_CONTEXT, Held
from kvzip_press.serving.stream import Stream

Chosen = int | Exception  # a token, or what kept it from being chosen


@dataclass(eq=False)
class Request:
    """A question that waits for a row, or has one.

    Attributes:
        stream: Its answer.
        context: The name of its context; None for none.
        question: The question.
        answer_prefix: How the answer begins.
        max_new_tokens: Most tokens that are asked for.
        split_special_tokens: See :func:`kvzip_press.answer`.
        sampler: From logits ``[1, vocabulary]`` to an id ``[1]``, with random numbers of its own; None for the most
            likely one.
        held: Its context in the pool, while it has a row.
        bound: Most tokens for which its row has room, at most ``max_new_tokens``; known once it has a row.
    """

    stream: Stream
    context: str | None
    question: str
    answer_prefix: str
    max_new_tokens: int
    split_special_tokens: bool
    sampler: Callable[[torch.Tensor], torch.Tensor] | None
    held: Held = NO_CONTEXT
    bound: int = 0

    def ids(self, tokenizer: Any) -> list[int]:
        """Returns the ids to read: a question right behind its context, or as a turn of its own behind others."""
        split, is_first = self.split_special_tokens, self.held.n_turns == 0
        return question_ids(tokenizer, self.question, self.answer_prefix, is_first=is_first, split_special_tokens=split)

    def take(self, token_id: int, eos: set[int]) -> bool:
        """Appends a token to the answer; returns whether that is complete, and ends its stream."""
        if token_id in eos:
            self.stream.end(reason="stop")
        else:
            self.stream.ids.append(token_id)
            if len(self.stream.ids) == self.bound:
                self.stream.end(reason="length" if self.bound == self.max_new_tokens else "room")
        return self.stream.is_done


def next_tokens(requests: Sequence[Request], logits: torch.Tensor) -> list[Chosen]:
    """Returns each request's next token, or the error of its own sampling; waits for the device once.

    Args:
        requests: The requests.
        logits: ``[requests, vocabulary]``.
    """
    tokens, failed = most_likely(logits), dict[int, Exception]()
    for row, request in enumerate(requests):
        if request.sampler is not None:
            try:
                tokens[row] = request.sampler(logits[row : row + 1])[0]
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this request's own
                failed[row] = error
    return [failed.get(row, token) for row, token in enumerate(tokens.tolist())]
