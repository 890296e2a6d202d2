"""Gates, head scores and patterns of others: bounded before memory is taken. Ours have checksums and a model."""

from __future__ import annotations

import gzip
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import every_fault
from safetensors.torch import save_file

from kvzip_press.errors import CacheFileError, InvalidArgumentError
from kvzip_press.heads.scores import HeadScores
from kvzip_press.model.identity import facts_of
from kvzip_press.presses.duo_attention.pattern import CONFIG, HEADS, export_duo, import_duo
from kvzip_press.presses.fastkvzip import gate_file
from kvzip_press.presses.fastkvzip.fast_press import FastKVzipPress
from kvzip_press.presses.fastkvzip.gate import LayerGate
from kvzip_press.presses.fastkvzip.gates import Gates
from kvzip_press.presses.kvzip_head import KVzipHeadPress
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.any_transformers

MOST_BYTES = 100 * 2**20
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def in_little_memory() -> Iterator[None]:
    """What the whole process has taken at most grows by little, however much a file asks for."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def gates_of(model: Any) -> Gates:
    torch.manual_seed(0)
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    layers = [LayerGate(config.hidden_size, config.num_key_value_heads, groups, dim=2, n_sink=2) for _ in range(3)]
    return Gates.of_state_dicts([layer.state_dict() for layer in layers], (0, 1, 2), facts_of(model))


def state(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**LayerGate(8, 1, 2, dim=2, n_sink=2).state_dict(), **others}


def write_gates(
    path: Path, *, tensors: dict[str, torch.Tensor] | None = None, header: str = "", **entries: Any
) -> None:
    """A file of the first version, without a checksum, that says what it is told to."""
    said = {"format": 1, "layers": 1, "layer_indices": [0], **entries}
    tensors = {f"0.{name}": tensor.contiguous() for name, tensor in (tensors or state()).items()}
    save_file(tensors, path, {"kvzip_press_gates": header or json.dumps(said)})


def write_heads(path: Path, values: torch.Tensor | None = None, **texts: str) -> None:
    values = torch.rand(3, 2) if values is None else values
    save_file({"head_scores": values}, path, {"kvzip_press_head_scores": "1", **texts})


GATES: dict[str, Callable[[Path], object]] = {
    "a hundred million hidden units": lambda path: write_gates(
        path, tensors=state(**{"q_proj.weight": torch.empty(0, 10**8), "k_proj.weight": torch.empty(0, 10**8)})
    ),
    "ten million hidden units beside few numbers": lambda path: write_gates(
        path,
        tensors=state(**{"q_proj.weight": torch.zeros(1, 10**6, dtype=torch.float16), "b": torch.zeros(1, 1, 1000)}),
    ),
    "very many sinks and dimensions of nothing": lambda path: write_gates(
        path, tensors=state(k_base=torch.empty(2**30, 0, 2**30, 2**30))
    ),
    "a billion layers": lambda path: write_gates(path, layers=10**9),
    "half a layer": lambda path: write_gates(path, layers=0.5),
    "less than no layer": lambda path: write_gates(path, layers=-1),
    "layers without end": lambda path: write_gates(path, layers=float("inf")),
    "an infinite index": lambda path: write_gates(path, layer_indices=[float("inf")]),
    "an index that is a list": lambda path: write_gates(path, layer_indices=[[0]]),
    "an index of five thousand digits": lambda path: write_gates(
        path, header='{"format": 1, "layers": 1, "layer_indices": [' + "9" * 5000 + "]}"
    ),
    "metadata nested a hundred thousand deep": lambda path: write_gates(path, header=DEEP),
    "float8": lambda path: write_gates(path, tensors=state(**{"q_proj.bias": torch.zeros(4).to(torch.float8_e4m3fn)})),
    "int8": lambda path: write_gates(path, tensors=state(b=torch.zeros(1, 1, 2, dtype=torch.int8))),
    "complex numbers": lambda path: write_gates(path, tensors=state(b=torch.zeros(1, 1, 2, dtype=torch.complex64))),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}
HEADS_OF: dict[str, Callable[[Path], object]] = {
    "infinite indices": lambda path: write_heads(path, layer_indices="[1e999, 1, 2]"),
    "indices that are texts": lambda path: write_heads(path, layer_indices='["0", "1", "2"]'),
    "indices nested a hundred thousand deep": lambda path: write_heads(path, layer_indices=DEEP),
    "norms nested a hundred thousand deep": lambda path: write_heads(path, k_proj_norms=DEEP),
    "texts that are no list": lambda path: write_heads(path, texts="3"),
    "no heads, and a quintillion layers": lambda path: write_heads(path, torch.empty(2**60, 0)),
    "float8": lambda path: write_heads(path, torch.rand(3, 2).to(torch.float8_e5m2)),
    "int8": lambda path: write_heads(path, torch.ones(3, 2, dtype=torch.int8)),
    "NaN": lambda path: write_heads(path, torch.full((3, 2), torch.nan)),
    "another tensor beside it": lambda path: save_file(
        {"head_scores": torch.rand(3, 2), "more": torch.rand(1)}, path, {"kvzip_press_head_scores": "1"}
    ),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("what", GATES)
def test_gates_that_claim_too_much_are_refused(tmp_path, in_little_memory, what) -> None:
    path = tmp_path / "gates.safetensors"
    write_gates(path)
    assert Gates.load(path).shape == (8, 1, 2, 2, 2), "only what is changed is refused"
    GATES[what](path)
    with pytest.raises(InvalidArgumentError, match="expected"):
        Gates.load(path)


@pytest.mark.parametrize("what", HEADS_OF)
def test_head_scores_that_claim_too_much_are_refused(tmp_path, in_little_memory, what) -> None:
    path = tmp_path / "scores.safetensors"
    write_heads(path)
    HeadScores.load(path)
    HEADS_OF[what](path)
    with pytest.raises(InvalidArgumentError, match="expected"):
        HeadScores.load(path)


@pytest.mark.parametrize(
    "held", [torch.zeros(1).expand(10**6, 10**6), torch.full((3, 2), 0.5), torch.full((3, 2), torch.nan)]
)
def test_scores_of_kvzips_that_cannot_be_scores_are_refused(tmp_path, in_little_memory, held) -> None:
    torch.save(held, tmp_path / "scores.pt")
    with pytest.raises(InvalidArgumentError, match="expected"):
        HeadScores.load(tmp_path / "scores.pt")


def test_published_gates_that_claim_terabytes_are_refused(tmp_path, in_little_memory) -> None:
    torch.save({"module": [state(**{"q_proj.weight": torch.zeros(1).expand(4, 10**12)})]}, tmp_path / "gates.pt")
    with pytest.raises(InvalidArgumentError, match="within its record"):
        Gates.load(tmp_path / "gates.pt")


def test_a_pattern_that_would_not_be_read_again_is_not_written(tmp_path) -> None:
    for values in (torch.full((3, 2), 0.5), torch.tensor([[3.0, 0.5]])):
        with pytest.raises(InvalidArgumentError, match="as a pattern"):
            export_duo(HeadScores(values), tmp_path / "pattern")
    assert not (tmp_path / "pattern").exists()


CONFIGS = {
    "five thousand digits": '{"sink_size": 1, "recent_size": ' + "9" * 5000 + "}",
    "more tokens than there can be": '{"sink_size": 1, "recent_size": 2147483648}',
    "nested a hundred thousand deep": DEEP,
    "a name twice": '{"sink_size": 1, "recent_size": 2, "sink_size": 3}',
    "very long": '{"sink_size": 1, "recent_size": 2}' + " " * 2**21,
}
TABLES = {
    "NaN": "nan\t0.5\n",
    "an infinity": "inf\t0.5\n",
    "far outside": "100\t0.5\n",
    "all equal": "0.5\t0.5\n0.5\t0.5\n",
    "nothing": "",
    "very long": "0.5\n" * 2**23,
}


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    export_duo(HeadScores(torch.rand(3, 2)), tmp_path / "pattern", 64, 256)
    assert import_duo(tmp_path / "pattern")[1:] == (64, 256)
    return tmp_path / "pattern"


@pytest.mark.parametrize("what", CONFIGS)
def test_sizes_of_a_pattern_that_cannot_be_are_refused(pattern, in_little_memory, what) -> None:
    (pattern / CONFIG).write_text(CONFIGS[what], encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="expected"):
        import_duo(pattern)


@pytest.mark.parametrize("what", TABLES)
def test_a_table_that_orders_no_heads_is_refused(pattern, in_little_memory, what) -> None:
    (pattern / HEADS).write_text(TABLES[what], encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="expected a DuoAttention pattern"):
        import_duo(pattern)


@pytest.mark.parametrize("name", [HEADS, CONFIG])
def test_a_packed_file_is_not_read_in_place_of_one_that_is_missing_nor_a_pipe_waited_for(pattern, name) -> None:
    text = (pattern / name).read_bytes()
    (pattern / name).unlink()
    with gzip.open(pattern / f"{name}.gz", "wb") as packed:
        packed.write(text)
    with pytest.raises(InvalidArgumentError, match="FileNotFoundError"):
        import_duo(pattern)
    os.mkfifo(pattern / name)
    with pytest.raises(InvalidArgumentError, match="regular file"):
        import_duo(pattern)


# Ours say whose they are ------------------------------------------------------------------------------------------


def test_files_made_with_other_weights_are_refused_unless_their_record_is_left_out(tmp_path) -> None:
    made, other = tiny_model(), tiny_model(seed=1)
    gates_of(made).save(tmp_path / "gates.safetensors")
    HeadScores(torch.rand(3, 2), (0, 1, 2), facts_of(made)).save(tmp_path / "scores.safetensors")
    gates, scores = (
        FastKVzipPress(gate=tmp_path / "gates.safetensors"),
        KVzipHeadPress(0.5, tmp_path / "scores.safetensors"),
    )
    assert gates.gates(made).layer_indices == (0, 1, 2) and scores.head_scores(made).values.shape == (3, 2)
    for use in (gates.gates, scores.head_scores):
        with pytest.raises(InvalidArgumentError, match=r"got other weights of its shape.*leave out the record"):
            use(other)
    loaded, held = Gates.load(tmp_path / "gates.safetensors"), scores.head_scores(made)
    assert FastKVzipPress(gate=Gates(loaded.layers, loaded.layer_indices)).gates(other).shape == loaded.shape
    assert KVzipHeadPress(0.5, HeadScores(held.values, held.layer_indices)).head_scores(other) is not None


def test_files_made_with_a_model_of_another_shape_say_what_differs() -> None:
    made = gates_of(tiny_model())
    with pytest.raises(InvalidArgumentError, match="vocab_size=128, got 160"):
        made.check(tiny_model(vocab_size=160))


def test_a_light_fine_tune_and_packed_weights_are_taken() -> None:
    model = tiny_model()
    made = gates_of(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.005)
        made.check(model)
        projection = model.model.layers[1].self_attn.k_proj
        del projection._parameters["weight"]
        projection.weight = torch.zeros(7, dtype=torch.uint8)  # as a quantizer leaves it: no norm to compare
    made.check(model)


@pytest.mark.parametrize("norms", ["not JSON", "3", '["a"]', DEEP, "[1e999]"])
def test_a_record_of_weights_that_is_none_is_refused(norms) -> None:
    model = tiny_model()
    gates = Gates(gates_of(model).layers, (0, 1, 2), {**facts_of(model), "k_proj_norms": norms})
    with pytest.raises(InvalidArgumentError, match="norms of key projections"):
        gates.check(model)


def test_files_of_the_first_versions_are_read_with_a_note(tmp_path, caplog) -> None:
    write_gates(tmp_path / "gates.safetensors")
    write_heads(tmp_path / "scores.safetensors", layer_indices="[0, 1, 2]")
    Gates.load(tmp_path / "gates.safetensors")
    assert HeadScores.load(tmp_path / "scores.safetensors").layer_indices == (0, 1, 2)
    assert [record.getMessage().partition(" is ")[2] for record in caplog.records] == [
        "an older file without a checksum: whether it was damaged cannot be told"
    ] * 2


def test_what_comes_with_the_package_has_checksums(caplog) -> None:
    folder = Path(gate_file.__file__).parents[1]
    assert len(Gates.load(folder / "fastkvzip" / "data" / "smollm2-135m-instruct.safetensors").layers) == 30
    for name in ("kvzip_head", "duo_attention"):
        assert HeadScores.load(folder / name / "data" / "smollm2-135m-instruct.safetensors").values.shape == (30, 3)
    assert caplog.records == []


def test_what_would_not_be_read_again_is_not_written(tmp_path) -> None:
    made = gates_of(tiny_model())
    long = Gates(made.layers, made.layer_indices, {"model": "m" * 2**24})
    with torch.no_grad():
        made.layers[1].b[0, 0, 0] = torch.nan
    scores = [
        HeadScores(torch.rand(3, 2), (0, 1, 2), {name: text}) for name, text in [("texts", "{"), ("k_proj_norms", "3")]
    ]
    for held in (long, made, *scores):
        with pytest.raises(InvalidArgumentError, match="expected"):
            held.save(tmp_path / "file.safetensors")
    assert list(tmp_path.iterdir()) == []


# Written whole or not at all ----------------------------------------------------------------------------------------


def test_whatever_fails_while_writing_the_old_file_stays_or_the_new_one_is_there(tmp_path) -> None:
    path, gates = tmp_path / "file.safetensors", gates_of(tiny_model())
    for write in (gates.save, HeadScores(torch.rand(3, 2)).save):
        write(path)
        new = path.read_bytes()
        for fault, raised in every_fault(lambda write=write: write(path)):
            assert path.read_bytes() == (new if raised is None else b"old") or not fault, fault
            assert isinstance(raised, CacheFileError | None) and list(tmp_path.iterdir()) == [path]
            path.write_bytes(b"old")


def test_whatever_fails_while_a_pattern_is_written_each_of_its_files_is_whole(pattern) -> None:
    scores = HeadScores(torch.rand(5, 2))
    old = [(pattern / name).read_bytes() for name in (HEADS, CONFIG)]
    for _, raised in every_fault(lambda: export_duo(scores, pattern, 1, 2)):
        assert isinstance(raised, CacheFileError | None)
        for name, before in zip((HEADS, CONFIG), old, strict=True):
            got = (pattern / name).read_bytes()
            assert got == before or len(got) == {HEADS: 5 * 2 * 25, CONFIG: 41}[name]
            (pattern / name).write_bytes(before)
    assert sorted(path.name for path in pattern.iterdir()) == sorted([HEADS, CONFIG])
