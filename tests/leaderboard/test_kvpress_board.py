"""Names and settings as kvpress's evaluation makes them, in both directions: two decimals, thresholds, repetitions."""

import csv
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

import yaml
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.kvpress_format import data_sets_of, export_rows, import_rows, notes_for_board
from kvzip_press.leaderboard.rows.results import Row, run_id
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec
from kvzip_press.leaderboard.running.run_directory import RunRecord
from kvzip_press.leaderboard.tasks.ruler.task import SUBSETS, RULERTask

MakeRow = Callable[..., Row]


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return found


def lines_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_theirs(folder: Path, *, measured: Sequence[float] = (), **settings: Any) -> None:
    """Results as kvpress's evaluation writes them: two lines of RULER, one right and one half right."""
    config = {"dataset": "ruler", "data_dir": "4096", "model": "Qwen/Qwen3-8B", "press_name": "kvzap", "seed": 42}
    config |= {"press_init_command": "KVzapPress()", "fraction": 1.0, "max_context_length": None} | settings
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = [("407 and 12", "niah_multivalue"), ("only 12", "niah_multivalue")]
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "task", "predicted_answer", "compression_ratio"])
        for number, (said, task) in enumerate(lines):
            ratio = measured[number] if measured else settings.get("compression_ratio", 0.0)
            writer.writerow(["?", "['407' '12']", task, said, ratio])
    metrics = {"niah_multivalue": {"string_match": 75.0}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


# What we write -------------------------------------------------------------------------------------------------------


def test_ratios_of_names_have_two_decimals_and_those_of_settings_all(make_row: MakeRow, tmp_path: Path) -> None:
    rows = [make_row(task="of_ours", compression_ratio=ratio) for ratio in (0.875, 0.9375, 0.25)]
    folders = export_rows(rows, tmp_path)
    assert [folder.name.rsplit("__", 1)[1] for folder in folders] == ["0.88", "0.94", "0.25"]
    assert [config_in(folder)["compression_ratio"] for folder in folders] == [0.875, 0.9375, 0.25]
    assert import_rows(tmp_path) and {row.compression_ratio for row in import_rows(tmp_path)} == {0.875, 0.9375, 0.25}


def test_folders_of_one_name_are_numbered_inside_the_first(make_row: MakeRow, tmp_path: Path) -> None:
    """As kvpress numbers them, so that none is written over another."""
    rows = [make_row(task="of_ours", compression_ratio=ratio) for ratio in (0.96875, 0.97, 0.965)]
    rows.append(make_row(task="of_ours", compression_ratio=0.97, run_id="ba9876543210"))
    folders = export_rows(rows, tmp_path)
    first = folders[0]
    assert [folder.relative_to(tmp_path).as_posix() for folder in folders[1:]] == [
        f"{first.name}/1", "of_ours__tiny__kvzip__0.96", f"{first.name}/2",
    ]  # fmt: skip
    assert config_in(first)["compression_ratio"] == 0.96875 and config_in(folders[1])["compression_ratio"] == 0.97
    assert sorted(import_rows(tmp_path), key=repr) == sorted(rows, key=repr)
    with pytest.raises(InvalidArgumentError, match="which is there: remove it, or take another folder"):
        export_rows(rows[:1], tmp_path)
    assert config_in(first)["compression_ratio"] == 0.96875


def test_a_press_that_goes_by_no_ratio_has_the_one_that_was_measured(make_row: MakeRow, tmp_path: Path) -> None:
    rows = [make_row(task="of_ours", press="full cache", compression_ratio=0.0, kept_fraction=1.0)]
    rows += [
        make_row(task="of_ours", press="kvzip, threshold", compression_ratio=0.0, sample_id=str(i), kept_fraction=kept)
        for i, kept in enumerate((0.3, 0.4))
    ]
    full, threshold = export_rows(rows, tmp_path)
    assert threshold.name.endswith("kvzip_threshold__0.65") and config_in(threshold)["compression_ratio"] == 0.65
    assert full.name.endswith("__0.00") and config_in(full)["compression_ratio"] == 0.0
    assert sorted(import_rows(tmp_path), key=repr) == sorted(rows, key=repr)


def test_a_ratio_of_heads_is_not_called_one_of_pairs(make_row: MakeRow, tmp_path: Path) -> None:
    (row,) = rows = [make_row(task="of_ours", press="duo_attention", compression_ratio=0.5, kept_fraction=0.75)]
    (folder,) = export_rows(rows, tmp_path)
    assert folder.name.endswith("duo_attention__0.50")
    config = config_in(folder)
    assert config["head_compression_ratio"] == 0.5 and "compression_ratio" not in config
    assert lines_in(folder)[0]["compression_ratio"] == "0.25"  # what was measured, which the board takes
    assert import_rows(tmp_path) == [row]


def test_a_run_of_ruler_is_exported_under_the_name_of_the_data_set(make_row: MakeRow, tmp_path: Path) -> None:
    task = RULERTask(name="ruler_4k")
    config = Run("tiny", (TaskSpec(task, 1, 4096),), (PressSpec("kvzip", "kvzip"),), (0.7,)).config
    assert data_sets_of(config) == {"ruler_4k": ("ruler", "4096")}
    (tmp_path / "run").mkdir()
    row = make_row(task="ruler_4k", run_id=run_id(config), press="kvzip", tags={"subset": "niah_single_1"})
    (tmp_path / "run" / "rows.jsonl").write_text(row.to_line() + "\n", encoding="utf-8")
    record = RunRecord(run_id(config), config, {"torch": "2"}, 1)
    (tmp_path / "run" / "run.json").write_text(record.to_line(), encoding="utf-8")
    done = CliRunner().invoke(app, ["leaderboard", "export", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "its models are meta-llama/Llama-3.1-8B-Instruct and Qwen/Qwen3-8B, not tiny" in said
    assert "the mean of RULER's 13 tasks; these lack cwe, fwe, niah_multikey_1 and 9 more" in said
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "ruler__4096__tiny__kvzip__0.70"
    assert json.loads((folder / "metrics.json").read_text()) == {"niah_single_1": {"string_match": 100.0}}
    assert import_rows(tmp_path / "out") == [row]


def test_nothing_is_noted_of_what_the_board_takes(make_row: MakeRow) -> None:
    rows = [make_row(task="ruler", model="Qwen/Qwen3-8B", tags={"subset": subset}) for subset in SUBSETS]
    assert notes_for_board(rows, {"ruler": ("ruler", "4096")}) == []
    (note,) = notes_for_board(rows, {"ruler": ("ruler", "8192")})
    assert note.endswith("its data set is ruler 4096, not ruler")


# What they write -----------------------------------------------------------------------------------------------------


def test_the_ratio_of_a_folder_is_that_of_its_settings(tmp_path: Path) -> None:
    write_theirs(tmp_path / "ruler__4096__Qwen--Qwen3-8B__snapkv__0.88", press_name="snapkv", compression_ratio=0.875)
    assert {row.compression_ratio for row in import_rows(tmp_path)} == {0.875}


@pytest.mark.parametrize("setting", ["threshold", "head_compression_ratio"])
def test_without_a_ratio_in_the_settings_the_lines_say_what_was_removed(setting: str, tmp_path: Path) -> None:
    name = f"ruler__4096__Qwen--Qwen3-8B__kvzap__{-4 if setting == 'threshold' else 0.75:.2f}"
    value = -4.0 if setting == "threshold" else 0.75
    write_theirs(tmp_path / "theirs" / name, measured=(0.5, 0.75), **{setting: value})
    rows = import_rows(tmp_path / "theirs")
    assert [row.kept_fraction for row in rows] == [0.5, 0.25]
    assert {row.compression_ratio for row in rows} == {0.625}
    assert [row.score for row in rows] == [1.0, 0.5]
    (folder,) = export_rows(rows, tmp_path / "ours")
    assert folder.name == name
    config = config_in(folder)
    assert config[setting] == value and "compression_ratio" not in config and config["data_dir"] == "4096"
    assert [line["compression_ratio"] for line in lines_in(folder)] == ["0.5", "0.75"]
    assert import_rows(tmp_path / "ours") == rows


@pytest.mark.parametrize("measured", [("", ""), ("much", "0.5"), ("1.5", "0.5"), ("nan", "0.5")])
def test_a_measured_ratio_that_is_none_is_refused(measured: Any, tmp_path: Path) -> None:
    write_theirs(tmp_path / "a", measured=measured, threshold=-4.0)
    with pytest.raises(InvalidArgumentError, match="expected the column compression_ratio with what each line's"):
        import_rows(tmp_path)


def test_settings_of_an_evaluation_come_back_in_name_and_file(tmp_path: Path) -> None:
    names = {
        "ruler__4096__Qwen--Qwen3-8B__snapkv_query_aware__0.50__query_aware": {
            "press_name": "snapkv_query_aware", "query_aware": True,
        },
        "ruler__4096__Qwen--Qwen3-8B__snapkv__0.50__fraction0.100": {"press_name": "snapkv", "fraction": 0.1},
        "ruler__4096__Qwen--Qwen3-8B__snapkv__0.50__max_context4000": {
            "press_name": "snapkv", "max_context_length": 4000,
        },
        "ruler__4096__Qwen--Qwen3-8B__think__0.50__key_channel_cr0.50": {
            "press_name": "think", "key_channel_compression_ratio": 0.5,
        },
        "ruler__8192__Qwen--Qwen3-8B__snapkv__0.50": {"press_name": "snapkv", "data_dir": 8192},
    }  # fmt: skip
    for name, settings in names.items():
        write_theirs(tmp_path / "theirs" / name, compression_ratio=0.5, **settings)
    rows = import_rows(tmp_path / "theirs")
    assert {row.press for row in rows} == {"snapkv", "think, key_channel_compression_ratio 0.5"}
    assert {row.query_aware for row in rows} == {False, True}
    folders = export_rows(rows, tmp_path / "ours")
    assert sorted(folder.name for folder in folders) == sorted(names)
    for folder in folders:
        theirs = {name: value for name, value in config_in(tmp_path / "theirs" / folder.name).items() if value}
        assert {name: config_in(folder)[name] for name in theirs} == theirs
    assert sorted(import_rows(tmp_path / "ours"), key=repr) == sorted(rows, key=repr)


def test_depths_of_needles_are_other_contexts(tmp_path: Path) -> None:
    for depth in (10, 50):
        name = f"needle_in_haystack__Qwen--Qwen3-8B__knorm__0.50__max_context4096__needle_depth{depth}"
        settings = {"dataset": "needle_in_haystack", "data_dir": None, "press_name": "knorm", "compression_ratio": 0.5}
        write_theirs(tmp_path / "theirs" / name, **settings, max_context_length=4096, needle_depth=depth)
        (tmp_path / "theirs" / name / "metrics.json").write_text("{}")
    rows = import_rows(tmp_path / "theirs", score=lambda prediction, references, subset: 1.0)
    assert [row.tags["depth"] for row in rows] == [0.1, 0.1, 0.5, 0.5]
    (cell,) = summarise(rows)
    assert cell.n_contexts == 4
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {folder.name for folder in export_rows(rows, tmp_path / "ours")} == names


def test_an_evaluation_that_was_repeated_is_a_run_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = tmp_path / "theirs" / "ruler__4096__Qwen--Qwen3-8B__snapkv__0.50"
    for folder in (first, first / "1", first / "2"):
        write_theirs(folder, press_name="snapkv", compression_ratio=0.5)
    with caplog.at_level(logging.WARNING):
        rows = import_rows(tmp_path / "theirs")
    assert len(rows) == 6 and len({row.run_id for row in rows}) == 3
    assert len(caplog.records) == 2 and "its rows are a run of their own" in caplog.text
    folders = export_rows(rows, tmp_path / "ours")
    assert [folder.relative_to(tmp_path / "ours").as_posix() for folder in folders] == [
        first.name, f"{first.name}/1", f"{first.name}/2",
    ]  # fmt: skip
    caplog.clear()
    assert import_rows(tmp_path / "ours") == rows
    assert not caplog.records  # their scores are compared with the predictions by RULER's metric


def test_our_own_rows_in_two_folders_are_refused(make_row: MakeRow, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_rows([make_row()], tmp_path / name)
    with pytest.raises(InvalidArgumentError, match="expected each of our rows once"):
        import_rows(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "in JSON"),
        ("[]", "press_name"),
        ("3", "an object in JSON"),
        ('{"press_name": 3}', "press_name"),
        ('{"press_name": "a", "fraction": "x"}', "a number for the setting fraction"),
    ],
)
def test_broken_settings_in_a_row_are_named(text: str, said: str, make_row: MakeRow, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        export_rows([make_row(provenance={"kvpress_settings": text})], tmp_path)


def test_a_fault_leaves_no_numbered_folder_behind(make_row: MakeRow, tmp_path: Path, monkeypatch: Any) -> None:
    from kvzip_press.leaderboard.kvpress_format import staging

    rows = [make_row(task="of_ours", compression_ratio=ratio) for ratio in (0.96875, 0.97)]

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(staging, "_move_all", fail)
    with pytest.raises(Exception, match="none of them was written"):
        export_rows(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert len(export_rows([*rows, replace(rows[0], press="random")], tmp_path / "out")) == 3
