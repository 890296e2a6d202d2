"""Damaged files of every format: refused with an error of ours, or read as what they were, bit for bit; never more.

Formats that cannot notice damage (DuoAttention's text, GGUF, our files without a checksum) may give other numbers; the
rest holds for them, too.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import mutations
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from kvzip_press import RaggedCache, RandomPress, compress
from kvzip_press.errors import KVzipPressError
from kvzip_press.files import DIGEST
from kvzip_press.heads.file import SEALED
from kvzip_press.heads.scores import HeadScores
from kvzip_press.loading.gguf_conversion import convert_gguf
from kvzip_press.presses.decoding import QueryStatistics, TrimKVGates
from kvzip_press.presses.duo_attention.pattern import CONFIG, HEADS, export_duo, import_duo
from kvzip_press.presses.fastkvzip.gate import LayerGate
from kvzip_press.presses.fastkvzip.gates import Gates
from kvzip_press.sharing.file import read_sources, write_sources
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.any_transformers

MODEL = tiny_model("gemma3_text")
SCORES = HeadScores(torch.rand(3, 2), (0, 1, 2), {"model": "m", "texts": "[]", "k_proj_norms": "[1.5, 2.5, 3.5]"})
MOST_BYTES = 200 * 2**20  # that reading any of them may add to the most that the process ever took


def cache_file(path: Path) -> None:
    cache = DynamicCache(config=MODEL.config)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), RandomPress(0.6)(MODEL):
        MODEL(ids, past_key_values=cache)
        MODEL(ids[:, :3], past_key_values=cache)
    RaggedCache.of(cache).save(path)


def cache_file_with_evicted(path: Path) -> None:
    compress(MODEL, ByteTokenizer(), "The key is under the mat.", RandomPress(0.6), cold="cpu").save(path)


def read_restored(path: Path) -> list[torch.Tensor]:
    cache = RaggedCache.load(path, MODEL)
    cache.restore()
    return [tensor for _, layer in cache.ragged_layers() for tensor in layer.tensors]


def read_cache(path: Path) -> list[torch.Tensor]:
    layers = RaggedCache.load(path, MODEL).layers
    ragged = [tensor for layer in layers for tensor in getattr(layer, "tensors", ())]
    return [*ragged, *(t for layer in layers if not hasattr(layer, "tensors") for t in (layer.keys, layer.values))]


EVICTED_FROM: dict[Path, RaggedCache] = {}  # a file of evicted pairs is read by the cache that wrote it


def evicted_pairs(path: Path) -> None:
    EVICTED_FROM[path] = compress(MODEL, ByteTokenizer(), "The key is under the mat.", RandomPress(0.6), cold=path)


def read_evicted(path: Path) -> list[torch.Tensor]:
    cache = EVICTED_FROM[path].fork()
    cache.restore()
    return [tensor for _, layer in cache.ragged_layers() for tensor in layer.tensors]


def gates() -> Gates:
    torch.manual_seed(0)
    layers = [LayerGate(8, 1, 2, dim=2, n_sink=2) for _ in range(2)]
    for layer in layers:
        torch.nn.init.normal_(layer.b)
    return Gates(layers, (0, 1), {"model": "m", "k_proj_norms": "[1.5, 2.5]"})


def gate_pt(path: Path) -> None:
    states = [layer.state_dict() for layer in gates().layers]
    torch.save({"module": states, "loss": np.arange(9.0), "epoch": 3}, path)


def read_gates(path: Path) -> list[torch.Tensor]:
    return [tensor for layer in Gates.load(path).layers for tensor in layer.state_dict().values()]


def read_heads(path: Path) -> list[torch.Tensor]:
    scores = HeadScores.load(path)
    return [scores.values, torch.tensor(scores.layer_indices)]


def unsealed(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """Takes the checksum out, as in the files of the first versions."""

    def writes(path: Path) -> None:
        write(path)
        with safe_open(path, framework="pt") as file:
            texts = {name: text for name, text in file.metadata().items() if name not in (DIGEST, SEALED)}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        save_file(tensors, path, texts)

    return writes


def pattern(path: Path) -> None:
    export_duo(SCORES, path.parent / "pattern")
    path.write_bytes((path.parent / "pattern" / HEADS).read_bytes())


def read_pattern(path: Path) -> list[torch.Tensor]:
    (path.parent / "pattern" / HEADS).write_bytes(path.read_bytes())
    scores, *sizes = import_duo(path.parent / "pattern")
    return [scores.values, torch.tensor(sizes)]


def config(path: Path) -> None:
    pattern(path)
    path.write_text(json.dumps({"sink_size": 64, "recent_size": 256, "other": [1, {"a": 2.5}]}), encoding="utf-8")


def read_config(path: Path) -> list[torch.Tensor]:
    (path.parent / "pattern" / CONFIG).write_bytes(path.read_bytes())
    return [torch.tensor(import_duo(path.parent / "pattern")[1:])]


def queries(path: Path) -> None:
    means = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(0))
    said = {"model": "m", "k_proj_norms": "[1.5, 2.5]"}
    QueryStatistics(torch.stack([means, means], -1), means, means[0, 0], ("halves",) * 2, (0, 3), said).save(path)


def read_queries(path: Path) -> list[torch.Tensor]:
    read = QueryStatistics.load(path)
    return [read.centres, read.magnitudes, read.frequencies, torch.tensor(read.layer_indices)]


def trimkv_pth(path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"linear1.weight": (4, 8), "linear1.bias": (4,), "linear2.weight": (2, 4), "bias": (2,)}
    TrimKVGates({0: {name: torch.randn(shape) for name, shape in shapes.items()}}).save(path.parent)


def read_trimkv(path: Path) -> list[torch.Tensor]:
    return list(TrimKVGates.load(path).layers[0].values())


def shared_layers(path: Path) -> None:
    write_sources(path, {7: 2, 9: 2, 12: 3}, {"model": "m", "k_proj_norms": "[1.5, 2.5]"}, {"order": "dissimilar"})


def read_shared_layers(path: Path) -> list[torch.Tensor]:
    return [torch.tensor([*read_sources(path)[0].items()])]


def gguf_file(path: Path) -> None:
    writer = pytest.importorskip("gguf").GGUFWriter(str(path), "llama")
    counts = {
        "embedding_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "feed_forward_length": 32,
    }
    for field, count in {**counts, "block_count": 1, "context_length": 64}.items():
        writer.add_uint32(f"llama.{field}", count)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>", "a", "b", "ab"])
    writer.add_array("tokenizer.ggml.token_type", [3, 3, 1, 1, 1])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    for field, token in {"bos": 0, "eos": 1, "padding": 1, "unknown": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{field}_token_id", token)
    for field, shape in {"token_embd": (5, 32), "blk.0.attn_q": (32, 32), "blk.0.ffn_norm": (32,)}.items():
        writer.add_tensor(f"{field}.weight", np.full(shape, 0.5, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def read_gguf(path: Path) -> list[torch.Tensor]:
    folder = path.parent / "converted"
    folder.mkdir(exist_ok=True)
    convert_gguf(path, folder)
    texts = b"".join(file.read_bytes() for file in sorted(folder.glob("*.json")))
    return [*load_file(folder / "model.safetensors").values(), torch.frombuffer(bytearray(texts), dtype=torch.uint8)]


# Name of the file, how it is written and read, how many mutations, and whether it notices all that matters.
FORMATS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], list[torch.Tensor]], int, bool]] = {
    "a cache": ("a.safetensors", cache_file, read_cache, 330, True),
    "a cache with evicted pairs": ("a.safetensors", cache_file_with_evicted, read_restored, 220, True),
    "evicted pairs": ("evicted", evicted_pairs, read_evicted, 110, True),
    "gates": ("a.safetensors", lambda path: gates().save(path), read_gates, 330, True),
    "gates without a checksum": ("a.safetensors", unsealed(lambda path: gates().save(path)), read_gates, 220, False),
    "head scores": ("a.safetensors", SCORES.save, read_heads, 330, True),
    "head scores without a checksum": ("a.safetensors", unsealed(SCORES.save), read_heads, 220, False),
    "KVzip's head scores": ("a.pt", lambda path: torch.save(SCORES.values, path), read_heads, 330, True),
    "Fast KVzip's gates": ("a.pt", gate_pt, read_gates, 330, True),
    "means of queries": ("a.safetensors", queries, read_queries, 220, True),
    "TrimKV's gates": ("trimkv_weights.pth", trimkv_pth, read_trimkv, 220, True),
    "DuoAttention's table": ("a.tsv", pattern, read_pattern, 220, False),
    "a model's GGUF": ("a.gguf", gguf_file, read_gguf, 220, False),
    "shared layers": ("a.json", shared_layers, read_shared_layers, 110, False),
    "DuoAttention's sizes": ("a.json", config, read_config, 220, False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_or_is_what_it_was(name, tmp_path, caplog) -> None:
    """With an error of ours, in little memory, whatever the damage."""
    caplog.set_level("CRITICAL")
    file, write, read, count, protected = FORMATS[name]
    path = tmp_path / file
    write(path)
    whole, right, outcomes = path.read_bytes(), read(path), Counter[str]()
    longest = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for change, data in mutations(whole, seed=len(name), count=count):
        path.write_bytes(data)
        try:
            got = read(path)
        except KVzipPressError as error:
            longest = max(longest, len(str(error)))
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        same = len(got) == len(right) and all(map(_same_bits, got, right))
        assert same or not protected, f"{change}: read as something else"
        outcomes["read as it was"] += same
    assert outcomes["refused"] > 0.2 * count and longest < 3000, (outcomes, longest)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def test_there_are_enough_of_them() -> None:
    def counts() -> Iterator[int]:
        yield from (count for *_, count, _ in FORMATS.values())

    assert sum(counts()) >= 1200


def test_mutations_are_the_same_for_the_same_seed_and_never_the_file_itself() -> None:
    whole = b'{"a": 1, "dtype": "F32"}' * 9
    one, two = (list(mutations(whole, seed=3, count=66)) for _ in range(2))
    assert one == two and len({change.partition(" at ")[0] for change, _ in one}) == 11
    assert all(data != whole for _, data in one) and one != list(mutations(whole, seed=4, count=66))
