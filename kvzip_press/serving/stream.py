"""An answer as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvzip_press.decoding.answering import decoded

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
