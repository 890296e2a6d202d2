"""Token ids from whatever a caller hands in: lists, tensors and arrays of integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch

from kvzip_press.errors import InvalidArgumentError


def items_of(given: object, what: str) -> list[Any]:
    """Returns the items of a list, a tuple, a tensor or an array, with Python's own integers for those of tensors.

    A tensor or array of two dimensions is taken if it has one row, whose items are returned.

    Args:
        given: What the caller gave.
        what: What was expected, for the message.

    Raises:
        InvalidArgumentError: It is something else, or a tensor of other numbers than integers or of several rows. The
            message says what to pass.
    """
    if hasattr(given, "tolist"):
        return _row_of(given, what)
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray | memoryview):
        raise InvalidArgumentError(f"expected {what}, got {described(given)}")
    scalars = (hasattr(item, "tolist") and getattr(item, "ndim", None) == 0 for item in given)
    return [item.tolist() if scalar else item for item, scalar in zip(given, scalars, strict=True)]


def described(given: object, encoded: str = "the text itself, or its input_ids") -> str:
    """Says what was given instead of texts or ids, and what to pass: ``encoded`` for what a tokenizer returned."""
    if isinstance(given, Mapping):
        names = ", ".join(map(str, given))
        if "input_ids" in given:
            return f"a {type(given).__name__} with {names:.80}: pass {encoded}"
        hint = ": pass its text; the chat template is put around it" if "content" in given else ""
        return f"a {type(given).__name__} with {names:.80}{hint}"
    if isinstance(given, bytes | bytearray):
        return f"{type(given).__name__}: decode them first, given.decode()"
    if isinstance(given, PurePath):
        return f"the path {str(given)!r:.80}: read it first, path.read_text()"
    if hasattr(given, "read"):
        return "an open file: read it first, file.read()"
    if given is None or isinstance(given, bool | int | float):
        return repr(given)
    return f"{type(given).__name__}"


def id_rows(given: object, what: str) -> torch.Tensor:
    """Returns token ids as a tensor of rows, int64 ``[batch, n]``.

    Args:
        given: A tensor or array ``[batch, n]`` or ``[n]``, a list of ids, or a list of rows of equal length.
        what: What was expected, for the message.

    Raises:
        InvalidArgumentError: It is something else, there is no id in it, or a number is no id.
    """
    if isinstance(given, str | Mapping):
        said = described(given, "its input_ids, and its attention_mask if rows are padded")
        said = "a text: question_ids(tokenizer, text) makes ids of it" if isinstance(given, str) else said
        raise InvalidArgumentError(f"expected {what}, got {said}")
    if not isinstance(given, torch.Tensor):
        rows = given.tolist() if hasattr(given, "tolist") else [_plain(row) for row in items_of(given, what)]
        try:
            given = torch.tensor(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(f"expected {what}, got {rows!r:.80} ({error})") from error
    ids = given[None] if given.dim() == 1 else given
    if ids.dim() != 2 or ids.numel() == 0:
        raise InvalidArgumentError(f"expected {what}, got a tensor of shape {tuple(given.shape)}")
    _check_integers(ids, what)
    return ids.long()


def check_vocabulary(model: Any, least: int, most: int) -> None:
    """Raises InvalidArgumentError unless ids from ``least`` to ``most`` have embeddings; a GPU would only stop."""
    n_known = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", most + 1)
    if least < 0 or most >= n_known:
        raise InvalidArgumentError(
            f"expected token ids from 0 to {n_known - 1}, those of the model's vocabulary, got "
            f"{least if least < 0 else most}: does the tokenizer belong to another model?"
        )


def _plain(row: Any) -> Any:
    return row.tolist() if hasattr(row, "tolist") else row


def _row_of(given: Any, what: str) -> list[Any]:
    _check_integers(given, what)
    shape = tuple(given.shape)
    if len(shape) == 2 and shape[0] == 1:
        given = given[0]
    elif len(shape) == 2:
        raise InvalidArgumentError(
            f"expected {what}, got a {type(given).__name__} of shape {shape}, whose padding would be read as text: "
            "pass a list of rows without padding"
        )
    if given.ndim != 1:
        raise InvalidArgumentError(f"expected {what}, got a {type(given).__name__} of shape {shape}")
    items: list[Any] = given.tolist()
    return items


def _check_integers(given: Any, what: str) -> None:
    dtype = given.dtype
    if isinstance(given, torch.Tensor):
        is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    else:
        is_integer = getattr(dtype, "kind", "") in ("i", "u")
    if not is_integer:
        raise InvalidArgumentError(f"expected {what}, got a {type(given).__name__} of {dtype}")
