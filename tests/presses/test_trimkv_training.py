"""Gates of TrimKV learn which pairs a full cache still looks at, and are read back as released ones."""

from __future__ import annotations

import json
from typing import Any

import decode_oracles as oracles
import pytest
import torch
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding import TrimKVGates, TrimKVPress
from kvzip_press.presses.decoding.trimkv.attended import lessons
from kvzip_press.presses.decoding.trimkv.foreseen import cross_entropy
from kvzip_press.presses.decoding.trimkv.gates import check_is_for_gates
from kvzip_press.presses.decoding.trimkv.recipe import OBJECTIVES, TrimKVRecipe
from kvzip_press.presses.decoding.trimkv.training import train
from kvzip_press.testing import ByteTokenizer, tiny_model
from kvzip_press.training.folder import WorkFolder

pytestmark = pytest.mark.usefixtures("one_thread")
MEMORY = 12


def rows_of(n: int, length: int = 48) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [(3 + torch.randperm(120, generator=generator)[:length]).tolist() for _ in range(n)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=1)


def test_what_was_worth_keeping_is_what_later_queries_look_at_most(model, monkeypatch) -> None:
    """Pair by pair in fp64, also if the queries are looked at in parts."""
    ids, moments = rows_of(1)[0], [13, 30, 47]
    text = oracles.Text.read_by(model, torch.tensor([ids]))
    monkeypatch.setattr("kvzip_press.presses.decoding.trimkv.attended._QUERIES", 7)
    lesson = lessons(model, ids, moments, MEMORY)[0]
    for head in range(2):
        attention = torch.stack([text.attention(head, query, list(range(48))).amax(dim=0) for query in range(48)])
        for number, moment in enumerate(moments):
            most = attention[moment:].amax(dim=0)[:moment]
            expected = set(most.topk(MEMORY).indices.tolist())
            assert set(lesson.kept[head, number].nonzero()[:, 0].tolist()) == expected


def test_the_loss_is_the_cross_entropy_of_what_stays(model) -> None:
    lesson = lessons(model, rows_of(1)[0], [20, 40], MEMORY)[0]
    log_beta = -torch.rand(2, 48, generator=torch.Generator().manual_seed(0)) / 20
    nats = []
    for head in range(2):
        for number, moment in enumerate((20, 40)):
            for i in range(moment):
                stays = float(log_beta[head, i].double().exp()) ** (moment + 1 - i)
                is_kept = bool(lesson.kept[head, number, i])
                nats.append(-torch.tensor(stays if is_kept else 1 - stays, dtype=torch.float64).log())
    torch.testing.assert_close(cross_entropy(log_beta, lesson).double(), torch.stack(nats).mean(), atol=1e-5, rtol=1e-5)


def test_gates_learn_on_other_texts_than_those_they_are_measured_on(model) -> None:
    """More of what is worth keeping is found than among the newest pairs, and more than at the beginning; the same
    again with the same seed, and the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows, recipe = rows_of(40), TrimKVRecipe(memory_size=MEMORY, width=32, steps=240, lr=0.01)
    gates, found = train(model, recipe, rows[:32], rows[32:])
    begun = train(model, TrimKVRecipe(memory_size=MEMORY, width=32, steps=1, lr=1e-9), rows[:32], rows[32:])[1]
    assert found.gates > found.newest + 0.05 and found.gates > begun.gates + 0.05 and found.loss < begun.loss - 0.02
    again = train(model, recipe, rows[:32], rows[32:])[0]
    assert all(torch.equal(x, again.layers[0][name]) for name, x in gates.layers[0].items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_folder_as_released_is_written_and_read_back(tmp_path) -> None:
    """By the command, for a hybrid model too: layers without full attention have no gate."""
    model = tiny_model("gemma3_text", vocab_size=256)
    rows = rows_of(10)
    gates, _ = train(model, TrimKVRecipe(memory_size=MEMORY, width=8, steps=8), rows[:8], rows[8:])
    gates.save(tmp_path / "gates", base_model="some/model", memory_size=MEMORY)
    read = TrimKVGates.load(tmp_path / "gates")
    assert read.kind == "rg" and set(read.layers) == set(gates.layers) == {1, 3}
    assert all(torch.equal(x, read.layers[i][name]) for i in (1, 3) for name, x in gates.layers[i].items())
    said = json.loads((tmp_path / "gates" / "config.json").read_text(encoding="utf-8"))
    assert said["retention_gate"] == "rg" and said["retention_gate_intermediate_size"] == 8
    assert said["base_model"] == "some/model" and said["memory_size"] == MEMORY
    TrimKVPress(budget=16, buffer=4, gate=tmp_path / "gates").requires(model)


def equal(gates: TrimKVGates, others: TrimKVGates) -> bool:
    pairs = ((x, others.layers[i][name]) for i, gate in gates.layers.items() for name, x in gate.items())
    return all(torch.equal(x, other) for x, other in pairs)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_training_goes_on_bit_by_bit(model, tmp_path, monkeypatch, objective) -> None:
    """From what was kept last; and anew, if that is damaged or there is none yet."""
    monkeypatch.setattr("kvzip_press.presses.decoding.trimkv.training._SECONDS_A_STATE", 0.0)
    rows, recipe = rows_of(6), TrimKVRecipe(memory_size=MEMORY, width=8, steps=60, lr=0.01, objective=objective)
    whole, found = train(model, recipe, rows[:4], rows[4:])
    seen: list[int] = []

    def until(last: int) -> Any:
        def progress(stage: str, done: int, *_: Any) -> None:
            seen.append(done)
            if stage == "training" and done >= last:
                raise KeyboardInterrupt

        return progress

    folder = WorkFolder(tmp_path / "work")
    for last in (21, 41):
        with pytest.raises(KeyboardInterrupt):
            train(model, recipe, rows[:4], rows[4:], until(last), folder=folder)
    seen.clear()
    gates, again = train(model, recipe, rows[:4], rows[4:], until(1000), folder=folder)
    assert min(done for done in seen if done > 2) >= 41 and equal(gates, whole) and again == found
    (tmp_path / "work" / "state-000.safetensors").write_bytes(b"damaged")
    gates, again = train(model, recipe, rows[:4], rows[4:], folder=folder)
    assert equal(gates, whole) and again == found
    with pytest.raises(InvalidArgumentError, match="recipe"):
        train(model, TrimKVRecipe(**{**vars(recipe), "seed": 1}), rows[:4], rows[4:], folder=folder)
    with folder.held():
        folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_distilled_gates_hold_fewer_pairs_at_less_loss(model) -> None:
    """On texts that they were not trained on; and the attention objective's share is told beside."""
    rows = rows_of(24)
    recipe = TrimKVRecipe(memory_size=4, width=16, steps=120, lr=0.02, objective="distillation")
    _, found = train(model, recipe, rows[:16], rows[16:])
    _, begun = train(model, TrimKVRecipe(**{**vars(recipe), "steps": 1, "lr": 1e-9}), rows[:16], rows[16:])
    assert found.loss < 0.8 * begun.loss and 0 < found.gates < 1 and found.newest == begun.newest


def test_values_out_of_range_are_refused(model) -> None:
    with pytest.raises(InvalidArgumentError, match=r"objective to be one of .*, got 'distilation'.*'distillation'"):
        TrimKVRecipe(objective="distilation")
    with pytest.raises(InvalidArgumentError, match="capacity_weight"):
        TrimKVRecipe(capacity_weight=float("nan"))
    with pytest.raises(InvalidArgumentError, match="expected memory_size >= 1, got 0"):
        TrimKVRecipe(memory_size=0)
    with pytest.raises(InvalidArgumentError, match="more than memory_size=48 tokens"):
        train(model, TrimKVRecipe(memory_size=48, steps=1), rows_of(2), rows_of(2))


def test_the_command_trains_from_texts(tmp_path, monkeypatch) -> None:
    """The same command as for Fast KVzip's gates; what it writes is a press's gate."""
    loaded = tiny_model(num_layers=2)
    monkeypatch.setattr("kvzip_press.loading.by_name.load_model", lambda name, **_: (loaded, ByteTokenizer()))
    texts = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": "".join(chr(97 + (7 * i + j * j) % 26) for j in range(60))}) for i in range(20)]
    texts.write_text("\n".join(lines), encoding="utf-8")
    words = {
        "--model": "tiny",
        "--method": "trimkv",
        "--data": texts,
        "--tokens": 600,
        "--held-out-tokens": 100,
        "--steps": 12,
        "--dim": 8,
        "--memory-size": MEMORY,
        "--out": tmp_path / "gates",
    }
    given = [str(word) for pair in words.items() for word in pair]
    done = CliRunner().invoke(app, ["gates", "train", *given], catch_exceptions=False)
    assert done.exit_code == 0 and "of the pairs worth keeping in held-out texts" in done.output
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["gates", "texts.jsonl"]
    TrimKVPress(budget=16, buffer=4, gate=tmp_path / "gates").requires(loaded)


def test_the_command_refuses_what_cannot_be_trained(tmp_path) -> None:
    (tmp_path / "file").write_text("a text", encoding="utf-8")
    given = ["gates", "train", "--model", "smollm2", "--data", str(tmp_path / "file")]
    for more, reason in (
        (["--out", str(tmp_path / "new"), "--method", "kvzap"], "--method"),
        (["--out", str(tmp_path / "file"), "--method", "trimkv"], "is no folder"),
        (
            ["--out", str(tmp_path / "new"), "--method", "trimkv", "--objective", "paper"],
            "expected objective to be",
        ),
        (["--out", str(tmp_path / "new"), "--method", "trimkv", "--weighting", "surprisal"], "of --method fastkvzip"),
        (["--out", str(tmp_path / "new"), "--objective", "distillation"], "of --method trimkv"),
        (["--out", str(tmp_path / "new"), "--memory-size", "64"], "--memory-size, which are of --method trimkv"),
        (["--out", str(tmp_path / "new"), "--lr", "0"], "expected --lr above 0, got 0.0"),
        (["--out", str(tmp_path / "new"), "--disk-gb", "nan"], "expected --disk-gb above 0, got nan"),
        (["--out", str(tmp_path / "new"), "--work", str(tmp_path / "new")], "expected --work to be another place than"),
    ):
        done = CliRunner().invoke(app, given + more)
        assert done.exit_code and reason in str(done.exception), more
    for option, least in (("--dim", 1), ("--memory-size", 1), ("--steps", 1), ("--seed", 0)):
        out = ["--out", str(tmp_path / "new"), "--method", "trimkv"]
        done = CliRunner().invoke(app, [*given, *out, option, str(least - 1)], env={"TERMINAL_WIDTH": "200"})
        assert done.exit_code == 2 and f"Invalid value for '{option}'" in done.output, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        CliRunner().invoke(
            app, [*given, "--out", str(tmp_path / "file" / "new"), "--method", "trimkv"], catch_exceptions=False
        )


def test_a_config_of_something_else_is_not_replaced(tmp_path) -> None:
    """The folder of a model has one of the same name; gates of before are replaced."""
    for content in ('{"model_type": "llama"}', "no JSON"):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        words = ["--model", "smollm2", "--data", "x.txt", "--method", "trimkv", "--out", str(tmp_path)]
        with pytest.raises(InvalidArgumentError, match=r"config\.json is of something else"):
            CliRunner().invoke(app, ["gates", "train", *words], catch_exceptions=False)
        assert (tmp_path / "config.json").read_text(encoding="utf-8") == content
    (tmp_path / "config.json").write_text('{"retention_gate": "rg"}', encoding="utf-8")
    check_is_for_gates(tmp_path)
    check_is_for_gates(tmp_path / "new")
