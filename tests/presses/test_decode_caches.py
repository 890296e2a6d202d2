"""Presses that evict while the model writes, over caches from elsewhere and shared ones, and what is held at most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decode_presses import BUDGET, BUFFER, PRESSES, SPENDING, distinct_ids, held, made, ragged, step
from transformers import DynamicCache

from kvzip_press import RaggedCache, answer, compress
from kvzip_press.budget.allocators import allocation_of
from kvzip_press.decoding import step as decoding
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.generation import generate
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding import (
    DecodePress,
    H2OPress,
    KnormDecodePress,
    RKVPress,
    StreamingLLMDecodePress,
)
from kvzip_press.presses.kvzip import KVzipPress
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
every_press = pytest.mark.parametrize("kind_and_options", PRESSES, ids=lambda pair: pair[0].__name__)


def small_model(architecture: str = "llama", **options: Any) -> Any:
    return tiny_model(architecture, vocab_size=256, **options)


def storage_bytes(cache: Any) -> int:
    """Of all that the compressed layers refer to, each storage once, as long as it is."""
    storages = (tensor.untyped_storage() for layer in ragged(cache) for tensor in layer.tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# Dense caches from outside ------------------------------------------------------------------------------------------


def filled_outside(model: Any, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    step(model, cache, ids)
    return cache


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("prompt", [None, KVzipPress(0.5)], ids=["own", "kvzip"])
def test_a_dense_cache_that_fills_the_budget_is_refused_and_the_error_says_what_to_do(prompt, n_tokens) -> None:
    """Before anything is read: its tokens stay, since the press did not see them."""
    model, ids = small_model(num_layers=2), distinct_ids(60)
    cache = filled_outside(model, ids[:, :40])
    said = "40 protected first tokens.*dense cache.*filled outside.*protect_prompt=True"
    with RKVPress(budget=24, buffer=8, prompt=prompt)(model), pytest.raises(InvalidArgumentError, match=said):
        step(model, cache, ids[:, 40 : 40 + n_tokens])
    assert cache.get_seq_length() == 40
    assert not ragged(cache)


@every_press
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_a_press_that_scores_the_prompt_refuses_one_that_it_did_not_see(kind_and_options, n_tokens) -> None:
    """Token by token, such a cache had grown without any bound and without a word."""
    model, ids = small_model(num_layers=2), distinct_ids(60)
    cache = filled_outside(model, ids[:, :10])
    said = "one forward.*a dense cache of 10 tokens that was filled outside.*protect_prompt=True"
    with made(kind_and_options)(model), pytest.raises(InvalidArgumentError, match=said):
        step(model, cache, ids[:, 10 : 10 + n_tokens])
    assert cache.get_seq_length() == 10
    assert not ragged(cache)


@every_press
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_a_dense_cache_from_outside_is_a_prompt_that_stays(kind_and_options, n_tokens) -> None:
    """``protect_prompt``: with what is read behind it first, as if the press had seen both."""
    model, ids = small_model(num_layers=2), distinct_ids(90)
    press = made(kind_and_options, protect_prompt=True)
    outside, inside = filled_outside(model, ids[:, :30]), DynamicCache(config=model.config)
    with press(model):
        for at in range(30, 84, n_tokens):
            step(model, outside, ids[:, at : at + n_tokens])
    with press(model):
        step(model, inside, ids[:, : 30 + n_tokens])
        for at in range(30 + n_tokens, 84, n_tokens):
            step(model, inside, ids[:, at : at + n_tokens])
    assert all(positions[:30] == list(range(30)) for positions in held(outside))
    assert sum(map(len, held(outside))) < (30 + n_tokens + BUDGET + BUFFER) * 4
    assert held(outside) == held(inside)


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind_and_options", "architecture"),
    [(PRESSES[4], "llama"), (PRESSES[4], "gemma3_text"), (PRESSES[6], "gemma3_text"), (PRESSES[3], "llama")],
    ids=lambda x: getattr(x[0], "__name__", x),
)
def test_questions_about_one_context_are_answered_as_alone(kind_and_options, architecture) -> None:
    """Each loses what it would lose alone: a context that they share is theirs from the first forward on."""
    model, press = small_model(architecture), made(kind_and_options)
    cache = compress(model, TOKENIZER, "a context of some length, about which there are questions", press)
    questions, before = ["one?", "and a second, longer one?", "3"], held(cache)
    with press(model):
        alone = [answer(model, TOKENIZER, cache, question, max_new_tokens=25) for question in questions]
        assert answer(model, TOKENIZER, cache, questions, max_new_tokens=25) == alone
    assert held(cache) == before


# Gemma 3 normalises keys, so that their norms are equal and rounding alone ranks them.
RANKED = [(pair, name) for pair in PRESSES for name in ("llama", "gemma3_text", "gemma2")]
RANKED = [(pair, name) for pair, name in RANKED if (pair[0], name) != (KnormDecodePress, "gemma3_text")]


@pytest.mark.parametrize(("kind_and_options", "architecture"), RANKED, ids=lambda x: getattr(x[0], "__name__", x))
def test_rows_of_a_sliding_window_model_are_what_they_are_alone(kind_and_options, architecture) -> None:
    """Their full layers evict, the sliding ones beside them go on; padded questions, longer than the window."""
    model, press, n = small_model(architecture), made(kind_and_options), 30
    contexts, questions = ["a first context, rather long, of words", "short one"], [[5, 6, 7], list(range(8, 20))]
    together = compress(model, TOKENIZER, contexts, press)
    ids = torch.tensor([[0] * 9 + questions[0], questions[1]])
    alone = [compress(model, TOKENIZER, context, press) for context in contexts]
    with press(model):
        written = generate(model, together, ids, n, attention_mask=(ids > 0).long())
        for row, (cache, question) in enumerate(zip(alone, questions, strict=True)):
            assert generate(model, cache, question, n) == [written[row]]
            assert held(together, row) == held(cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_behind_a_prompt_that_no_row_moves_over_is_refused(side) -> None:
    """It would be held, and attended, like tokens: before anything is read."""
    model, ids = small_model(num_layers=2), distinct_ids(60, batch=2)
    cache, mask = DynamicCache(config=model.config), torch.ones(2, 44, dtype=torch.int64)
    mask[0, slice(40, 42) if side == "left" else slice(42, 44)] = 0
    with RKVPress(budget=24, buffer=8)(model):
        step(model, cache, ids[:, :40])
        with pytest.raises(InvalidArgumentError, match=r"padding among the new ones.*kvzip_press\.generate"):
            step(model, cache, ids[:, 40:44], attention_mask=mask)
        assert cache.get_seq_length() == 40
        step(model, cache, ids[:, 40:44], attention_mask=torch.ones_like(mask))


def test_rows_with_prefixes_of_different_length_keep_their_own_newest_tokens() -> None:
    """A long protected prefix leaves its own row less room for the newest tokens, and no other row."""
    model, ids, firsts = small_model(num_layers=2), distinct_ids(80, batch=2), (9, 0)
    mask, press = torch.ones_like(ids), H2OPress(budget=24, buffer=8, recent_fraction=0.7, prompt=RandomPress(0.0))
    mask[0, :9] = 0
    where = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(row: slice, first: int) -> Any:
        cache = DynamicCache(config=model.config)
        given = {"attention_mask": mask[row, first:], "position_ids": where[row, first:]}
        step(model, cache, ids[row, first:18], **{name: value[:, : 18 - first] for name, value in given.items()})
        with press(model):
            for at, end in ((18, 22), *((at, at + 1) for at in range(22, 60))):
                named = {"attention_mask": mask[row, first:end], "position_ids": where[row, at:end]}
                step(model, cache, ids[row, at:end], **named)
        return cache

    together = run(slice(0, 2), 0)
    assert together.layers[0].n_protected == (9, 18)
    for row, first in enumerate(firsts):
        assert held(together, row) == held(run(slice(row, row + 1), first))


# Bytes --------------------------------------------------------------------------------------------------------------


def most_bytes(press: DecodePress, n_layers: int, n_rows: int = 1) -> int:
    """Of pairs: budget in the pool, buffer in the tail; of queries: see ``QueryWindow``; ends of heads."""
    heads, tail_bytes, packed_bytes = n_layers * 2 * n_rows, 2 * 16 * 4 + 4, 2 * 16 * 4 + 4 + 4
    n_queries = 0 if press.n_queries == 0 else BUFFER if press.n_queries is None else press.n_queries + 1
    pairs = heads * (BUDGET * packed_bytes + BUFFER * tail_bytes)
    return pairs + n_layers * n_rows * n_queries * 4 * 16 * 4 + 4 * (heads + 1) + 4 * n_layers * (2 * n_rows + 1)


def steps_of(model: Any, cache: Any, ids: torch.Tensor, *, static: bool) -> Iterator[None]:
    if not static:
        for token in ids.T:
            step(model, cache, token[:, None])
            yield
        return
    with decoding.DecodeStep(model, cache, max_new_tokens=ids.shape[1]) as decode:
        for token in ids.T:
            decode(token)
            assert decode.captured
            yield


@pytest.mark.any_transformers
@every_press
@pytest.mark.parametrize("allocation", SPENDING)
@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_storages_never_hold_more_than_budget_and_buffer(kind_and_options, allocation, static, static_steps) -> None:
    """From a short prompt on: buffers have room for what comes until an eviction, and not for more."""
    model, ids, n_prompt = small_model(num_layers=1), distinct_ids(50), 3
    press, cache = made(kind_and_options, allocation=allocation), DynamicCache(config=model.config)
    most = most_bytes(press, 1)
    if press.n_queries is None:  # none is added up before the first eviction
        most += 64 * 4 * 16 * 4
    with press(model):
        step(model, cache, ids[:, :n_prompt])
        assert storage_bytes(cache) <= most
        for _ in steps_of(model, RaggedCache.of(cache), ids[:, n_prompt:], static=static):
            assert storage_bytes(cache) <= most
    assert sum(map(len, held(cache))) >= BUDGET * 2 - allocation_of(allocation).rounding


def test_buffers_grow_in_blocks_again_behind_the_press() -> None:
    """Not token by token, each time with a copy of all that is there."""
    model = small_model(num_layers=2)
    cache = compress(model, TOKENIZER, "a context of some words", RandomPress(0.5))
    with StreamingLLMDecodePress(budget=24, buffer=8)(model):
        generate(model, cache, [5], 10)
    addresses = set()
    for _ in range(60):
        read(model, cache, torch.tensor([[7]]))
        addresses.add(cache.layers[0].tail.keys.data_ptr())
    assert len(addresses) < 9
