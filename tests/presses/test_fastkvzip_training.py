"""Gates learn KVzip's scores; a training is deterministic, goes on after a kill, and holds whole documents out."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from typer.testing import CliRunner

from kvzip_press import KVzipPress, prefill
from kvzip_press.cli.main import app
from kvzip_press.errors import DataNotFoundError, DiskFullError, InvalidArgumentError
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.presses.fastkvzip import FastKVzipPress, Gates
from kvzip_press.presses.fastkvzip.training import Recipe, Training, evaluate, texts_of
from kvzip_press.presses.fastkvzip.training.documents import Piece, pieces, read_texts, split
from kvzip_press.presses.fastkvzip.training.features import features_of
from kvzip_press.presses.fastkvzip.training.openings import opening
from kvzip_press.presses.fastkvzip.training.optimise import Optimiser, agreement, initial, soft_bce
from kvzip_press.presses.fastkvzip.training.self_generation import SelfGeneration
from kvzip_press.presses.fastkvzip.training.shards import Shards
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.any_transformers

TOKENIZER = ByteTokenizer()
RECIPE = Recipe(tokens=900, held_out_tokens=120, steps=40, batch_size=200, dim=4, n_sink=3)


def documents(n: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (60,), generator=generator).tolist() for _ in range(n)]


def training(folder, recipe: Recipe = RECIPE, model=None, **options) -> Training:
    data = split(pieces(documents(), 10_000), recipe.tokens, recipe.held_out_tokens)
    return Training(model or tiny_model(), TOKENIZER, recipe, data, "random ids", folder, **options)


def states(gates: Gates) -> list[torch.Tensor]:
    return [tensor for gate in gates.layers for tensor in gate.state_dict().values()]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_gates_learn_to_foresee_kvzip_on_documents_that_they_have_not_seen(tmp_path, architecture) -> None:
    model = tiny_model(architecture)
    recipe = replace(RECIPE, tokens=1500, steps=150, dim=16)
    gates, found = training(tmp_path, recipe, model).run()
    assert gates.layer_indices == tuple(layer.layer_idx for layer in full_attention_layers(model))
    untrained = training(tmp_path / "other", replace(recipe, steps=1), model)
    before = untrained.run()[1]
    assert found.summary["loss"] < before.summary["loss"] - 0.05
    assert found.summary["rank_correlation"] > before.summary["rank_correlation"] + 0.1
    assert found.overlap[0.3] > before.overlap[0.3] + 0.05
    assert found.tokens == 120


def test_the_gates_own_file_says_where_they_come_from(tmp_path) -> None:
    gates, found = training(tmp_path / "work").run()
    gates.save(tmp_path / "gate.safetensors")
    said = Gates.load(tmp_path / "gate.safetensors").provenance
    assert said["model_type"] == "llama" and said["data"] == "random ids" and said["data_tokens"] == "900"
    assert json.loads(said["recipe"])["seed"] == 0 and len(said["data_sha256"]) == 64
    assert json.loads(said["held_out"]) == {**found.summary, "tokens": 120}
    dtypes = {name: tensor.dtype for name, tensor in gates.layers[0].state_dict().items()}
    assert dtypes["q_proj.weight"] == dtypes["b"] == torch.bfloat16 and dtypes["k_base"] == torch.float32


@pytest.mark.parametrize("weighting", [None, "surprisal"])
def test_features_are_what_entered_attention_and_kvzips_scores(weighting) -> None:
    model, ids = tiny_model(), documents(1)[0]
    hidden, scores = features_of(model, TOKENIZER, ids, weighting)
    press = KVzipPress(weighting=weighting)
    done = prefill(model, TOKENIZER, ids, observers=[press])
    for layer_idx, expected in press.score(done).layers.items():
        assert torch.equal(scores[layer_idx], expected[0, :, 1:])
    entered = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
    assert torch.equal(hidden[0], entered)


def test_the_training_adds_the_bias_once_as_the_gate_does() -> None:
    """The authors' trainer adds it twice and their gate once: what was learned is then not what is used."""
    parameters = initial((64, 2, 2, 4, 3), 2, seed=1)
    parameters["b"] += torch.randn(2, 2, 1, 2) * 3
    x, wanted = torch.randn(2, 50, 64).bfloat16().float(), torch.rand(2, 50, 2)
    optimiser = Optimiser(RECIPE, parameters, torch.device("cpu"))
    losses, predicted, _ = optimiser._losses(list(x), list(wanted), torch.arange(50))
    gates = Gates.of_state_dicts([{name: stack[i] for name, stack in parameters.items()} for i in range(2)])
    expected = torch.stack([gates.scores(x[i], i) for i in range(2)])
    torch.testing.assert_close(predicted, expected)
    torch.testing.assert_close(losses, soft_bce(expected, wanted.transpose(1, 2)))


def test_sinks_begin_apart_and_stay_apart() -> None:
    def spread(parameters) -> float:
        x, wanted = torch.randn(1, 300, 64), torch.rand(1, 300, 2)
        optimiser = Optimiser(RECIPE, parameters, torch.device("cpu"))
        optimiser.run(list(x), list(wanted), range(30))
        return float(optimiser.parameters["k_base"].detach().std(dim=3).min())

    ours = initial((64, 2, 2, 4, 3), 1, seed=1)
    assert spread(ours) > 0.01
    assert spread({**ours, "k_base": torch.zeros_like(ours["k_base"])}) == 0, "all zero they never part"


def test_the_loss_is_the_soft_cross_entropy() -> None:
    predicted, wanted = torch.rand(3, 2, 40, dtype=torch.float64), torch.rand(3, 2, 40, dtype=torch.float64)
    by_hand = -(wanted * predicted.log() + (1 - wanted) * (1 - predicted).log())
    torch.testing.assert_close(soft_bce(predicted, wanted), by_hand.mean(dim=2).sum(dim=1))
    assert agreement(torch.tensor([[[0.04, 0.06]]]), torch.tensor([[[0.9, 0.9]]])).tolist() == [0.5]


def test_what_does_not_fit_on_the_disk_is_trained_in_rounds(tmp_path) -> None:
    sizes, small = [], replace(RECIPE, disk_bytes=3 * (64 * 2 + 2 * 4) * 300)

    def watch(*_: object) -> None:
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.bin")))

    runner = training(tmp_path, small, progress=watch)
    assert len(runner.rounds) == 4
    assert [piece for one in runner.rounds for piece in one] == list(runner.train)
    gates, _ = runner.run()
    assert 0 < max(sizes) <= small.disk_bytes
    assert all(bool(tensor.isfinite().all()) for tensor in states(gates))
    with pytest.raises(InvalidArgumentError, match="expected disk_bytes for two pieces"):
        training(tmp_path / "tiny", replace(RECIPE, disk_bytes=1000))


def test_rounds_go_on_where_the_one_before_ended(tmp_path) -> None:
    """One loop over the steps, each round's over its own features, momentum and all."""
    model, small = tiny_model(), replace(RECIPE, disk_bytes=3 * (64 * 2 + 2 * 4) * 540, steps=12)
    runner = training(tmp_path, small, model)
    gates, _ = runner.run()
    optimiser = Optimiser(small, initial(runner.shape, 3, small.seed), torch.device("cpu"))
    for steps, some in zip((range(6), range(6, 12)), runner.rounds, strict=True):
        read = [features_of(model, TOKENIZER, piece.ids) for piece in some]
        hidden = [torch.cat([one[i] for one, _ in read]).bfloat16() for i in range(3)]
        scores = [torch.cat([one[i].T for _, one in read]) for i in range(3)]
        optimiser.run(hidden, scores, steps)
    for i, gate in enumerate(gates.layers):
        for name, tensor in gate.state_dict().items():
            assert torch.equal(tensor, optimiser.parameters[name][i].detach().to(tensor.dtype)), name


def test_a_seed_gives_the_same_gates_and_another_seed_others(tmp_path) -> None:
    one, two, other = (
        states(training(tmp_path / name, replace(RECIPE, seed=seed)).run()[0])
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_fastkvzip_training import RECIPE, replace, training

def run(folder, kill_at):
    calls = 0
    def progress(*_):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    small = replace(RECIPE, disk_bytes=3 * (64 * 2 + 2 * 4) * 540)
    gates, _ = training(folder / "work", small, progress=progress).run()
    gates.save(folder / "gate.safetensors")

for argument in sys.argv[1:]:  # each in a process of its own, which has not to import all of it again
    folder, kill_at = argument.split(",")
    child = os.fork()
    if child == 0:
        run(Path(folder), int(kill_at))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gives_the_same_file(tmp_path, repo_root) -> None:
    """Killed while it reads, between rounds, and while it optimises; the file is bit for bit that of one run."""
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(tests=str(repo_root / "tests" / "presses")))
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    runs = [f"{folders[0]},0", *(f"{folders[1]},{calls}" for calls in (3, 6, 5, 6, 0))]
    command, environment = [sys.executable, str(script), *runs], {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert [int(status) for status in done.stdout.split()] == [0, *[-signal.SIGKILL] * 4, 0]
    files = [(folder / "gate.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]


def test_rows_that_a_killed_run_left_are_written_over(tmp_path) -> None:
    shards = Shards(tmp_path / "round", (0, 2), 4, 2)
    first, second = ({i: torch.full((3, 4), value) for i in (0, 2)} for value in (1.0, 2.0))
    scores = {i: torch.rand(2, 3) for i in (0, 2)}
    shards.append(first, scores)
    with (tmp_path / "round" / "hidden-000.bin").open("ab") as file:
        file.write(b"half of a piece")
    shards.append(second, scores)
    hidden, wanted = shards.read()
    assert shards.done == (2, 6) and len(hidden) == 2
    assert hidden[0].tolist() == [[1.0] * 4] * 3 + [[2.0] * 4] * 3
    assert torch.equal(wanted[1], torch.cat([scores[2].T] * 2))


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (2, 1)])
def test_shards_give_back_what_they_were_given(tmp_path, shape) -> None:
    """Also where a dimension is one: such a tensor's strides may be anything."""
    scores, hidden = torch.rand(shape), torch.randn(shape[1], 4).bfloat16()
    shards = Shards(tmp_path, (0,), 4, shape[0])
    shards.append({0: hidden}, {0: scores})
    read_hidden, read_scores = shards.read()
    assert torch.equal(read_scores[0], scores.T) and torch.equal(read_hidden[0], hidden)


def test_a_folder_of_another_training_is_refused(tmp_path) -> None:
    training(tmp_path)
    training(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"other \['recipe'\]"):
        training(tmp_path, replace(RECIPE, seed=3))


def test_whole_documents_are_held_out() -> None:
    some = list(pieces([[7] * 250, *([[i] * 60 for i in range(30)])], 100))
    assert [(piece.document, len(piece.ids)) for piece in some[:3]] == [(0, 100), (0, 100), (0, 50)]
    train, held_out = split(some, 850, 100)
    assert sum(len(piece.ids) for piece in train) == 850 and sum(len(piece.ids) for piece in held_out) == 100
    assert {piece.document for piece in train} & {piece.document for piece in held_out} == set()
    with pytest.raises(InvalidArgumentError, match=r"expected at least 8 documents, .*, got 1: a text file is one"):
        split([Piece(0, [1] * 100)] * 20, 800, 100)


def test_texts_come_from_files_and_jsonl(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third", "id": 3}\n')
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    assert [text for text in read_texts(sources) if text] == ["first", "second", "third"]
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"words": 1}\n')
    with pytest.raises(InvalidArgumentError, match=r'expected {"text": "..."} in line 2'):
        list(read_texts([str(tmp_path / "c.jsonl")]))
    with pytest.raises(InvalidArgumentError, match="expected a JSONL file"):
        list(read_texts([str(tmp_path / "none.jsonl")]))
    with pytest.raises(InvalidArgumentError, match=r"expected a text file, a \.jsonl file or a hub data set"):
        list(read_texts([str(tmp_path / "none.txt")]))


def test_a_full_disk_says_how_much_is_needed_and_gets_its_room_back(tmp_path, monkeypatch) -> None:
    """With room again the same command goes on, and gives what it would have given."""
    append, left = Shards.append, [3]

    def until_full(self, *piece) -> None:
        left[0] -= 1
        if left[0] < 0:
            (self.folder / "hidden-000.bin").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *piece)

    monkeypatch.setattr(Shards, "append", until_full)
    begun = training(tmp_path / "full")
    with pytest.raises(DiskFullError, match=r"expected 0\.00 GB of room in .*full.* full disk.*--disk-gb"):
        begun.run()
    assert not list((tmp_path / "full").rglob("*.bin"))
    monkeypatch.setattr(Shards, "append", append)
    again, _ = training(tmp_path / "full").run()
    other, _ = training(tmp_path / "other").run()
    assert all(torch.equal(a, b) for a, b in zip(states(again), states(other), strict=True))


def test_another_error_of_the_disk_is_itself(tmp_path, monkeypatch) -> None:
    def denied(self, *piece) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(Shards, "append", denied)
    with pytest.raises(PermissionError, match="denied"):
        training(tmp_path).run()


def test_a_data_set_that_cannot_be_reached_leaves_nothing(invoke, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataNotFoundError, match=r"expected the hub data set some/texts .* cached or reachable"):
        invoke("--model", "llama", "--data", "some/texts", "--out", tmp_path / "gates.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_hub_data_sets_are_streamed_by_name(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*arguments: object, **options: object) -> list[dict[str, str]]:
        asked.append((*arguments, options))
        return [{"text": f"text {i} " * 20} for i in range(30)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (train, held_out), said = texts_of(["HuggingFaceFW/fineweb-edu"], TOKENIZER, replace(RECIPE, tokens=2000))
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT", {"split": "train", "streaming": True})]
    assert said == "HuggingFaceFW/fineweb-edu" and train and held_out


def test_a_model_writes_its_own_texts_the_same_for_a_seed(tmp_path) -> None:
    model = tiny_model()
    sampling = SelfGeneration(seed=3, batch_size=4, new_tokens=24, lengths=(40, 100))

    def first(folder: str, n: int = 12, sampling: SelfGeneration = sampling) -> list[list[int]]:
        return list(islice(sampling.documents(model, TOKENIZER, tmp_path / folder), n))

    texts = first("a")
    assert all(40 <= len(ids) <= 100 for ids in texts) and len({tuple(ids) for ids in texts}) == len(texts)
    (tmp_path / "a" / "batch-00001.json").unlink()
    assert first("a") == texts == first("b")
    assert first("c", sampling=replace(sampling, seed=4)) != texts


def test_openings_have_their_slots_filled() -> None:
    texts = [opening(random.Random(i)) for i in range(300)]
    assert len(set(texts)) > 290
    assert [text for text in texts if "{name" in text or "{{" in text or "{place" in text] == []


@pytest.mark.parametrize("weighting", [None, "surprisal"])
def test_evaluation_of_the_teacher_itself_is_perfect(weighting) -> None:
    found = evaluate(KVzipPress(weighting=weighting), tiny_model(), TOKENIZER, documents(2), weighting=weighting)
    assert found.overlap == {0.3: 1.0, 0.5: 1.0} and found.summary["rank_correlation"] == pytest.approx(1)
    assert found.summary["agreement"] == 1.0


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"steps": 0}, {"lr": 0.0}, {"disk_bytes": 0}, {"dim": 0}, {"weighting": "1"}]
)
def test_a_bad_recipe_is_refused(options) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        Recipe(**options)


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr("kvzip_press.loading.by_name.load_model", lambda name, **_: (tiny_model(name), TOKENIZER))

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["gates", "train", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


SMALL = ("--model", "llama", "--tokens", 1000, "--held-out-tokens", 100, "--steps", 20, "--dim", 4, "--device", "cpu")


def test_the_command_trains_from_texts(invoke, tmp_path) -> None:
    path, out = tmp_path / "texts.jsonl", tmp_path / "gate.safetensors"
    path.write_text("".join(json.dumps({"text": f"document {i} " * 8}) + "\n" for i in range(30)))
    said = invoke(*SMALL, "--data", path, "--out", out)
    assert "rank_correlation" in said and "3 layers" in said
    assert sorted(tmp_path.iterdir()) == [out, path]
    assert Gates.load(out).provenance["data"] == "texts.jsonl"
    model = tiny_model()
    done = prefill(
        model, TOKENIZER, "some text to compress, long enough", observers=[press := FastKVzipPress(0.5, gate=out)]
    )
    assert done.evict(press.score(done)).kept_fraction < 0.6


def test_the_command_trains_from_what_the_model_writes(invoke, tmp_path) -> None:
    out = tmp_path / "gate.safetensors"
    invoke(*SMALL, "--self-generated", "--batch-size", 4, "--out", out, "--work", tmp_path / "w", "--keep-work")
    assert Gates.load(out).provenance["data"].startswith("sampled from the model")
    assert len(list((tmp_path / "w").glob("kvzip-press-gates-*/sampled/batch-00000.json"))) == 1


def test_the_command_wants_one_source(invoke, tmp_path) -> None:
    for arguments in ((), ("--self-generated", "--data", "x.txt")):
        with pytest.raises(InvalidArgumentError, match="expected one of --data and --self-generated"):
            invoke(*SMALL, *arguments, "--out", tmp_path / "gate.safetensors")
