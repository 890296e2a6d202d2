"""Laws of storages of few bits: whatever is done to a cache, it answers as one that decodes all before it looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import DynamicCache

from kvzip_press import FastKVzipPress, Gates, KVzipPress, RaggedCache, RandomPress, compress, compress_in_chunks
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.codecs.by_name import STORAGES, storage_named
from kvzip_press.cache.codecs.int8 import Int8
from kvzip_press.cache.file.writing import read_record
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.step import DecodeStep, _StaticStep
from kvzip_press.errors import CacheFileError, KVzipPressError
from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.presses.decoding.tova import TOVADecodePress
from kvzip_press.presses.fastkvzip import LayerGate
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = [pytest.mark.any_transformers, pytest.mark.usefixtures("one_thread")]

LOSSY = tuple(name for name in STORAGES if name != "model")
TOKENIZER = ByteTokenizer()
# In fp64, a code is not rounded the other way because attention was summed in another order.
MODELS = {name: tiny_model(name, num_layers=2, dtype=torch.float64) for name in ("llama", "gemma2")}
TEXT = "The key of the red box is under the mat, and the mat is at the door of the house."


def that_decodes_everything(name: str) -> str:
    """The name of a storage that holds what another does, and reads it slowly: all of it, decoded."""
    kind, slow = storage_named(name), f"{name}, slow"

    def attend(self, query, held, tail_keys, tail_values, **options):
        return ragged_attention(query, *self.decode(held), held.cu_seqlens, tail_keys, tail_values, **options)

    STORAGES[slow] = type(f"Slow{kind.__name__}", (kind,), {"attend": attend})
    return slow


@pytest.fixture(params=LOSSY)
def names(request):
    """A storage, and the same that decodes everything."""
    slow = that_decodes_everything(request.param)
    yield request.param, slow
    del STORAGES[slow]


def logits(model, cache, n: int = 3) -> torch.Tensor:
    attach(model)
    return read(model, cache.fork(), torch.arange(5, 5 + n).repeat(cache.batch_size, 1))


def kept(cache: RaggedCache) -> str:
    return str([cache.kept_positions(i) for i, _ in cache.ragged_layers()])


def packed_bytes(cache: RaggedCache) -> list[int]:
    """Without the room of tails, which grows by other steps while pairs are evicted."""
    return [layer.packed.nbytes(slice(None)) for _, layer in cache.ragged_layers()]


class Operations:
    """What can be done to a cache, by the name that hypothesis draws."""

    @staticmethod
    def question(model, cache, seed):
        attach(model)
        read(model, cache, torch.arange(3, 5 + seed % 5).repeat(cache.batch_size, 1))
        return cache

    @staticmethod
    def turn(model, cache, seed):
        """A later turn, compressed: its pairs are encoded beside those that are there."""
        dense = DynamicCache()
        dense.layers = list(cache.layers)
        with RandomPress(0.5, seed=seed)(model), torch.no_grad():
            model(torch.arange(3, 20 + seed % 9).repeat(cache.batch_size, 1), past_key_values=dense)
        return RaggedCache.of(dense)

    @staticmethod
    def fork(model, cache, seed):
        return cache.fork()

    @staticmethod
    def beams(model, cache, seed):
        cache.reorder_cache(torch.tensor([(row + seed) % cache.batch_size for row in range(cache.batch_size)]))
        return cache

    @staticmethod
    def select(model, cache, seed):
        cache.batch_select_indices(torch.tensor([seed % cache.batch_size, 0]))
        return cache

    @staticmethod
    def repeat(model, cache, seed):
        if cache.batch_size < 3:
            cache.batch_repeat_interleave(2)
        return cache

    @staticmethod
    def move(model, cache, seed):
        cache.move_to("cpu")
        return cache

    @staticmethod
    def write(model, cache, seed):
        """The model writes on, and pairs are evicted; what cannot be evicted so is refused, and left as it is."""
        dense, before = DynamicCache(), cache.fork()
        dense.layers = list(cache.layers)
        try:
            with WRITING(model), torch.no_grad():
                for token in range(3, 8 + seed % 3):
                    model(torch.full((cache.batch_size, 1), token), past_key_values=dense)
        except KVzipPressError:
            return before
        return RaggedCache.of(dense)

    @staticmethod
    def again(model, cache, seed):
        """Emptied, and filled by another context."""
        for _, layer in cache.ragged_layers():
            layer.reset()
        return Operations.turn(model, cache, seed) if seed % 2 else cache


NAMES = [name for name in vars(Operations) if not name.startswith("_") and name != "again"]
WRITING = TOVADecodePress(budget=24, buffer=4)
BEGINNINGS = ["replayed", "at random", "in chunks", "while writing"]


def begun(how: str, model, texts: list[str], storage: str) -> RaggedCache:
    """A cache that was compressed in one of several ways."""
    if how == "in chunks":
        press = RandomPress(0.5, allocation="layer")
        return compress_in_chunks(model, TOKENIZER, TEXT, press, chunk_size=24, window_size=8, storage=storage)
    if how == "while writing":
        cache = DynamicCache()
        with replace(WRITING, storage=storage)(model), torch.no_grad():
            for tokens in torch.arange(3, 49).split([40, *[1] * 6]):
                model(tokens.expand(2, -1), past_key_values=cache)
        return RaggedCache.of(cache)
    press = KVzipPress(0.5, chunk_size=64) if how == "replayed" else RandomPress(0.6, allocation="layer")
    return compress(model, TOKENIZER, texts, press, storage=storage)


@pytest.mark.parametrize("how", BEGINNINGS)
def test_whatever_is_done_to_a_cache_it_answers_as_if_all_were_decoded(how, names) -> None:
    """Forks, rows, beams, later turns, moves and what is written on, in any order, however the cache began."""
    # transformers' eager attention makes NaN of padding in fp64: Gemma 2 reads rows of one length.
    model = MODELS["gemma2" if how == "at random" else "llama"]
    texts = [TEXT[:60], TEXT[20:80] if how == "at random" else TEXT[:33]]

    @settings(max_examples=3, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 20)), min_size=2, max_size=6))
    def check(operations) -> None:
        caches = [begun(how, model, texts, name) for name in names]
        for name, seed in operations:
            caches = [getattr(Operations, name)(model, cache, seed) for cache in caches]
        fast, slow = caches
        assert kept(fast) == kept(slow)
        assert (fast.storage, fast.resident_bytes) == (names[0], slow.resident_bytes)
        torch.testing.assert_close(logits(model, fast), logits(model, slow), rtol=1e-6, atol=1e-6)

    check()


def test_a_cache_that_was_emptied_begins_anew(names) -> None:
    """Its tables are those of the new context."""
    model = MODELS["llama"]
    fast, slow = (compress(model, TOKENIZER, TEXT, RandomPress(0.5), storage=name) for name in names)
    for seed in (0, 1):
        fast, slow = (Operations.again(model, cache, seed) for cache in (fast, slow))
    assert kept(fast) == kept(slow) != ""
    torch.testing.assert_close(logits(model, fast), logits(model, slow), rtol=1e-6, atol=1e-6)
    error = (logits(model, fast) - logits(model, compress_like(model, fast))).abs().max()
    assert float(error) < (6 if names[0] == "kivi2" else 5)


def compress_like(model, cache: RaggedCache) -> RaggedCache:
    """A cache of the tokens of :meth:`Operations.again`, in the model's dtype."""
    dense = DynamicCache()
    with RandomPress(0.5, seed=1)(model), torch.no_grad():
        model(torch.arange(3, 21).repeat(cache.batch_size, 1), past_key_values=dense)
    return RaggedCache.of(dense)


# Once, and never twice --------------------------------------------------------------------------------------------


def test_a_chunk_is_encoded_once_and_survivors_keep_their_codes(monkeypatch) -> None:
    """Each token of a long context goes through the codec once a layer; what is evicted later leaves the rest alone."""
    model, encoded = MODELS["llama"], []
    encode = Int8.encode

    def noted(self, new, before=None):
        encoded.append(new.keys.shape[2])
        return encode(self, new, before)

    monkeypatch.setattr(Int8, "encode", noted)
    cache = compress_in_chunks(model, TOKENIZER, TEXT, KVzipPress(0.5), chunk_size=16, window_size=8, storage="int8")
    assert sum(encoded) == 2 * cache.n_seen and len(encoded) > 8
    before = columns(cache)
    assert columns(cache.fork()) == before
    again = Operations.turn(model, cache, 0)
    after = columns(again)
    assert all(after[where] == codes for where, codes in before.items())


def columns(cache: RaggedCache) -> dict[tuple[int, int, int], list[float]]:
    """Codes and scales of each pair, by layer, head and position."""
    found = {}
    for i, layer in cache.ragged_layers():
        packed = layer.packed
        heads = torch.arange(packed.num_heads).repeat_interleave(packed.seqlens[0])
        numbers = [
            x.double().reshape(len(heads), -1) for n, x in packed.columns.items() if n.startswith(("key", "val"))
        ]
        for head, position, row in zip(heads.tolist(), packed.positions.tolist(), torch.cat(numbers, 1), strict=True):
            found[i, head, position] = row.tolist()
    return found


# While the model writes -------------------------------------------------------------------------------------------


def test_what_is_evicted_while_the_model_writes_leaves_the_others_codes(names) -> None:
    """The layers share a pool, and its tables; static layers, as in a graph, read it as eager ones do."""
    model, generator, made = MODELS["llama"], torch.Generator().manual_seed(0), []
    for _ in full_attention_layers(model):
        gate = LayerGate(64, 2, 2)
        for parameter in gate.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        made.append(gate.requires_grad_(False).double())
    said = []
    for name in names:
        press = FastKVzipPress(decoding=True, budget=40, buffer=8, gate=Gates(made), storage=name)
        with press(model):
            cache = DynamicCache()
            ids = model.generate(
                torch.arange(3, 70)[None], past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None
            )
        ragged = RaggedCache.of(cache)
        said.append((ids.tolist(), kept(ragged), ragged.storage == name, logits(model, ragged)))
    fast, slow = said
    assert fast[:3] == slow[:3] and fast[2]
    torch.testing.assert_close(fast[3], slow[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSY)
def test_static_steps_read_codes(name) -> None:
    """As those of a captured graph: the tail has room that is not read."""
    model = MODELS["gemma2"]
    cache = compress(model, TOKENIZER, [TEXT, TEXT], RandomPress(0.5), storage=name)
    token = torch.tensor([5, 7])
    static = _StaticStep(model, cache.fork(), 4, None, torch.device("cpu"))
    eager = DecodeStep(model, cache, max_new_tokens=4)
    for _ in range(4):
        torch.testing.assert_close(static(token), eager(token), rtol=1e-6, atol=1e-6)


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSY)
def test_a_file_may_come_between_any_operations(name, tmp_path) -> None:
    """What is done to the loaded cache gives the same bits as done to the saved one, however that came about."""
    model, path = tiny_model(num_layers=2), tmp_path / "cache.safetensors"
    drawn = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 20)), max_size=3)

    @settings(max_examples=4, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(st.sampled_from(BEGINNINGS), drawn, drawn)
    def check(how, before, after) -> None:
        cache = begun(how, model, [TEXT[:60], TEXT[:33]], name)
        for operation, seed in before:
            cache = getattr(Operations, operation)(model, cache, seed)
        cache.save(path)
        caches = [cache, RaggedCache.load(path, model)]
        for operation, seed in after:
            caches = [getattr(Operations, operation)(model, one, seed) for one in caches]
        saved, loaded = caches
        assert kept(saved) == kept(loaded)
        assert (loaded.storage, packed_bytes(loaded)) == (name, packed_bytes(saved))
        assert torch.equal(logits(model, saved), logits(model, loaded))

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSY)
def test_a_loaded_cache_answers_bit_for_bit_as_the_saved_one(name, dtype, tmp_path) -> None:
    """The file holds codes, scales and tables, and says which storage they are of."""
    path, model = tmp_path / "cache.safetensors", tiny_model("gemma3_text", dtype=dtype)
    cache = compress(model, TOKENIZER, [TEXT, TEXT[:40]], RandomPress(0.6), storage=name)
    cache.save(path)
    loaded = RaggedCache.load(path, model)
    assert (loaded.storage, loaded.resident_bytes) == (name, cache.resident_bytes)
    assert torch.equal(logits(model, loaded), logits(model, cache))
    assert {layer.storage for layer in read_record(path).layers} == {name, "model"}  # sliding layers stay as they are
    loaded.export_kept(tmp_path / "kept.npz")
    cache.batch_select_indices(torch.tensor([1]))
    cache.save(path)
    assert torch.equal(logits(model, RaggedCache.load(path, model)), logits(model, cache))


def test_codes_are_not_read_as_those_of_another_storage(tmp_path, monkeypatch) -> None:
    """A name that nobody knows, and one whose tensors are others."""
    path, model = tmp_path / "cache.safetensors", tiny_model(num_layers=1)
    compress(model, TOKENIZER, TEXT, RandomPress(0.5), storage="int8").save(path)
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("0.key_codes").get_dtype() == "I8"
    kind = STORAGES["int8"]
    monkeypatch.delitem(STORAGES, "int8")
    with pytest.raises(CacheFileError, match=r"expected a storage out of model, .*got 'int8'"):
        RaggedCache.load(path, model)
    monkeypatch.setitem(STORAGES, "int8", STORAGES["k8v4"])
    with pytest.raises(CacheFileError, match=r"expected .* tensors, got others"):
        RaggedCache.load(path, model)
    monkeypatch.setitem(STORAGES, "int8", kind)
    assert RaggedCache.load(Path(path), model).storage == "int8"
