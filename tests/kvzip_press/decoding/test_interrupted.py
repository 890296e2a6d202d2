"""What ends half-way leaves a cache as it was, or behind a whole step: interrupts, closed loops, modes, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import FastKVzipPress, Gates, RaggedCache, RandomPress, answer, compress
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.padding import left_padded, padding_in
from kvzip_press.cache.pair_pool import merging
from kvzip_press.cache.pair_pool.change import InParts
from kvzip_press.cache.pair_pool.pool import PairPool
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.cache.tail import Tail
from kvzip_press.decoding.answering import question_ids
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.generation import generate
from kvzip_press.errors import CacheMismatchError
from kvzip_press.model.structure import attention_layers
from kvzip_press.presses.fastkvzip import LayerGate
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
MODELS = {
    "llama": tiny_model(num_layers=2, tie_word_embeddings=False),
    "gemma3_text": tiny_model("gemma3_text", tie_word_embeddings=False),
}
QUESTION = torch.tensor([[5, 6, 7, 8]])
NEVER = 10**9


class Stop(BaseException):
    """Like a KeyboardInterrupt, which would end the test run if it escaped."""


@contextmanager
def stopping_at(model, number: int) -> Iterator[list[int]]:
    """While open, the call of attention with this number raises; the list counts them."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1
        if calls[0] > number:
            raise Stop

    hooks = [layer.module.register_forward_hook(count) for layer in attention_layers(model)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def made(model, sizes: tuple[int, ...] = (40,), turns: int = 1) -> RaggedCache:
    rows = [torch.randint(3, 120, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in sizes]
    cache = compress(model, TOKENIZER, rows, RandomPress(0.5))
    for turn in range(turns):
        questions = ["a longer question"[: 3 + 5 * row + turn] for row in range(len(sizes))]
        answer(model, TOKENIZER, cache, questions, max_new_tokens=2, keep=True)
    return cache


def logits_after(model, cache: RaggedCache) -> torch.Tensor:
    attach(model)
    return read(model, cache.fork(), torch.tensor([[9, 4]] * cache.batch_size))


def check_equal(model, cache: RaggedCache, expected: RaggedCache, tmp_path) -> None:
    """The same facts and logits, bit for bit, as it is and as it comes back from a file."""
    cache.save(tmp_path / "cache.safetensors")
    for one in (cache, RaggedCache.load(tmp_path / "cache.safetensors", model)):
        assert (one.n_seen, one.turn_starts) == (expected.n_seen, expected.turn_starts)
        assert torch.equal(logits_after(model, one), logits_after(model, expected))


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("tokens", [[[5, 6, 7], [8, 9, 4]], [[5], [8, 9, 4]]], ids=["even", "padded"])
def test_a_read_that_is_interrupted_in_any_layer_leaves_the_cache_as_it_was(architecture, tokens, tmp_path) -> None:
    """Rows that hold turns of different lengths already, whose tokens would move over the padding of the block."""
    model = MODELS[architecture]
    cache = made(model, (40, 31))
    before = cache.fork()
    ids, valid = left_padded(tokens, torch.device("cpu"))
    for number in range(len(attention_layers(model))):
        with pytest.raises(Stop), stopping_at(model, number):
            read(model, cache, ids, padding=padding_in(valid, tuple(ids.shape)))
        check_equal(model, cache, before, tmp_path)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_generation_that_is_interrupted_anywhere_leaves_the_cache_behind_a_whole_step(architecture, tmp_path) -> None:
    """What was read stays, step by step; the step that was interrupted leaves nothing."""
    model, n_layers = MODELS[architecture], len(attention_layers(MODELS[architecture]))
    whole = made(model)
    for number in range(0, 3 * n_layers, 1 if n_layers < 3 else 3):
        cache, expected = whole.fork(), whole.fork()
        with pytest.raises(Stop), stopping_at(model, number):
            generate(model, cache, QUESTION, 9)
        if n_read := number // n_layers:
            generate(model, expected, QUESTION, n_read)
        check_equal(model, cache, expected, tmp_path)


class Breaking:
    """A streamer that has had enough after some tokens."""

    def __init__(self, n_tokens: int) -> None:
        self.n_left = n_tokens + 1  # the question comes first

    def put(self, ids: torch.Tensor) -> None:
        self.n_left -= 1
        if self.n_left <= 0:
            raise Stop

    def end(self) -> None:
        raise AssertionError("the stream was broken off")


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_a_stream_that_is_broken_off_leaves_the_cache_behind_what_was_read(n_tokens, tmp_path) -> None:
    """The token that is put last has not been read yet, as at the end of any generation."""
    model = MODELS["llama"]
    cache, expected = made(model), made(model)
    with pytest.raises(Stop):
        generate(model, cache, QUESTION, 20, streamer=Breaking(n_tokens))
    generate(model, expected, QUESTION, n_tokens)
    check_equal(model, cache, expected, tmp_path)


def test_an_answer_that_is_to_be_kept_and_is_interrupted_anywhere_is_not_kept(tmp_path) -> None:
    """Rows that end at different tokens are read again, which is interrupted, too."""
    model = MODELS["llama"]
    cache = made(model, (40, 31))
    before, questions, bounds = cache.fork(), ["a", "a long one"], [2, 5]
    with stopping_at(model, NEVER) as calls:
        answer(model, TOKENIZER, cache.fork(), questions, "", bounds, keep=True)
    for number in range(calls[0]):
        with pytest.raises(Stop), stopping_at(model, number):
            answer(model, TOKENIZER, cache, questions, "", bounds, keep=True)
    check_equal(model, cache, before, tmp_path)
    answer(model, TOKENIZER, cache, questions, "", bounds, keep=True)
    assert len(cache.turn_starts) == 2


@pytest.mark.parametrize("questions", [["Where?"], ["Where?", "Who is it then?"]], ids=["one row", "rows"])
def test_a_question_without_an_answer_is_kept(questions) -> None:
    """``max_new_tokens=0`` puts the question into the cache, as if its answer had ended at once."""
    model = MODELS["llama"]
    cache = made(model, (40, 31)[: len(questions)], turns=0)
    asked = answer(model, TOKENIZER, cache, questions, max_new_tokens=0, keep=True)
    assert asked == [""] * len(questions)
    ids, valid = left_padded([question_ids(TOKENIZER, question) for question in questions], torch.device("cpu"))
    expected = made(model, (40, 31)[: len(questions)], turns=0)
    read(model, expected, ids, padding=padding_in(valid, tuple(ids.shape)))
    assert cache.n_seen == expected.n_seen and len(cache.turn_starts) == 1
    assert torch.equal(logits_after(model, cache), logits_after(model, expected))
    answer(model, TOKENIZER, cache, questions, max_new_tokens=3, keep=True)
    assert len(cache.turn_starts) == 2


MODES: dict[str, Callable[[], object]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_cache_goes_on_in_any_mode_of_torch(first, second, tmp_path) -> None:
    """Made and read in one mode, read in another, padded rows too, truncated, and saved: always the same answers."""

    def run(one, other) -> tuple[object, ...]:
        model = MODELS["gemma3_text"]
        with MODES[one]():
            cache = made(model, (20, 9), turns=0)
            generate(model, cache, QUESTION.repeat(2, 1), 2)
        with MODES[other]():
            answers = generate(model, cache, QUESTION.repeat(2, 1), 3)
            kept = answer(model, TOKENIZER, cache, ["a", "a longer one"], max_new_tokens=3, keep=True)
            cache.reorder_cache(torch.tensor([1, 0]))
        with MODES[one]():
            model(torch.tensor([[5], [6]]), past_key_values=cache) if one != "plain" else read(
                model, cache, torch.tensor([[5], [6]])
            )
            cache.move_to("cpu")
            answer(model, TOKENIZER, cache, ["c", "d"], max_new_tokens=3, keep=True)
        cache.save(tmp_path / "cache.safetensors")
        loaded = RaggedCache.load(tmp_path / "cache.safetensors", model)
        return answers, kept, cache.turn_starts, torch.equal(logits_after(model, cache), logits_after(model, loaded))

    assert run(first, second) == run("no_grad", "no_grad")


def test_turns_that_are_kept_by_several_threads_follow_one_another() -> None:
    """None is lost, and the dialogue is one that a single thread could have had; forks in other threads are free."""
    model, barrier = MODELS["llama"], threading.Barrier(5)
    cache = made(model, turns=0)
    questions = {f"Question {number}{'?' * number}" for number in range(4)}
    n_before, failures = cache.n_seen, []

    def ask(question: str) -> None:
        barrier.wait()
        try:
            answer(model, TOKENIZER, cache, question, max_new_tokens=4, keep=True)
        except BaseException as error:  # noqa: BLE001  # to be shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    barrier.wait()
    forks = [answer(model, TOKENIZER, cache, "And?", max_new_tokens=2) for _ in range(3)]
    for thread in threads:
        thread.join()
    assert not failures and len(forks) == 3
    starts = [*cache.turn_starts, cache.n_seen]
    assert len(cache.turn_starts) == len(questions) and starts[0] == n_before
    assert starts == sorted(set(starts))


def gated(model) -> FastKVzipPress:
    """Evicts every 8 tokens from a budget of 24."""
    gates = [LayerGate(64, 2, 2) for _ in attention_layers(model)]
    for number, gate in enumerate(gates):
        for parameter in gate.requires_grad_(False).parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return FastKVzipPress(decoding=True, gate=Gates(gates), budget=24, buffer=8, n_sink=2)


def written(model, press: FastKVzipPress, n_tokens: int, stop: Callable[[], object] = nullcontext) -> RaggedCache:
    """What is left of a context, and of ``n_tokens`` that follow it, or of those before something stops the model."""
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(torch.arange(3, 43)[None], past_key_values=cache)
        with suppress(Stop), stop():
            generate(model, cache, QUESTION, n_tokens)
    return RaggedCache.of(cache)


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(PairPool, "put", 0)]  # the first eviction makes the pool, later ones write to it a layer at a time
    + [(*one, n) for one in ((InParts, "_write"), (RaggedLayer, "take"), (Tail, "emptied")) for n in range(4)],
    ids=str,
)
def test_an_eviction_that_is_interrupted_anywhere_is_finished(owner, name, number, behind, monkeypatch) -> None:
    """While the model writes: half of the pairs written over, or half of the layers emptied, would be lost."""
    model, calls, original = MODELS["llama"], [0], getattr(owner, name)
    monkeypatch.setattr(merging, "NUMBERS_MERGED", 1)  # a layer at a time

    def interrupted(*args: object) -> object:
        calls[0] += 1
        if calls[0] == number + 1 and not behind:
            raise Stop
        result = original(*args)
        if calls[0] == number + 1:
            raise Stop
        return result

    @contextmanager
    def stop() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            yield

    press, n_before = gated(model), 40
    cache = written(model, press, 40, stop)
    expected = written(model, press, cache.n_seen - n_before - QUESTION.shape[1] + 1)
    assert cache.n_seen == expected.n_seen < n_before + QUESTION.shape[1] + 39
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.packed.tensors, other.packed.tensors, strict=True))
        assert (layer.tail.length, layer.context_ends) == (other.tail.length, other.context_ends)
    assert torch.equal(logits_after(model, cache), logits_after(model, expected))


def test_a_cache_whose_eviction_failed_half_way_is_refused(monkeypatch) -> None:
    """The first layer is written, the second cannot be, whenever it is tried."""
    model, original = MODELS["llama"], InParts._write

    def fails(self: InParts, number: int, new: object) -> None:
        if len(self.left) == 1:
            raise Stop
        original(self, number, new)

    @contextmanager
    def stop() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(InParts, "_write", fails)
            yield

    cache = written(model, gated(model), 40, stop)
    with pytest.raises(CacheMismatchError, match="an eviction failed after it had begun to write"):
        logits_after(model, cache)


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_pairs_that_are_evicted_while_the_model_writes_do_so_in_any_mode(mode) -> None:
    """A cache that began in one mode goes on in another, its scores moved and forked with it."""
    model = MODELS["llama"]
    press, cache = gated(model), DynamicCache()
    with MODES[mode](), press(model):
        model(torch.arange(3, 43)[None], past_key_values=cache)
        begun = generate(model, cache, QUESTION, 20)
    ragged = RaggedCache.of(cache).fork()
    ragged.move_to("cpu")
    end = torch.tensor([begun[0][-1:]])
    answers = []
    for one in (ragged, cache):
        with press(model):
            answers.append(generate(model, one, end, 20))
    assert answers[0] == answers[1]
    for layer, other in zip(ragged.layers, cache.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.packed.tensors, other.packed.tensors, strict=True))
        assert torch.equal(layer.tail.scores, other.tail.scores)
