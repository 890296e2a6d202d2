"""The door for codecs: another storage behind every way that pairs are made, moved and read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kvzip_press import FastKVzipPress, Gates, KVzipPress, RaggedCache, answer, compress, compress_in_chunks
from kvzip_press.cache.codecs.by_name import STORAGES
from kvzip_press.cache.codecs.held import Encoded
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Layout, Storage
from kvzip_press.kernels.ragged_attention import Part
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.presses.fastkvzip import LayerGate
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "The key of the red box is under the mat, and the mat is at the door of the house by the sea."
MASK = 0x5A5A5A5A


@dataclass(frozen=True)
class Scrambled(Storage):
    """Loses nothing, and nobody who takes a column for a key or a value is right: other names, dtypes and widths."""

    def layout(self):
        half = (self.v_head_dim,)
        return Layout({"k": (torch.int32, (self.head_dim,)), "high": (torch.int16, half), "low": (torch.int16, half)})

    def encode(self, new, before=None):
        halves = new.values.contiguous().view(torch.int16).unflatten(-1, (-1, 2))
        keys = new.keys.contiguous().view(torch.int32) ^ MASK
        return Encoded({"k": keys, "high": halves[..., 1], "low": halves[..., 0]}, new.keep)

    def decode(self, held):
        values = torch.stack([held.columns["low"], held.columns["high"]], dim=-1).flatten(-2).view(torch.float32)
        return (held.columns["k"] ^ MASK).view(torch.float32), values

    def parts(self, query, held, num_heads, row_index):
        return (Part(*self.decode(held), held.cu_seqlens),)


@pytest.fixture(params=[ModelDtype, Scrambled])
def storage(request, monkeypatch) -> type[Storage]:
    """What pairs are packed into, wherever that is not said."""
    monkeypatch.setitem(STORAGES, "model", request.param)
    return request.param


def gates(model) -> Gates:
    generator, made = torch.Generator().manual_seed(0), []
    for _ in full_attention_layers(model):
        gate = LayerGate(64, 2, 2)
        for parameter in gate.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        made.append(gate.requires_grad_(False))
    return Gates(made)


def contexts(model) -> dict[str, RaggedCache]:
    """One cache of each kind: a context, rows of different length, chunks."""
    press = KVzipPress(0.5, chunk_size=32)
    return {
        "one": compress(model, TOKENIZER, TEXT, press),
        "rows": compress(model, TOKENIZER, [TEXT, TEXT[:40]], press),
        "chunks": compress_in_chunks(model, TOKENIZER, TEXT, press, chunk_size=32, window_size=8),
    }


def everything(architecture: str) -> list[object]:
    """What is said and held on the way through all that a cache can do but for files."""
    model, seen = tiny_model(architecture), list[object]()
    for name, cache in contexts(model).items():
        seen += [answer(model, TOKENIZER, cache, "Where is it?", max_new_tokens=4, keep=True), cache.kept_fraction]
        fork = cache.fork()
        fork.reorder_cache(torch.tensor([cache.batch_size - 1, 0]))
        seen += [answer(model, TOKENIZER, fork, ["And then?", "Who?"], max_new_tokens=4)]
        fork.batch_select_indices(torch.tensor([1]))
        with KVzipPress(0.5, tokenizer=TOKENIZER, chunk_size=32)(model), torch.no_grad():  # a later turn is merged
            out = model(torch.arange(5, 40)[None], past_key_values=fork) if name != "rows" else None
        seen += [] if out is None else [out.logits, [p for heads in fork.kept_positions(1) for p in heads]]
    for allocation in ("global", "head"):
        press = FastKVzipPress(decoding=True, budget=40, buffer=8, gate=gates(model), allocation=allocation)
        with press(model):
            ids = model.generate(torch.arange(3, 70)[None], max_new_tokens=40, do_sample=False, eos_token_id=None)
        seen += [ids]
    return seen


FIRST: dict[str, list[object]] = {}


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_another_storage_that_loses_nothing_changes_nothing(architecture, storage) -> None:
    """Replays, batches, beams, chunks, turns, forks and eviction while decoding read pairs through it alone."""
    seen = everything(architecture)
    expected = FIRST.setdefault(architecture, seen)
    assert len(seen) == len(expected)
    for got, wanted in zip(seen, expected, strict=True):
        if isinstance(got, torch.Tensor):
            assert torch.equal(got, wanted)
        elif isinstance(got, list) and isinstance(got[0], torch.Tensor):
            assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
        else:
            assert got == wanted


def test_its_columns_are_all_that_is_held(storage) -> None:
    """Bytes are counted by what is there."""
    cache = compress(tiny_model(), TOKENIZER, TEXT, KVzipPress(0.5))
    for _, layer in cache.ragged_layers():
        names = [*layer.packed.storage.layout().columns, "positions"]
        assert isinstance(layer.packed.storage, storage) and list(layer.packed.columns) == names
        assert layer.packed.pair_bytes == 16 * 4 * 2 + 4
    assert sum(x.packed.pair_bytes * len(x.packed.positions) for _, x in cache.ragged_layers()) < cache.resident_bytes
