"""Reads a long context in chunks and evicts after each, so that the uncompressed cache of the whole never exists.

A chunk is read after what is left of the chunks before it, and its pairs are scored. Then everything older than a
window of recent tokens is cut to the fraction that the press keeps of a context; the window stays for the next chunk to
attend to. At the end the whole is cut to its budget. So the cache never holds more than the kept fraction, the window
and one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.arguments.model import takes_model
from kvzip_press.arguments.press import ForeignPress, as_press
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.cache.cold.chunks import ChunksKept
from kvzip_press.cache.cold.place import check_place
from kvzip_press.cache.cold.span import ColdPart
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import Context, chat_frame, check_ids, context_rows
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import check_length, text_config
from kvzip_press.model.watching import computing
from kvzip_press.prefilling.compressed import compress
from kvzip_press.prefilling.eviction import Span, check_storage, evicted_layers, storage_of
from kvzip_press.prefilling.whole import Prefill, Scorer, run_prefill

CHUNK_SIZE, WINDOW_SIZE = 16384, 4096


@takes_model
@computing()
@torch.no_grad()
def compress_in_chunks(
    model: nn.Module,
    tokenizer: Any,
    context: Context,
    press: Scorer | ForeignPress | str,
    *,
    compression_ratio: float | None = None,
    chunk_size: int = CHUNK_SIZE,
    window_size: int = WINDOW_SIZE,
    rerank: bool = True,
    split_special_tokens: bool = False,
    storage: str | None = None,
    cold: str | Path | None = None,
) -> RaggedCache:
    """Reads and compresses a context that is too long to be held uncompressed.

    The cache holds at most ``(1 - compression_ratio)`` of the context, ``window_size`` tokens and one chunk, besides
    what the press protects. A context of one chunk is compressed as by :func:`kvzip_press.compress`. In a longer one,
    later chunks attend to what is left of the earlier ones, and a pair has the score that it got with its chunk.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        context: The text or its token ids, without the chat template, which is put around either; one context, not a
            list.
        press: The press, which must be able to score a span of tokens by itself: :class:`kvzip_press.FastKVzipPress`,
            KVzip (which replays each chunk), or kvpress's Knorm, SnapKV, TOVA and KeyDiff; or the name of one, with
            ``compression_ratio``.
        compression_ratio: Fraction of pairs removed, in [0, 1), by a press that is given by its name.
        chunk_size: Number of tokens read at a time, including the template's.
        window_size: Number of last tokens that stay whole while more is to come.
        rerank: Whether pairs of all chunks compete, with the scores that they got, so that an informative chunk can
            keep more than a dull one. If False, each chunk keeps its own share for good, as in the code of Fast KVzip's
            authors.
        split_special_tokens: See :func:`kvzip_press.compress`.
        storage: See :func:`kvzip_press.compress`. A pair is encoded once, with its chunk.
        cold: See :func:`kvzip_press.compress`. Of a context in several chunks all pairs are kept there, in host memory
            until the last chunk was read. What :meth:`kvzip_press.RaggedCache.restore` brings back is what the whole
            context would keep by the scores that its pairs got, of the pairs as they were read: later chunks attended
            to what was left of the earlier ones then.

    Returns:
        The compressed cache, ready for questions (see :func:`kvzip_press.answer`).

    Raises:
        CacheFileError: The file for the evicted pairs cannot be written.
        InvalidArgumentError: A size is out of range, there are several contexts, the context is longer than the model's
            positions, the press is none, decides its own counts or cannot score a chunk, or the storage is unknown or
            cannot hold the model's keys and values. Or ``cold`` is no place, or is given without ``rerank`` or with a
            storage that encodes a pair by what else is kept.
    """
    chosen: Scorer = as_press(press, compression_ratio)
    storage = storage_of(chosen) if storage is None else storage
    check_storage(model, storage)
    if chunk_size < 1 or window_size < 0:
        raise InvalidArgumentError(f"expected chunk_size >= 1 and window_size >= 0, got {chunk_size} and {window_size}")
    if cold is not None:
        check_place(cold)
        if not rerank:
            raise InvalidArgumentError(
                "expected cold=None with rerank=False, where each chunk keeps its own share for good, got "
                f"cold={str(cold)!r:.80}"
            )
    frame, rows = chat_frame(tokenizer), context_rows(tokenizer, context, split_special_tokens=split_special_tokens)
    if len(rows) != 1:
        raise InvalidArgumentError(f"expected one context to read in chunks, got {len(rows)}")
    check_ids(model, rows)
    ids = torch.tensor([[*frame.prefix, *rows[0]]], device=input_device(model))
    check_length(model, ids.shape[1])
    if ids.shape[1] <= chunk_size:
        return compress(model, tokenizer, rows[0], chosen, storage=storage, cold=cold)
    cache = compat.DynamicCache(config=text_config(model))
    length = ids.shape[1]
    kept = None if cold is None else ChunksKept(storage, cold)
    options: dict[str, Any] = {"rerank": rerank, "storage": storage, "kept": kept}
    reading = _Reading(model, chosen, window_size, cache=cache, length=length, **options)
    for chunk in ids.split(chunk_size, dim=1):
        is_last = reading.n_seen + chunk.shape[1] == ids.shape[1]
        reading.read(chunk, is_last=is_last, prefix_length=len(frame.prefix), tokenizer=tokenizer)
    compressed = RaggedCache.of(cache)
    compressed.press = reading.scored_by
    return compressed


@dataclass
class _Reading:
    """The context as far as it was read.

    Attributes:
        cache: What is left of it.
        length: Number of tokens of the whole.
        storage: The name of how pairs are stored.
        kept: Where pairs are kept that are evicted; None for nowhere.
        n_seen: Number of its tokens.
        scores: ``layer_idx -> [1, heads, n_seen]``, fp32, the score that each pair got when its chunk was read.
        alive: ``layer_idx -> [1, heads, n_seen]``, bool, the pairs that each head still has.
        sink: ``[1, n_seen]``, bool, the positions that the press protects at the beginning.
        charged: ``[1, n_seen]``, bool, those of them that count towards the budget.
        scored_by: The press, as its scores name it.
    """

    model: nn.Module
    press: Scorer
    window_size: int
    rerank: bool
    cache: Any
    length: int
    storage: str
    kept: ChunksKept | None = None
    n_seen: int = 0
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    alive: dict[int, torch.Tensor] = field(default_factory=dict)
    sink: torch.Tensor | None = None
    charged: torch.Tensor | None = None
    scored_by: str = ""

    def read(self, chunk: torch.Tensor, *, is_last: bool, **template: Any) -> None:
        """Reads ``chunk`` ``[1, n]``, scores it and evicts; ``template`` holds a Prefill's chat-template fields."""
        valid = torch.ones_like(chunk, dtype=torch.bool)
        done = run_prefill(self.model, chunk, valid, observers=[self.press], cache=self.cache, length=self.length)
        new = self.press.score(replace(done, **template))
        if new.is_decided:
            raise InvalidArgumentError(
                f"expected a press whose scores the core spends a budget on, to read in chunks, got {self.press!r}, "
                "which decides its own counts"
            )
        self.scored_by = new.press
        if self.kept is not None:
            self.kept.add(self.cache, new, done.positions)
        self._add(new)
        asked = self._asked(new, is_last=is_last)
        seen = torch.ones_like(asked.protected)
        self.alive = select(asked, seen, among=self.alive, of_all=True)
        self._evict(done, new)
        if is_last and self.kept is not None:
            span = self.kept.span(asked.made_by(new.press, self.storage))
            for i, layer in enumerate(self.cache.layers):
                if isinstance(layer, RaggedLayer):
                    layer.cold = (ColdPart(span, i, (0,)),)

    def _add(self, new: Scores) -> None:
        n = new.protected.shape[1]
        for layer_idx, values in new.layers.items():
            everything = torch.ones_like(values, dtype=torch.bool)
            self.scores[layer_idx] = _behind(self.scores.get(layer_idx), values)
            self.alive[layer_idx] = _behind(self.alive.get(layer_idx), everything)
        nothing = torch.zeros_like(new.protected)
        sink = nothing if self.n_seen else _leading(new.protected)
        self.sink, self.charged = _behind(self.sink, sink), _behind(self.charged, sink & new.charged)
        self.n_seen += n

    def _asked(self, new: Scores, *, is_last: bool) -> Scores:
        """Returns scores of all that was seen, under the press's policy; recent positions are protected.

        Until the last chunk these are the last ``window_size`` tokens, then those that the press itself protects at the
        end.
        """
        assert self.sink is not None and self.charged is not None
        columns = torch.arange(self.n_seen, device=self.sink.device)[None]
        start = self.n_seen - new.protected.shape[1]
        recent, charged = columns >= self.n_seen - self.window_size, self.charged
        if is_last:
            window = _leading(new.protected.flip(-1)).flip(-1)
            recent, paid = (torch.cat([self.sink.new_zeros(1, start), x], 1) for x in (window, window & new.charged))
            charged = charged | paid
        n_decided = (
            0 if self.rerank else start - self.window_size
        )  # nothing more is evicted from what has left the window
        decided = (columns < n_decided) & ~self.sink
        protected = self.sink | recent | decided
        return Scores(self.scores, protected, new.policy, protected_count=charged | decided)

    def _evict(self, done: Prefill, new: Scores) -> None:
        assert self.sink is not None
        start = done.start
        earlier = {
            i: _of_pairs(layer, self.alive[i])
            for i, layer in enumerate(self.cache.layers)
            if isinstance(layer, RaggedLayer)
        }
        keep = {i: alive[:, :, start:] for i, alive in self.alive.items()}
        span = Span(done.valid, done.positions, self.sink[:, start:])
        options: dict[str, Any] = {"scores": new.to_carry, "importance": new, "storage": self.storage}
        for layer_idx, layer in evicted_layers(self.model, self.cache, span, keep, earlier=earlier, **options):
            self.cache.layers[layer_idx] = layer


def _behind(before: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if before is None else torch.cat([before, new], dim=-1)


def _leading(mask: torch.Tensor) -> torch.Tensor:
    """Returns the run of True at the beginning of each row."""
    return mask.long().cumprod(dim=-1).bool()


def _of_pairs(layer: RaggedLayer, alive: torch.Tensor) -> torch.Tensor:
    """Returns which packed pairs of a layer's one row are among ``alive`` ``[1, heads, n]``: bool ``[total]``."""
    packed = layer.packed
    heads = torch.arange(packed.num_heads, device=packed.device).repeat_interleave(packed.seqlens[0])
    return alive[0, heads, packed.positions.long()]
