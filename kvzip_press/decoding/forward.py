"""Reads tokens into a cache, in each row from where its own tokens end; rows may read different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.cache.all_layers import all_or_nothing
from kvzip_press.cache.padded_block import block_cache
from kvzip_press.cache.padding import visible_columns
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import CacheMismatchError
from kvzip_press.model.rope import check_frequencies, depends_on_length, with_own_rotation
from kvzip_press.model.watching import computing
from kvzip_press.sharing.layer import holding


def next_positions(cache: Any, batch_size: int, device: torch.device) -> torch.Tensor:
    """Returns the position of each row's next token, int64 ``[batch]``: where its own tokens end."""
    ragged = _first_ragged(cache)
    if ragged is None:
        return torch.full((batch_size,), int(cache.get_seq_length()), device=device)
    return ragged.next_positions.to(device)


def check_reading(model: Any, cache: Any, n_tokens: torch.Tensor | int, positions: torch.Tensor | None = None) -> None:
    """Raises InvalidArgumentError if reading on would change the frequencies that a compressed cache was made with.

    Args:
        model: The model.
        cache: Its cache.
        n_tokens: The most tokens that will be read; for each row ``[batch]``, or the same for all.
        positions: ``[batch]``, the position of each row's next token; by default where its own tokens end.
    """
    ragged = _first_ragged(cache)
    if ragged is None or not depends_on_length(model):
        return
    held = ragged.next_positions if positions is None else positions
    check_frequencies(model, held.tolist(), (held + n_tokens).tolist())


@computing()
@torch.no_grad()
def read(
    model: Any,
    cache: Any,
    token_ids: torch.Tensor,
    *,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    n_last: int | None = None,
) -> torch.Tensor:
    """Reads tokens into a cache, each row at its own positions.

    Args:
        model: A causal language model that is attached (:func:`kvzip_press.attach`).
        cache: Its cache, which grows.
        token_ids: int64 ``[batch, n]``.
        padding: int64 ``[batch]``, columns of padding on the left of ``token_ids``; only for a compressed cache.
        positions: int64 ``[batch]``, the position of each row's first token; by default where the row's own tokens end.
        n_last: Of how many of the last tokens logits are wanted; None for the last one alone.

    Returns:
        Logits ``[batch, vocabulary]`` of each row's last token; with ``n_last``, ``[batch, n_last, vocabulary]``.

    If an error is raised, or the program is interrupted, the cache stays as it was.

    Raises:
        CacheMismatchError: The cache has another number of rows.
        InvalidArgumentError: Sliding layers hold padding that is not on the left.
        UnsupportedCacheError: There is padding, but the cache is not compressed.
    """
    batch_size, n = token_ids.shape
    first = next_positions(cache, batch_size, token_ids.device) if positions is None else positions
    if first.shape[0] != batch_size:
        raise CacheMismatchError(f"expected tokens for the {first.shape[0]} rows of the cache, got {batch_size} rows")
    rows = first[:, None] + torch.arange(n, device=token_ids.device)
    mask = _mask_of_dense_layers(cache, n, padding)
    with all_or_nothing(cache):
        if padding is None:
            return forward(model, cache, token_ids, rows, mask, n_last=n_last)
        rows = (rows - padding[:, None]).clamp(min=0)
        return forward(model, block_cache(cache, padding), token_ids, rows, mask, n_last=n_last)


def _first_ragged(cache: Any) -> RaggedLayer | None:
    return next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, RaggedLayer)), None)


def _mask_of_dense_layers(cache: Any, n: int, padding: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the mask ``[batch, seen + n]`` that sliding layers need if rows have padding; None if none is needed.

    Ragged layers know their own padding.
    """
    ragged = _first_ragged(cache)
    if ragged is None or all(isinstance(layer, RaggedLayer) for layer in holding(cache.layers)):
        return None
    hidden = ragged.left_padding if padding is None else ragged.left_padding + padding
    return visible_columns(hidden, cache.get_seq_length() + n).long() if bool(hidden.any()) else None


def forward(
    model: Any,
    cache: Any,
    token_ids: torch.Tensor,
    position_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    n_last: int | None = None,
) -> torch.Tensor:
    """Runs one forward over ``token_ids`` ``[batch, n]`` at ``position_ids`` of the same shape.

    Returns:
        Logits ``[batch, vocabulary]`` of the last tokens; with ``n_last``, ``[batch, n_last, vocabulary]``.
    """
    own = with_own_rotation(model)
    with compat.uncompiled(model):
        output = own(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=n_last or 1,
            **compat.cache_argument(own, cache),
        )
    logits: torch.Tensor = output.logits if n_last else output.logits[:, -1]
    return logits
