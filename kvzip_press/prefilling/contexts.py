"""Reads contexts as callers give them: texts or token ids, framed by the model's chat template, one or a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvzip_press.arguments.model import takes_model
from kvzip_press.arguments.press import ForeignPress, as_press
from kvzip_press.cache.padding import left_padded
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import Context, chat_frame, check_ids, context_rows
from kvzip_press.model.devices import input_device
from kvzip_press.prefilling.whole import Prefill, Scorer, run_prefill

if TYPE_CHECKING:
    from torch import nn


@takes_model
def prefill(
    model: nn.Module,
    tokenizer: Any,
    context: Context | Sequence[Context],
    *,
    observers: Sequence[Scorer | ForeignPress] = (),
    split_special_tokens: bool = False,
) -> Prefill:
    """Reads a context once, framed by the model's chat template, ready for a question to follow it.

    Several contexts become the rows of one batch, padded on the left; each is scored and evicted as it would be alone.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        context: The text or its token ids (a list, or a tensor ``[n]`` or ``[1, n]``), without the chat template, which
            is put around either; or a list of such contexts.
        observers: Presses whose scorers watch the forward; each must be hashable. Scoring with them then needs no
            further forward for watching. One of kvpress is wrapped in a :class:`kvzip_press.RaggedPress`, which scores
            afterwards: it is a key of the prefill's ``observers``.
        split_special_tokens: Whether control tokens that are spelled out in a text (``<|im_end|>``) are read as
            ordinary text, as those of others should be; otherwise they become control tokens.

    Raises:
        InvalidArgumentError: A context is empty, longer than the model's positions, or neither text nor token ids of
            the model's vocabulary; or an observer is no press.
        UnsupportedModelError: The model has no layer that can be compressed, or its attention is not that of a ragged
            cache.
    """
    if not isinstance(observers, list | tuple):
        raise InvalidArgumentError(f"expected observers as a list of presses, got {type(observers).__name__}")
    watching = [as_press(press) for press in observers]
    frame = chat_frame(tokenizer)
    rows = [
        [*frame.prefix, *ids] for ids in context_rows(tokenizer, context, split_special_tokens=split_special_tokens)
    ]
    check_ids(model, rows)
    input_ids, valid = left_padded(rows, input_device(model))
    done = run_prefill(model, input_ids, valid, observers=watching)
    done.prefix_length, done.tokenizer = len(frame.prefix), tokenizer
    return done
