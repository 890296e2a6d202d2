"""Answers many users' questions about shared contexts in one running batch, which requests join and leave."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvzip_press.attention.implementation import attach
from kvzip_press.cache.file.reading import check_model
from kvzip_press.cache.file.record import CacheRecord
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.answering import question_ids
from kvzip_press.decoding.generation import eos_ids
from kvzip_press.decoding.sampling import most_likely
from kvzip_press.errors import (
    CacheFileError,
    CacheMismatchError,
    InvalidArgumentError,
    KVzipPressError,
    UnsupportedCacheError,
    did_you_mean,
)
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import max_positions, text_config, text_decoder
from kvzip_press.model.watching import computing
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.serving.context import PoolShape
from kvzip_press.serving.folder import ContextFile, ContextFolder
from kvzip_press.serving.packing import (
    Packing,
    check_storage,
    packed_cache,
    packed_file,
    pairs_in_cache,
    pairs_in_file,
)
from kvzip_press.serving.pool import NO_CONTEXT, ContextPool, Held
from kvzip_press.serving.rotation import Rotation
from kvzip_press.serving.rows import Rows
from kvzip_press.serving.stream import Stream


@dataclass(eq=False)
class _Request:
    """A question that waits for a row, or has one."""

    stream: Stream
    context: str | None
    question: str
    answer_prefix: str
    max_new_tokens: int
    split_special_tokens: bool
    held: Held = NO_CONTEXT

    def ids(self, tokenizer: Any) -> list[int]:
        """Returns the ids to read: a question right behind its context, or as a turn of its own behind others."""
        split, is_first = self.split_special_tokens, self.held.n_turns == 0
        return question_ids(tokenizer, self.question, self.answer_prefix, is_first=is_first, split_special_tokens=split)


class Session:
    """A running batch over a pool of contexts: each step writes one token of every answer.

    Requests are taken in the order in which they came, as soon as there is a row and room for their context; those that
    ask about one context share it. Nothing runs by itself: whoever waits for a piece of an answer runs the steps, for
    everybody, so several threads may wait at a time, each for its own.

    Answers are greedy, and those of :func:`kvzip_press.answer` up to rounding, which another order of sums brings.

    Args:
        model: A causal language model with a RoPE of fixed frequencies and without sliding windows.
        tokenizer: Its tokenizer.
        folder: A folder of files that ``RaggedCache.save`` wrote; ``<name>.safetensors`` is asked about as ``<name>``.
            Files may come and go meanwhile.
        pool_bytes: Bytes of the pool, allocated at once. Contexts of the folder are loaded when they are asked about.
        storage: How the pool holds pairs: "model", in the model's dtype, whatever the storage of a context; or "int8",
            in about half the bytes of 16 bits, and only contexts that were compressed with that storage.
        max_rows: Most requests that are answered at a time.
        max_tokens: Most tokens of a question and its answer together, for which each row has room.

    Raises:
        CacheFileError: The folder cannot be read.
        InvalidArgumentError: A number is out of range.
        UnsupportedModelError: The model's contexts cannot be shared; the message says why.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: str | Path | None = None,
        *,
        pool_bytes: int,
        storage: str = "model",
        max_rows: int = 16,
        max_tokens: int = 1024,
    ) -> None:
        if min(max_rows, max_tokens) < 1:
            raise InvalidArgumentError(f"expected max_rows and max_tokens of 1 and more, got {max_rows}, {max_tokens}")
        shape, device = PoolShape.of(model, storage), input_device(model)
        self.rotation = Rotation.of(model)
        self.pool = ContextPool(shape, pool_bytes, device=device)
        self._packing = Packing(self.rotation, device, storage)
        self.folder = None if folder is None else ContextFolder(folder, partial(_check, model=model, storage=storage))
        self._model, self._tokenizer = model, tokenizer
        heads = int(text_config(model).num_attention_heads)
        self._rows = Rows(self.pool, self.rotation, num_attention_heads=heads, max_rows=max_rows, max_tokens=max_tokens)
        self._eos = eos_ids(model, tokenizer)
        self._caches: dict[str, RaggedCache] = {}
        self._loaded: dict[str, ContextFile] = {}  # what the pool's contexts of these names were read from
        self._weights = weights_fingerprint(text_decoder(model))
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # row i answers request i
        self._lock = threading.RLock()
        attach(model)

    @property
    def names(self) -> list[str]:
        """The contexts that can be asked about, sorted."""
        return sorted({*self._caches, *(() if self.folder is None else self.folder.names)})

    def add(self, name: str, cache: RaggedCache) -> None:
        """Makes a compressed cache known by a name; it goes before a file of that name.

        Raises:
            CacheMismatchError: Another model made the cache.
            InvalidArgumentError: It does not fit into the pool.
            UnsupportedCacheError: It is no cache of one context, compressed in every layer, or not in the pool's
                storage.
        """
        context = packed_cache(cache, self._model, self._packing)
        with self._lock:
            self.pool.put(name, context)  # if there is no room now, it is packed again when it is asked about
            self._caches[name] = cache

    def submit(
        self,
        question: str,
        context: str | None = None,
        *,
        answer_prefix: str = "",
        max_new_tokens: int = 64,
        split_special_tokens: bool = False,
    ) -> Stream:
        """Takes a question; its answer is written as somebody reads it, or another one.

        Args:
            question: The question, framed as by :func:`kvzip_press.answer`.
            context: The name of the context that it is about; None for none.
            answer_prefix: How the answer begins; not part of it.
            max_new_tokens: Most tokens of the answer.
            split_special_tokens: Whether control tokens that are spelled out in question or prefix are read as ordinary
                text, as those of others should be.

        Raises:
            InvalidArgumentError: There is no context of that name, or what there is cannot be read; a text is none; or
                the question and its answer are longer than a row has room for.
        """
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InvalidArgumentError(f"expected max_new_tokens of 1 and more, got {max_new_tokens!r:.80}")
        if context is not None and context not in self._caches:
            if self.folder is None:
                raise InvalidArgumentError(
                    f"expected the name of a context, got {context!r:.80}{did_you_mean(context, self._caches)}"
                )
            self.folder.find(context)
        stream = Stream(self._tokenizer, self._step_for, self._cancel)
        request = _Request(stream, context, question, answer_prefix, max_new_tokens, split_special_tokens)
        self._check_length(request, len(request.ids(self._tokenizer)))
        with self._lock:
            self._waiting.append(request)
        return stream

    @property
    def n_waiting(self) -> int:
        """Number of requests that wait for a row, or for room for their context."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Number of requests whose answers are being written."""
        return len(self._running)

    @torch.no_grad()
    def step(self) -> bool:
        """Writes a token of every answer, then reads the questions that wait as far as there are rows.

        If an error is raised, no answer has grown, and the step may be run again.

        Returns:
            Whether anything is left to do.
        """
        with self._lock, computing():
            if self._running:
                logits = self._rows.step(self._model, [request.stream.ids[-1] for request in self._running])
                chosen = most_likely(logits).tolist()
                for row in reversed(range(len(chosen))):  # a row that leaves is replaced by one that was looked at
                    self._take(row, chosen[row])
            self._admit()
            return bool(self._running or self._waiting)

    def _step_for(self, stream: Stream) -> None:
        with self._lock:
            if not stream.is_done:  # by the step of another reader, for which this one has waited
                self.step()

    def _admit(self) -> None:
        while self._waiting and self._rows.n < self._rows.max_rows:
            request = self._waiting[0]
            try:
                held = self._hold(request.context)
                if held is None:
                    return
                request.held = held
                logits = self._joined(request)
            except (KVzipPressError, RuntimeError) as error:  # its own: others go on
                self._waiting.popleft()
                request.stream.end(error)
                continue
            self._waiting.popleft()
            self._running.append(request)
            self._take(self._rows.n - 1, int(most_likely(logits[None])))

    def _joined(self, request: _Request) -> torch.Tensor:
        try:
            self._check_weights()
            ids = request.ids(self._tokenizer)
            self._check_length(request, len(ids))
            return self._rows.join(self._model, ids, request.held.row)
        except BaseException:
            self.pool.release(request.held)
            request.held = NO_CONTEXT
            raise

    def _take(self, row: int, token_id: int) -> None:
        """Appends a token to the answer of a row, which leaves if that was its last."""
        request = self._running[row]
        if token_id not in self._eos:
            request.stream.ids.append(token_id)
        if token_id in self._eos or len(request.stream.ids) == request.max_new_tokens:
            self._leave(row)
            request.stream.end()

    def _leave(self, row: int) -> None:
        self._rows.leave(row)
        self.pool.release(self._running[row].held)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _cancel(self, stream: Stream) -> None:
        with self._lock:
            for request in [one for one in self._waiting if one.stream is stream]:
                self._waiting.remove(request)
            for row in [row for row, one in enumerate(self._running) if one.stream is stream]:
                self._leave(row)
            stream.end()

    def _hold(self, name: str | None) -> Held | None:
        """Returns a context for a reader, brought into the pool if need be; None if there is no room for it now."""
        if name is None:
            return NO_CONTEXT
        cache = self._caches.get(name)
        file = None if cache is not None or self.folder is None else self.folder.find(name)
        if cache is not None or self._loaded.get(name) == file:
            held = self.pool.hold(name)
            if held is not None:
                return held
        n_pairs = pairs_in_file(file.path) if file is not None else pairs_in_cache(self._caches[name])
        if not self.pool.has_room(name, n_pairs):  # nothing is read that would have to wait
            return None
        if cache is not None:
            context = packed_cache(cache, self._model, self._packing)
        else:
            assert self.folder is not None and file is not None
            try:
                context = packed_file(file.path, self._model, self._packing)
            except (CacheFileError, UnsupportedCacheError) as error:
                self.folder.refuse(name, file, error)
                self.folder.find(name)  # says why, without the path
                raise
        if not self.pool.put(name, context):
            return None
        if file is not None:
            self._loaded[name] = file
        return self.pool.hold(name)

    def _check_weights(self) -> None:
        if weights_fingerprint(text_decoder(self._model)) != self._weights:
            raise CacheMismatchError(
                "expected the weights and adapters with which the session began, got others: the contexts in its pool "
                "were made with those"
            )

    def _check_length(self, request: _Request, n_ids: int) -> None:
        n_own, limit = n_ids + request.max_new_tokens, max_positions(self._model)
        if n_own > self._rows.max_tokens:
            raise InvalidArgumentError(
                f"expected a question and an answer of at most {self._rows.max_tokens} tokens, got {n_ids} and "
                f"{request.max_new_tokens}: ask for fewer, or give the session a larger max_tokens"
            )
        if limit is not None and request.held.n_tokens + n_own > limit:
            raise InvalidArgumentError(
                f"expected context, question and answer within the model's {limit} positions, got up to "
                f"{request.held.n_tokens + n_own}"
            )


def _check(record: CacheRecord, *, model: Any, storage: str) -> None:
    check_model(record, model)
    check_storage(record, storage)
