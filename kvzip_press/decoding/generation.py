"""Generates tokens from a cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import takewhile
from typing import Any

import torch

from kvzip_press.arguments.ids import check_vocabulary, id_rows
from kvzip_press.arguments.model import takes_model
from kvzip_press.arguments.numbers import is_int
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.padding import padding_in
from kvzip_press.decoding.forward import check_reading, next_positions, read
from kvzip_press.decoding.sampling import Sampling, most_likely
from kvzip_press.decoding.step import DecodeStep
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import max_positions
from kvzip_press.model.watching import computing

MIN_GRAPH_TOKENS = 16


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Returns the ids that end an answer, according to the model's generation config and the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return ids | ({tokenizer.eos_token_id} - {None})


@takes_model
@computing()
@torch.no_grad()
def generate(
    model: Any,
    cache: Any,
    input_ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    eos_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    streamer: Any = None,
    watch: Callable[[torch.Tensor], None] | None = None,
    graph: bool | None = None,
    compile: bool = False,  # noqa: A002  # torch's name for it
) -> list[list[int]]:
    """Generates tokens from a cache, which grows by what is read and generated.

    Rows of different lengths, in the cache and in ``input_ids``, generate what each would alone. A row that has ended
    reads on until all have: to continue from its end, fork the cache before (or use ``answer(..., keep=True)``).

    Args:
        model: A causal language model.
        cache: Its cache; for a compressed one on a GPU, decode steps replay a CUDA graph.
        input_ids: int64 ``[batch, n]``, the tokens to read first, n >= 1 (:func:`kvzip_press.question_ids` frames a
            question); or the ids of one row, or a list of rows of equal length.
        max_new_tokens: Most tokens to generate per row.
        attention_mask: ``[batch, n]``, 0 or False at padding in ``input_ids``, which must be on the left; padding needs
            a compressed cache. None for no padding. The padding that is already in the cache need not be given.
        eos_ids: The ids that end a row.
        sampling: How to sample; None takes the most likely token.
        streamer: A transformers streamer (``put``, ``end``), for one row; as in transformers it gets ``input_ids``
            first.
        watch: Is given the logits ``[batch, vocabulary]`` from which each token is chosen, one step after another; they
            are valid until it returns.
        graph: See :class:`kvzip_press.decoding.step.DecodeStep`. By default a graph is captured if that is possible and
            ``max_new_tokens`` is at least 16: a capture takes as long as a few steps.
        compile: See :class:`kvzip_press.decoding.step.DecodeStep`.

    Returns:
        The generated ids of every row, without the one that ended it.

    Raises:
        CacheMismatchError: The cache has another number of rows.
        InvalidArgumentError: An argument is out of range, or there are more tokens than the model has positions.
        UnsupportedCacheError: There is padding, but the cache is not compressed.
    """
    input_ids = _checked_ids(model, cache, input_ids, max_new_tokens)
    choose = _watched(chooser(sampling), watch)
    check_streamer(streamer, input_ids.shape[0])
    padding = None if attention_mask is None else padding_in(attention_mask, (input_ids.shape[0], input_ids.shape[1]))
    input_ids = input_ids.to(input_device(model))
    padding = None if padding is None else padding.to(input_ids.device)
    _check_positions(model, cache, input_ids, padding, max_new_tokens)
    ended = set(eos_ids)
    rows: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
    unended = set(range(len(rows)))
    with (
        _streaming(streamer, input_ids) as show,
        closing(
            _tokens(model, cache, input_ids, padding, max_new_tokens, choose, graph=graph, compile=compile)
        ) as tokens,
    ):
        for chosen in tokens:
            for number, token in enumerate(chosen.tolist()):
                rows[number].append(token)
                if token in ended:
                    unended.discard(number)
            if not unended:
                break
            show(chosen)
    return [list(takewhile(lambda token: token not in ended, row)) for row in rows]


def _checked_ids(model: Any, cache: Any, input_ids: object, max_new_tokens: object) -> torch.Tensor:
    """Returns the ids as rows, int64 ``[batch, n]``, after a look at all that comes with them."""
    if not callable(getattr(cache, "get_seq_length", None)):
        raise InvalidArgumentError(
            f"generate(model, cache, input_ids, max_new_tokens, ...): expected a cache, got {type(cache).__name__}"
        )
    ids = id_rows(input_ids, "input_ids [batch, n >= 1]")
    if not is_int(max_new_tokens) or max_new_tokens < 0:
        raise InvalidArgumentError(f"expected max_new_tokens >= 0, got {max_new_tokens!r:.80}")
    check_vocabulary(model, int(ids.min()), int(ids.max()))
    return ids


def chooser(sampling: Sampling | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that chooses tokens: ids ``[batch]`` from logits ``[batch, vocabulary]``.

    Raises:
        InvalidArgumentError: This is neither None nor a ``Sampling``.
    """
    if not isinstance(sampling, Sampling | None):
        raise InvalidArgumentError(
            f"expected sampling as Sampling(temperature=..., top_k=..., top_p=...) or None, got {sampling!r:.80}"
        )
    return most_likely if sampling is None else sampling.sampler()


def _watched(
    choose: Callable[[torch.Tensor], torch.Tensor], watch: Callable[[torch.Tensor], None] | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    if watch is None:
        return choose

    def watched(logits: torch.Tensor) -> torch.Tensor:
        watch(logits)
        return choose(logits)

    return watched


def check_streamer(streamer: Any, n_rows: int) -> None:
    """Raises InvalidArgumentError unless this is None, or a streamer for one row."""
    if streamer is None:
        return
    if isinstance(streamer, type) or not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise InvalidArgumentError(
            "expected a streamer with the methods `put` and `end`, such as transformers.TextStreamer(tokenizer, "
            f"skip_prompt=True), got {streamer!r:.80}"
        )
    if n_rows != 1:
        raise InvalidArgumentError(f"expected one row for a streamer, got {n_rows}: what it shows would be mixed up")


@contextmanager
def _streaming(streamer: Any, input_ids: torch.Tensor) -> Iterator[Callable[[torch.Tensor], None]]:
    """Gives a function that shows each token; the streamer is ended in any case: somebody may be waiting for it.

    Only one that raised itself is left alone.
    """
    if streamer is None:
        yield lambda _: None
        return
    is_well = True

    def show(token: torch.Tensor) -> None:
        nonlocal is_well
        is_well = False
        streamer.put(token.cpu())
        is_well = True

    show(input_ids)
    try:
        yield show
    finally:
        if is_well:
            streamer.end()


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
    """Yields the chosen tokens ``[batch]`` one after another; the model does not read the last one."""
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
    held = next_positions(cache, input_ids.shape[0], input_ids.device)
    ends = held + input_ids.shape[1] + max_new_tokens - (0 if padding is None else padding)
    needed = int(ends.max())
    limit = max_positions(model)
    if limit is not None and needed > limit:
        raise InvalidArgumentError(
            f"expected context, question and answer within the model's {limit} positions, got up to {needed}"
        )
    check_reading(model, cache, ends - held, held)
