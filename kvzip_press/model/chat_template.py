"""What a tokenizer's chat template writes around the texts of a dialogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvzip_press.errors import InvalidArgumentError

# With everything that a template could escape, replace or put into other letters.
_MARK = "KVzip-Press <context> & \"goes\" 'here'\n\nnumber"

#: How messages are made, tried in this order: with lists of parts as contents (or texts); after a system turn (or not).
_FORMS = ((False, False), (False, True), (True, False), (True, True))


def around_turns(tokenizer: Any, roles: Sequence[str]) -> list[str]:
    """Returns what the template writes before, between and behind the contents of turns, and to begin an answer.

    Args:
        tokenizer: A tokenizer with a chat template.
        roles: "user" or "assistant", for each turn.

    Returns:
        One text more than there are roles.

    Raises:
        InvalidArgumentError: The template does not insert each content once and as it is (but for whitespace around
            it), however the messages are made; or there are several, and none is the default.
    """
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    options |= _name_of_template(tokenizer)
    contents = [f"{_MARK} {number}." for number in range(len(roles))]
    reasons = []
    for in_parts, with_system in _FORMS:
        turns = [*([("system", "")] if with_system else []), *zip(roles, contents, strict=True)]
        messages = [{"role": role, "content": _content(text, in_parts=in_parts)} for role, text in turns]
        try:
            text = tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # noqa: BLE001  # a template is a program: it raises what it likes
            reasons.append(f"raises {type(error).__name__}: {error}")
            continue
        problem = _problem(text, contents, in_parts=in_parts)
        if problem is None:
            return _between(text, contents)
        reasons.append(problem)
    tried = "; ".join(dict.fromkeys(reasons))
    raise InvalidArgumentError(
        f"expected a chat template that inserts each text of a dialogue once, as it is, got one that {tried:.500}"
    )


def _name_of_template(tokenizer: Any) -> dict[str, str]:
    """Returns the option that names the template, where a tokenizer has several."""
    templates = tokenizer.chat_template
    if not isinstance(templates, Mapping) or "default" in templates:
        return {}
    if len(templates) > 1:
        raise InvalidArgumentError(
            f"expected one chat template, or a default among several, got {sorted(templates)}: choose one, "
            f"tokenizer.chat_template = tokenizer.chat_template[{min(templates)!r}]"
        )
    return {"chat_template": next(iter(templates))}


def _content(text: str, *, in_parts: bool) -> Any:
    return [{"type": "text", "text": text}] if in_parts else text


def _problem(text: Any, contents: Sequence[str], *, in_parts: bool) -> str | None:
    """Returns what a template does to the contents that it should not do; None if all is well."""
    if not isinstance(text, str):
        return f"makes {type(text).__name__}, not text"
    for content in contents:
        if (count := text.count(content)) != 1:
            return "leaves a text out or changes it" if not count else f"repeats a text {count} times"
    if in_parts and "'type'" in text:
        return "writes a list of parts as it is"
    places = [text.index(content) for content in contents]
    return None if places == sorted(places) else "puts turns into another order"


def _between(text: str, contents: Sequence[str]) -> list[str]:
    pieces = []
    for content in contents:
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]
