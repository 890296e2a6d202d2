"""Where a context and a question go in a model's chat template."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.arguments.ids import check_vocabulary, described, items_of
from kvzip_press.arguments.numbers import is_int
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat_template import around_turns
from kvzip_press.model.text import encode

logger = logging.getLogger(__name__)

__all__ = ["ChatFrame", "Context", "chat_frame", "check_ids", "context_rows", "encode", "find_tokenizer", "turn_break"]

#: One context: its text, or its token ids, as a list or as a tensor ``[n]`` or ``[1, n]``.
Context = str | Sequence[int] | torch.Tensor
_EXPECTED = "a context as text or token ids, or a list of such"


@dataclass(frozen=True)
class ChatFrame:
    """Token ids around the user's turn.

    Attributes:
        prefix: Ids before the context (system prompt, user header); they are protected from eviction.
        suffix: Ids after the question (end of turn, assistant header).
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def chat_frame(tokenizer: Any) -> ChatFrame:
    """Returns the ids around a user turn, from the tokenizer's chat template; without one, BOS and a newline.

    Raises:
        InvalidArgumentError: The template does not insert the user's text once and as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        bos = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
        return ChatFrame(bos, encode(tokenizer, "\n"))
    prefix, suffix = around_turns(tokenizer, ["user"])
    return ChatFrame(encode(tokenizer, prefix), encode(tokenizer, suffix))


def turn_break(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids between an answer and the user's next question: the answer's end of turn and the user's header.

    They come from the tokenizer's chat template; without one, they are an empty line.

    Raises:
        InvalidArgumentError: The template does not insert the texts of a dialogue once and as they are.
    """
    if not getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, "\n\n")
    return encode(tokenizer, around_turns(tokenizer, ["user", "assistant", "user"])[2])


def context_rows(
    tokenizer: Any, context: Context | Sequence[Context], *, split_special_tokens: bool = False
) -> list[tuple[int, ...]]:
    """Returns the token ids of each context.

    A text is one context, and so are integers: a list, or a tensor or array ``[n]`` or ``[1, n]``. A list of these is
    several. A tensor of several rows is refused: its padding could not be told from text. So is the name of a file: its
    letters would be the context.

    Args:
        tokenizer: The tokenizer.
        context: One or several, as texts or token ids, which are taken as they are.
        split_special_tokens: See :func:`kvzip_press.model.text.encode`.

    Raises:
        InvalidArgumentError: A context is empty, there is none, or one is neither text nor token ids. The message says
            what to pass.
    """
    items: Any = context if isinstance(context, str) else items_of(context, _EXPECTED)
    one = isinstance(items, str) or not items or any(map(is_int, items))
    rows = [_context_ids(tokenizer, item, split=split_special_tokens) for item in ([items] if one else items)]
    if not all(rows):
        which = "" if one else f" at index {rows.index(())} of {len(rows)}"
        raise InvalidArgumentError(f"expected a context of at least one token, got an empty one{which}")
    return rows


def _context_ids(tokenizer: Any, context: Any, *, split: bool) -> tuple[int, ...]:
    if isinstance(context, str):
        if os.path.isfile(context):  # noqa: PTH113  # Path.is_file raises for a text that is too long for a name
            raise InvalidArgumentError(
                f"expected a context as text, got {context!r:.80}, the name of a file: read it first, "
                f"Path({context!r:.80}).read_text()"
            )
        return encode(tokenizer, context, split_special_tokens=split)
    ids = items_of(context, "a context as text or token ids")
    for item in ids:
        if not is_int(item):
            raise InvalidArgumentError(f"expected a context as text or token ids, got {described(item)} among its ids")
    return tuple(ids)


def check_ids(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Raises InvalidArgumentError if an id is not in the model's vocabulary."""
    check_vocabulary(model, min(map(min, rows)), max(map(max, rows)))


def find_tokenizer(model: Any) -> Any | None:
    """Returns the tokenizer at the model's own path, cached by path; None, with a warning, if there is none."""
    return _load_tokenizer(str(getattr(model.config, "name_or_path", "") or ""))


@functools.lru_cache(maxsize=16)
def _load_tokenizer(path: str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        if path:
            return AutoTokenizer.from_pretrained(path)
        reason = "the model has no path"
    except Exception as error:  # noqa: BLE001  # transformers raises many kinds; all mean: no tokenizer can be loaded
        reason = f"{type(error).__name__}: {error}"
    logger.warning("no tokenizer found for %r (%s): KVzip replays the context without its prompt", path, reason)
    return None
