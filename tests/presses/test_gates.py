"""Gates on disk: the published checkpoints load, wrong ones are refused, and no file runs code."""

from __future__ import annotations

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch

from kvzip_press import load_model
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import encode
from kvzip_press.presses.fastkvzip import FastKVzipPress, Gates, LayerGate, shipped_gates
from kvzip_press.presses.fastkvzip.published import file_name
from kvzip_press.presses.fastkvzip.training import evaluate
from kvzip_press.testing import tiny_model

HIDDEN, HEADS, GROUPS = 64, 2, 2  # of tiny models
TEXT = (
    "Anna Merkel keeps the key of the lighthouse in a blue tin behind the stove. It has been there since May 1972, "
    "when her uncle left for Oslo. Nobody else knows, apart from the postman, who once saw her open it and said "
    "nothing. The tin also holds 340 crowns, a photograph of a dog called Rufus, and a list of ships that never came."
)


def published_state(seed: int = 0, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """A layer as the authors publish it: projections and b in the model's dtype, norms and sinks in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(of)

    return {
        "q_proj.weight": random(HEADS * GROUPS * 16, HIDDEN, of=dtype),
        "q_proj.bias": random(HEADS * GROUPS * 16, of=dtype),
        "k_proj.weight": random(HEADS * 16, HIDDEN, of=dtype),
        "q_norm.weight": random(16),
        "k_norm.weight": random(16),
        "b": random(HEADS, 1, GROUPS, of=dtype),
        "k_base": random(HEADS, 1, 16, 16),
    }


def checkpoint(n_layers: int = 3, **changes: object) -> dict[str, object]:
    """Everything that a published file holds: the curves of the training are numpy arrays."""
    curves = {name: np.random.default_rng(0).random((100, n_layers)) for name in ("loss", "acc")}
    trained = {f"{name}_train": curve.astype(np.float32) for name, curve in curves.items()}
    return {"module": [published_state(i) for i in range(n_layers)], **curves, **trained, **changes}


@pytest.fixture
def folder(tmp_path):
    """A folder laid out as the hub repository, with a gate of the model "Some/Tiny-Model"."""
    (tmp_path / "tiny-model").mkdir()
    torch.save(checkpoint(), tmp_path / "tiny-model" / "q2_dim16_sink16.pt")
    return tmp_path


def named_model(architecture: str = "llama"):
    model = tiny_model(architecture)
    model.config.name_or_path = "Some/Tiny-Model"
    return model


def assert_published(gates: Gates) -> None:
    for seed, gate in enumerate(gates.layers):
        for name, tensor in published_state(seed).items():
            assert torch.equal(gate.state_dict()[name], tensor) and gate.state_dict()[name].dtype == tensor.dtype


def test_a_published_file_loads_from_a_file_a_folder_and_the_hub(folder, monkeypatch) -> None:
    path, asked = folder / "tiny-model" / "q2_dim16_sink16.pt", []

    def download(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        if not (folder / filename).exists():
            raise FileNotFoundError("no such entry")
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for source in (path, str(path), folder, "Some/Repository", None):
        gates = FastKVzipPress(gate=source).gates(named_model())
        assert_published(gates)
        assert gates.layer_indices == (0, 1, 2) and gates.shape == (HIDDEN, HEADS, GROUPS, 16, 16)
    names = [f"tiny-model/q2_dim16_sink16.{ending}" for ending in ("safetensors", "pt")]
    assert asked == [(repository, name) for repository in ("Some/Repository", "Jang-Hyun/Fast-KVzip") for name in names]


def test_safetensors_come_before_pickles_and_a_revision_is_the_one_that_is_named(folder, monkeypatch) -> None:
    ours, asked = Gates.of_state_dicts([published_state(i + 9) for i in range(3)]), []

    def download(repository: str, filename: str, revision: str) -> str:
        asked.append((repository, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    ours.save(folder / "tiny-model" / "q2_dim16_sink16.safetensors")
    for source in (folder, f"Some/Repository@{'5d' * 20}"):
        found = FastKVzipPress(gate=source).gates(named_model())
        assert torch.equal(found.layers[0].k_base, ours.layers[0].k_base)
    assert asked == [("Some/Repository", "tiny-model/q2_dim16_sink16.safetensors", "5d" * 20)]


def test_what_comes_from_the_hub_says_of_which_commit_it_is(folder, monkeypatch, tmp_path) -> None:
    cached = tmp_path / "models--a--b" / "snapshots" / ("5d" * 20)
    shutil.copytree(folder, cached)
    gates = Gates.load(cached / "tiny-model" / "q2_dim16_sink16.pt")
    assert gates.provenance == {"source": f"q2_dim16_sink16.pt of commit {'5d' * 20}"}


def test_gates_are_looked_up_once_a_model(folder, monkeypatch) -> None:
    reads, load, model = [], Gates.load, named_model()
    monkeypatch.setattr(Gates, "load", lambda path: reads.append(path) or load(path))
    for ratio in (0.3, 0.5, 0.7):
        FastKVzipPress(ratio, gate=folder).observer(model)
    assert len(reads) == 1


def test_arrays_that_numpy_1_pickled_are_read(folder) -> None:
    """Its module had another name, and the authors' environment was of its time."""
    path = folder / "tiny-model" / "q2_dim16_sink16.pt"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    old = {name: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") for name, data in records.items()}
    assert old != records
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in old.items():
            archive.writestr(name, data)
    assert_published(Gates.load(path))


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "expected"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-1M", 28, 4, "qwen2.5-7b-instruct-1m/q7_dim16_sink16.pt"),
        ("Qwen/Qwen3-8B-FP8", 32, 8, "qwen3-8b-fp8/q4_dim16_sink16.pt"),
        ("google/gemma-3-12b-it", 16, 8, "gemma-3-12b-it/q2_dim16_sink16.pt"),
    ],
)
def test_names_are_those_of_the_repository(name, heads, kv_heads, expected) -> None:
    model = tiny_model(num_layers=1, hidden_size=4 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
    model.config.name_or_path = name
    assert file_name(model) == expected


def test_nobody_is_told_the_name_of_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    model = tiny_model()
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(InvalidArgumentError, match="kvzip-press gates train"):
        FastKVzipPress().gates(model)


def test_what_the_hub_does_not_have_is_a_clear_error(monkeypatch) -> None:
    def download(repository: str, filename: str) -> str:
        raise FileNotFoundError("no such entry")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InvalidArgumentError, match=r"num_hidden_layers=3.*none on the hub.*no such entry"):
        FastKVzipPress().gates(named_model())
    with pytest.raises(InvalidArgumentError, match=r"expected tiny-model/q2_dim16_sink16.pt in the hub repository a/b"):
        FastKVzipPress(gate="a/b").gates(named_model())


def test_a_folder_without_the_gate_says_what_it_has(folder) -> None:
    model = named_model()
    model.config.name_or_path = "Some/Other"
    with pytest.raises(InvalidArgumentError, match=r"expected other/q2_dim16_sink16.pt .* got \['tiny-model"):
        FastKVzipPress(gate=folder).gates(model)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_would_run_code_is_refused(tmp_path) -> None:
    torch.save(checkpoint(loss=Malicious(tmp_path / "made")), tmp_path / "bad.pt")
    with pytest.raises(InvalidArgumentError, match="expected a gate as Fast KVzip publishes it"):
        Gates.load(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()


def test_arrays_of_objects_are_refused(tmp_path) -> None:
    """Of numpy only arrays of floats are allowed, and what is allowed is allowed for this one read."""
    before = set(torch.serialization.get_safe_globals())  # torch's own are in no fixed order
    torch.save(checkpoint(loss=np.array([{"a": 1}], dtype=object)), tmp_path / "bad.pt")
    with pytest.raises(InvalidArgumentError, match="expected a gate"):
        Gates.load(tmp_path / "bad.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in published_state().items() if key != name}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.ones(3), "got a Tensor"),
        ({"gates": []}, r"got a dict with \['gates'\]"),
        ({"module": []}, 'whose "module" is a list'),
        ({"module": [without("b")]}, "expected the tensors"),
        ({"module": [{**published_state(), "more": torch.ones(1)}]}, "expected the tensors"),
        ({"module": [{**published_state(), "k_base": torch.ones(16, 16)}]}, r"expected k_base \[heads, 1"),
        ({"module": [{**published_state(), "k_proj.weight": torch.ones(31, HIDDEN)}]}, "'k_proj.weight': \\(32, 64\\)"),
        ({"module": [{**published_state(), "q_norm.weight": torch.ones(15)}]}, "expected finite floats of shapes"),
        ({"module": [{**published_state(), "b": torch.full((HEADS, 1, GROUPS), torch.nan)}]}, "expected finite floats"),
    ],
)
def test_other_content_is_refused(tmp_path, held, message) -> None:
    torch.save(held, tmp_path / "other.pt")
    with pytest.raises(InvalidArgumentError, match=message):
        Gates.load(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["gate.pt", "gate.safetensors"])
def test_torn_and_absent_files_are_refused(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"no gate")
    with pytest.raises(InvalidArgumentError, match="expected"):
        FastKVzipPress(gate=tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(InvalidArgumentError, match="expected"):
        FastKVzipPress(gate=tmp_path / name).gates(tiny_model())


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2}, {"num_key_value_heads": 1}, {"num_attention_heads": 2}, {"hidden_size": 32}],
)
def test_gates_of_another_model_are_refused(options) -> None:
    gates = Gates.of_state_dicts([published_state(i) for i in range(3)])
    with pytest.raises(InvalidArgumentError, match=r"expected gates for Llama.*full-attention layers.*got Gates"):
        gates.check(tiny_model(**options))


def test_of_a_hybrid_model_published_gates_are_those_of_its_global_layers(folder, tmp_path) -> None:
    gates = Gates.of_state_dicts([published_state(i) for i in range(2)])
    assert gates.check(tiny_model("gemma3_text")).layer_indices == (1, 3)
    with pytest.raises(InvalidArgumentError, match="expected gates of the layers"):
        Gates(gates.layers, (0, 1)).check(tiny_model("gemma3_text"))


def test_our_files_hold_what_was_saved(tmp_path) -> None:
    path = tmp_path / "new" / "gate.safetensors"
    gates = Gates.of_state_dicts([published_state(i) for i in range(3)], (0, 1, 2), {"model": "m", "seed": "3"})
    gates.save(path)
    again = Gates.load(path)
    assert_published(again)
    assert (again.layer_indices, again.provenance) == (gates.layer_indices, gates.provenance)
    assert list(path.parent.iterdir()) == [path]
    assert "3 layers" in repr(again) and "'m'" in repr(again)


@pytest.mark.parametrize("layers", [[], [LayerGate(8, 1, 1), LayerGate(8, 1, 2)]])
def test_gates_of_no_or_of_several_shapes_are_refused(layers) -> None:
    with pytest.raises(InvalidArgumentError, match="expected gates of one shape"):
        Gates(layers)


def test_a_model_of_another_shape_has_no_shipped_gates() -> None:
    assert shipped_gates(tiny_model()) is None


@pytest.mark.embedded
def test_the_embedded_model_has_shipped_gates_and_other_weights_of_its_shape_have_none() -> None:
    model, tokenizer = load_model("smollm2")
    gates = FastKVzipPress().gates(model)
    assert (len(gates.layers), *gates.shape[:3]) == (30, 576, 3, 3)
    assert {"data", "data_sha256", "data_tokens", "recipe", "held_out"} <= set(gates.provenance)
    found = evaluate(FastKVzipPress(window_size=0), model, tokenizer, [list(encode(tokenizer, TEXT))])
    assert found.overlap[0.3] > 0.6 and found.overlap[0.5] > 0.7, "by chance they would be 0.3 and 0.5"
    with torch.no_grad():
        model.model.layers[7].self_attn.k_proj.weight.mul_(1.02)
    assert shipped_gates(model) is None
