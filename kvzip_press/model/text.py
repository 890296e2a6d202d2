"""Turns text into token ids, with or without the control tokens that someone has written into it."""

from __future__ import annotations

import re
from typing import Any

from kvzip_press.errors import InvalidArgumentError

_ROLES = ("bos", "eos", "sep", "pad", "cls", "mask")


def encode(tokenizer: Any, text: str, *, split_special_tokens: bool = False) -> tuple[int, ...]:
    """Returns the ids of a text, without adding special tokens.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        split_special_tokens: Whether a control token that is spelled out in the text (``<|im_end|>``) is read as the
            letters that it consists of, as text from others should be. Otherwise it becomes the control token.

    Raises:
        InvalidArgumentError: The tokenizer makes control tokens of such text in any case.
    """
    ids = _ids(tokenizer, text)
    if not split_special_tokens:
        return ids
    control = set(_special_tokens(tokenizer))
    if control.isdisjoint(ids):
        return ids
    for way in (_told_to_split, _in_pieces):
        found = way(tokenizer, text)
        if control.isdisjoint(found):
            return found
    names = sorted({str(tokenizer.decode([token])) for token in control.intersection(ids)})
    raise InvalidArgumentError(
        f"expected a tokenizer that can read {', '.join(names)} in a text as letters, got {type(tokenizer).__name__}, "
        "which makes control tokens of it: take it out of the text, or pass split_special_tokens=False"
    )


def _ids(tokenizer: Any, text: str, **options: Any) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False, **options)) if text else ()


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Returns the special tokens by id, but for the one that stands for unknown text, and nothing else."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found = {int(i): str(token.content) for i, token in added.items() if token.special}
    named = zip(
        getattr(tokenizer, "all_special_ids", None) or (), getattr(tokenizer, "all_special_tokens", ()), strict=False
    )
    found |= {int(i): str(token) for i, token in named}
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown not in [getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES]:
        found.pop(unknown, None)
    return found


def _told_to_split(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Returns what transformers' own option gives; some tokenizers ignore it."""
    try:
        return _ids(tokenizer, text, split_special_tokens=True)
    except TypeError:  # not a tokenizer of transformers
        return _ids(tokenizer, text)


def _in_pieces(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Returns the ids of pieces of the text, cut inside of each control token."""
    spelled = sorted(filter(None, _special_tokens(tokenizer).values()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, spelled)), re.IGNORECASE)
    ids: list[int] = []
    start = 0
    while (found := pattern.search(text, start)) is not None:
        ids += _ids(tokenizer, text[start : found.start() + 1])
        start = found.start() + 1
    return (*ids, *_ids(tokenizer, text[start:]))
