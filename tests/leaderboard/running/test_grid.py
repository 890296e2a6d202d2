"""Grids: those of the package load, and what is misspelt or out of range is named with its path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.launch import launch
from kvzip_press.leaderboard.running.availability import available, check_files
from kvzip_press.leaderboard.running.grid import grid_names, load_grid
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, count_rows, plan
from kvzip_press.leaderboard.samples.task import approximate_tokens
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.registry import press_names
from kvzip_press.testing import tiny_model

GRID = {
    "description": "Two presses.",
    "model": "smollm2",
    "seed": 4,
    "compression_ratios": [0.5, 0.9],
    "tasks": [{"task": "hidden_facts", "contexts": 2, "tokens": 300, "options": {"n_keys": 3}}],
    "presses": [
        {"press": "none", "label": "full cache", "compression_ratios": [0.0]},
        {"press": "kvzip", "options": {"chunk_size": 512}},
    ],
}


def grid_file(folder: Path, **changes: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}), encoding="utf-8")
    return str(path)


def test_a_file_is_the_run_that_it_says(tmp_path: Path) -> None:
    grid = load_grid(grid_file(tmp_path))
    assert (grid.name, grid.description) == ("mine", "Two presses.")
    assert grid.run == Run(
        "smollm2",
        (TaskSpec(get_task("hidden_facts", n_keys=3), 2, 300),),
        (PressSpec("none", "full cache", {}, (0.0,)), PressSpec("kvzip", "kvzip", {"chunk_size": 512})),
        (0.5, 0.9),
        seed=4,
    )
    named = load_grid(grid_file(tmp_path, tasks=[{**GRID["tasks"][0], "name": "facts"}])).run.tasks[0].task
    assert (named.name, replace(named, name="hidden_facts")) == ("facts", get_task("hidden_facts", n_keys=3))
    options = {"dtype": "bf16", "query_aware": True, "truncate": True, "batch_size": 3}
    other = load_grid(grid_file(tmp_path, **options)).run
    assert {name: getattr(other, name) for name in options} == options


def test_storages_of_a_press_are_presses_of_their_own(tmp_path: Path) -> None:
    """Their names are in the labels, but for the model's own dtype; names are checked, and are not said twice."""
    press = {"press": "kvzip", "label": "KVzip", "storages": ["model", "int8"], "options": {"chunk_size": 512}}
    found = load_grid(grid_file(tmp_path, presses=[GRID["presses"][0], press])).run.presses[1:]
    assert [(spec.label, spec.options) for spec in found] == [
        ("KVzip", {"chunk_size": 512, "storage": "model"}),
        ("KVzip, int8", {"chunk_size": 512, "storage": "int8"}),
    ]
    for storages, message in (
        (["int9"], r"presses\[0\]\.storages: expected a storage out of model, int8"),
        ([], r"presses\[0\]\.storages: expected at least one"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            load_grid(grid_file(tmp_path, presses=[{**press, "storages": storages}]))
    with pytest.raises(InvalidArgumentError, match="no storage among the options"):
        load_grid(grid_file(tmp_path, presses=[{**press, "options": {"storage": "int8"}}]))


def test_budgets_of_a_press_are_presses_of_their_own(tmp_path: Path) -> None:
    """At no ratio, and with each storage; a press that needs a budget is not asked for one besides."""
    press = {"press": "rkv", "label": "R-KV", "budgets": [64, 128], "options": {"buffer": 16}}
    found = load_grid(grid_file(tmp_path, presses=[GRID["presses"][0], press])).run.presses[1:]
    assert [(spec.label, spec.options, spec.compression_ratios) for spec in found] == [
        ("R-KV, 64 tokens", {"buffer": 16, "budget": 64}, (0.0,)),
        ("R-KV, 128 tokens", {"buffer": 16, "budget": 128}, (0.0,)),
    ]
    both = load_grid(grid_file(tmp_path, presses=[{**press, "storages": ["model", "int8"]}])).run.presses
    assert [spec.label for spec in both][2:] == ["R-KV, int8, 64 tokens", "R-KV, int8, 128 tokens"]
    for budgets, message in (
        ([], r"presses\[0\]\.budgets: expected numbers of tokens, at least one, got \[\]"),
        (["64"], r"presses\[0\]\.budgets: expected numbers of tokens"),
        ([8], r"presses\[0\]\.budgets: expected a buffer of 1 or more tokens and a budget of more than"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            load_grid(grid_file(tmp_path, presses=[{**press, "budgets": budgets}]))


def test_a_file_that_a_command_makes_is_an_argument_of_the_press(tmp_path: Path) -> None:
    """It may be absent when the grid is read; its contents, not its age, are a part of the run's configuration."""
    file = tmp_path / "gates"
    made = {"path": str(file), "command": "kvzip-press gates train --out gates"}
    press = {"press": "trimkv", "label": "TrimKV", "budgets": [64], "options": {"buffer": 16}, "files": {"gate": made}}
    presses = [GRID["presses"][0], press]
    before = load_grid(grid_file(tmp_path, presses=presses)).run
    for check in (lambda: check_files(before), before.presses[1].press):
        with pytest.raises(InvalidArgumentError, match="made beforehand by `kvzip-press gates train --out gates`"):
            check()
    assert "files" not in before.config["presses"][0]
    file.mkdir()
    with pytest.raises(InvalidArgumentError, match=r"expected files in .*`kvzip-press gates .*a folder without any"):
        check_files(load_grid(grid_file(tmp_path, presses=presses)).run)
    (file / "part").write_text("one", encoding="utf-8")
    first, again = (load_grid(grid_file(tmp_path, presses=presses)).run for _ in range(2))
    check_files(first)
    assert first.run_id == again.run_id != before.run_id
    (file / "part").write_text("two", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="changed or made since"):
        check_files(first)
    assert load_grid(grid_file(tmp_path, presses=presses)).run.run_id != first.run_id
    for files, message in (
        ({"gate": {"path": "x"}}, r"presses\[1\]\.files\.gate\.command: expected a text, got nothing"),
        ({"gate": {**made, "by": "x"}}, r"presses\[1\]\.files\.gate\.by: expected a key out of path, command"),
        ({"buffer": made}, r"presses\[1\]\.files\.buffer: expected an option that is not given elsewhere"),
        ({"a b": made}, r"presses\[1\]\.files: expected the names of options"),
        (["gate"], r"presses\[1\]\.files: expected a mapping"),
        ({"gat": made}, r"expected options of 'trimkv' among .*, got 'gat'; did you mean 'gate'"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            load_grid(grid_file(tmp_path, presses=[GRID["presses"][0], {**press, "files": files}]))


def test_a_press_without_its_file_is_left_out_or_refused(tmp_path: Path) -> None:
    """Refused before a model is loaded."""
    made = {"path": str(tmp_path / "gates"), "command": "make it"}
    press = {"press": "trimkv", "label": "TrimKV", "budgets": [64], "options": {"buffer": 16}, "files": {"gate": made}}
    run = load_grid(grid_file(tmp_path, presses=[GRID["presses"][0], press], model="no such model")).run
    with pytest.raises(InvalidArgumentError, match=r"TrimKV, 64 tokens: .*`make it`; or leave it out"):
        launch(run, tmp_path / "run")
    said: list[str] = []
    assert [spec.name for spec in available(run.presses, tiny_model(), said.append)] == ["none"]
    assert len(said) == 1 and "left out: TrimKV, 64 tokens" in said[0] and "`make it`" in said[0]


def test_a_task_may_be_asked_and_followed_in_one_grid(tmp_path: Path) -> None:
    task = {"task": "repeated_paragraph", "contexts": 2, "tokens": 300}
    specs = load_grid(grid_file(tmp_path, tasks=[task, {**task, "measure": "agreement"}])).run.tasks
    assert [(spec.task.name, spec.measure) for spec in specs] == [
        ("repeated_paragraph", "answer"),
        ("repeated_paragraph, agreement", "agreement"),
    ]
    with pytest.raises(InvalidArgumentError, match=r"tasks\[0\]\.measure: expected a measure out of agreement, answer"):
        load_grid(grid_file(tmp_path, tasks=[{**task, "measure": "kl"}]))


def test_a_misspelt_key_or_option_of_a_task_is_named_with_what_there_is(tmp_path: Path) -> None:
    (task,) = GRID["tasks"]
    for wrong, message in (
        (
            {"task": "hidden_facts", "contxts": 2},
            r"tasks\[0\]\.contexts: expected an integer, got nothing; is 'contxts'",
        ),
        ({**task, "contexts": "two"}, r"tasks\[0\]\.contexts: expected an integer, got 'two'"),
        ({**task, "tokens": 3.5}, r"tasks\[0\]\.tokens: expected an integer, got 3\.5"),
        ({**task, "token": 300}, r"tasks\[0\]\.token: expected a key out of .*; did you mean 'tokens'"),
        (
            {**task, "options": {"n_key": 3}},
            r"tasks\[0\]\.options: .* max_new_tokens, n_digits, n_keys, got 'n_key'; did you mean 'n_keys'",
        ),
    ):
        with pytest.raises(InvalidArgumentError, match=f"mine.yaml: {message}"):
            load_grid(grid_file(tmp_path, tasks=[wrong]))


@pytest.mark.parametrize("name", grid_names())
def test_every_grid_of_the_package_loads_and_has_its_baselines(name: str) -> None:
    grid = load_grid(name)
    assert grid.description.endswith(".")
    assert grid.run.presses[0] == PressSpec("none", "full cache", compression_ratios=(0.0,))
    assert {spec.name for spec in grid.run.presses} <= set(press_names())


def test_the_grids_of_the_evidence_differ_in_model_and_tasks_only() -> None:
    """So that ranks of presses on all models are of the same cells; each has a seed of its own among the grids."""
    large, gemma, small = (load_grid(f"evidence{model}").run for model in ("", "-gemma3", "-smollm2"))
    for run in (large, gemma):
        given = [replace(press, files={}) for press in run.presses]  # files of one model come with the package
        assert (given, run.compression_ratios, run.seed) == (list(small.presses), small.compression_ratios, small.seed)
    assert {name for press in large.presses for name in press.files} == {"scores", "gate"}
    assert {"model", "int8", "k8v4", "int4"} <= {spec.options.get("storage", "model") for spec in large.presses}
    assert large.compression_ratios[-1] == 1 - 1 / 32
    others = {load_grid(name).run.seed for name in grid_names() if not name.startswith("evidence")}
    assert large.seed not in others


@pytest.mark.parametrize("name", ["smollm2-cpu", "smollm2-full"])
def test_the_grids_of_the_embedded_model_differ_in_size_only(name: str) -> None:
    full, run = load_grid("smollm2-full").run, load_grid(name).run
    assert [spec.task for spec in run.tasks] == [spec.task for spec in full.tasks][: len(run.tasks)]
    assert set(run.compression_ratios) <= set(full.compression_ratios)
    assert [spec.label for spec in run.presses] == [
        spec.label for spec in full.presses if spec.label in {one.label for one in run.presses}
    ]


class Words:
    """Counts tokens as `approximate_tokens` does."""

    def encode(self, text: str, add_special_tokens: bool = False) -> range:
        return range(approximate_tokens(text))


def test_the_full_grid_asks_at_least_200_questions_a_cell_at_the_ratios_of_the_paper() -> None:
    run = load_grid("smollm2-full").run
    assert run.compression_ratios == (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1 - 1 / 16, 1 - 1 / 32)
    works = plan(run, Words())
    cells = sum(len(run.ratios(press)) for press in run.presses)
    assert count_rows(run, works) / cells >= 200
    names = {spec.name for spec in run.presses}
    assert {"random", "kvzip", "kvzip_local", "kvzip_head", "fastkvzip", "duo_attention", "snapkv"} <= names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 3}, "sed: expected a key out of .*; did you mean 'seed'"),
        ({"model": None}, "model: expected a text, got None"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"seed": True}, "seed: expected an integer, got True"),
        ({"query_aware": 1}, "query_aware: expected true or false, got 1"),
        ({"batch_size": 0}, "batch_size .* at least 1, got 0"),
        ({"tasks": []}, "tasks: expected at least one, got none"),
        ({"tasks": ["hidden_facts"]}, r"tasks\[0\]: expected a mapping, got 'hidden_facts'"),
        ({"compression_ratios": [0.5, 1.5]}, r"compression_ratios\[1\]: .* in \[0, 1\), got 1.5"),
        ({"compression_ratios": ["1/2"]}, r"compression_ratios\[0\]: .* got '1/2'"),
        ({"compression_ratios": 0.5}, "compression_ratios: expected a list, got 0.5"),
        ({"tasks": [{"task": "hidden_fact", "contexts": 1}]}, r"tasks\[0\].task: .*; did you mean 'hidden_facts'"),
        ({"tasks": [{"task": "hidden_facts", "contxts": 1}]}, r"tasks\[0\].contexts: .* got nothing; is 'contxts'"),
        (
            {"tasks": [{"task": "hidden_facts", "contexts": 1, "tokens": 9, "options": {"n_kys": 1}}]},
            r"tasks\[0\].options: .*n_kys",
        ),
        ({"presses": [{"press": "kvzp"}]}, r"presses\[0\].press: .*; did you mean 'kvzip'"),
        ({"presses": [{"press": "kvzip", "options": {"chunk": 3}}]}, r"presses\[0\].options: .*chunk"),
        ({"presses": [{"press": "kvzip", "ratios": [0.5]}]}, r"presses\[0\].ratios: expected a key out of"),
        ({"presses": [{"press": "kvzip", "compression_ratios": [2]}]}, r"presses\[0\].compression_ratios\[0\]: .* 2"),
        ({"presses": [{"press": "kvzip"}, {"press": "kvzip"}]}, "different labels, got 'kvzip' twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"mine\.yaml: .*{message}"):
        load_grid(grid_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "expected YAML"), ("", "the file: expected a mapping, got None"), ("- 1", "expected a mapping")],
)
def test_what_is_no_grid_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=message):
        load_grid(str(tmp_path / "mine.yaml"))


def test_an_unknown_grid_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidArgumentError, match="got 'quik'; did you mean 'quick'"):
        load_grid("quik")
