"""Reads a context, scores it and evicts, in one call: the shortest way from a text to a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvzip_press.arguments.model import takes_model
from kvzip_press.arguments.press import ForeignPress, as_press
from kvzip_press.cache.cold.place import check_place
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.model.chat import Context
from kvzip_press.model.watching import computing
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.prefilling.eviction import check_storage, storage_of
from kvzip_press.prefilling.whole import Scorer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


@takes_model
@computing()
def compress(
    model: nn.Module,
    tokenizer: Any,
    context: Context | Sequence[Context],
    press: Scorer | ForeignPress | str,
    *,
    compression_ratio: float | None = None,
    split_special_tokens: bool = False,
    storage: str | None = None,
    cold: str | Path | None = None,
) -> RaggedCache:
    """Reads a context and compresses it into a cache that is ready for many questions (see :func:`kvzip_press.answer`).

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        context: The text or its token ids (a list, or a tensor ``[n]`` or ``[1, n]``); or a list of such contexts,
            which become the rows of one cache.
        press: The press, with its compression ratio; one of kvpress; or the name of one, with ``compression_ratio``.
        compression_ratio: Fraction of pairs removed, in [0, 1), by a press that is given by its name.
        split_special_tokens: Whether control tokens that are spelled out in a text (``<|im_end|>``) are read as
            ordinary text, as those of others should be; otherwise they become control tokens.
        storage: How kept pairs are stored (see :class:`kvzip_press.press.Press`); by default as the press says.
        cold: Where evicted pairs are kept, so that :meth:`kvzip_press.RaggedCache.restore` can bring them back: "cpu"
            (host memory) or the path of a file, which is replaced; None keeps none.

    Raises:
        CacheFileError: The file for the evicted pairs cannot be written.
        InvalidArgumentError: A context is empty, longer than the model's positions, or neither text nor token ids of
            the model's vocabulary; what is given as a press is none, or a name without a ratio; the press cannot score
            the context; the storage is unknown or cannot hold the model's keys and values; or evicted pairs cannot be
            kept there, or not of a press that decides its own counts.
        UnsupportedModelError: The model has no layer that can be compressed, or its attention is not that of a ragged
            cache.
    """
    chosen: Scorer = as_press(press, compression_ratio)
    check_storage(model, storage_of(chosen) if storage is None else storage)
    if cold is not None:
        check_place(cold)
    done = prefill(model, tokenizer, context, observers=[chosen], split_special_tokens=split_special_tokens)
    done.evict_in_place(chosen.score(done), storage=storage, cold=cold)
    return RaggedCache.of(done.cache)
