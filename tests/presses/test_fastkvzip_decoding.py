"""Fast KVzip while the model writes: the cache stays within its budget, and holds what an oracle would keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, answer, compress, compress_in_chunks, get_press
from kvzip_press.budget.allocators import PerLayer
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.decoding import step as decoding
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.scorer import MOST_WAITING, HiddenStateScorer
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.presses.fastkvzip import FastKVzipPress, Gates, LayerGate
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
HEADS, GROUPS, HIDDEN = 2, 2, 64  # of tiny models


def random_gates(model, seed: int = 0) -> Gates:
    generator, gates = torch.Generator().manual_seed(seed), []
    for _ in full_attention_layers(model):
        gate = LayerGate(HIDDEN, HEADS, GROUPS)
        for parameter in gate.parameters():
            # Scores far from 0 and 1, where they tie
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        gates.append(gate.requires_grad_(False))
    return Gates(gates)


def press_for(model, **options) -> FastKVzipPress:
    options = {"budget": 40, "buffer": 16, "n_sink": 3} | options
    return FastKVzipPress(decoding=True, gate=random_gates(model), **options)


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def kept(cache) -> dict[tuple[int, int, int], list[int]]:
    """``(layer, row, head) -> positions`` of everything that is held, tails included."""
    held = {}
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, RaggedLayer):
            ends, n_tail = layer.next_positions.tolist(), layer.n_tail_tokens.tolist()
            for row in range(layer.batch_size):
                tail = list(range(ends[row] - n_tail[row], ends[row]))
                for head in range(HEADS):
                    positions = layer.packed.head_positions(row, head).tolist()
                    held[layer_idx, row, head] = positions + tail
    return held


def n_pairs(cache) -> list[int]:
    """Pairs that each row holds."""
    totals: dict[int, int] = {}
    for (_, row, _), positions in kept(cache).items():
        totals[row] = totals.get(row, 0) + len(positions)
    return [totals[row] for row in sorted(totals)]


def n_heads(cache) -> int:
    return HEADS * sum(isinstance(layer, RaggedLayer) for layer in cache.layers)


@torch.no_grad()
def step(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


class Oracle:
    """What must be kept, pair by pair in Python: scores from hidden states seen in the same forwards."""

    def __init__(self, model, press, n_sink: int) -> None:
        self.press, self.gates, self.n_sink = press, press.gates(model), n_sink
        self.scores: dict[tuple[int, int], dict[int, float]] = {}  # (layer, head) -> position -> score
        self.alive: dict[tuple[int, int], list[int]] = {}
        self.n_seen = 0

    def look(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        values = self.gates.scores(hidden_states, layer_idx)[0]
        for head in range(HEADS):
            known = self.scores.setdefault((layer_idx, head), {})
            first = len(known)
            known.update({first + i: float(values[head, i]) for i in range(values.shape[1])})

    def begin(self, cache) -> None:
        """Behind the prefill: what the press kept there is tested elsewhere."""
        self.alive = {(layer, head): list(p) for (layer, _, head), p in kept(cache).items()}
        self.n_seen = cache.get_seq_length()

    def read(self, n_tokens: int) -> None:
        for positions in self.alive.values():
            positions.extend(range(self.n_seen, self.n_seen + n_tokens))
        self.n_seen += n_tokens
        total = sum(map(len, self.alive.values()))
        if total >= (self.press.budget + self.press.buffer) * len(self.alive):
            self._evict()

    def _evict(self) -> None:
        layers = sorted({layer for layer, _ in self.alive})
        of_layers = [[key for key in self.alive if key[0] == layer] for layer in layers]
        pools = {
            "global": [list(self.alive)],
            "layer": of_layers,
            "adakv": of_layers,
            "head": [[key] for key in self.alive],
        }[self.press.allocation]
        for pool in pools:
            pairs = [(layer, head, p) for layer, head in pool for p in self.alive[layer, head]]
            safe = {pair for pair in pairs if pair[2] < self.n_sink or pair[2] >= self.n_seen - self.press.buffer}
            rest = sorted(
                (pair for pair in pairs if pair not in safe),
                key=lambda pair: (-self.scores[pair[0], pair[1]][pair[2]], pair[2], pair[0], pair[1]),
            )
            budget = self.press.budget * len(pool) - len(safe)
            stay = safe | set((self._in_turns(pool, rest, budget) + rest)[:budget])
            stay |= set([pair for pair in rest if pair not in stay][: self.press.budget * len(pool) - len(stay)])
            for layer, head in pool:
                self.alive[layer, head] = [p for p in self.alive[layer, head] if (layer, head, p) in stay]

    def _in_turns(self, pool: list[Any], rest: list[Any], budget: int) -> list[Any]:
        """What heads take in turns, each with its best pair left, before the best of the rest win."""
        floors = sum(min(self.press.min_kept_per_head, sum(pair[:2] == head for pair in rest)) for head in pool)
        share = int(self.press.safeguard * budget) if self.press.allocation == "adakv" else 0
        by_head = [[pair for pair in rest if pair[:2] == head] for head in pool]  # the best first
        turns = [pair for turn in zip_longest(*by_head) for pair in sorted(filter(None, turn), key=rest.index)]
        return turns[: min(max(floors, share), budget)]


@pytest.mark.parametrize("policy", [
    {"allocation": "global"},
    {"allocation": "layer"},
    {"allocation": "head"},
    {"allocation": "adakv", "safeguard": 0.5},
    {"allocation": "global", "min_kept_per_head": 24},
])  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_what_is_kept_is_what_an_oracle_keeps(architecture, policy) -> None:
    """Prompt, single tokens, a question of several, single tokens again; the scores given first are the last word."""
    model = tiny_model(architecture, vocab_size=300)
    no_twice = 3 + torch.randperm(297, generator=torch.Generator().manual_seed(0))[None]  # equal tokens tie in layer 0
    press = press_for(model, **policy)
    cache, oracle = DynamicCache(config=model.config), Oracle(model, press, n_sink=3)
    with press(model), watching_hidden_states(model, oracle.look):
        step(model, cache, no_twice[:, :70])
        oracle.begin(cache)
        for n_tokens in [1] * 37 + [9] + [1] * 50:
            step(model, cache, no_twice[:, oracle.n_seen : oracle.n_seen + n_tokens])
            oracle.read(n_tokens)
            assert {(i, h): p for (i, _, h), p in kept(cache).items()} == oracle.alive


@pytest.mark.parametrize(("length", "n_steps"), [(5, 300), (40, 300), (90, 1000)])  # tails grow by 256
def test_the_cache_never_exceeds_budget_and_buffer_over_many_steps(length, n_steps) -> None:
    """Nor do its bytes, with the room of its tails; right after an eviction it is exactly the budget."""
    model = tiny_model()
    press, cache = press_for(model), DynamicCache(config=model.config)
    fewest, sizes = [], set()
    with press(model):
        logits = step(model, cache, token_ids(1, length))
        for _ in range(n_steps):
            logits = step(model, cache, logits.argmax(-1)[:, None])
            assert n_pairs(cache)[0] <= (40 + 16) * n_heads(cache)
            if n_pairs(cache)[0] == 40 * n_heads(cache):
                fewest.append(cache.get_seq_length())
                sizes.add(RaggedCache.of(cache).resident_bytes)
    assert len(fewest) >= (n_steps - max(56 - length, 0)) // 16
    pair_bytes = 2 * 16 * 4
    assert max(sizes) <= n_heads(cache) * (40 * (pair_bytes + 8) + 256 * (pair_bytes + 4) + 64)
    assert cache.get_seq_length() == length + n_steps


@pytest.mark.any_transformers
@pytest.mark.parametrize("graph", [False, None], ids=["eager", "static"])
def test_how_many_hidden_states_wait_for_their_scores_changes_nothing(graph, monkeypatch, static_steps) -> None:
    """Fewer than the buffer: they are larger than the pairs, and not among the cache's bytes."""
    model, held, seen = tiny_model(vocab_size=300), set(), HiddenStateScorer.seen
    ids = 3 + torch.randperm(290, generator=torch.Generator().manual_seed(0))[None]
    press = press_for(model, budget=120, buffer=100)
    monkeypatch.setattr(HiddenStateScorer, "seen", lambda self: (seen(self), held.add(self._hidden.shape[2])))
    logits, cache = steps_written(model, press, ids, 20, graph)
    assert held == {MOST_WAITING}
    assert n_pairs(cache)[0] < 220 * n_heads(cache) < ids.shape[1] * n_heads(cache)
    for n_waiting in (1, 7):
        monkeypatch.setitem(HiddenStateScorer.__init__.__kwdefaults__, "most_waiting", n_waiting)
        others, other = steps_written(model, press, ids, 20, graph)
        torch.testing.assert_close(others, logits, atol=1e-4, rtol=1e-4)
        assert kept(other) == kept(cache)
    assert held == {MOST_WAITING, 1, 7}


def steps_written(model, press, ids: torch.Tensor, length: int, graph: bool | None):
    """Logits of decode steps over given tokens, in two runs with a question before each, and the cache."""
    cache, logits = DynamicCache(config=model.config), []
    with press(model):
        step(model, cache, ids[:, :length])
        cache = RaggedCache.of(cache)
        for begin, end in ((length, length + 150), (length + 150, ids.shape[1])):
            step(model, cache, ids[:, begin : begin + 5])
            with decoding.DecodeStep(model, cache, max_new_tokens=end - begin - 5, graph=graph) as decode:
                logits += [decode(ids[:, i]).clone() for i in range(begin + 5, end)]
        assert decode.captured == (graph is not False)
    return torch.stack(logits), cache


def assert_static_steps_evict_as_eager_steps(model, length: int) -> None:
    device = next(model.parameters()).device
    ids = 3 + torch.randperm(290, generator=torch.Generator().manual_seed(0))[None].to(device)  # equal tokens tie
    press = press_for(model)
    eager, cache = steps_written(model, press, ids, length, graph=False)
    static, other = steps_written(model, press, ids, length, graph=None)
    torch.testing.assert_close(static, eager, atol=1e-4, rtol=1e-4)
    assert kept(cache) == kept(other)
    for one, two in zip(cache.layers, other.layers, strict=True):
        if isinstance(one, RaggedLayer):
            torch.testing.assert_close(two.packed.columns["keys"], one.packed.columns["keys"], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(two.packed.scores, one.packed.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("length", [20, 70])
def test_static_steps_evict_as_eager_steps_do(architecture, length, static_steps) -> None:
    """From below the budget on and from a full one: same logits, same pairs."""
    assert_static_steps_evict_as_eager_steps(tiny_model(architecture, vocab_size=300), length)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("length", [20, 70])
def test_graphs_evict_as_eager_steps_do(architecture, length) -> None:
    """The same where a graph is replayed."""
    assert_static_steps_evict_as_eager_steps(tiny_model(architecture, vocab_size=300).to("cuda"), length)


def test_static_steps_are_set_up_twice_at_most(static_steps, monkeypatch) -> None:
    """Once below the budget and once behind the first eviction: all later ones leave the memory in its place."""
    model, made = tiny_model(), []
    original = decoding._StaticStep.__init__
    monkeypatch.setattr(decoding._StaticStep, "__init__", lambda *a, **k: made.append(1) or original(*a, **k))
    cache = DynamicCache(config=model.config)
    with press_for(model)(model):
        step(model, cache, token_ids(1, 20))
        generate(model, RaggedCache.of(cache), token_ids(1, 5), 400)
    assert len(made) == 2
    assert n_pairs(cache)[0] <= 56 * n_heads(cache)


def test_generate_of_transformers_evicts_too() -> None:
    """The same tokens as our own loop, on a cache as small."""
    model = tiny_model()
    press, ids = press_for(model), token_ids(1, 60)
    with press(model):
        done = model.generate(ids, max_new_tokens=90, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
        cache = DynamicCache(config=model.config)
        first = step(model, cache, ids).argmax(-1)
        again = generate(model, RaggedCache.of(cache), first[:, None], 89)
    assert done.sequences[0, 60:].tolist() == [int(first), *again[0]]
    assert kept(done.past_key_values) == kept(cache)
    assert n_pairs(cache)[0] <= 56 * n_heads(cache)


def test_rows_of_a_batch_are_what_they_are_alone() -> None:
    """Contexts and questions of different length, padded; each row has its own budget."""
    model = tiny_model()
    press = press_for(model)
    contexts, questions = ["a first context, rather long, of many words", "short one"], ["Who?", "And where was it?"]
    together = compress(model, TOKENIZER, contexts, press)
    alone = [compress(model, TOKENIZER, context, press) for context in contexts]
    with press(model):
        answers = answer(model, TOKENIZER, together, questions, max_new_tokens=70, keep=True)
        expected = [
            answer(model, TOKENIZER, cache, question, max_new_tokens=70, keep=True)
            for cache, question in zip(alone, questions, strict=True)
        ]
    assert answers == expected


def test_questions_that_are_not_kept_leave_the_cache_as_it_was() -> None:
    """Each evicts in a fork of its own, and gets the answer it gets alone."""
    model = tiny_model()
    press = press_for(model)
    cache = compress(model, TOKENIZER, "some text to be compressed, of more than forty bytes", press)
    before, tensors = kept(cache), [layer.packed.columns["keys"].clone() for layer in cache.layers]
    with press(model):
        first = answer(model, TOKENIZER, cache, "What is it?", max_new_tokens=100)
        answer(model, TOKENIZER, cache, "Something else, entirely?", max_new_tokens=50)
        assert answer(model, TOKENIZER, cache, "What is it?", max_new_tokens=100) == first
    assert kept(cache) == before
    assert all(
        torch.equal(layer.packed.columns["keys"], keys) for layer, keys in zip(cache.layers, tensors, strict=True)
    )


def test_two_caches_in_turns_give_what_each_gives_alone() -> None:
    """Step by step on one model: what is pending of one is not lost when the other is read."""
    model = tiny_model()
    press = press_for(model)

    def start(seed: int):
        cache = DynamicCache(config=model.config)
        return cache, step(model, cache, token_ids(1, 60, seed)).argmax(-1)

    def go(cache, token):
        return step(model, cache, token[:, None]).argmax(-1)

    with press(model):
        alone = []
        for seed in (1, 2):
            cache, token = start(seed)
            for _ in range(60):
                token = go(cache, token)
            alone.append((kept(cache), token.tolist()))
        (one, a), (two, b) = start(1), start(2)
        for _ in range(60):
            a, b = go(one, a), go(two, b)
    assert [(kept(one), a.tolist()), (kept(two), b.tolist())] == alone


def test_a_fork_keeps_its_pairs_while_the_other_goes_on() -> None:
    """An eviction writes in place into what the layers share, and no fork shares it."""
    model, cache = tiny_model(), None
    with press_for(model)(model):
        cache = DynamicCache(config=model.config)
        token = step(model, cache, token_ids(1, 60)).argmax(-1)
        for _ in range(40):
            token = step(model, cache, token[:, None]).argmax(-1)
        fork = RaggedCache.of(cache).fork()
        held, keys = kept(fork), [layer.packed.columns["keys"].clone() for layer in fork.layers]
        for _ in range(40):
            token = step(model, cache, token[:, None]).argmax(-1)
    assert kept(fork) == held != kept(cache)
    assert all(
        torch.equal(layer.packed.columns["keys"], tensor) for layer, tensor in zip(fork.layers, keys, strict=True)
    )


@pytest.mark.parametrize("n_before", [3, 15])
def test_a_fork_goes_on_with_tokens_that_wait_for_their_scores(n_before) -> None:
    """It is what the cache would be that it was forked from, whichever of them is read first."""
    model = tiny_model()
    press, ids = press_for(model), token_ids(1, 60)

    def read_on(cache, first: int) -> None:
        for token in range(first, first + 40):
            step(model, cache, torch.tensor([[3 + token % 100]]))

    def begun() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        step(model, cache, ids)
        for token in range(n_before):
            step(model, cache, torch.tensor([[50 + token]]))
        return cache

    with press(model):
        expected = begun()
        read_on(expected, 7)
    with press(model):
        cache = begun()
        fork = RaggedCache.of(cache).fork()
        read_on(cache, 30)
        read_on(fork, 7)
    assert kept(fork) == kept(expected)


def test_a_context_that_is_used_in_and_out_of_inference_mode_evicts_alike() -> None:
    model = tiny_model()
    press, ids = press_for(model), token_ids(1, 60)

    def read_on(modes: list[bool]) -> Any:
        cache = DynamicCache(config=model.config)
        with press(model):
            for index, mode in enumerate(modes):
                with torch.inference_mode(mode), torch.no_grad():
                    step(model, cache, ids if not index else torch.tensor([[3 + index]]))
        return kept(cache)

    assert read_on([True, True, False, False, True, True, False] * 6) == read_on([False] * 42)


def test_a_conversation_goes_on_in_another_context() -> None:
    """What was pending when the first ended has been scored; what is read outside of both is refused at an eviction."""
    model = tiny_model()
    press, cache = press_for(model), DynamicCache(config=model.config)
    with press(model):
        step(model, cache, token_ids(1, 60))
        for _ in range(5):
            step(model, cache, token_ids(1, 1))
    with press(model):
        for _ in range(20):
            step(model, cache, token_ids(1, 1))
    assert n_pairs(cache)[0] < 56 * n_heads(cache)
    step(model, cache, token_ids(1, 1))
    with press(model), pytest.raises(CacheMismatchError, match="read outside"):
        for _ in range(20):
            step(model, cache, token_ids(1, 1))


def moved(cache, model, path):
    """Through a device that is not the model's and back; "meta" drops contents, so a clone stands in for the way."""
    for layer in cache.layers:
        layer.packed = replace(layer.packed, columns={n: x.clone() for n, x in layer.packed.columns.items()}, pool=None)
        layer.tail = layer.tail.copy()
    return cache


def saved(cache, model, path):
    RaggedCache.of(cache).save(path / "cache.safetensors")
    return RaggedCache.load(path / "cache.safetensors", model)


@pytest.mark.parametrize("way", [moved, saved])
def test_a_cache_that_was_away_goes_on_as_one_that_was_not(way, tmp_path) -> None:
    """Scores travel with their pairs, those of the tail too: the next evictions are the same."""
    model = tiny_model()
    press = press_for(model)

    def written(away: bool):
        cache = DynamicCache(config=model.config)
        with press(model):
            step(model, cache, token_ids(1, 60))
            for i in range(21):
                step(model, cache, token_ids(1, 1, seed=i))
        cache = way(cache, model, tmp_path) if away else cache
        with press(model):
            for i in range(40):
                logits = step(model, cache, token_ids(1, 1, seed=50 + i))
        return kept(cache), logits

    (pairs, logits), (expected_pairs, expected_logits) = written(away=True), written(away=False)
    assert pairs == expected_pairs
    assert torch.equal(logits, expected_logits)


def test_a_move_takes_all_columns_and_the_tail_s_scores() -> None:
    """Nothing is left behind, nothing is forgotten."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with press_for(model)(model):
        for length in (60, 3, 1):
            step(model, cache, token_ids(1, length))
    shapes = [[(x.dtype, x.shape) for x in layer.packed.tensors] for layer in cache.layers]
    RaggedCache.of(cache).move_to("meta")
    for layer, held in zip(cache.layers, shapes, strict=True):
        assert {x.device.type for x in layer.tensors} == {"meta"}
        assert [(x.dtype, x.shape) for x in layer.packed.tensors] == held
        assert layer.tail.scores is not None and layer.tail.scores.shape == (1, HEADS, 4)


def test_what_was_read_in_chunks_goes_on_as_well() -> None:
    """The pairs of all chunks carry the scores that they got, so that they can be evicted while the model writes."""
    model = tiny_model()
    press = press_for(model)
    cache = compress_in_chunks(model, TOKENIZER, token_ids(1, 120)[0].tolist(), press, chunk_size=32, window_size=8)
    assert all(layer.packed.scores is not None for _, layer in cache.ragged_layers())
    with press(model):
        for i in range(40):
            step(model, cache, token_ids(1, 1, seed=i))
            assert n_pairs(cache)[0] < 56 * n_heads(cache)


def test_tokens_that_are_cut_off_are_forgotten() -> None:
    """A crop between two evictions, as speculative decoding does, and the same pairs as without the detour."""
    model = tiny_model()
    press = press_for(model)

    def written(detour: bool):
        cache = DynamicCache(config=model.config)
        step(model, cache, token_ids(1, 60))
        for i in range(50):
            step(model, cache, token_ids(1, 1, seed=i))
            if detour and i % 16 == 6:
                step(model, cache, token_ids(1, 1, seed=99))
                step(model, cache, token_ids(1, 1, seed=98))
                cache.crop(-2)
        return kept(cache)

    with press(model):
        assert written(detour=True) == written(detour=False)


def test_beam_search_is_refused() -> None:
    model = tiny_model()
    with press_for(model)(model), pytest.raises(UnsupportedCacheError, match="beam search"):
        model.generate(token_ids(1, 60), max_new_tokens=40, num_beams=2, eos_token_id=None)


def test_a_cache_without_scores_is_refused() -> None:
    model = tiny_model()
    cache = compress(model, TOKENIZER, "compressed by another press", get_press("random", compression_ratio=0.5))
    with press_for(model)(model), pytest.raises(CacheMismatchError, match="carry scores"):
        answer(model, TOKENIZER, cache, "What?", max_new_tokens=5)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": None},
        {"budget": 16, "buffer": 16},
        {"buffer": 0},
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(options) -> None:
    with pytest.raises(InvalidArgumentError, match="decoding=True"):
        FastKVzipPress(decoding=True, **{"budget": 64, "buffer": 16, **options})


def test_a_budget_that_the_protected_prefix_fills_is_refused() -> None:
    model = tiny_model()
    with press_for(model, n_sink=50)(model), pytest.raises(InvalidArgumentError, match="protected first tokens"):
        model.generate(token_ids(1, 60), max_new_tokens=40, eos_token_id=None)


@dataclass(frozen=True)
class ByIndex(PerLayer):
    """A user's own, which knows the layers by their index in the model."""

    def asked(self, amount, layers, n_pairs, n_heads, n_held=0) -> int:
        return amount.pairs(layers, n_pairs, n_heads, n_held) + {1: 6, 3: -6}[layers[0]]


def test_an_allocation_sees_the_layers_as_in_a_prefill() -> None:
    """By their index in the model, where sliding layers count too."""
    model = tiny_model("gemma3_text")
    cache = DynamicCache(config=model.config)
    with press_for(model, allocation=ByIndex())(model):
        step(model, cache, token_ids(1, 60))
        for i in range(20):
            step(model, cache, token_ids(1, 1, seed=i))
    held = [sum(len(p) for (layer, _, _), p in kept(cache).items() if layer == i) for i in (1, 3)]
    assert held[0] - held[1] == 12


def test_rows_that_are_reordered_after_an_eviction_are_refused() -> None:
    """They would share pairs, as beams do; the pool that is there knows of no order."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with press_for(model)(model), pytest.raises(UnsupportedCacheError, match="no beam search"):
        for i in range(60):
            if i == 30:
                cache.reorder_cache(torch.tensor([1, 0]))
            step(model, cache, token_ids(2, 60 if i == 0 else 1, seed=i))


@pytest.mark.parametrize("rows", [[1, 0], [1], [0, 1, 0]])
def test_rows_that_are_rearranged_before_they_have_a_score_are_refused(rows) -> None:
    """What waits to be scored belongs to the rows as they were; nobody else's score is taken for theirs."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with press_for(model)(model), pytest.raises(CacheMismatchError, match="rearranged before they had a score"):
        for i in range(60):
            if i == 5:
                cache.batch_select_indices(torch.tensor(rows))
            step(model, cache, token_ids(2 if i < 5 else len(rows), 60 if i == 0 else 1, seed=i))
