"""Answers many users' questions about shared contexts in one running batch, which requests join and leave."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import Any

import torch

from kvzip_press.arguments.model import check_model, check_tokenizer
from kvzip_press.arguments.numbers import whole
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.answering import seeded
from kvzip_press.decoding.generation import chooser, eos_ids
from kvzip_press.decoding.sampling import Sampling
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, SessionClosedError
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import max_positions, text_config, text_decoder
from kvzip_press.model.watching import computing
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.serving.context import PoolShape
from kvzip_press.serving.folder import ContextFolder
from kvzip_press.serving.known_contexts import KnownContexts
from kvzip_press.serving.packing import Packing
from kvzip_press.serving.pool import NO_CONTEXT, ContextPool
from kvzip_press.serving.rotation import Rotation
from kvzip_press.serving.row_step import RowStep
from kvzip_press.serving.rows import Rows
from kvzip_press.serving.stream import Chosen, Request, Stream, next_tokens


class Session:
    """A running batch over a pool of contexts: each step writes one token of every answer.

    Requests are taken in the order in which they came, as soon as there is a row and room for their context; those that
    ask about one context share it. Nothing runs by itself: whoever waits for a piece of an answer runs the steps, for
    everybody, so several threads may wait at a time, each for its own.

    Answers are those of :func:`kvzip_press.answer` alone, up to rounding, which another order of sums brings; also
    sampled ones, if they have a seed of their own. On a GPU, steps replay CUDA graphs, which rows join and leave
    without a new capture; questions are read by themselves, without one.

    Args:
        model: A causal language model with a RoPE of fixed frequencies and without sliding windows.
        tokenizer: Its tokenizer.
        folder: A folder of files that ``RaggedCache.save`` wrote; ``<name>.safetensors`` is asked about as ``<name>``.
            Files may come and go meanwhile.
        pool_bytes: Bytes of the pool, allocated at once. Contexts of the folder are loaded when they are asked about.
        storage: How the pool holds pairs: "model", in the model's dtype, whatever the storage of a context; or "int8",
            in about half the bytes of 16 bits, and only contexts that were compressed with that storage.
        max_rows: Most requests that are answered at a time.
        max_tokens: Most tokens of a question and its answer together, for which each row has room: where that is full,
            an answer ends.
        graph: Whether to capture CUDA graphs of the steps: None captures them if possible, False never, True captures
            them or raises.

    Attributes:
        pool: The contexts that are in memory.

    Raises:
        CacheFileError: The folder cannot be read.
        InvalidArgumentError: A number is out of range, or ``graph=True`` is given and a graph is impossible.
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
        graph: bool | None = None,
    ) -> None:
        call = "Session(model, tokenizer, folder, pool_bytes=...)"
        check_model(model, call)
        check_tokenizer(tokenizer, call)
        pool_bytes = whole("pool_bytes", pool_bytes)
        max_rows, max_tokens = whole("max_rows", max_rows), whole("max_tokens", max_tokens)
        if graph is not None and not isinstance(graph, bool):
            raise InvalidArgumentError(f"expected graph to be True, False or None, got {graph!r:.80}")
        shape, device = PoolShape.of(model, storage), input_device(model)
        rotation = Rotation.of(model)
        self.pool = ContextPool(shape, pool_bytes, device=device)
        self._contexts = KnownContexts(model, self.pool, Packing(rotation, device, storage), folder)
        self._model, self._tokenizer = model, tokenizer
        heads = int(text_config(model).num_attention_heads)
        self._rows = Rows(self.pool, rotation, num_attention_heads=heads, max_rows=max_rows, max_tokens=max_tokens)
        self._read_tokens = RowStep(model, self._rows, graph=graph)
        self._eos = eos_ids(model, tokenizer)
        self._weights = weights_fingerprint(text_decoder(model))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # row i answers request i
        self._is_closed = False
        self._lock = threading.RLock()
        attach(model)

    @property
    def names(self) -> list[str]:
        """The contexts that can be asked about, sorted."""
        return self._contexts.names

    @property
    def folder(self) -> ContextFolder | None:
        """The folder of contexts; None if there is none."""
        return self._contexts.folder

    @property
    def captured(self) -> bool:
        """Whether steps replay CUDA graphs; False before the first one."""
        return self._read_tokens.captured

    @property
    def reason(self) -> str | None:
        """Why steps do not replay CUDA graphs; None if they do, or will from the first one on."""
        return self._read_tokens.reason

    def add(self, name: str, cache: RaggedCache) -> None:
        """Makes a compressed cache known by a name; it goes before a file of that name.

        Raises:
            CacheMismatchError: Another model made the cache.
            InvalidArgumentError: It does not fit into the pool.
            SessionClosedError: The session was closed.
            UnsupportedCacheError: It is no cache of one context, compressed in every layer, or not in the pool's
                storage.
        """
        with self._lock, computing():
            self._check_open()
            self._contexts.add(name, cache)

    def submit(
        self,
        question: str,
        context: str | None = None,
        *,
        answer_prefix: str = "",
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int | None = None,
        split_special_tokens: bool = False,
    ) -> Stream:
        """Takes a question; its answer is written as somebody reads it, or another one. Any thread may call this.

        Args:
            question: The question, framed as by :func:`kvzip_press.answer`.
            context: The name of the context that it is about; None for none.
            answer_prefix: How the answer begins; not part of it.
            max_new_tokens: Most tokens of the answer. It ends earlier where its row has no more room: ``finish_reason``
                of the stream is then "room".
            sampling: How to sample the tokens; None takes the most likely one each time.
            seed: Seed of the sampling: the answer is then the one that :func:`kvzip_press.answer` samples with it,
                whoever asks meanwhile. None takes that of ``sampling``, and without one PyTorch's default generator.
            split_special_tokens: Whether control tokens that are spelled out in question or prefix are read as ordinary
                text, as those of others should be.

        Raises:
            InvalidArgumentError: There is no context of that name, or what there is cannot be read; a text is none;
                the question leaves its row no room for an answer; or there is a seed, but no sampling.
            SessionClosedError: The session was closed.
        """
        max_new_tokens = whole("max_new_tokens", max_new_tokens)
        sampling = seeded(sampling, seed)
        sampler = None if sampling is None else chooser(sampling)
        stream = Stream(self._tokenizer, self._step_for, self._cancel)
        request = Request(stream, context, question, answer_prefix, max_new_tokens, split_special_tokens, sampler)
        self._bound(request, len(request.ids(self._tokenizer)))
        with self._lock:
            self._check_open()
            if context is not None:
                self._contexts.check(context)
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

        What goes wrong with one request alone ends its stream. If an error is raised, it was everybody's: no answer has
        grown, and the step may be run again.

        Returns:
            Whether anything is left to do.
        """
        with self._lock, computing():
            if self._running:
                logits = self._read_tokens([request.stream.ids[-1] for request in self._running])
                chosen = next_tokens(self._running, logits)
                for row in reversed(range(len(chosen))):  # a row that leaves is replaced by one that was looked at
                    self._rows.lengths[row] += 1
                    self._take(row, chosen[row])
            self._admit()
            return bool(self._running or self._waiting)

    def close(self) -> None:
        """Ends all answers that are not complete, and forgets contexts and graphs; any thread may call this.

        The memory of pool and rows goes with the session object.
        """
        with self._lock:
            self._is_closed = True
            unfinished = [*self._waiting, *self._running]
            self._waiting.clear()
            while self._running:
                self._leave(len(self._running) - 1)
            for request in unfinished:
                request.stream.end(SessionClosedError("the session was closed before its answer"), reason="closed")
            self._contexts.forget()
            self._read_tokens.close()

    def __enter__(self) -> Session:
        """Returns the session itself, to be closed at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the session."""
        self.close()

    def _step_for(self, stream: Stream) -> None:
        with self._lock:
            if not stream.is_done:  # by the step of another reader, for which this one has waited
                self.step()

    def _admit(self) -> None:
        while self._waiting and self._rows.n < self._rows.max_rows:
            request = self._waiting[0]
            try:
                held = self._contexts.hold(request.context)
                if held is None:
                    return
                request.held = held
                [token] = self._joined(request)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this request's own: others go on
                self._waiting.popleft()
                request.stream.end(error, reason="error")
                continue
            self._waiting.popleft()
            self._running.append(request)
            self._take(self._rows.n - 1, token)

    def _joined(self, request: Request) -> list[Chosen]:
        """Reads a question into a new row; returns its first token."""
        n_before = self._rows.n
        try:
            self._check_weights()
            ids = request.ids(self._tokenizer)
            request.bound = self._bound(request, len(ids))
            logits = self._rows.join(self._model, ids, request.held.row)
            return next_tokens([request], logits[None])
        except BaseException:
            if self._rows.n > n_before:
                self._rows.leave(n_before)
            self.pool.release(request.held)
            request.held = NO_CONTEXT
            raise

    def _take(self, row: int, chosen: Chosen) -> None:
        """Appends a token to the answer of a row, which leaves if that was its last."""
        request = self._running[row]
        if isinstance(chosen, Exception):
            request.stream.end(chosen, reason="error")
            self._leave(row)
        elif request.take(chosen, self._eos):
            self._leave(row)

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
            stream.end(reason="cancelled")

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosedError("expected an open session, got one that was closed: make another one")

    def _check_weights(self) -> None:
        if weights_fingerprint(text_decoder(self._model)) != self._weights:
            raise CacheMismatchError(
                "expected the weights and adapters with which the session began, got others: the contexts in its pool "
                "were made with those"
            )

    def _bound(self, request: Request, n_ids: int) -> int:
        """Returns the most tokens of an answer behind a question of ``n_ids`` tokens."""
        room, limit = self._rows.max_tokens - n_ids, max_positions(self._model)
        if room < 1:
            raise InvalidArgumentError(
                f"expected a question that leaves room for an answer in a row of {self._rows.max_tokens} tokens, got "
                f"{n_ids}: ask a shorter one, or give the session a larger max_tokens"
            )
        bound = min(request.max_new_tokens, room)
        n_all = request.held.n_tokens + n_ids + bound
        if limit is not None and n_all > limit:
            raise InvalidArgumentError(
                f"expected context, question and answer within the model's {limit} positions, got up to {n_all}"
            )
        return bound
