"""Asks questions of a compressed cache and returns the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch

from kvzip_press.arguments.ids import described
from kvzip_press.arguments.model import check_tokenizer, takes_model
from kvzip_press.arguments.numbers import is_int
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.padding import left_padded, padding_in
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.generation import check_streamer, eos_ids, generate
from kvzip_press.decoding.sampling import Sampling
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import chat_frame, encode, turn_break
from kvzip_press.model.devices import input_device

ASKED_AT_ONCE = 32  # questions in one batch of a longer list: its rows share the context, but not their tails


@overload
def answer(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str,
    answer_prefix: str | Sequence[str] = "",
    max_new_tokens: int | Sequence[int] = 64,
    *,
    sampling: Sampling | None = None,
    seed: int | None = None,
    streamer: Any = None,
    keep: bool = False,
    split_special_tokens: bool = False,
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
    sampling: Sampling | None = None,
    seed: int | None = None,
    streamer: Any = None,
    keep: bool = False,
    split_special_tokens: bool = False,
) -> list[str]: ...


@takes_model
def answer(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str | Sequence[str],
    answer_prefix: str | Sequence[str] = "",
    max_new_tokens: int | Sequence[int] = 64,
    *,
    sampling: Sampling | None = None,
    seed: int | None = None,
    streamer: Any = None,
    keep: bool = False,
    split_special_tokens: bool = False,
) -> str | list[str]:
    """Answers one question about a compressed context, or many in one batch.

    The cache is unchanged afterwards, unless ``keep`` is True: then question and answer stay in it, and the next
    question, kept or not, follows them as a new turn, framed by the model's chat template.

    For a list of questions a list of answers is returned. The list has one question for each row of a cache that was
    made from several contexts, or any number of questions about the one context of a cache with one row, which they
    share in memory. A single question goes to all rows. Each row answers as it would alone.

    Args:
        model: The model that made the cache.
        tokenizer: Its tokenizer.
        cache: From ``compress``, ``Prefill.evict`` or ``with press(model):``.
        question: The question; it follows the context in the user's turn after an empty line. Or a list of questions.
            An empty question adds nothing, for a context that itself ends with the question.
        answer_prefix: How each answer begins; not part of what is returned. One for all, or a list with one for each
            question.
        max_new_tokens: Most tokens to generate. One bound for all, or a list with one for each question.
        sampling: How to sample the tokens; None takes the most likely one each time.
        seed: Seed of the sampling: the same seed gives the same answer, and PyTorch's own random numbers stay as they
            are. None takes that of ``sampling``, and without one PyTorch's default generator. Questions in one batch
            draw from one generator, so what one of them gets depends on the others.
        streamer: A transformers streamer (``TextStreamer(tokenizer, skip_prompt=True)``), which is given the tokens as
            they come; for one question and a cache of one row. It gets the question's ids first, and the answer without
            ``answer_prefix``.
        keep: Whether the cache remembers this question and its answer. If an error is raised, it stays as it was. In
            several threads, turns that one cache keeps follow one another.
        split_special_tokens: Whether control tokens that are spelled out in a question or in the beginning of an answer
            (``<|im_end|>``) are read as ordinary text, as those of others should be; otherwise they become control
            tokens. Those of the chat template always are.

    Returns:
        The answer as a text, for one question and a cache of one row; otherwise a list of answers. For a cache of
        several rows that is so even if the question is a text, which type checkers cannot see.

    Raises:
        CacheMismatchError: The cache was made by another model, or is not compressed.
        InvalidArgumentError: Context, question and answer exceed the model's positions; the number of questions does
            not fit the rows, or the number of prefixes or bounds the questions; several questions are to be kept in one
            row; one is no text, or a bound is negative; the tokenizer cannot split special tokens; there are several
            rows for a streamer; or a seed, but no sampling.
    """
    cache = RaggedCache.of(cache)
    generated = answer_ids(
        model,
        tokenizer,
        cache,
        question,
        answer_prefix,
        max_new_tokens,
        sampling=sampling,
        seed=seed,
        streamer=streamer,
        keep=keep,
        split_special_tokens=split_special_tokens,
    )
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
    sampling: Sampling | None = None,
    seed: int | None = None,
    streamer: Any = None,
    keep: bool = False,
    split_special_tokens: bool = False,
    watch: Callable[[torch.Tensor], None] | None = None,
) -> list[list[int]]:
    """Returns the ids of the answers that :func:`answer` returns as texts, without the ids that ended them.

    ``watch`` is that of :func:`kvzip_press.generate`.
    """
    if isinstance(question, bytes | Mapping) or not isinstance(question, Iterable):
        said = described(question, "the question as text")
        raise InvalidArgumentError(f"expected a question as text, or a list of questions, got {said}")
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
    if not all(isinstance(text, str) for text in questions):
        raise InvalidArgumentError(
            f"expected a question as text, or a list of questions as texts, got {question!r:.80}"
        )
    prefixes: list[str] = _one_each("answer_prefix", "a text", answer_prefix, _is_text, len(questions))
    bounds: list[int] = _one_each("max_new_tokens", "an int of 0 or more", max_new_tokens, _is_bound, len(questions))
    check_streamer(streamer, len(questions))
    asked = _Asked(questions, prefixes, bounds, split_special_tokens, seeded(sampling, seed), streamer, watch)
    if not keep:
        return _answered(model, tokenizer, cache, asked)[0]
    with cache.turn_lock:  # one turn after another: each begins where the one before it ends
        answers, grown = _answered(model, tokenizer, cache, asked, keep=True)
        cache.adopt_turn(grown)
    return answers


def seeded(sampling: Sampling | None, seed: int | None) -> Sampling | None:
    """Returns how to sample with a seed, which one of the two may give."""
    if seed is None:
        return sampling
    if not isinstance(sampling, Sampling):
        raise InvalidArgumentError(
            f"expected sampling=Sampling(temperature=...) with seed={seed!r:.80}: the most likely token needs no seed"
        )
    if sampling.seed not in (None, seed):
        raise InvalidArgumentError(f"expected one seed, got {seed!r:.80} beside {sampling}")
    return replace(sampling, seed=seed)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of an answer's ids."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _one_each(name: str, what: str, given: Any, is_one: Callable[[object], bool], n: int) -> list[Any]:
    """Returns ``n`` values: the one given for all, or those of the list that is given."""
    if is_one(given):
        return [given] * n
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) else [given]
    if not all(map(is_one, values)):
        raise InvalidArgumentError(f"expected {name} to be {what}, or a list of such, got {given!r:.80}")
    if len(values) != n:
        raise InvalidArgumentError(f"expected {name} once, or one for each of {n} questions, got {len(values)}")
    return values


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bound(value: object) -> bool:
    return is_int(value) and value >= 0


def question_ids(
    tokenizer: Any,
    question: str,
    answer_prefix: str = "",
    *,
    is_first: bool = True,
    split_special_tokens: bool = False,
) -> list[int]:
    """Returns the ids of a question as :func:`kvzip_press.answer` reads it, for use with :func:`kvzip_press.generate`.

    They are the question, the end of the user's turn and the header of the answer, according to the tokenizer's chat
    template, and the beginning of the answer::

        ids = question_ids(tokenizer, "Where is the key?")
        [answer] = generate(model, cache.fork(), ids, max_new_tokens=64, eos_ids={tokenizer.eos_token_id})

    Args:
        tokenizer: The model's tokenizer.
        question: The question; an empty one adds nothing before the end of the turn.
        answer_prefix: How the answer begins.
        is_first: True for a question right behind the context: it follows in the user's turn, after an empty line.
            False for a turn of its own, behind an answer.
        split_special_tokens: Whether control tokens that are spelled out in question or prefix (``<|im_end|>``) are
            read as ordinary text, as those of others should be; otherwise they become control tokens.

    Returns:
        The token ids of one row, at least one unless there is no chat template and all texts are empty.

    Raises:
        InvalidArgumentError: A text is none; the chat template does not insert texts as they are; or the tokenizer
            cannot split special tokens.
    """
    check_tokenizer(tokenizer, "question_ids(tokenizer, question, ...)")
    if not isinstance(question, str) or not isinstance(answer_prefix, str):
        raise InvalidArgumentError(
            f"expected one question and its answer_prefix as texts, got {question!r:.80} and {answer_prefix!r:.80}"
        )
    asked, begun = (
        encode(tokenizer, part, split_special_tokens=split_special_tokens)
        for part in (_after_context(question) if is_first else question.strip(), answer_prefix)
    )
    before = () if is_first else turn_break(tokenizer)
    return [*before, *asked, *chat_frame(tokenizer).suffix, *begun]


def _after_context(question: str) -> str:
    text = question.strip()
    return "\n\n" + text if text else ""


@dataclass(frozen=True)
class _Asked:
    """What is asked: a question, the beginning of its answer and the most tokens to generate, for each."""

    questions: Sequence[str]
    prefixes: Sequence[str]
    bounds: Sequence[int]
    split_special_tokens: bool
    sampling: Sampling | None
    streamer: Any
    watch: Callable[[torch.Tensor], None] | None

    def rows(self, tokenizer: Any, *, is_first: bool) -> list[list[int]]:
        """Returns the ids of each question."""
        split = self.split_special_tokens
        return [
            question_ids(tokenizer, text, prefix, is_first=is_first, split_special_tokens=split)
            for text, prefix in zip(self.questions, self.prefixes, strict=True)
        ]


def _answered(
    model: Any, tokenizer: Any, cache: RaggedCache, asked: _Asked, *, keep: bool = False
) -> tuple[list[list[int]], RaggedCache]:
    """Returns the ids of the answers, and a fork of the cache that has read what is to be kept of them."""
    grown = cache.fork()
    is_first = not grown.turn_starts
    rows = asked.rows(tokenizer, is_first=is_first)
    if len(rows) > grown.batch_size:
        grown.batch_repeat_interleave(len(rows))
    ids, valid = left_padded(rows, input_device(model))
    ended = eos_ids(model, tokenizer)
    generated = generate(
        model,
        grown,
        ids,
        max(asked.bounds),
        attention_mask=valid,
        eos_ids=ended,
        sampling=asked.sampling,
        streamer=asked.streamer,
        watch=asked.watch,
    )
    answers = [ids[:bound] for ids, bound in zip(generated, asked.bounds, strict=True)]
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
