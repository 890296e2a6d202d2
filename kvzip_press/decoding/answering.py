"""Asks questions of a compressed cache and returns the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

from kvzip_press.attention.implementation import attach
from kvzip_press.cache.padding import left_padded, padding_in
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.generation import eos_ids, generate
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import chat_frame, encode, turn_break
from kvzip_press.model.devices import input_device

ASKED_AT_ONCE = 32  # questions in one batch of a longer list: its rows share the context, but not their tails
_T = TypeVar("_T")


@overload
def answer(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str,
    answer_prefix: str | Sequence[str] = "",
    max_new_tokens: int | Sequence[int] = 64,
    *,
    keep: bool = False,
) -> str: ...


@overload
def answer(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: Sequence[str],
    answer_prefix: str | Sequence[str] = "",
    max_new_tokens: int | Sequence[int] = 64,
    *,
    keep: bool = False,
) -> list[str]: ...


def answer(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str | Sequence[str],
    answer_prefix: str | Sequence[str] = "",
    max_new_tokens: int | Sequence[int] = 64,
    *,
    keep: bool = False,
) -> str | list[str]:
    """Answers one question about a compressed context, or many in one batch, decoding greedily.

    The cache is unchanged afterwards, unless ``keep`` is True: then question and answer stay in it, and the next
    question, kept or not, follows them as a new turn, framed by the model's chat template.

    For a list of questions a list of answers is returned. The list has one question for each row of a cache that was
    made from several contexts, or any number of questions about the one context of a cache with one row, which they
    share in memory. A single question goes to all rows. Each row answers as it would alone.

    Args:
        model: The model that made the cache.
        tokenizer: Its tokenizer.
        cache: From ``compress``, ``Prefill.evict`` or ``RaggedCache.of``.
        question: The question; it follows the context in the user's turn after an empty line. Or a list of questions.
            An empty question adds nothing, for a context that itself ends with the question.
        answer_prefix: How each answer begins; not part of what is returned. One for all, or a list with one for each
            question.
        max_new_tokens: Most tokens to generate. One bound for all, or a list with one for each question.
        keep: Whether the cache remembers this question and its answer. If an error is raised, it stays as it was. In
            several threads, turns that one cache keeps follow one another.

    Returns:
        The answer as a text, for one question and a cache of one row; otherwise a list of answers. For a cache of
        several rows that is so even if the question is a text, which type checkers cannot see.

    Raises:
        CacheMismatchError: The cache was made by another model.
        InvalidArgumentError: Context, question and answer exceed the model's positions; the number of questions does
            not fit the rows, or the number of prefixes or bounds the questions; or several questions are to be kept in
            one row.
    """
    generated = answer_ids(model, tokenizer, cache, question, answer_prefix, max_new_tokens, keep=keep)
    answers = [decoded(tokenizer, row) for row in generated]
    return answers[0] if isinstance(question, str) and cache.batch_size == 1 else answers


def answer_ids(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str | Sequence[str],
    answer_prefix: str | Sequence[str] = "",
    max_new_tokens: int | Sequence[int] = 64,
    *,
    keep: bool = False,
) -> list[list[int]]:
    """Returns the ids of the answers that :func:`answer` returns as texts, without the ids that ended them."""
    batch_size = cache.batch_size
    questions = [question] if isinstance(question, str) else list(question)
    if len(questions) == 1:
        questions *= batch_size
    shared = batch_size == 1 and not keep  # one context for all questions
    if not questions or (len(questions) != batch_size and not shared):
        raise InvalidArgumentError(
            f"expected one question or one for each of {batch_size} rows of the cache"
            f"{' (an answer is kept in its own row)' if keep else ''}, got {len(questions)}"
        )
    prefixes = _one_each("answer_prefix", answer_prefix, str, len(questions))
    bounds = _one_each("max_new_tokens", max_new_tokens, int, len(questions))
    asked = list(zip(questions, prefixes, bounds, strict=True))
    if not keep:
        return _answered(model, tokenizer, cache, asked)[0]
    with cache.turn_lock:  # one turn after another: each begins where the one before it ends
        answers, grown = _answered(model, tokenizer, cache, asked, keep=True)
        cache.adopt_turn(grown)
    return answers


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of an answer's ids."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _one_each(name: str, given: _T | Sequence[_T], kind: type[_T], n: int) -> list[_T]:
    """Returns ``n`` values: the one given for all, or those of the list that is given."""
    values = [given] * n if isinstance(given, kind) else list(given)  # type: ignore[arg-type]
    if len(values) != n:
        raise InvalidArgumentError(f"expected {name} once, or one for each of {n} questions, got {len(values)}")
    return values


def question_ids(tokenizer: Any, question: str, answer_prefix: str = "", *, is_first: bool = True) -> list[int]:
    """Returns the ids of a question: the question, the end of the user's turn, and the beginning of the answer."""
    before = () if is_first else turn_break(tokenizer)
    text = question.strip()
    if is_first and text:
        text = "\n\n" + text
    return [*before, *encode(tokenizer, text), *chat_frame(tokenizer).suffix, *encode(tokenizer, answer_prefix)]


def _answered(
    model: Any, tokenizer: Any, cache: RaggedCache, asked: Sequence[tuple[str, str, int]], *, keep: bool = False
) -> tuple[list[list[int]], RaggedCache]:
    """Returns the ids of the answers, and a fork of the cache that has read what is to be kept of them.

    ``asked`` holds a question, the beginning of its answer and the most tokens to generate for each.
    """
    grown = cache.fork()
    is_first = not grown.turn_starts
    rows = [question_ids(tokenizer, text, prefix, is_first=is_first) for text, prefix, _ in asked]
    if len(rows) > grown.batch_size:
        grown.batch_repeat_interleave(len(rows))
    ids, valid = left_padded(rows, input_device(model))
    most, ended = max(bound for *_, bound in asked), eos_ids(model, tokenizer)
    generated = generate(model, grown, ids, most, attention_mask=valid, eos_ids=ended)
    answers = [ids[:bound] for ids, (*_, bound) in zip(generated, asked, strict=True)]
    if not keep:
        return answers, grown
    as_read = answers == generated  # False if an answer was cut at a lower bound, beyond which its row has read on
    return answers, _after_turn(model, cache, grown if as_read else None, rows, answers)


def _after_turn(
    model: Any, cache: RaggedCache, grown: RaggedCache | None, rows: list[list[int]], generated: list[list[int]]
) -> RaggedCache:
    """Returns ``cache`` with the questions and answers of a turn in it.

    ``grown`` has read most of them as it generated. If it is None, or the answers differ in length, all are read again.
    """
    if grown is None or len({len(row) for row in generated}) > 1:  # rows that ended first have read on: read all again
        grown = cache.fork()
        unread = [[*question, *answer] for question, answer in zip(rows, generated, strict=True)]
    else:
        n_read = grown.get_seq_length() - cache.get_seq_length()
        n_left = max(len(row) for row in rows) + len(generated[0]) - n_read  # the last token, or all if none was asked
        unread = [[*question, *answer][-n_left:] for question, answer in zip(rows, generated, strict=True)]
        unread = unread if n_left else []
    if unread:
        attach(model)
        ids, valid = left_padded(unread, input_device(model))
        read(model, grown, ids, padding=padding_in(valid, (ids.shape[0], ids.shape[1])))
    return grown
