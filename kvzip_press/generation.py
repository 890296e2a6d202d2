"""Questions to a compressed cache, and generation behind one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import closing
from itertools import takewhile
from typing import Any

import torch

from kvzip_press.attention import attach
from kvzip_press.chat import chat_frame, encode, turn_break
from kvzip_press.decoding import DecodeStep, forward
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.models import text_config
from kvzip_press.ragged_cache import RaggedCache
from kvzip_press.sampling import Sampling, most_likely

MIN_GRAPH_TOKENS = 16


def answer(
    model: Any,
    tokenizer: Any,
    cache: RaggedCache,
    question: str,
    answer_prefix: str = "",
    max_new_tokens: int = 64,
    *,
    keep: bool = False,
) -> str:
    """Answers a question about a compressed context, greedily.

    The cache is unchanged afterwards, unless question and answer are to be kept in it: then the next question, kept or
    not, comes after them, framed as a new turn by the model's chat template.

    Args:
        model: The model that made the cache.
        tokenizer: Its tokenizer.
        cache: From ``compress``, ``Prefill.evict`` or ``RaggedCache.of``.
        question: The question; it follows the context in the user's turn after an empty line.
        answer_prefix: How the answer begins; not part of what is returned.
        max_new_tokens: Most tokens to generate.
        keep: Whether the cache remembers this question and its answer. An error leaves it as it was.

    Raises:
        CacheMismatchError: The cache was made by another model.
        InvalidArgumentError: Context, question and answer exceed the model's positions.
    """
    ids = question_ids(tokenizer, question, answer_prefix, is_first=not cache.turn_starts)
    grown = cache.fork()
    [generated] = generate(model, grown, torch.tensor([ids]), max_new_tokens, eos_ids=eos_ids(model, tokenizer))
    if keep:
        _read_last(model, grown, generated, n_seen=cache.get_seq_length() + len(ids))
        cache.adopt_turn(grown)
    return str(tokenizer.decode(generated, skip_special_tokens=True)).strip()


def question_ids(tokenizer: Any, question: str, answer_prefix: str = "", *, is_first: bool = True) -> list[int]:
    """Ids of a question: the question, the end of the user's turn, the answer's beginning.

    The first question follows the context in the user's turn; a later one begins a turn of its own, after an answer.
    """
    before = () if is_first else turn_break(tokenizer)
    text = "\n\n" + question.strip() if is_first else question.strip()
    return [*before, *encode(tokenizer, text), *chat_frame(tokenizer).suffix, *encode(tokenizer, answer_prefix)]


@torch.no_grad()
def _read_last(model: Any, cache: Any, generated: list[int], *, n_seen: int) -> None:
    """Lets the model read the last generated token, where generation stopped before it had."""
    if cache.get_seq_length() == n_seen + len(generated):
        return
    last = torch.tensor([generated[-1:]], device=model.get_input_embeddings().weight.device)
    forward(model, cache, last, _positions(cache, last))


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
    eos_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    streamer: Any = None,
    graph: bool | None = None,
    compile: bool = False,  # noqa: A002  # torch's name for it
) -> list[list[int]]:
    """Generates behind a cache, which grows by what is read and written.

    Args:
        model: A causal language model.
        cache: Its cache; with a compressed one on a GPU the decode steps replay a CUDA graph.
        input_ids: int64 ``[batch, n]``, what is read first, n >= 1, without padding.
        max_new_tokens: Most tokens to generate a row.
        eos_ids: The ids that end a row.
        sampling: How to sample; None takes the most likely token.
        streamer: A transformers streamer (``put``, ``end``), for one row; it gets ``input_ids`` first, as there.
        graph: See :class:`kvzip_press.decoding.DecodeStep`. By default a graph is captured where it is possible and
            ``max_new_tokens`` is at least 16: a capture takes as long as a few steps.
        compile: See :class:`kvzip_press.decoding.DecodeStep`.

    Returns:
        The generated ids of every row, without the one that ended it.

    Raises:
        InvalidArgumentError: An argument out of range, or more tokens than the model has positions.
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
    _check_positions(model, cache.get_seq_length() + input_ids.shape[1] + max_new_tokens)
    choose = most_likely if sampling is None else sampling.sampler()
    ended = set(eos_ids)
    rows: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
    unended = set(range(len(rows)))
    with closing(_tokens(model, cache, input_ids, max_new_tokens, choose, graph=graph, compile=compile)) as tokens:
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
    input_ids = input_ids.to(model.get_input_embeddings().weight.device)
    chosen = choose(forward(model, cache, input_ids, _positions(cache, input_ids)))
    yield chosen
    if max_new_tokens == 1:
        return
    if graph is None and not compile and max_new_tokens < MIN_GRAPH_TOKENS:
        graph = False
    with DecodeStep(model, cache, max_new_tokens=max_new_tokens - 1, graph=graph, compile=compile) as step:
        for _ in range(max_new_tokens - 1):
            chosen = choose(step(chosen))
            yield chosen


def _positions(cache: Any, input_ids: torch.Tensor) -> torch.Tensor:
    return (cache.get_seq_length() + torch.arange(input_ids.shape[1], device=input_ids.device)).expand_as(input_ids)


def _check_positions(model: Any, needed: int) -> None:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise InvalidArgumentError(
            f"expected context, question and answer within the model's {limit} positions, got up to {needed}"
        )
