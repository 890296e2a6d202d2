"""Threads that share one model: each gets what it would get alone, and what one opens is not seen by another.

Every comparison is with the same calls made one after another in one thread. Threads switch every few microseconds, so
that forwards really interleave.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, answer, compress, get_press, prefill
from kvzip_press.attention.implementation import attach, detach, is_attached
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import KVzipPressError
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.presses.fastkvzip import FastKVzipPress, Gates, LayerGate
from kvzip_press.presses.kvzip import KVzipPress
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
N_THREADS, N_ROUNDS = 4, 6


@pytest.fixture(autouse=True)
def hurried() -> Iterator[None]:
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def side_by_side(*functions: Callable[[], Any]) -> list[Any]:
    """Runs each function in a thread of its own, all at once, and returns what they return."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, function) for function in functions]]


def random_gates(model: Any) -> Gates:
    generator, gates = torch.Generator().manual_seed(0), []
    for _ in full_attention_layers(model):
        gate = LayerGate(64, 2, 2)
        for parameter in gate.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        gates.append(gate.requires_grad_(False))
    return Gates(gates)


def in_this_context(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Returns a function that a thread can call, which then sees what is open here."""
    here = contextvars.copy_context()
    return lambda: here.run(function, *args)


def press_of(name: str, model: Any) -> Any:
    if name == "fastkvzip":
        return FastKVzipPress(0.6, gate=random_gates(model))
    return get_press(name, 0.6)


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def held(cache: Any) -> list[list[int]]:
    """The positions that every head of every layer keeps."""
    layers = [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]
    return [layer.packed.head_positions(0, head).tolist() for layer in layers for head in range(2)]


def state_of(model: Any) -> list[Any]:
    """What threads could leave on modules: attributes and hooks."""
    return [
        (sorted(vars(module)), list(module._forward_hooks), list(module._forward_pre_hooks))
        for module in model.modules()
    ]


PRESSES = ["fastkvzip", "kvzip", "random", "snapkv", "expected_attention"]
PRESSES += [pytest.param(name, marks=pytest.mark.kvpress) for name in ("kvpress_kvzip", "adakv_snapkv")]


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("lengths", [(90, 90, 90, 90), (70, 90, 110, 130)], ids=["equal", "unequal"])
def test_contexts_that_are_compressed_at_once_keep_what_each_keeps_alone(name: str, lengths: tuple[int, ...]) -> None:
    model = tiny_model()
    attach(model)
    press, before = press_of(name, model), state_of(model)
    tokenizer = TOKENIZER
    if name == "kvpress_kvzip":
        from kvzip_press.presses.kvpress_adapter.original import blank_tokenizer

        tokenizer = blank_tokenizer()  # one that it can load from a folder
    contexts = [ids_of(length, seed) for seed, length in enumerate(lengths)]
    alone = [held(compress(model, tokenizer, context, press)) for context in contexts]

    def repeatedly(context: list[int]) -> list[Any]:
        return [held(compress(model, tokenizer, context, press)) for _ in range(N_ROUNDS)]

    together = side_by_side(*(lambda context=context: repeatedly(context) for context in contexts))
    assert together == [[expected] * N_ROUNDS for expected in alone]
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["fastkvzip", "kvzip"])
def test_answers_beside_a_compression_are_what_they_are_alone(name: str) -> None:
    model = tiny_model()
    press, context = press_of(name, model), ids_of(90, 0)
    cache = compress(model, TOKENIZER, context, press)
    expected, said = held(cache), answer(model, TOKENIZER, cache, "what?", max_new_tokens=12)

    def compressing() -> list[Any]:
        return [held(compress(model, TOKENIZER, context, press)) for _ in range(N_ROUNDS)]

    def answering() -> list[Any]:
        return [answer(model, TOKENIZER, cache, "what?", max_new_tokens=12) for _ in range(N_ROUNDS)]

    assert side_by_side(compressing, answering) == [[expected] * N_ROUNDS, [said] * N_ROUNDS]


def generated(model: Any, ids: list[int]) -> tuple[list[int], Any]:
    cache = DynamicCache(config=model.config)
    tokens = model.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=8, do_sample=False)
    return tokens[0, len(ids) :].tolist(), cache


def test_a_press_of_one_thread_is_not_that_of_another() -> None:
    """Each in its own `with press(model):`, and one without."""
    model, ids = tiny_model(), ids_of(60, 1)
    presses = [KVzipPress(0.5), FastKVzipPress(0.7, gate=random_gates(model)), RandomPress(0.3), None]

    def run(press: Any) -> Any:
        if press is None:
            tokens, cache = generated(model, ids)
            assert not any(isinstance(layer, RaggedLayer) for layer in cache.layers)
            return tokens, cache.get_seq_length()
        with press(model):
            tokens, cache = generated(model, ids)
        return tokens, held(cache)

    alone = [run(press) for press in presses]
    together = side_by_side(*(lambda press=press: [run(press) for _ in range(N_ROUNDS)] for press in presses))
    assert together == [[expected] * N_ROUNDS for expected in alone]


def test_a_thread_that_runs_in_a_copy_of_the_context_sees_the_press() -> None:
    """Several at once do, each with its own forward."""
    model = tiny_model()
    contexts = [ids_of(length, length) for length in (60, 70, 80)]
    with KVzipPress(0.5)(model):
        alone = [held(generated(model, ids)[1]) for ids in contexts]
        runs = [
            in_this_context(lambda ids=ids: [held(generated(model, ids)[1]) for _ in range(N_ROUNDS)])
            for ids in contexts
        ]
        assert side_by_side(*runs) == [[expected] * N_ROUNDS for expected in alone]


def test_a_press_that_ended_is_seen_by_no_thread() -> None:
    model, ids = tiny_model(), ids_of(60, 1)
    with KVzipPress(0.5)(model):
        later = in_this_context(generated, model, ids)
    _, cache = side_by_side(later)[0]
    assert not any(isinstance(layer, RaggedLayer) for layer in cache.layers)
    with RandomPress(0.5)(model), pytest.raises(KVzipPressError, match="one press at a time"), RandomPress(0.5)(model):
        pass


def steps(model: Any, ids: list[int], n: int, cache: Any = None) -> Any:
    """Reads ids into a cache, then n tokens one by one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        if ids:
            model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        for token in ids_of(n, n):
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    return cache


def test_eviction_while_decoding_goes_on_beside_others() -> None:
    """In one `with press(model):` that three threads see, and each in its own."""
    model = tiny_model()
    press = FastKVzipPress(decoding=True, budget=40, buffer=8, n_sink=3, gate=random_gates(model))
    contexts = [ids_of(length, length) for length in (50, 60, 70)]

    def own(ids: list[int]) -> Any:
        with press(model):
            cache = steps(model, ids, 45)
        return held(cache), [layer.tail.scores.tolist() for layer in cache.layers]

    alone = [own(ids) for ids in contexts]
    assert side_by_side(*(lambda ids=ids: own(ids) for ids in contexts)) == alone
    with press(model):
        runs = [in_this_context(steps, model, ids, 45) for ids in contexts]
        assert [held(cache) for cache in side_by_side(*runs)] == [expected for expected, _ in alone]


def test_another_thread_goes_on_with_a_cache_that_evicts() -> None:
    """Tokens that wait for their scores get them when the cache changes hands."""
    model, ids = tiny_model(), ids_of(60, 3)
    press = FastKVzipPress(decoding=True, budget=40, buffer=8, n_sink=3, gate=random_gates(model))
    with press(model):
        expected = steps(model, [], 21, steps(model, ids, 5))
    with press(model):
        cache = side_by_side(in_this_context(steps, model, ids, 5))[0]
        assert held(steps(model, [], 21, cache)) == held(expected)


def test_an_error_in_one_thread_leaves_the_model_attached_for_another() -> None:
    model = tiny_model()
    cache = compress(model, TOKENIZER, ids_of(60, 1), RandomPress(0.5))
    detach(model)

    def failing() -> None:
        with pytest.raises(ZeroDivisionError), RandomPress(0.5)(model):
            entered.set()
            attached.wait()
            raise ZeroDivisionError

    def using() -> None:
        entered.wait()
        attach(model)
        attached.set()

    entered, attached = threading.Event(), threading.Event()
    side_by_side(failing, using)
    assert is_attached(model)
    assert answer(model, TOKENIZER, cache, "what?", max_new_tokens=2) is not None


def test_a_forward_that_raises_in_one_thread_is_watched_no_longer() -> None:
    model, before = tiny_model(), None
    attach(model)
    before = state_of(model)

    def failing() -> None:
        with pytest.raises(IndexError), FastKVzipPress(0.5, gate=random_gates(model))(model):
            model(torch.tensor([[5, 6, 7, 10_000]]), use_cache=True)

    def working() -> list[Any]:
        return [held(compress(model, TOKENIZER, ids_of(60, 1), KVzipPress(0.5))) for _ in range(N_ROUNDS)]

    expected = working()
    assert side_by_side(failing, working, failing, working)[1] == expected
    assert state_of(model) == before


def test_prefills_with_other_observers_run_at_once() -> None:
    """One context is watched by two presses, another by one: each observer sees its own forward."""
    model = tiny_model()
    gated, seen = FastKVzipPress(0.6, gate=random_gates(model)), {}

    def evicted(ids: list[int]) -> Any:
        done = prefill(model, TOKENIZER, ids, observers=[gated])
        return held(RaggedCache.of(done.evict(gated.score(done))))

    contexts = [ids_of(80, seed) for seed in range(N_THREADS)]
    seen = [evicted(ids) for ids in contexts]
    assert side_by_side(*(lambda ids=ids: evicted(ids) for ids in contexts)) == seen


def test_contexts_on_both_sides_of_a_switch_of_rope_are_read_at_once() -> None:
    """transformers keeps the frequencies of the last forward on the model; ours have them for themselves."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope["original_max_position_embeddings"] = 64
    model = tiny_model("phi3", max_position_embeddings=512, original_max_position_embeddings=64, rope_parameters=rope)

    def work(length: int) -> Any:
        cache = compress(model, TOKENIZER, ids_of(length, length), KVzipPress(0.5))
        return held(cache), answer(model, TOKENIZER, cache, "?", max_new_tokens=5)

    alone = [work(length) for length in (40, 100)]
    together = side_by_side(*(lambda n=n: [work(n) for _ in range(3)] for n in (40, 100)))
    assert together == [[expected] * 3 for expected in alone]
