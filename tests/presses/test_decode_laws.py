"""What holds for every press that evicts while the model writes: bytes, rows, steps, forks, storages, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache as once
from typing import Any

import pytest
import torch
from decode_presses import BUDGET, BUFFER, SPENDING, Made, distinct_ids, held, step
from decode_presses import PRESSES as WITHOUT_FILES
from decode_presses import made as made_small
from transformers import DynamicCache

from kvzip_press import RaggedCache, compress
from kvzip_press.budget.allocators import Allocation, Pages, PerHead, PerLayer, allocation_of
from kvzip_press.budget.amount import Amount
from kvzip_press.budget.candidates import Pool
from kvzip_press.cache.pair_pool import eviction, merging, pair_list
from kvzip_press.decoding import pair_scorer
from kvzip_press.decoding import step as decoding
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.decoding.pair_scorer import PairScorer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding import (
    DecodePress,
    H2OPress,
    KVCompressPress,
    QueryStatistics,
    RKVPress,
    SnapKVDecodePress,
    StreamingLLMDecodePress,
    TriAttentionPress,
    TrimKVGates,
    TrimKVPress,
    calibrate_queries,
)
from kvzip_press.presses.kvzip import KVzipPress
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER, HEADS = ByteTokenizer(), 2
PRESSES = (*WITHOUT_FILES, (TriAttentionPress, {}), (TrimKVPress, {}))
pytestmark = pytest.mark.usefixtures("one_thread")
every_press = pytest.mark.parametrize("kind_and_options", PRESSES, ids=lambda pair: pair[0].__name__)


def made(kind_and_options: Made, **options: Any) -> DecodePress:
    kind, own = kind_and_options
    if kind is TriAttentionPress:
        own = own | {"queries": statistics()}
    if kind is TrimKVPress:
        own = own | {"gate": gates()}
    return made_small((kind, own), **options)


@once
def statistics() -> QueryStatistics:
    return calibrate_queries(small_model(), TOKENIZER, ["a text whose queries are taken"])


@once
def gates() -> TrimKVGates:
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear1.weight": (8, 64), "linear1.bias": (8,), "linear2.weight": (2, 8), "bias": (2,)}
    return TrimKVGates(
        {i: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for i in (0, 1)}
    )


def n_pairs(cache: Any, row: int = 0) -> int:
    return sum(map(len, held(cache, row)))


def small_model(**options: Any) -> Any:
    return tiny_model(num_layers=2, vocab_size=256, **options)


@pytest.mark.any_transformers
@every_press
@pytest.mark.parametrize("allocation", SPENDING)
def test_bytes_never_exceed_budget_and_buffer(kind_and_options, allocation) -> None:
    """Pairs, and bytes of what the cache's storages hold, to the byte; exactly the budget behind an eviction.

    Queries of the buffer and of the window lie beside them, and each head has a number and an end.
    """
    model, ids = small_model(), distinct_ids(100)
    cache, n_heads = DynamicCache(config=model.config), 2 * HEADS
    press = made(kind_and_options, allocation=allocation)
    tail_bytes, packed_bytes = 2 * 16 * 4 + 4, 2 * 16 * 4 + 4 + 4  # of a pair: key, value, score; and its position
    n_columns = 0 if press.n_queries == 0 else 8 + (press.n_queries or 0)
    most = n_heads * (24 * packed_bytes + 8 * tail_bytes) + 2 * n_columns * 4 * 16 * 4
    with press(model):
        step(model, cache, ids[:, :40])
        fewest = n_pairs(cache)
        for token in range(40, 58):
            step(model, cache, ids[:, token : token + 1])
            assert n_pairs(cache) < (24 + 8) * n_heads
            fewest = min(fewest, n_pairs(cache))
            if token > 48:  # behind the first eviction, which makes the pool
                ends = sum(layer.packed.cu_seqlens.untyped_storage().nbytes() for layer in cache.layers)
                assert RaggedCache.of(cache).resident_bytes <= most + ends
    assert 24 * n_heads - allocation_of(allocation).rounding <= fewest <= 24 * n_heads


def steps_written(model: Any, press: DecodePress, ids: torch.Tensor, graph: bool | None) -> tuple[torch.Tensor, Any]:
    cache, logits = DynamicCache(config=model.config), []
    with press(model):
        step(model, cache, ids[:, :20])
        cache = RaggedCache.of(cache)
        for begin, end in ((20, 40), (40, ids.shape[1])):
            step(model, cache, ids[:, begin : begin + 3])
            with decoding.DecodeStep(model, cache, max_new_tokens=end - begin - 3, graph=graph) as decode:
                logits += [decode(ids[:, i]).clone() for i in range(begin + 3, end)]
        assert decode.captured == (graph is not False)
    return torch.stack(logits), cache


def check_static_steps(press: DecodePress, device: str) -> None:
    model, ids = small_model().to(device), distinct_ids(60).to(device)
    eager, cache = steps_written(model, press, ids, graph=False)
    static, other = steps_written(model, press, ids, graph=None)
    torch.testing.assert_close(static, eager, atol=1e-4, rtol=1e-4)
    assert held(cache) == held(other)


@every_press
def test_static_steps_evict_as_eager_steps_do(kind_and_options, static_steps) -> None:
    """From below the budget on, with a question of several tokens between."""
    check_static_steps(made(kind_and_options), "cpu")


def test_steps_are_eager_where_no_graph_can_hold_what_a_press_looks_at(static_steps, monkeypatch) -> None:
    """And evict as they do in one; whoever insists on a graph is told why there is none."""
    model, ids = small_model(), distinct_ids(60)
    expected, cache = steps_written(model, RKVPress(budget=24, buffer=8), ids, graph=False)
    monkeypatch.setattr(PairScorer, "can_be_captured", False)
    with RKVPress(budget=24, buffer=8)(model):
        other, logits = DynamicCache(config=model.config), []
        step(model, other, ids[:, :20])
        for begin, end in ((20, 40), (40, 60)):
            step(model, other, ids[:, begin : begin + 3])
            with decoding.DecodeStep(model, other, max_new_tokens=end - begin - 3) as decode:
                assert not decode.captured and "no graph holds" in str(decode.reason)
                logits += [decode(ids[:, i]).clone() for i in range(begin + 3, end)]
        with pytest.raises(InvalidArgumentError, match="no graph holds"):
            decoding.DecodeStep(model, other, max_new_tokens=1, graph=True)
    torch.testing.assert_close(torch.stack(logits), expected, atol=1e-5, rtol=1e-5)
    assert held(other) == held(cache)


@pytest.mark.gpu
@every_press
@pytest.mark.parametrize("buffer", [1, 8])
def test_graphs_evict_as_eager_steps_do(kind_and_options, buffer) -> None:
    """The same where a graph is replayed."""
    check_static_steps(made(kind_and_options, buffer=buffer), "cuda")


@every_press
def test_rows_of_a_batch_are_what_they_are_alone(kind_and_options) -> None:
    """Contexts and questions of different length: each row has its own budget, its own window and its own moment."""
    model, press, n = small_model(), made(kind_and_options), 21
    contexts, questions = ["a first context, rather long, of words", "short one"], [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    together = compress(model, TOKENIZER, contexts, press)
    ids = torch.tensor([[0, 0, 0, *questions[0]], questions[1]])
    alone = [compress(model, TOKENIZER, context, press) for context in contexts]
    with press(model):
        written = generate(model, together, ids, n, attention_mask=(ids > 0).long())
        for row, (cache, question) in enumerate(zip(alone, questions, strict=True)):
            assert generate(model, cache, question, n) == [written[row]]
            assert held(together, row) == held(cache)


@every_press
def test_detours_forks_and_modes_change_nothing(kind_and_options) -> None:
    """Tokens that are cropped again, a fork that goes on, inference mode, a second context: the same pairs."""
    model, ids, press = small_model(), distinct_ids(100), made(kind_and_options)

    def begun() -> Any:
        cache = DynamicCache(config=model.config)
        step(model, cache, ids[:, :40])
        return cache

    with press(model):
        plain = begun()
        for token in range(40, 80):
            step(model, plain, ids[:, token : token + 1])
    with press(model):
        cache = begun()
        for token in range(40, 60):
            with torch.inference_mode(token % 3 == 0):
                step(model, cache, ids[:, token : token + 1])
            if token % 8 == 2:
                step(model, cache, ids[:, 90:92])
                cache.crop(-2)
        fork = RaggedCache.of(cache).fork()
        for token in range(80, 90):
            step(model, cache, ids[:, token : token + 1])
    with press(model):
        for token in range(60, 80):
            step(model, fork, ids[:, token : token + 1])
    assert held(fork) == held(plain)


@pytest.mark.any_transformers
@every_press
@pytest.mark.parametrize("allocation", ["head", "global"])
@pytest.mark.parametrize("storage", ["model", "int4"])
def test_layers_are_evicted_together_as_one_by_one(kind_and_options, allocation, storage, monkeypatch) -> None:
    """Rows of several layers are scored, cut and merged at once where they are few, else one at a time."""
    model, ids = small_model(), distinct_ids(90, batch=2)
    press = made(kind_and_options, storage=storage, allocation=allocation)

    def written() -> list[list[int]]:
        cache = DynamicCache(config=model.config)
        with press(model):
            for token in range(40, 68):
                block = ids[:, :41] if token == 40 else ids[:, token : token + 1]
                step(model, cache, block, attention_mask=torch.ones(2, token + 1, dtype=torch.long))
        return [*held(cache, 0), *held(cache, 1)]

    together = written()
    monkeypatch.setattr(pair_scorer, "NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr(merging, "NUMBERS_MERGED", 1)
    monkeypatch.setattr(eviction, "NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr(pair_list, "MOST_POSITIONS", 1)
    monkeypatch.setattr(PerHead, "heads_alone", False)
    monkeypatch.setattr(PerHead, "counts_of_rows", Allocation.counts_of_rows)
    assert written() == together


class LastLayerFirst(RKVPress):
    """Of a user: asks of which layer the pairs are, as presses did before there were rows of several layers."""

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        return pairs.positions.float() if pairs.layer_idx else -pairs.positions.float()


class HalfOfTheFirstLayer(PerHead):
    """Of a user: heads of the first layer keep half of what those of others do."""

    def asked(self, amount: Amount, layers: Sequence[int], n_pairs: int, n_heads: int, n_held: int = 0) -> int:
        return super().asked(amount, layers, n_pairs, n_heads, n_held) // (1 if layers[0] else 2)


class PairsOfHeads(PerHead):
    """Of a user: all heads of a layer compete."""

    def pools(self, heads: Mapping[int, int]) -> list[Pool]:
        return PerLayer().pools(heads)


def written_once(press: DecodePress) -> Any:
    """What a cache holds right behind an eviction."""
    model, ids = small_model(), distinct_ids(60)
    cache = DynamicCache(config=model.config)
    with press(model):
        step(model, cache, ids[:, :20])
        for token in range(20, 60):
            step(model, cache, ids[:, token : token + 1])
            if not cache.layers[0].tail.length:
                return cache
    raise AssertionError("nothing was evicted")


class NotANumber(RKVPress):
    """Of a user: what it thinks of a new pair of the last layer is no number."""

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        return pairs.positions.float().masked_fill(pairs.newest(1) & (pairs.layer_idx == 1), torch.nan)


@pytest.mark.parametrize("allocation", ["head", "global"])
def test_what_is_no_number_is_said_with_its_layer(allocation) -> None:
    """And not taken for a token that was read outside of the press, which has no score either."""
    model, ids = small_model(), distinct_ids(60)
    cache = DynamicCache(config=model.config)
    with NotANumber(budget=BUDGET, buffer=BUFFER, allocation=allocation, prompt=RandomPress(0.0))(model):
        step(model, cache, ids[:, :20])
        with pytest.raises(InvalidArgumentError, match="NaN or infinity in layer 1"):
            for token in range(20, 60):
                step(model, cache, ids[:, token : token + 1])


def test_a_subclass_that_asks_for_the_layer_gets_one_at_a_time() -> None:
    """Of a press whose own worth is the same for all layers; otherwise all would count as the first."""
    first, _, last, _ = held(written_once(LastLayerFirst(budget=BUDGET, buffer=BUFFER)))
    assert first[:8] == list(range(8)), "the oldest stay in the first layer"
    assert last == list(range(BUFFER, BUDGET + BUFFER)), "and the newest in the last"


def test_a_subclass_of_an_allocation_per_head_may_ask_for_the_layer() -> None:
    sizes = [len(kept) for kept in held(written_once(made(PRESSES[0], allocation=HalfOfTheFirstLayer())))]
    assert sizes == [BUDGET // 2] * HEADS + [BUDGET] * HEADS


def test_a_subclass_of_an_allocation_per_head_may_have_other_pools() -> None:
    """While the model writes, and of a prompt."""
    found, expected = (made(PRESSES[4], allocation=kind) for kind in (PairsOfHeads(), PerLayer()))
    assert held(written_once(found)) == held(written_once(expected))
    caches = [
        compress(small_model(), TOKENIZER, "a text " * 9, RandomPress(0.5, allocation=kind))
        for kind in (PairsOfHeads(), PerLayer())
    ]
    assert held(caches[0]) == held(caches[1])


@every_press
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_codes_are_evicted_as_exact_pairs_are(kind_and_options, storage) -> None:
    """Scores are those of the keys as the codes hold them, and the cache stays in codes."""
    model, ids = small_model(), distinct_ids(90)
    cache = DynamicCache(config=model.config)
    with made(kind_and_options, storage=storage)(model):
        for token in range(40, 60):
            step(model, cache, ids[:, :41] if token == 40 else ids[:, token : token + 1])
    assert RaggedCache.of(cache).storage == storage
    assert n_pairs(cache) < (24 + 8) * 2 * HEADS


@every_press
def test_a_whole_prompt_stays_outside_the_budget(kind_and_options) -> None:
    """``protect_prompt``: every pair of it, and the budget for what is written."""
    model, ids = small_model(), distinct_ids(100)
    cache = DynamicCache(config=model.config)
    with made(kind_and_options, protect_prompt=True)(model):
        step(model, cache, ids[:, :30])
        fewest = 10**6
        for token in range(30, 64):
            step(model, cache, ids[:, token : token + 1])
            assert all(positions[:30] == list(range(30)) for positions in held(cache))
            assert n_pairs(cache) < (30 + 24 + 8) * 2 * HEADS
            fewest = fewest if token < 61 else min(fewest, n_pairs(cache))
    assert fewest == (30 + 24) * 2 * HEADS


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("kind_and_options", [PRESSES[4], PRESSES[6]], ids=["h2o", "rkv"])
def test_another_press_compresses_the_prompt(kind_and_options, protect) -> None:
    """One line: KVzip for the prompt, this press for the answer; what KVzip kept stays, or competes."""
    model, ids, kvzip = small_model(), distinct_ids(100), KVzipPress(0.5, n_sink=2)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with kvzip(model):
        step(model, expected, ids[:, :60])
    with made(kind_and_options, prompt=kvzip, protect_prompt=protect)(model):
        step(model, cache, ids[:, :60])
        of_prompt = held(cache)
        assert of_prompt == held(expected)
        for token in range(60, 95):
            step(model, cache, ids[:, token : token + 1])
    kept = [[p for p in positions if p < 60] for positions in held(cache)]
    assert (kept == of_prompt) == protect
    limit = (24 + 8) * 2 * HEADS + (sum(map(len, of_prompt)) if protect else 0)
    assert n_pairs(cache) < limit


def test_a_cache_that_another_press_compressed_goes_on() -> None:
    """In a context of its own: no scores are needed of what is there."""
    model = small_model()
    cache = compress(model, TOKENIZER, "a context that was compressed at random, before", RandomPress(0.3))
    with RKVPress(budget=24, buffer=8)(model):
        generate(model, cache, [5, 6, 7], 20)
    assert n_pairs(cache) < (24 + 8) * 2 * HEADS


@pytest.mark.parametrize("protect", [False, True])
def test_a_cache_goes_through_a_file(protect, tmp_path) -> None:
    """What it holds is saved in the middle of a period, also which pairs stay."""
    model, ids = small_model(), distinct_ids(100)
    cache, press = (
        DynamicCache(config=model.config),
        StreamingLLMDecodePress(budget=24, buffer=8, protect_prompt=protect),
    )
    with press(model):
        for token in range(40, 80):
            step(model, cache, ids[:, :41] if token == 40 else ids[:, token : token + 1])
        RaggedCache.of(cache).save(tmp_path / "cache.safetensors")
        loaded = RaggedCache.load(tmp_path / "cache.safetensors", model)
        for token in range(80, 100):
            step(model, loaded, ids[:, token : token + 1])
            step(model, cache, ids[:, token : token + 1])
    assert held(loaded) == held(cache)


@every_press
def test_chunks_and_questions_count_as_written(kind_and_options) -> None:
    """A context in parts inside the press: the budget holds behind each of them."""
    model, ids = small_model(), distinct_ids(200)
    cache = DynamicCache(config=model.config)
    with made(kind_and_options)(model):
        for first in range(0, 200, 50):
            step(model, cache, ids[:, first : first + 50])
            assert n_pairs(cache) == 24 * 2 * HEADS
        assert len(generate(model, RaggedCache.of(cache), ids[:, :3], 20)[0]) == 20


@pytest.mark.parametrize("page_size", [4, 16])
def test_heads_keep_whole_pages_within_the_budget(page_size) -> None:
    """While the model writes: a head that lost a pair holds a multiple, and all of them the budget or less than a page
    below it."""
    model, ids = small_model(), distinct_ids(90)
    cache = DynamicCache(config=model.config)
    with KVCompressPress(budget=24, buffer=8, window_size=4, allocation=Pages(page_size=page_size))(model):
        held_before: list[int] = []
        for token in range(40, 80):
            step(model, cache, ids[:, :41] if token == 40 else ids[:, token : token + 1])
            sizes = [n for layer in cache.layers for n in layer.packed.seqlens.flatten().tolist()]
            if sizes != held_before and held_before:  # behind an eviction
                lost = [n for n, before in zip(sizes, held_before, strict=True) if n < before + 8]
                assert lost and all(n % page_size == 0 for n in lost)
                assert 24 * 2 * HEADS - page_size < sum(sizes) <= 24 * 2 * HEADS
            held_before = sizes
            assert n_pairs(cache) < (24 + 8) * 2 * HEADS
    assert len(set(sizes)) > 1


def test_one_press_goes_on_behind_another() -> None:
    """Each keeps the queries that it looks at, and none if it looks at none."""
    model, ids = small_model(), distinct_ids(100)
    cache, first = DynamicCache(config=model.config), 40
    for kind, size in ((RKVPress, 8), (H2OPress, None), (SnapKVDecodePress, 10), (StreamingLLMDecodePress, 0)):
        options = {"window_size": size} if kind is SnapKVDecodePress else {}
        with kind(budget=24, buffer=8, **options)(model):
            for token in range(first, first + 11):
                step(model, cache, ids[:, :41] if token == 40 else ids[:, token : token + 1])
        first += 11
        windows = [layer.tail.window for layer in cache.layers]
        assert [0 if window is None else window.size for window in windows] == [size, size]
        assert n_pairs(cache) < (24 + 8) * 2 * HEADS


def test_hybrid_models_evict_in_their_full_layers() -> None:
    """With Gemma's softcap and sliding layers beside."""
    model, ids = tiny_model("gemma2", vocab_size=256), distinct_ids(90)
    cache = DynamicCache(config=model.config)
    with H2OPress(budget=24, buffer=8)(model):
        for token in range(40, 60):
            step(model, cache, ids[:, :41] if token == 40 else ids[:, token : token + 1])
    assert n_pairs(cache) < (24 + 8) * 2 * HEADS
