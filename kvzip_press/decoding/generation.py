"""Questions to a compressed cache, and generation behind one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from itertools import takewhile
from typing import Any, TypeVar, overload

import torch

from kvzip_press.attention.implementation import attach
from kvzip_press.cache.padding import left_padded, padding_in
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.forward import next_positions, read
from kvzip_press.decoding.sampling import Sampling, most_likely
from kvzip_press.decoding.step import DecodeStep
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import chat_frame, encode, turn_break
from kvzip_press.model.structure import input_device, text_config

ASKED_AT_ONCE = 32  # questions that a long list of them is cut into: a batch shares its context, not its tails
MIN_GRAPH_TOKENS = 16

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
    """Answers a question about a compressed context, greedily; or many at once, in one batch.

    The cache is unchanged afterwards, unless question and answer are to be kept in it: then the next question, kept or
    not, comes after them, framed as a new turn by the model's chat template.

    A list of questions gets a list of answers: one question for each row of a cache that was made of several contexts,
    or many questions about the one context of a cache of one row, which they share in memory. A single question goes
    to all rows. Each row answers as it would alone.

    Args:
        model: The model that made the cache.
        tokenizer: Its tokenizer.
        cache: From ``compress``, ``Prefill.evict`` or ``RaggedCache.of``.
        question: The question; it follows the context in the user's turn after an empty line. Or a list of questions.
            An empty one adds nothing: the context ends with the question.
        answer_prefix: How each answer begins; not part of what is returned. One for all, or a list of one a question.
        max_new_tokens: Most tokens to generate. One bound for all, or a list of one a question.
        keep: Whether the cache remembers this question and its answer. An error leaves it as it was.

    Returns:
        The answer as a text for one question and a cache of one row, else (for a cache of several rows also where the
        question is a text, which type checkers cannot see) a list of answers.

    Raises:
        CacheMismatchError: The cache was made by another model.
        InvalidArgumentError: Context, question and answer exceed the model's positions; another number of questions
            than rows, or of prefixes or bounds than questions; several questions to keep in one row.
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
    """The ids of the answers that :func:`answer` returns as texts, without those that ended them."""
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
    is_first = not cache.turn_starts
    rows = [
        question_ids(tokenizer, text, prefix, is_first=is_first)
        for text, prefix in zip(questions, prefixes, strict=True)
    ]
    grown = cache.fork()
    if len(rows) > batch_size:
        grown.batch_repeat_interleave(len(rows))
    generated = _generate_rows(model, grown, rows, max(bounds), eos_ids(model, tokenizer))
    answers = [ids[:bound] for ids, bound in zip(generated, bounds, strict=True)]
    if keep:
        as_read = answers == generated  # not those of a lower bound, whose rows have read on
        cache.adopt_turn(_after_turn(model, cache, grown if as_read else None, rows, answers))
    return answers


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer's ids."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _one_each(name: str, given: _T | Sequence[_T], kind: type[_T], n: int) -> list[_T]:
    """``n`` values: the one given for all, or the ones of a list."""
    values = [given] * n if isinstance(given, kind) else list(given)  # type: ignore[arg-type]
    if len(values) != n:
        raise InvalidArgumentError(f"expected {name} once, or one for each of {n} questions, got {len(values)}")
    return values


def question_ids(tokenizer: Any, question: str, answer_prefix: str = "", *, is_first: bool = True) -> list[int]:
    """Ids of a question: the question, the end of the user's turn, the answer's beginning.

    The first question follows the context in the user's turn; a later one begins a turn of its own, after an answer.
    """
    before = () if is_first else turn_break(tokenizer)
    text = question.strip()
    if is_first and text:
        text = "\n\n" + text
    return [*before, *encode(tokenizer, text), *chat_frame(tokenizer).suffix, *encode(tokenizer, answer_prefix)]


def _generate_rows(
    model: Any, cache: RaggedCache, rows: list[list[int]], max_new_tokens: int, ended: Collection[int]
) -> list[list[int]]:
    ids, valid = left_padded(rows, input_device(model))
    return generate(model, cache, ids, max_new_tokens, attention_mask=valid, eos_ids=ended)


def _after_turn(
    model: Any, cache: RaggedCache, grown: RaggedCache | None, rows: list[list[int]], generated: list[list[int]]
) -> RaggedCache:
    """What ``cache`` becomes by a turn: questions and answers, most of which ``grown`` read while it wrote them."""
    if grown is None or len({len(row) for row in generated}) > 1:  # rows that ended first have read on: all again
        grown = cache.fork()
        unread = [[*question, *answer] for question, answer in zip(rows, generated, strict=True)]
    else:
        n_read = max(len(row) for row in rows) + len(generated[0])
        unread = [row[-1:] for row in generated] if grown.get_seq_length() - cache.get_seq_length() < n_read else []
    if unread:
        attach(model)
        ids, valid = left_padded(unread, input_device(model))
        read(model, grown, ids, padding=padding_in(valid, (ids.shape[0], ids.shape[1])))
    return grown


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer, by the model's generation config and the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return ids | ({tokenizer.eos_token_id} - {None})


@torch.no_grad()
def generate(
    model: Any,
    cache: Any,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    eos_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    streamer: Any = None,
    graph: bool | None = None,
    compile: bool = False,  # noqa: A002  # torch's name for it
) -> list[list[int]]:
    """Generates behind a cache, which grows by what is read and written.

    Rows of different length, in the cache and in ``input_ids``, generate what each would alone. A row that has ended
    reads on until all have: to go on from its end, fork the cache before (or use ``answer(..., keep=True)``).

    Args:
        model: A causal language model.
        cache: Its cache; with a compressed one on a GPU the decode steps replay a CUDA graph.
        input_ids: int64 ``[batch, n]``, what is read first, n >= 1.
        max_new_tokens: Most tokens to generate a row.
        attention_mask: ``[batch, n]``, 0 or False at padding in ``input_ids``, which must be on the left; needs a
            compressed cache. None: there is none. What the cache holds of padding, it knows.
        eos_ids: The ids that end a row.
        sampling: How to sample; None takes the most likely token.
        streamer: A transformers streamer (``put``, ``end``), for one row; it gets ``input_ids`` first, as there.
        graph: See :class:`kvzip_press.decoding.step.DecodeStep`. By default a graph is captured where it is possible
            and ``max_new_tokens`` is at least 16: a capture takes as long as a few steps.
        compile: See :class:`kvzip_press.decoding.step.DecodeStep`.

    Returns:
        The generated ids of every row, without the one that ended it.

    Raises:
        CacheMismatchError: The cache has another number of rows.
        InvalidArgumentError: An argument out of range, or more tokens than the model has positions.
        UnsupportedCacheError: Padding, and a cache that is not compressed.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or max_new_tokens < 0:
        shape = tuple(input_ids.shape)
        raise InvalidArgumentError(
            f"expected input_ids [batch, n >= 1] and max_new_tokens >= 0, got {shape} and {max_new_tokens}"
        )
    if streamer is not None:
        if input_ids.shape[0] > 1:
            raise InvalidArgumentError(f"expected one row for a streamer, got {input_ids.shape[0]}")
        streamer.put(input_ids.cpu())
    padding = None if attention_mask is None else padding_in(attention_mask, (input_ids.shape[0], input_ids.shape[1]))
    input_ids = input_ids.to(input_device(model))
    padding = None if padding is None else padding.to(input_ids.device)
    _check_positions(model, cache, input_ids, padding, max_new_tokens)
    choose = most_likely if sampling is None else sampling.sampler()
    ended = set(eos_ids)
    rows: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
    unended = set(range(len(rows)))
    with closing(
        _tokens(model, cache, input_ids, padding, max_new_tokens, choose, graph=graph, compile=compile)
    ) as tokens:
        for chosen in tokens:
            for number, token in enumerate(chosen.tolist()):
                rows[number].append(token)
                if token in ended:
                    unended.discard(number)
            if not unended:
                break
            if streamer is not None:
                streamer.put(chosen.cpu())
    if streamer is not None:
        streamer.end()
    return [list(takewhile(lambda token: token not in ended, row)) for row in rows]


def _tokens(
    model: Any,
    cache: Any,
    input_ids: torch.Tensor,
    padding: torch.Tensor | None,
    max_new_tokens: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    *,
    graph: bool | None,
    compile: bool,  # noqa: A002
) -> Generator[torch.Tensor]:
    """The chosen tokens ``[batch]`` one after another; the last one is not read by the model."""
    if max_new_tokens == 0:
        return
    attach(model)
    chosen = choose(read(model, cache, input_ids, padding=padding))
    yield chosen
    if max_new_tokens == 1:
        return
    if graph is None and not compile and max_new_tokens < MIN_GRAPH_TOKENS:
        graph = False
    with DecodeStep(model, cache, max_new_tokens=max_new_tokens - 1, graph=graph, compile=compile) as step:
        for _ in range(max_new_tokens - 1):
            chosen = choose(step(chosen))
            yield chosen


def _check_positions(
    model: Any, cache: Any, input_ids: torch.Tensor, padding: torch.Tensor | None, max_new_tokens: int
) -> None:
    ends = next_positions(cache, input_ids.shape[0], input_ids.device) + input_ids.shape[1]
    needed = int((ends if padding is None else ends - padding).max()) + max_new_tokens
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise InvalidArgumentError(
            f"expected context, question and answer within the model's {limit} positions, got up to {needed}"
        )
