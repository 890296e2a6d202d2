"""An answer as it is written, and the request that it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.decoding.answering import decoded, question_ids
from kvzip_press.decoding.sampling import most_likely
from kvzip_press.serving.pool import NO_CONTEXT, Held

Chosen = int | Exception  # a token, or what kept it from being chosen
_HALF = "\N{REPLACEMENT CHARACTER}"  # what a character is decoded to whose last token has not come yet


class Stream:
    """The answer to one question: iterate over it for its text, piece by piece, or take it whole.

    The pieces put together are :meth:`text`. Who waits for a piece runs the session's steps meanwhile, for everybody.

    Args:
        tokenizer: The model's tokenizer.
        run: Runs one step of the session.
        cancel: Takes the request out of the session.

    Attributes:
        ids: The token ids of the answer so far, without the one that ends it.
        is_done: Whether nothing more comes.
        finish_reason: Why nothing more comes: "stop" (the model ended its answer), "length" (``max_new_tokens`` are
            written), "room" (the row has no room for more, see the session's ``max_tokens``), "cancelled", "closed"
            (the session was closed before the answer was complete) or "error"; None until then.
    """

    def __init__(self, tokenizer: Any, run: Callable[[Stream], None], cancel: Callable[[Stream], None]) -> None:
        self._tokenizer, self._run, self._cancel = tokenizer, run, cancel
        self.ids: list[int] = []
        self.is_done = False
        self.finish_reason: str | None = None
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        shown = ""
        while True:
            is_done = self.is_done  # before the text is read: what came in between is shown next time
            text = decoded(self._tokenizer, self.ids)
            is_whole = is_done or not text.endswith(_HALF)
            if is_whole and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            if is_done:
                self._raise()
                return
            self._run(self)

    def text(self) -> str:
        """Waits for the whole answer, and returns it as :func:`kvzip_press.answer` does.

        Raises:
            KVzipPressError: What kept the request from being answered.
            RuntimeError: Likewise, such as a lack of memory.
            SessionClosedError: The session was closed before the answer was complete; ``ids`` has what there was.
        """
        while not self.is_done:
            self._run(self)
        self._raise()
        return decoded(self._tokenizer, self.ids)

    def cancel(self) -> None:
        """Ends the answer here; its row is free for others."""
        self._cancel(self)

    def end(self, error: BaseException | None = None, *, reason: str = "stop") -> None:
        """Notes that the answer is complete, or what has kept it from that; what has ended stays as it ended."""
        if not self.is_done:
            self.error, self.finish_reason = error, reason
            self.is_done = True  # last: other threads look at it without a lock

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


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
