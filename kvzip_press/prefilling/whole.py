"""Reads a context once, so that it can then be scored by any press and evicted at any ratio."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvzip_press import compat
from kvzip_press.arguments.named import is_press
from kvzip_press.attention.implementation import attach, attention_watched
from kvzip_press.budget.allocators import AllocationLike
from kvzip_press.budget.amount import Tokens
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select, why_nothing_went
from kvzip_press.cache.cold.making import check_can_be_cold, evicted_span
from kvzip_press.cache.compressible import check_not_evicted, compressible_layers, heads_and_device, last_pairs
from kvzip_press.cache.padding import first_tokens
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.sliding_windows import windows_only
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.devices import synchronize
from kvzip_press.model.rope import check_context, depends_on_length, pinned
from kvzip_press.model.structure import (
    check_keeps_cache,
    check_length,
    full_attention_layers,
    text_config,
    text_decoder,
)
from kvzip_press.model.watching import computing
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.prefilling.eviction import Span, check_can_be_stored, evicted_layers
from kvzip_press.prefilling.query_window import READING, LastQueries, Reading
from kvzip_press.prefilling.self_check import SelfCheck
from kvzip_press.terminal import counted

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from kvzip_press.cache.cold.span import ColdSpan

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Looks at one prefill forward as it runs, without changing it, and computes scores from what it saw."""

    def __enter__(self) -> Observer: ...

    def __exit__(self, *exc: object) -> None: ...

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the scores of the prefill that was observed."""


class Scorer(Protocol):
    """The part of a press that reading a context needs; hashable."""

    def observer(self, model: nn.Module) -> Observer | None:
        """Returns an observer of the prefill, for a scorer that needs to see it run; None otherwise."""

    def score(self, prefill: Prefill) -> Scores:
        """Returns the scores of every pair of the prefill's span."""


@dataclass
class Prefill:
    """One forward over a span of tokens, and the cache that it left.

    Attributes:
        model: The model.
        cache: Its cache: dense for a first turn, ragged with a dense tail for a later one. Only :meth:`evict_in_place`
            changes it.
        input_ids: ``[batch, span]``, the tokens of the span; None if only embeddings were given.
        valid: ``[batch, span]``, bool, False at padding.
        positions: ``[batch, span]``, int32, the position of each token in its row.
        start: Number of tokens that the cache had seen before the span.
        prefix_length: Number of leading tokens of each row that belong to the chat template; None if unknown.
        tokenizer: The tokenizer; None if none was given.
        seconds: Wall time of the forward, in seconds.
        observers: The observers that watched the forward, by press.
        length: Number of tokens of the whole context of which this is a part; None if this is its end.
        weights: Fingerprint of the decoder as it read the span: adapters may be switched before an eviction.
        last_queries: The queries of the last token of each row, in every layer that can be compressed; None if they
            were not watched.
    """

    model: Any
    cache: Any
    input_ids: torch.Tensor | None
    valid: torch.Tensor
    positions: torch.Tensor
    start: int = 0
    prefix_length: int | None = None
    tokenizer: Any = None
    seconds: float = 0.0
    observers: dict[Scorer, Observer] = field(default_factory=dict)
    length: int | None = None
    weights: str = field(default="", repr=False)
    last_queries: LastQueries | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        batch_size, span = self.valid.shape
        behind = f" behind {self.start}" if self.start else ""
        parts = [
            counted(batch_size, "row"),
            f"{counted(span, 'token')}{behind}",
            f"{self.dense_bytes / 1e6:.1f} MB uncompressed",
            f"read in {self.seconds:.1f} s",
            *(f"watched by {press!r:.100}" for press in self.observers),
        ]
        return f"Prefill({', '.join(parts)})"

    def __post_init__(self) -> None:
        """Notes which weights made the keys and values, if nobody has."""
        self.weights = self.weights or weights_fingerprint(text_decoder(self.model))

    @property
    def turned_for(self) -> int:
        """The number of tokens that RoPE turned keys for, if its frequencies depend on how far a context reaches."""
        return int(self.positions.max()) + 1 if self.length is None else self.length

    @property
    def dense_bytes(self) -> int:
        """Bytes of keys and values of the uncompressed cache."""
        return RaggedCache(self.cache.layers).dense_bytes

    def blank_scores(self) -> dict[int, torch.Tensor]:
        """Returns zeros for every layer that can be compressed.

        Returns:
            ``layer_idx -> [batch, num_key_value_heads, span]``, fp32.
        """
        return {
            layer_idx: torch.zeros(self.valid.shape[0], heads, self.valid.shape[1], device=device)
            for layer_idx in compressible_layers(self.model, self.cache)
            for heads, device in [heads_and_device(self.cache.layers[layer_idx])]
        }

    def pairs(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values of the span in a layer that can be compressed: views, which must not be changed.

        It works alike for a first turn, a later one and a chunk. The content at padding is arbitrary.

        Returns:
            ``[batch, num_key_value_heads, span, head_dim]`` and ``[batch, num_key_value_heads, span, v_head_dim]``, in
            the model's dtype, keys after RoPE.

        Raises:
            InvalidArgumentError: The layer cannot be compressed, or there is none of this index.
            UnsupportedCacheError: They were evicted in place.
        """
        if layer_idx not in self._compressible:
            raise InvalidArgumentError(
                f"expected one of the layers {list(self._compressible)}, which can be compressed, got {layer_idx!r}"
            )
        return last_pairs(self.cache.layers[layer_idx], self.valid.shape[1])

    @cached_property
    def _compressible(self) -> tuple[int, ...]:
        """The indices of the layers that can be compressed, found once: a scorer asks for the pairs of each."""
        return tuple(compressible_layers(self.model, self.cache))

    def protected(self, n_sink: int) -> torch.Tensor:
        """Returns a mask of the chat-template prefix if that is known, else of the first ``n_sink`` tokens of each row.

        For a later turn nothing is marked: it has neither.

        Returns:
            ``[batch, span]``, bool.
        """
        return self.first_tokens(n_sink if self.prefix_length is None else self.prefix_length)

    def first_tokens(self, n: int) -> torch.Tensor:
        """Returns a mask of the first ``n`` tokens of each row, ``[batch, span]``, bool; of a later turn, of none."""
        return first_tokens(self.valid, 0 if self.start else n)

    def last_tokens(self, n: int) -> torch.Tensor:
        """Returns a mask of the last ``n`` tokens of each row, ``[batch, span]``, bool."""
        after = self.valid.long().flip(-1).cumsum(dim=-1).flip(-1) - 1
        return self.valid & (after < n)

    def observed(self, press: Scorer) -> Observer:
        """Returns the observer of a press: the one that watched, or a new one that watches the same tokens run again.

        Raises:
            InvalidArgumentError: They would have to run again, but the span is not the whole context or has no token
                ids.
        """
        if press not in self.observers:
            if self.start or self.input_ids is None:
                raise InvalidArgumentError(
                    f"{type(press).__name__} has to watch the prefill: pass it in prefill(..., observers=[press])"
                )
            again = run_prefill(self.model, self.input_ids, self.valid, observers=[press])
            self.observers[press] = again.observers[press]
        return self.observers[press]

    def last_attention(self) -> Mapping[int, torch.Tensor]:
        """Returns what the last token of each row pays to each pair of the span, the most of a group of query heads.

        It is normalised over the pairs of the span; see :meth:`kvzip_press.prefilling.query_window.LastQueries`.

        Returns:
            ``layer_idx -> [batch, num_key_value_heads, span]``, fp32, 0 at padding.

        Raises:
            InvalidArgumentError: The queries of this prefill were not watched.
        """
        layers = self.blank_scores()
        for layer_idx, paid in layers.items():
            for row, heads, attention in self.last_token().attention(layer_idx, self.pairs(layer_idx)[0]):
                paid[row, heads, self.valid[row].to(paid.device)] = attention[:, :, 0].amax(dim=1)
        return layers

    def last_token(self) -> LastQueries:
        """Returns the queries of the last token of each row.

        Raises:
            InvalidArgumentError: They were not watched.
        """
        if self.last_queries is None:
            raise InvalidArgumentError(
                "expected a prefill that `prefill`, `compress` or `with press(model):` made, got one whose queries "
                "nobody watched"
            )
        return self.last_queries

    def uniform_attention(self) -> torch.Tensor:
        """Returns what each pair of the span would get if attention to the span were uniform, ``[batch, span]``, fp32.

        For ``Scores.uniform`` of presses whose scores are weights of attention.
        """
        return self.valid.sum(dim=1, keepdim=True).clamp(min=1).float().reciprocal().expand(self.valid.shape)

    def attended(self, scores: Scores) -> Scores:
        """Returns the scores as their allocation looks at them: with the last token's attention, or in other units.

        Raises:
            InvalidArgumentError: It compares with uniform attention, and the scores are no weights of attention.
        """
        if scores.policy.allocation.needs_weights:
            return scores.relative()
        if scores.attention is not None or not scores.policy.allocation.needs_attention:
            return scores
        return replace(scores, attention=self.last_attention())

    def held_pairs(self, scores: Scores) -> dict[int, torch.Tensor]:
        """Returns what a budget in tokens has to hold besides the span: earlier turns' pairs, and tokens since then.

        Returns:
            ``layer_idx -> [batch, num_key_value_heads]``, int64; protected pairs are included if ``scores`` count them
            towards the budget. Empty without such a budget, and for a first turn.
        """
        if not isinstance(scores.policy.amount, Tokens) or not self.start:
            return {}
        layers = {i: layer for i in scores.layers if isinstance(layer := self.cache.layers[i], RaggedLayer)}
        held = {}
        for layer_idx, layer in layers.items():
            pairs = layer.packed.seqlens.long()
            if scores.protected_count is not True:  # a mask is about this span; of earlier ones the prefix is protected
                pairs = pairs - torch.tensor(layer.n_protected, device=pairs.device).unsqueeze(1)
            pairs = pairs if layer.row_index is None else pairs[layer.row_index]
            held[layer_idx] = pairs + layer.tail.length - self.valid.shape[1]
        return held

    def evict(
        self,
        scores: Scores,
        compression_ratio: float | None = None,
        allocation: AllocationLike | None = None,
        *,
        budget: int | None = None,
        storage: str | None = None,
        cold: str | Path | None = None,
    ) -> RaggedCache:
        """Returns a compressed copy of the cache. Any number of copies can be made; this prefill stays as it is.

        Args:
            scores: The result of ``press.score(prefill)``.
            compression_ratio: Fraction of pairs removed, in [0, 1); by default the press's own.
            allocation: A name of :data:`kvzip_press.budget.allocators.ALLOCATIONS`, or an
                :class:`kvzip_press.budget.allocators.Allocation`; by default the press's own.
            budget: Tokens' worth of pairs to keep, instead of a ratio; see :class:`kvzip_press.press.Press`.
            storage: How kept pairs are stored (see :class:`kvzip_press.press.Press`); by default as the press says.
            cold: Where evicted pairs are kept, so that :meth:`kvzip_press.RaggedCache.restore` can bring them back:
                "cpu" (host memory) or the path of a file, which is replaced; None keeps none.

        Raises:
            CacheFileError: The file for the evicted pairs cannot be written.
            InvalidArgumentError: Ratio, budget or allocation are out of range, ratio and budget are both given, the
                press decided its own counts and something else, or ``cold``, is asked for, the scores are of another
                prefill, or the storage is unknown or cannot hold the pairs.
            UnsupportedCacheError: The cache cannot be compressed, or was already evicted in place.
        """
        asked = self._checked(scores).asked_for(compression_ratio, allocation, budget)
        cache = RaggedCache([layer for _, layer in self._evicted(asked, self._selected(asked), storage, cold)])
        cache.press = asked.press
        return cache

    def evict_in_place(self, scores: Scores, *, storage: str | None = None, cold: str | Path | None = None) -> None:
        """Replaces the layers of the cache itself, freeing each dense one before the next is packed.

        Args:
            scores: The result of ``press.score(prefill)``.
            storage: See :meth:`evict`.
            cold: See :meth:`evict`. All that is evicted is copied there before the first layer is freed.

        Raises:
            CacheFileError: The file for the evicted pairs cannot be written; the cache is then as it was.
            InvalidArgumentError: The scores are of another prefill, the press decided its own counts and ``cold`` is
                asked for, or the storage is unknown or cannot hold the pairs.
            UnsupportedCacheError: The cache cannot be compressed, or was already evicted in place.
        """
        keep = self._selected(self._checked(scores))
        for layer_idx, layer in self._evicted(scores, keep, storage, cold):
            self.cache.layers[layer_idx] = layer
        self.cache.press = scores.press  # the repr of a RaggedCache over these layers shows it

    def _selected(self, scores: Scores) -> dict[int, torch.Tensor]:
        """Returns the keep masks, and says once for each press and reason if they keep all of what was to go."""
        keep = select(self.attended(scores), self.valid, held=self.held_pairs(scores))
        if why := why_nothing_went(scores, keep, self.valid):
            _warn_once(scores.press or "the press", why)
        return keep

    def _evicted(
        self, scores: Scores, keep: Mapping[int, torch.Tensor], storage: str | None, cold: str | Path | None
    ) -> Iterator[tuple[int, Any]]:
        span = Span(self.valid, self.positions, scores.protected)
        carried = scores.to_carry
        storage = scores.storage if storage is None else storage
        options: dict[str, Any] = {"importance": scores, "weights": self.weights, "storage": storage}
        gone = None if cold is None else self._cold(scores, keep, storage, cold)
        return evicted_layers(self.model, self.cache, span, keep, scores=carried, cold=gone, **options)

    def _cold(self, scores: Scores, keep: Mapping[int, torch.Tensor], storage: str, cold: str | Path) -> ColdSpan:
        """Keeps what an eviction is about to take; what cannot come back is refused before."""
        check_can_be_cold(cold, scores)
        every = {i: self.valid.to(kept.device)[:, None].expand_as(kept) for i, kept in keep.items()}
        check_can_be_stored(self.cache, every, storage)
        where = {"valid": self.valid, "positions": self.positions}
        return evicted_span(self.cache, keep, scores, storage=storage, cold=cold, **where)

    def _checked(self, scores: Scores) -> Scores:
        check_not_evicted(self.cache, self.start)
        self.check(scores)
        return scores

    def check(self, scores: object) -> None:
        """Raises InvalidArgumentError unless these are scores of this prefill: before anything is evicted by them."""
        if not isinstance(scores, Scores):
            hint = ", which makes them: pass press.score(prefill)" if is_press(scores) else ""
            raise InvalidArgumentError(f"expected Scores, got {type(scores).__name__}{hint}")
        if scores.protected.shape != self.valid.shape or set(scores.layers) != set(self._compressible):
            raise InvalidArgumentError(
                f"expected scores of layers {list(self._compressible)} over {tuple(self.valid.shape)} [batch, span], "
                f"got layers {sorted(scores.layers)} over {tuple(scores.protected.shape)}: made for another prefill?"
            )
        for layer_idx, values in scores.layers.items():
            expected, got = heads_and_device(self.cache.layers[layer_idx]), (values.shape[1], values.device)
            if got != expected:
                raise InvalidArgumentError(
                    f"expected scores of layer {layer_idx} for (KV heads, device) = {expected}, got {got}"
                )


@functools.lru_cache(maxsize=64)
def _warn_once(press: str, why: str) -> None:
    logger.warning("%s was asked to remove pairs and removed none: %s", press, why)


@computing()
@torch.no_grad()
def run_prefill(
    model: nn.Module,
    input_ids: torch.Tensor,
    valid: torch.Tensor,
    *,
    observers: Sequence[Scorer] = (),
    cache: Any = None,
    length: int | None = None,
) -> Prefill:
    """Runs one forward of the decoder (no logits) over ``input_ids`` ``[batch, n]``, padding where ``valid`` is False.

    Args:
        model: A causal language model.
        input_ids: The tokens, int64.
        valid: ``[batch, n]``, bool.
        observers: Presses whose scorers watch the forward.
        cache: The cache to read them into, which must have no padding; None for a new one.
        length: Number of tokens of the whole context, if this is a part of it that more is to follow.

    Raises:
        InvalidArgumentError: The tokens are more than the model's positions, or RoPE has other frequencies for some
            rows than for others, or for each further token.
    """
    decoder, config = text_decoder(model), text_config(model)
    check_keeps_cache(decoder)
    full_attention_layers(model)
    cache = compat.DynamicCache(config=config) if cache is None else cache
    start = int(cache.get_seq_length())
    check_length(model, start + input_ids.shape[1])
    lengths: list[int] = []
    if depends_on_length(decoder):
        lengths = (start + valid.sum(dim=-1)).tolist() if length is None else [length]
        check_context(model, lengths)
    attach(model)
    padded = not bool(valid.all())
    positions = start + (valid.long().cumsum(dim=-1) - 1).clamp(min=0)
    check, last = SelfCheck(model, valid), LastQueries(model, valid, 1)
    begin = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(attention_watched(model, check, valid=valid))
        stack.enter_context(last)
        stack.enter_context(READING.opened(model, Reading(valid, start, input_ids)))
        watching = {press: observer for press in observers if (observer := press.observer(model)) is not None}
        for observer in watching.values():
            stack.enter_context(observer)
        stack.enter_context(windows_only(model, cache))
        reader = pinned(decoder, max(lengths)) if lengths else decoder  # a twin has the hooks that are open by now
        reader(
            input_ids=input_ids,
            attention_mask=valid.long() if padded else None,
            position_ids=positions,
            use_cache=True,
            **compat.cache_argument(reader, cache),
        )
    weights = weights_fingerprint(text_decoder(model))  # the host looks at them while the device still reads
    check.finish(cache)
    synchronize(input_ids.device)
    return Prefill(
        model,
        cache,
        input_ids,
        valid,
        positions.int(),
        start,
        seconds=time.perf_counter() - begin,
        observers=watching,
        length=length,
        weights=weights,
        last_queries=last,
    )
