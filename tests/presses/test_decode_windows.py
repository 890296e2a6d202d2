"""The ring of a layer's last queries says what all queries would, bit for bit, in a fraction of the bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kvzip_press import RaggedCache, compress
from kvzip_press.cache.pair_pool.worth import held_tokens
from kvzip_press.cache.query_window import QueryWindow
from kvzip_press.decoding import pair_scorer
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.pair_scorer import PairScorer
from kvzip_press.model.structure import attention_layers
from kvzip_press.presses.decoding import DecodePress, H2OPress, RKVPress, SnapKVDecodePress, TOVADecodePress
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = [pytest.mark.any_transformers, pytest.mark.usefixtures("one_thread")]

TOKENIZER, BUDGET, BUFFER = ByteTokenizer(), 24, 12
PRESSES = [
    RKVPress(budget=BUDGET, buffer=BUFFER),
    SnapKVDecodePress(budget=BUDGET, buffer=BUFFER, window_size=11),
    TOVADecodePress(budget=BUDGET, buffer=BUFFER),
    RKVPress(budget=BUDGET, buffer=1, window_size=3),
]
every_press = pytest.mark.parametrize("press", PRESSES, ids=["rkv", "snapkv", "tova", "rkv_each_token"])


class Stop(BaseException):
    """What ends a forward half-way."""


@dataclass(frozen=True)
class AllQueries(QueryWindow):
    """Every query since the cache was met, in new memory at each change."""

    @classmethod
    def unknown(cls, like: torch.Tensor, size: int | None, length: int) -> QueryWindow:
        return cls(like.new_full((*like.shape[:2], length, like.shape[3]), torch.nan), size, length)

    def appended(self, n_tokens: int, padding: torch.Tensor | None = None) -> QueryWindow:
        new = self.buffer.new_full((*self.buffer.shape[:2], n_tokens, self.buffer.shape[3]), torch.nan)
        rows = []
        for row, (old, block) in enumerate(zip(self.buffer, new, strict=True)):
            n = 0 if padding is None else int(padding[row])
            rows.append(torch.cat([block[:, :n], old, block[:, n:]], dim=1))
        return replace(self, buffer=torch.stack(rows), length=self.length + n_tokens, padding=padding)

    def filled(self, queries: torch.Tensor) -> QueryWindow:
        buffer, n = self.buffer.clone(), queries.shape[2]
        for row in range(len(buffer)):
            first = 0 if self.padding is None else int(self.padding[row])
            buffer[row, :, self.length - n + first :] = queries[row, :, first:]
        return replace(self, buffer=buffer, padding=None)

    def truncated(self, n_tokens: int) -> QueryWindow:
        length = self.length - n_tokens
        return replace(self, buffer=self.buffer[:, :, :length].clone(), length=length)

    def ends_dropped(self, counts: torch.Tensor) -> QueryWindow:
        columns = torch.arange(self.length) - counts[:, None]
        taken = torch.stack([row[:, index.clamp(min=0)] for row, index in zip(self.buffer, columns, strict=True)])
        return replace(self, buffer=taken.masked_fill((columns < 0)[:, None, :, None], torch.nan))

    def reserved(self, n_tokens: int) -> QueryWindow:
        return self

    with_room_for = reserved

    def copy(self, device: torch.device | None = None) -> QueryWindow:
        return replace(self, buffer=self.buffer.clone())


@contextmanager
def worths(monkeypatch: Any, kind: type[QueryWindow]) -> Iterator[list[torch.Tensor]]:
    """While open, notes what pairs are worth at each eviction, as a window of this kind makes a press see it."""
    seen: list[torch.Tensor] = []
    worth = PairScorer.worth

    def noted(self: PairScorer, layers: Any) -> Any:
        found = worth(self, layers)
        seen.extend(tensor.clone() for one in found.values() for tensor in (one.packed, one.tail))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(PairScorer, "worth", noted)
        patch.setattr(pair_scorer, "QueryWindow", kind)
        yield seen


@contextmanager
def stopping(model: Any) -> Iterator[None]:
    """While open, the last layer raises when it has attended."""

    def stop(*_: object) -> None:
        raise Stop

    hook = attention_layers(model)[-1].module.register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()


class Story:
    """Two contexts, and what happens behind them, in an order that the seed says."""

    def __init__(self, model: Any, press: DecodePress, seed: int) -> None:
        contexts = ["a first context, rather long, of several words", "short one"]
        self.model, self.press, self.order = model, press, random.Random(seed)
        self.cache = compress(model, TOKENIZER, contexts, RandomPress(0.3))

    def read(self, n_tokens: int, padding: list[int] | None = None) -> None:
        ids = [[self.order.randrange(3, 120) for _ in range(n_tokens)] for _ in range(2)]
        read(self.model, self.cache, torch.tensor(ids), padding=None if padding is None else torch.tensor(padding))

    def block(self) -> None:
        self.read(4)

    def padded(self) -> None:
        self.read(6, self.order.choice([[0, 4], [5, 0], [1, 0]]))

    def detour(self) -> None:
        """Three tokens are read, cropped, and others read; no eviction between."""
        layers: Any = self.cache.layers
        if int(held_tokens(layers).max()) + 6 < BUDGET + self.press.buffer:
            n_seen = self.cache.n_seen
            self.read(3)
            self.cache.truncate(n_seen)
            self.read(3)

    def aborted(self) -> None:
        with pytest.raises(Stop), stopping(self.model):
            self.read(self.order.choice([1, 1, 5]))

    def rearranged(self) -> None:
        self.cache.batch_select_indices(torch.tensor(self.order.choice([[0, 1], [1, 0]])))

    def moved(self) -> None:
        self.cache.move_to("cpu")

    def forked(self) -> None:
        self.cache = self.cache.fork()

    def told(self) -> RaggedCache:
        what = [self.block, self.padded, self.detour, self.aborted, self.rearranged, self.moved, self.forked]
        with self.press(self.model):
            self.aborted()  # the press has met the cache, which is then as if it had not
            for number in range(70):
                self.read(1)
                if number % 3 == 0:
                    self.order.choice(what)()
        return self.cache


@every_press
@pytest.mark.parametrize("seed", range(4))
def test_a_ring_says_what_all_queries_say(press, seed, monkeypatch) -> None:
    """Rows of different length, padded blocks, detours, steps that fail, forks, reordered rows, moves."""
    model = tiny_model(num_layers=2)
    with worths(monkeypatch, AllQueries) as expected:
        other = Story(model, press, seed).told()
    with worths(monkeypatch, QueryWindow) as got:
        cache = Story(model, press, seed).told()
    assert len(got) == len(expected) > 8
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for layer, dense in zip(cache.layers, other.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.packed.tensors, dense.packed.tensors, strict=True))
        assert layer.tail.window.buffer.shape[2] == press.n_queries + 1


@every_press
def test_a_ring_that_static_steps_write_says_what_all_queries_say(press, static_steps, monkeypatch) -> None:
    """Queries and keys of a single layer do not depend on how it attends, so theirs are the same bits."""
    model = tiny_model(num_layers=1)

    def run() -> Any:
        cache = compress(model, TOKENIZER, ["a first context, rather long", "short one"], RandomPress(0.3))
        with press(model):
            for n in (40, 7, 40):
                ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
                generate(model, cache, ids, n, attention_mask=mask)
        return cache

    monkeypatch.setattr("kvzip_press.decoding.generation.most_likely", lambda logits: torch.full((2,), 9))
    with worths(monkeypatch, QueryWindow) as got:
        run()
    with worths(monkeypatch, AllQueries) as expected, monkeypatch.context() as patch:
        patch.setattr("kvzip_press.decoding.step._reason_against", lambda *_: "eager")
        run()
    assert len(got) == len(expected) > 4
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("press", "n_rows"), [*zip(PRESSES, (9, 12, 2, 4), strict=True)], ids=lambda one: str(one)[:9])
def test_a_row_holds_the_bytes_of_its_window_s_queries_and_of_one_more(press, n_rows) -> None:
    """However long the buffer is, in eager steps and behind a block; storages do not keep more than is seen."""
    model = tiny_model(num_layers=2)
    cache = compress(model, TOKENIZER, "a context of some words that is read before", RandomPress(0.3))
    with replace(press, buffer=100, budget=40)(model):
        for n in (1, 1, 30, 1, 150, 1):
            read(model, cache, torch.arange(3, 3 + n)[None] % 120)
            for layer in cache.layers:
                buffer = layer.tail.window.buffer
                assert buffer.untyped_storage().nbytes() == buffer.nbytes == n_rows * 4 * 16 * 4


def test_sums_of_all_attention_keep_the_queries_of_the_buffer() -> None:
    """H2O looks at each query since the last eviction, once."""
    model = tiny_model(num_layers=2)
    cache = compress(model, TOKENIZER, "a context of some words that is read before", RandomPress(0.3))
    with H2OPress(budget=24, buffer=16)(model):
        generate(model, cache, [5], 60)
        held = [layer.tail.window for layer in cache.layers]
        assert all(window.length == layer.tail.length for window, layer in zip(held, cache.layers, strict=True))
        assert all(window.buffer.shape[2] == 16 for window in held)
