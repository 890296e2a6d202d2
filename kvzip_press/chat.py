"""Where a context and a question go in a model's chat template."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_SENTINEL = "kvzippresscontextgoeshere"


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
    """The ids around a user turn, from the tokenizer's chat template; without one, BOS before and a newline after."""
    if not getattr(tokenizer, "chat_template", None):
        bos = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
        return ChatFrame(bos, encode(tokenizer, "\n"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    prefix, suffix = text.split(_SENTINEL)
    return ChatFrame(encode(tokenizer, prefix), encode(tokenizer, suffix))


def turn_break(tokenizer: Any) -> tuple[int, ...]:
    """The ids between an answer and the user's next question: the answer's end of turn and the user's header.

    From the tokenizer's chat template; without one, an empty line.
    """
    if not getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, "\n\n")
    turns = [{"role": role, "content": f"{_SENTINEL}{role}"} for role in ("user", "assistant", "user")]
    turns[2]["content"] = _SENTINEL + "again"
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return encode(tokenizer, text.split(turns[1]["content"])[1].split(turns[2]["content"])[0])


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of a piece of text, no special tokens added (those spelled out in it are recognised)."""
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def find_tokenizer(model: Any) -> Any | None:
    """The tokenizer at the model's own path, looked up once a path; None, said once, where there is none."""
    return _load_tokenizer(str(getattr(model.config, "name_or_path", "") or ""))


@functools.lru_cache(maxsize=16)
def _load_tokenizer(path: str) -> Any | None:
    from transformers import AutoTokenizer

    try:
        if path:
            return AutoTokenizer.from_pretrained(path)
        reason = "the model has no path"
    except Exception as error:  # noqa: BLE001  # transformers raises many kinds; all mean that there is none to be had
        reason = f"{type(error).__name__}: {error}"
    logger.warning("no tokenizer found for %r (%s): KVzip replays the context without its prompt", path, reason)
    return None
