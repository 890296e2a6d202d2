"""Layers that read the keys and values of others: against an fp32 decoder written out here, and wherever caches go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import silu, softmax

import kvzip_press
from kvzip_press import KVzipPress, RaggedCache, RandomPress, StreamingLLMDecodePress, get_press, share_layers
from kvzip_press.attention.queries import queries_watched
from kvzip_press.cache.file.checks import check_record
from kvzip_press.cache.file.reading import read_record
from kvzip_press.compat import DynamicCache
from kvzip_press.decoding.static_layers import reason_against
from kvzip_press.decoding.step import DecodeStep, _compiled_layers, _StaticStep
from kvzip_press.errors import CacheFileError, CacheMismatchError, InvalidArgumentError, UnsupportedModelError
from kvzip_press.model.identity import facts_of
from kvzip_press.prefilling.replay import Replay
from kvzip_press.sharing.file import write_sources
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "The night ferry leaves at 21:40 from pier 9, and the quota is 310 tonnes of cod."
SOURCES = {2: 0, 3: 1, 4: 0}  # 2 and 4 read the same one

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> Any:
    return tiny_model(num_layers=5)


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([TOKENIZER.encode(text)])


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@torch.no_grad()
def oracle(
    model: Any, ids: torch.Tensor, sources: Mapping[int, int], hidden: Mapping[int, torch.Tensor] | None = None
) -> torch.Tensor:
    """A Llama's logits ``[n, vocab]`` of ``ids`` ``[1, n]``, in one pass, without any code of a cache.

    ``hidden``: layer that keeps its own -> bool ``[heads, n, n]``, (query, key) that were evicted before the query.
    """
    decoder, n = model.model, ids.shape[1]
    x = decoder.embed_tokens(ids)[0]
    cos, sin = (part[0] for part in decoder.rotary_emb(x[None], torch.arange(n)[None]))
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, layer in enumerate(decoder.layers):
        own, attention = sources.get(i, i), layer.self_attn
        state = layer.input_layernorm(x)
        query = turned(attention.q_proj(state).view(n, 4, 16).transpose(0, 1), cos, sin)
        if own == i:
            key = turned(attention.k_proj(state).view(n, 2, 16).transpose(0, 1), cos, sin)
            pairs[i] = key, attention.v_proj(state).view(n, 2, 16).transpose(0, 1)
        key, value = (part.repeat_interleave(2, dim=0) for part in pairs[own])
        unseen = torch.ones(n, n, dtype=torch.bool).triu(1).expand(4, -1, -1)
        if hidden is not None:
            unseen = unseen | hidden[own].repeat_interleave(2, dim=0)
        weights = softmax((query @ key.transpose(1, 2) / 4).masked_fill(unseen, -torch.inf), dim=-1)
        x = x + attention.o_proj((weights @ value).transpose(0, 1).reshape(n, 64))
        state = layer.post_attention_layernorm(x)
        x = x + layer.mlp.down_proj(silu(layer.mlp.gate_proj(state)) * layer.mlp.up_proj(state))
    logits: torch.Tensor = model.lm_head(decoder.norm(x))
    return logits


def gone(keep: Mapping[int, torch.Tensor], n: int, first: int) -> dict[int, torch.Tensor]:
    """Which keys queries from ``first`` on do not see: those that ``keep`` ``[1, heads, first]`` lacks."""
    hidden = {}
    for layer, kept in keep.items():
        hidden[layer] = torch.zeros(2, n, n, dtype=torch.bool)
        hidden[layer][:, first:, :first] = ~kept[0, :, None]
    return hidden


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=3e-4)


@torch.no_grad()
def read(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, past_key_values=cache).logits[0]
    return logits


def test_shared_layers_attend_to_the_pairs_of_others(model: Any) -> None:
    """With a cache and without, in one forward and in several, and the model is as before afterwards."""
    ids = ids_of(TEXT)
    expected, alone = oracle(model, ids, SOURCES), oracle(model, ids, {})
    assert (expected - alone).abs().max() > 1
    with share_layers(model, SOURCES):
        cache = DynamicCache()
        got = [read(model, cache, ids[:, :40]), read(model, cache, ids[:, 40:41]), read(model, cache, ids[:, 41:])]
        close(torch.cat(got), expected)
        with torch.no_grad():
            close(model(ids, use_cache=False).logits[0], expected)
            close(model(ids).logits[0], expected)
    with torch.no_grad():
        close(model(ids).logits[0], alone)


@pytest.mark.parametrize(
    "press", [RandomPress(0.5), KVzipPress(0.5), get_press("snapkv", 0.5, window_size=8), get_press("none")], ids=str
)
def test_a_compressed_cache_is_what_masking_the_pairs_of_other_layers_gives(
    model: Any, press: Any, keep_masks: Callable[[Any, torch.Tensor], dict[int, torch.Tensor]]
) -> None:
    ids, cache = ids_of(TEXT), DynamicCache()
    with share_layers(model, SOURCES):
        with press(model):
            read(model, cache, ids[:, :60])
        keep = keep_masks(cache, torch.ones(1, 60, dtype=torch.bool))
        assert set(keep) == {0, 1}
        got = read(model, cache, ids[:, 60:])
    close(got, oracle(model, ids, SOURCES, gone(keep, ids.shape[1], 60))[60:])


def test_later_turns_are_compressed_with_shared_layers(
    model: Any, keep_masks: Callable[[Any, torch.Tensor], dict[int, torch.Tensor]]
) -> None:
    ids, cache = ids_of(TEXT), DynamicCache()
    with share_layers(model, SOURCES), torch.no_grad():
        with RandomPress(0.5)(model):
            model(ids[:, :30], past_key_values=cache)
            first = keep_masks(cache, torch.ones(1, 30, dtype=torch.bool))
            model(ids[:, 30:60], past_key_values=cache)
        second = keep_masks(cache, torch.ones(1, 60, dtype=torch.bool))
        got = read(model, cache, ids[:, 60:])
    hidden, later = gone(first, ids.shape[1], 30), gone(second, ids.shape[1], 60)
    hidden = {i: hidden[i] | later[i] for i in hidden}
    close(got, oracle(model, ids, SOURCES, hidden)[60:])


def test_a_replay_reads_through_shared_layers_as_a_dense_forward_would() -> None:
    """The queries of a layer above them, with which KVzip scores, are the same."""
    model, ids = tiny_model(num_layers=4), ids_of(TEXT[:40])
    with share_layers(model, {1: 0, 2: 0}), torch.no_grad():
        done = kvzip_press.prefill(model, TOKENIZER, ids)
        replayed: dict[int, torch.Tensor] = {}
        Replay(done, 0, 0, lambda layer, seen: replayed.update({layer: seen.query})).run(
            ids.tolist(), [slice(0, 40)], local=False
        )
        dense: dict[int, torch.Tensor] = {}
        with queries_watched(model, lambda layer, query, _: dense.update({layer.layer_idx: query})):
            model.model(ids, past_key_values=copy.deepcopy(done.cache))
    assert set(replayed) == {0, 3}
    torch.testing.assert_close(replayed[3], dense[3], rtol=1e-4, atol=1e-4)


def test_rows_of_different_length_answer_as_alone(model: Any) -> None:
    contexts, questions = [TEXT[:60], TEXT[10:35]], ["When?", "How many tonnes?"]
    with share_layers(model, SOURCES):
        together = kvzip_press.compress(model, TOKENIZER, contexts, RandomPress(0.4))
        got = kvzip_press.answer(model, TOKENIZER, together, questions, max_new_tokens=5)
        for row, (context, question) in enumerate(zip(contexts, questions, strict=True)):
            alone = kvzip_press.compress(model, TOKENIZER, context, RandomPress(0.4))
            assert got[row] == kvzip_press.answer(model, TOKENIZER, alone, question, max_new_tokens=5)


def test_a_cache_takes_the_bytes_of_the_layers_that_keep_their_own(model: Any, tmp_path: Path) -> None:
    context = TEXT[:60]
    whole = kvzip_press.compress(model, TOKENIZER, context, RandomPress(0.5))
    with share_layers(model, SOURCES):
        shared = kvzip_press.compress(model, TOKENIZER, context, RandomPress(0.5))
    assert shared.resident_bytes * 5 == whole.resident_bytes * 2
    assert shared.dense_bytes == whole.dense_bytes
    assert shared.kept_fraction == whole.kept_fraction
    assert shared.compression == pytest.approx(whole.compression * 2.5)
    shared.export_kept(tmp_path / "kept.npz")
    with np.load(tmp_path / "kept.npz") as exported:
        assert {name for name in exported if name.startswith("layer")} == {
            f"layer{layer}_{name}" for layer in (0, 1) for name in ("positions", "cu_seqlens")
        }


def test_operations_on_a_cache_follow_the_layers_that_are_read(model: Any) -> None:
    """Forks, repeated and reordered rows, forgotten questions, moves: what comes next is what it would be."""
    question = ids_of(TEXT[60:70])
    with share_layers(model, SOURCES):
        cache = kvzip_press.compress(model, TOKENIZER, [TEXT[:30], TEXT[30:60]], RandomPress(0.4))
        expected = read_rows(model, cache.fork(), question)
        assert torch.equal(read_rows(model, cache, question), expected)
        cache.truncate(31)
        assert torch.equal(read_rows(model, cache, question), expected)
        cache.truncate([31, 31])
        cache.move_to("cpu")
        cache.move_to(model)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        assert torch.equal(read_rows(model, cache, question), expected.flip(0))


@torch.no_grad()
def read_rows(model: Any, cache: Any, question: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(question.expand(cache.batch_size, -1), past_key_values=cache).logits
    return logits


def test_what_was_evicted_comes_back_for_layers_that_share_it(model: Any) -> None:
    with share_layers(model, SOURCES):
        done = kvzip_press.prefill(model, TOKENIZER, TEXT[:60])
        scores = RandomPress(0.7).score(done)
        cache, more = done.evict(scores, cold="cpu"), done.evict(scores, 0.2)
        cache.restore(0.2)
        question = ids_of(TEXT[60:])
        assert torch.equal(read(model, cache, question), read(model, more, question))


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_pairs_in_codes_are_read_by_layers_that_share_them(model: Any, storage: str) -> None:
    with share_layers(model, SOURCES):
        done = kvzip_press.prefill(model, TOKENIZER, TEXT[:60])
        scores = RandomPress(0.3).score(done)
        exact, coded = done.evict(scores), done.evict(scores, storage=storage)
        assert coded.resident_bytes < exact.resident_bytes
        apart = read(model, coded, ids_of("When?")) - read(model, exact, ids_of("When?"))
    assert 0 < float(apart.abs().mean()) < 1  # other pairs, or none, move a logit by about 10


def test_a_long_context_in_chunks_and_eviction_while_decoding_work_with_shared_layers(model: Any) -> None:
    with share_layers(model, SOURCES):
        cache = kvzip_press.compress_in_chunks(model, TOKENIZER, TEXT, KVzipPress(0.5), chunk_size=32, window_size=8)
        assert [layer for layer, _ in cache.ragged_layers()] == [0, 1]
        whole = kvzip_press.compress(model, TOKENIZER, TEXT, get_press("none"))
        assert cache.resident_bytes < 0.6 * whole.resident_bytes
        kvzip_press.answer(model, TOKENIZER, cache, "When?", max_new_tokens=4)
        with StreamingLLMDecodePress(budget=24, buffer=4)(model):
            out = DynamicCache()
            with torch.no_grad():
                model(ids_of(TEXT[:40]), past_key_values=out)
            kvzip_press.generate(model, out, ids_of("When?"), max_new_tokens=12)
        assert int(RaggedCache.of(out).seqlens(1).max()) <= 24


@torch.no_grad()
def test_steps_that_a_graph_could_hold_are_those_of_other_steps(model: Any) -> None:
    """Static layers are read where they lie, step by step, also from between compiled layers; nothing moves."""
    from torch._dynamo.testing import CompileCounter

    with share_layers(model, SOURCES):
        cache = kvzip_press.compress(model, TOKENIZER, [TEXT[:30], TEXT[30:60]], RandomPress(0.4))
        read_rows(model, cache, ids_of("When?"))
        eager, compiled = cache.fork(), cache.fork()
        assert reason_against(cache) is None
        first = DecodeStep(model, cache.fork(), max_new_tokens=1)(torch.tensor([5, 6]))
        static = _StaticStep(model, cache, 4, None, torch.device("cpu"))
        before = [tensor.data_ptr() for _, layer in cache.ragged_layers() for tensor in layer.tensors]
        step = DecodeStep(model, eager, max_new_tokens=4)
        tokens = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
        for token in tokens:
            torch.testing.assert_close(static(token), step(token), rtol=1e-4, atol=3e-4)
        assert [tensor.data_ptr() for _, layer in cache.ragged_layers() for tensor in layer.tensors] == before
        one = _StaticStep(model, compiled, 4, None, torch.device("cpu"))
        one.token_ids.copy_(tokens[0][:, None])
        torch._dynamo.reset()
        with _compiled_layers(model, one.cache, backend=CompileCounter()) as twin:
            torch.testing.assert_close(one.run(twin), first, rtol=1e-4, atol=3e-4)


def test_a_file_says_which_layers_share_and_is_refused_without(model: Any, tmp_path: Path) -> None:
    question, path = ids_of(TEXT[60:]), tmp_path / "cache.safetensors"
    with share_layers(model, SOURCES):
        cache = kvzip_press.compress(model, TOKENIZER, TEXT[:60], RandomPress(0.5))
        cache.save(path)
        loaded = RaggedCache.load(path, model)
        assert loaded.resident_bytes == cache.resident_bytes
        assert torch.equal(read(model, loaded, question), read(model, cache, question))
    whole = tmp_path / "whole.safetensors"
    kvzip_press.compress(model, TOKENIZER, TEXT[:60], RandomPress(0.5)).save(whole)
    with pytest.raises(
        CacheMismatchError, match=r"inside share_layers\(model, \{2: 0, 3: 1, 4: 0\}\), got one outside"
    ):
        RaggedCache.load(path, model)
    with share_layers(model, {2: 0, 3: 1, 4: 1}):
        with pytest.raises(CacheMismatchError, match="got one inside"):
            RaggedCache.load(path, model)
        with pytest.raises(CacheMismatchError, match="expected a model whose layers share as in this cache, outside"):
            RaggedCache.load(whole, model)
    assert path.stat().st_size < 0.5 * whole.stat().st_size


def test_a_file_whose_layers_share_in_a_circle_is_refused(model: Any, tmp_path: Path) -> None:
    with share_layers(model, SOURCES):
        kvzip_press.compress(model, TOKENIZER, TEXT[:60], RandomPress(0.5)).save(tmp_path / "cache.safetensors")
    record = read_record(tmp_path / "cache.safetensors")
    for layer, changed in {
        2: {"shares_with": 3},
        3: {"shares_with": 3},
        4: {"shares_with": 2},
        1: {"shares_with": 1},
    }.items():
        layers = list(record.layers)
        layers[layer] = replace(layers[layer], **changed)
        with pytest.raises(CacheFileError, match="read an earlier one of their shape"):
            check_record(replace(record, layers=tuple(layers)))


def test_a_cache_is_refused_where_layers_do_not_share_as_when_it_was_made(model: Any) -> None:
    question = ids_of("When?")
    outside = kvzip_press.compress(model, TOKENIZER, TEXT[:60], RandomPress(0.5))
    dense = DynamicCache()
    read(model, dense, question)
    with share_layers(model, SOURCES):
        inside, dense_inside = kvzip_press.compress(model, TOKENIZER, TEXT[:60], RandomPress(0.5)), DynamicCache()
        read(model, dense_inside, question)
        for cache in (outside, dense):
            with pytest.raises(CacheMismatchError, match="got one that was filled without sharing"):
                read(model, cache, question)
    with pytest.raises(CacheMismatchError, match="made by another model, or by this one with other weights"):
        read(model, inside, question)
    with pytest.raises(CacheMismatchError, match=r"was made inside `with share_layers\(model, ...\):`"):
        read(model, dense_inside, question)
    with (
        share_layers(model, {2: 0, 3: 1, 4: 1}),
        pytest.raises(CacheMismatchError, match="got one that was filled with"),
    ):
        read(model, dense_inside, question)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_transformers_own_generate_works_inside(model: Any, num_beams: int) -> None:
    """Its caches are made and reordered by itself, and it may use none."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    with share_layers(model, SOURCES):
        cached, without = (model.generate(ids_of(TEXT[:30]), use_cache=use, **options) for use in (True, False))
    assert cached.shape[1] == 36
    assert torch.equal(cached, without)


@pytest.mark.kvpress
@pytest.mark.parametrize(("name", "is_refused"), [("kvpress_knorm", False), ("kvpress_kvzip", True)])
@pytest.mark.usefixtures("kvpress")
def test_presses_of_kvpress_that_evict_every_layer_are_refused(model: Any, name: str, is_refused: bool) -> None:
    with share_layers(model, SOURCES):
        if is_refused:
            with pytest.raises(UnsupportedModelError, match=r"outside of share_layers\(...\)"):
                kvzip_press.compress(model, TOKENIZER, TEXT, get_press(name, 0.5))
        else:
            cache = kvzip_press.compress(model, TOKENIZER, TEXT, get_press(name, 0.5))
            assert [layer for layer, _ in cache.ragged_layers()] == [0, 1]


def test_what_would_attend_to_projections_that_were_left_out_gives_nan(model: Any) -> None:
    with share_layers(model, SOURCES), torch.no_grad():
        assert bool(model.model.layers[2].self_attn.k_proj(torch.ones(1, 2, 64)).isnan().all())


def refused(error: type[Exception], message: str, model: Any, sources: Any) -> None:
    with pytest.raises(error, match=message), share_layers(model, sources):
        pass


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("gemma3_text", r"layers \[0, 2\] use a sliding window"), ("phi3", "layer 0 has no k_proj and no v_proj: fused")],
)
def test_models_whose_layers_cannot_share_are_refused(architecture: str, message: str) -> None:
    refused(UnsupportedModelError, message, tiny_model(architecture), {1: 0})


def test_layers_that_share_already_or_differ_in_shape_or_place_are_refused(model: Any) -> None:
    with share_layers(model, SOURCES):
        refused(UnsupportedModelError, "leave that context first", model, {1: 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvzip_press.sharing.context.execution_device", lambda module: f"cuda:{module.layer_idx}")
        refused(UnsupportedModelError, "got layer 1 on cuda:1 and layer 0 on cuda:0", model, {1: 0})
    model.model.layers[1].self_attn.v_proj = torch.nn.Linear(64, 16)
    refused(UnsupportedModelError, "expected layers of one shape to share, got layer 1", model, {1: 0})


@pytest.mark.parametrize("sources", [{}, {0: 1}, {2: 1, 1: 0}, {7: 0}, {"2": 0}], ids=str)
def test_sources_that_are_no_earlier_layers_are_refused(model: Any, sources: Any) -> None:
    refused(InvalidArgumentError, "to earlier ones that keep their own", model, sources)


@pytest.mark.parametrize("sources", [None, [(1, 0)], 3], ids=str)
def test_sources_are_a_mapping_or_a_file(model: Any, sources: Any) -> None:
    refused(InvalidArgumentError, "expected a file of shared layers, or a mapping", model, sources)


def test_a_file_of_shared_layers_belongs_to_a_model(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "shared.json"
    write_sources(path, SOURCES, facts_of(model), {})
    with share_layers(model, path):
        pass
    other = tiny_model(num_layers=5, seed=1)
    refused(InvalidArgumentError, "expected shared layers made with this LlamaForCausalLM", other, path)
    for text in ("{}", '{"format": "kvzip_press_shared_layers", "model": {}, "sources": {"x": 1}}', "["):
        path.write_text(text)
        refused(InvalidArgumentError, "as `kvzip-press layers share` writes them", model, path)
