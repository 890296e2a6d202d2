"""Finds layers of a model that can read the keys and values of others: KVSharer's search.

KVSharer (https://arxiv.org/abs/2410.18517): pairs of layers by how far their mean keys and values lie apart, the
farthest first, and a pair stays if the model's last hidden states still point where they did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from kvzip_press import compat
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import encode
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import text_decoder
from kvzip_press.model.watching import computing
from kvzip_press.sharing.context import share_layers, shareable_layers

Order = Literal["dissimilar", "similar"]
ORDERS: tuple[Order, ...] = ("dissimilar", "similar")


@dataclass(frozen=True)
class FoundLayers:
    """What a search found.

    Attributes:
        sources: Index of each layer that reads another -> index of that other.
        cosine: Mean cosine between the last hidden states of each text with these shared layers and without; 1 if
            there are none.
        n_tried: Number of pairs of layers that were tried.
    """

    sources: dict[int, int]
    cosine: float
    n_tried: int


@computing()
@torch.no_grad()
def find_shared_layers(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    n_shared: int = 4,
    min_cosine: float = 0.5,
    n_pieces: int = 30,
    n_tokens: int = 64,
    order: Order = "dissimilar",
    progress: Callable[[int, int], None] | None = None,
) -> FoundLayers:
    """Searches layers that can read others' keys and values: pairs of layers in order, each kept if little changes.

    Defaults are those of KVSharer's code. Where texts are cut differs: there, the first 64 tokens of each of 30 lines
    are read, and shorter lines are left out, but still counted.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: What it reads: pieces of ``n_tokens`` tokens, spread over all texts.
        n_shared: How many layers shall read others, if so many pairs pass.
        min_cosine: A pair of layers passes if the mean cosine of last hidden states, with it and all that passed
            before, is above this.
        n_pieces: Most pieces.
        n_tokens: Length of a piece.
        order: "dissimilar" tries the pairs that lie farthest apart first, as in the paper, "similar" the nearest: the
            control.
        progress: Called with the number of layers that share so far, and ``n_shared``.

    Raises:
        InvalidArgumentError: A number is out of range, the order is unknown, or the texts are shorter than one piece.
        UnsupportedModelError: The model's layers cannot read each other's pairs: see :func:`share_layers`.
    """
    layers = [layer.layer_idx for layer in shareable_layers(model)]
    checked_order(order)
    if not 1 <= n_shared < len(layers) or n_pieces < 1 or n_tokens < 2:
        raise InvalidArgumentError(
            f"expected 1 to {len(layers) - 1} layers to share, and pieces, of 2 tokens and more, got {n_shared} layers "
            f"and {n_pieces} pieces of {n_tokens}"
        )
    ids = _pieces(tokenizer, texts, n_pieces, n_tokens).to(input_device(model))
    before, pairs = _read(model, ids)
    n_tried, cosine, sources = 0, 1.0, dict[int, int]()
    for layer, source in _in_order(pairs, layers, order):
        if layer in sources:
            continue
        tried = _followed({**sources, layer: source})
        with share_layers(model, tried):
            got = _cosine(before, _read(model, ids)[0])
        n_tried += 1
        if got > min_cosine:  # also False for NaN
            sources, cosine = tried, got
        if progress is not None:
            progress(len(sources), n_shared)
        if len(sources) == n_shared:
            break
    return FoundLayers(sources, cosine, n_tried)


def checked_order(order: str) -> Order:
    """Returns the order itself.

    Raises:
        InvalidArgumentError: There is none of this name.
    """
    for known in ORDERS:
        if order == known:
            return known
    raise InvalidArgumentError(f"expected order to be one of {', '.join(ORDERS)}, got {order!r:.80}")


def _pieces(tokenizer: Any, texts: Sequence[str], n_pieces: int, n_tokens: int) -> torch.Tensor:
    """Returns pieces of texts, int64 ``[pieces, n_tokens]``, spread over all that there are."""
    rows = [encode(tokenizer, text) for text in texts]
    every = [list(row[i : i + n_tokens]) for row in rows for i in range(0, len(row) - n_tokens + 1, n_tokens)]
    if not every:
        longest = max(map(len, rows), default=0)
        raise InvalidArgumentError(f"expected a text of at least {n_tokens} tokens, got {longest} in the longest")
    n = min(n_pieces, len(every))
    return torch.tensor([every[i * len(every) // n] for i in range(n)])


def _read(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor] | None]]:
    """Returns the last hidden states ``[pieces, n]``, fp32, and each layer's mean key and value, None if it shares."""
    decoder: Any = text_decoder(model)
    cache = compat.DynamicCache(config=decoder.config)
    output = decoder(input_ids=ids, use_cache=True, **compat.cache_argument(decoder, cache))
    held: list[Any] = cache.layers
    means = [
        None if layer.keys is None else (layer.keys.float().mean(dim=0), layer.values.float().mean(dim=0))
        for layer in held
    ]
    return output[0].float().flatten(1), means


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(functional.cosine_similarity(one, other, dim=-1).mean())


def _in_order(pairs: Sequence[Any], layers: Sequence[int], order: Order) -> list[tuple[int, int]]:
    """Returns every (layer, earlier layer), by the distance of their mean keys and values.

    That is the norm of the difference, averaged over heads and tokens, of keys and values alike.
    """
    distances = {}
    for layer in layers:
        for source in (one for one in layers if one < layer):
            apart = (
                (mine - theirs.to(mine.device)).norm(dim=-1).mean()
                for mine, theirs in zip(pairs[layer], pairs[source], strict=True)
            )
            distances[layer, source] = sum(map(float, apart)) / 2
    return sorted(distances, key=lambda pair: distances[pair], reverse=order == "dissimilar")


def _followed(sources: dict[int, int]) -> dict[int, int]:
    """Returns sources in which no layer reads one that reads another: it reads that other itself."""
    return {layer: _end(sources, source) for layer, source in sources.items()}


def _end(sources: dict[int, int], layer: int) -> int:
    while layer in sources:
        layer = sources[layer]
    return layer
