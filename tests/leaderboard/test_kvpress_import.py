"""Folders of kvpress: what names lead nowhere else, what appears whole or not at all, and which scores are believed."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import FORBIDDEN, FULL, TORN, every_fault

pytest.importorskip("yaml")

import yaml

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.leaderboard.kvpress_format import export_rows, import_rows
from kvzip_press.leaderboard.kvpress_format.staging import new_folders
from kvzip_press.leaderboard.pictures import save_all
from kvzip_press.leaderboard.report import write_report
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.run_files import store

MakeRow = Callable[..., Row]
FAULTS = pytest.mark.parametrize("error", [FULL, FORBIDDEN, TORN], ids=["full", "forbidden", "torn"])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "absolute", "..", "a\0b", "a\nb", ".hidden", "a\\b", "C:x", "\u202etxt"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, make_row: MakeRow, name: str) -> None:
    inside = tmp_path / "a" / "b" / "folders"
    name = str(tmp_path / "x") if name == "absolute" else name
    for field in ("task", "model", "press", "run_id", "sample_id", "question_id"):
        row = make_row(**{"task": "of_ours", field: name}, tags={"subset": name})
        (folder,) = export_rows([row], inside / field, data_dir=name)
        assert folder.parent == inside / field and folder.is_dir()
        assert not set(folder.name) & set("/\\\0\n\u202e:") and not folder.name.startswith(".")
        assert import_rows(inside / field) == [row]
    assert {path.name for path in tmp_path.iterdir()} == {"a"} and len(list(inside.iterdir())) == 6


def test_no_name_leads_pictures_out_of_the_folder(tmp_path: Path, make_row: MakeRow) -> None:
    pytest.importorskip("matplotlib")
    name = "../../x"
    rows = [make_row(task=name, model=name, run_id=name, tags={"depth": 0.5}), make_row()]
    pictures = save_all(rows, [], tmp_path / "a" / "b" / "png")
    assert len(pictures) == 5 and all((tmp_path / "a" / "b" / "png") in path.resolve().parents for path in pictures)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_names_that_become_the_same_name_are_an_error(tmp_path: Path, make_row: MakeRow) -> None:
    with pytest.raises(InvalidArgumentError, match="several with the name"):
        export_rows([make_row(task="a/b"), make_row(task="a-b")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_for_a_file_is_an_error_of_ours(tmp_path: Path, make_row: MakeRow) -> None:
    with pytest.raises(RunDirectoryError, match="too long"):
        export_rows([make_row(task="x" * 300)], tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Whole or not at all -------------------------------------------------------------------------------------------------


@FAULTS
def test_a_fault_at_any_write_of_an_export_leaves_no_folder_behind(
    tmp_path: Path, make_row: MakeRow, error: OSError
) -> None:
    rows = [make_row(), make_row(press="random")]
    rounds: list[str] = []

    def act() -> None:
        export_rows(rows, tmp_path / str(len(rounds)))

    for fault, raised in every_fault(act, error):
        folder = tmp_path / str(len(rounds))
        rounds.append(fault)
        if raised is None:
            assert len(tree(folder)) == 8 and sorted(import_rows(folder), key=repr) == sorted(rows, key=repr)
        else:
            assert isinstance(raised, RunDirectoryError) and str(folder) in str(raised), fault
            assert not folder.exists(), fault
    assert rounds.count("write to a file") == 8


def test_a_folder_that_appears_in_the_meantime_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="none of them was written"), new_folders(tmp_path) as unfinished:
        for name in ("a", "b"):
            (unfinished / name).mkdir()
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "mine.txt").write_text("mine", encoding="utf-8")
    assert tree(tmp_path) == {"b/mine.txt": b"mine"} and not (tmp_path / "a").exists()


def test_what_a_killed_export_left_is_not_imported_and_goes_with_the_next(tmp_path: Path, make_row: MakeRow) -> None:
    pytest.importorskip("fcntl")
    export_rows([make_row()], tmp_path)
    (folder,) = tmp_path.iterdir()
    left = tmp_path / ".kvzip-press-1-0123456789abcdef.part"
    left.mkdir()
    (left / "other").mkdir()
    for name, data in tree(folder).items():
        (left / "other" / name).write_bytes(data)
    (tmp_path / ".mine.part").mkdir()
    assert import_rows(tmp_path) == [make_row()]
    export_rows([make_row(press="random")], tmp_path)
    assert not left.exists() and len(list(tmp_path.iterdir())) == 3
    with new_folders(tmp_path), new_folders(tmp_path):  # each leaves the other's alone
        assert len(list(tmp_path.iterdir())) == 5


@FAULTS
def test_a_fault_at_any_write_of_an_import_or_a_report_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, make_table: Callable[..., list[Row]], make_heads: Callable[..., list[HeadBudgets]], error: OSError
) -> None:
    pytest.importorskip("scipy")
    rows, heads = make_table(2, n_questions=1, tasks=("niah",)), make_heads()
    page = tmp_path / "page.html"

    def act() -> None:
        write_report(rows, heads, page, command=str(len(rounds)))
        (tmp_path / "rows.jsonl").unlink(missing_ok=True)
        store(rows, tmp_path)

    rounds: list[str] = []
    for fault, raised in every_fault(act, error):
        rounds.append(fault)
        assert raised is None or isinstance(raised, KVzipPressError | OSError), fault
        there = tree(tmp_path)
        assert all(text.endswith(b"</html>\n") for name, text in there.items() if name == "page.html"), fault
        assert all(text.count(b"\n") == len(rows) for name, text in there.items() if name == "rows.jsonl"), fault
        assert there.keys() <= {"page.html", "rows.jsonl"}, fault
    assert len(rounds) > 8


def test_a_fault_at_any_write_of_pictures_leaves_whole_pictures(
    tmp_path: Path, make_table: Callable[..., list[Row]], make_heads: Callable[..., list[HeadBudgets]]
) -> None:
    pytest.importorskip("matplotlib")
    from kvzip_press.leaderboard.pictures.canvas import canvas

    def act() -> None:
        with canvas(tmp_path / "new" / "one.png", "one", (1, 1)):
            pass

    for fault, raised in every_fault(act):
        assert raised is None or isinstance(raised, KVzipPressError), (fault, raised)
        for name, data in tree(tmp_path).items():
            assert name == "new/one.png" and data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82"), fault


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, make_row: MakeRow) -> Path:
    rows = [
        make_row(question_id=f"q{number}", prediction=("407.", "no")[number], score=1.0 - number) for number in (0, 1)
    ]
    (folder,) = export_rows(rows, tmp_path / "folders")
    return folder


def unseal(folder: Path) -> None:
    """Makes our own file one of an older version, which had no checksums."""
    extra = json.loads((folder / "kvzip_press.json").read_text(encoding="utf-8"))
    older = {name: extra[name] for name in ("run_id", "press", "provenances")}
    (folder / "kvzip_press.json").write_text(json.dumps(older), encoding="utf-8")


def edit_table(folder: Path, **values: Any) -> None:
    """Changes cells of the last line."""
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    lines[-1].update(values)
    with (folder / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


@pytest.mark.parametrize("score", ["1.0", "0.5", "nan", "inf", "5", "-1", "", "1e999", "one"])
@pytest.mark.parametrize("older", [False, True])
def test_a_score_that_is_not_its_predictions_is_refused_with_our_own_file_too(
    exported: Path, score: str, older: bool
) -> None:
    if older:
        unseal(exported)
    edit_table(exported, score=score)
    with pytest.raises(InvalidArgumentError):
        import_rows(exported)
    (exported / "metrics.json").write_text('{"hidden_facts": {"score": 100.0}}', encoding="utf-8")  # agrees with 1.0
    with pytest.raises(InvalidArgumentError):
        import_rows(exported)


@pytest.mark.parametrize("stated", ["NaN", "Infinity", "null", '"50.0"', "true", "49.9", "[50.0]", "1e999"])
@pytest.mark.parametrize("older", [False, True])
def test_metrics_that_do_not_agree_are_refused(exported: Path, stated: str, older: bool) -> None:
    if older:
        unseal(exported)
    (exported / "metrics.json").write_text(f'{{"hidden_facts": {{"score": {stated}}}}}', encoding="utf-8")
    with pytest.raises(InvalidArgumentError):
        import_rows(exported)


def test_folders_of_older_versions_are_imported_with_one_note(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = import_rows(exported)
    unseal(exported)
    with caplog.at_level(logging.WARNING):
        assert import_rows(exported) == rows
    assert len(caplog.records) == 1 and "older version" in caplog.text


def test_scores_of_a_task_that_is_not_known_are_noted_and_a_metric_given_checks_them(
    tmp_path: Path, make_row: MakeRow, caplog: pytest.LogCaptureFixture
) -> None:
    export_rows([make_row(task="of_ours", score=0.25)], tmp_path)
    assert [row.score for row in import_rows(tmp_path)] == [0.25]
    assert "the metric of the task 'of_ours' in version 1 is not known" in caplog.text
    with pytest.raises(InvalidArgumentError, match=r"expected the score 1 .* got 0\.25"):
        import_rows(tmp_path, score=lambda prediction, references, subset: 1.0)


@pytest.mark.parametrize("name", ["predictions.csv", "config.yaml", "metrics.json", "kvzip_press.json"])
def test_a_file_of_ours_that_was_changed_is_named(exported: Path, name: str) -> None:
    path = exported / name
    path.write_bytes(path.read_bytes().replace(b"0123456789ab", b"0123456789ac") + b"\n")
    with pytest.raises(InvalidArgumentError, match=r"kvzip_press\.json: expected what `export` wrote"):
        import_rows(exported)


@pytest.mark.parametrize(
    "changes",
    [
        {"query_aware": "false"},
        {"compression_ratio": float("nan")},
        {"compression_ratio": True},
        {"compression_ratio": -0.5},
        {"seed": "42"},
        {"seed": [1]},
        {"model": 3},
    ],
)
def test_settings_of_kvpress_of_another_type_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {"dataset": "ruler", "model": "org/tiny", "press_name": "kvzip", "compression_ratio": 0.5, "seed": 42}
    (tmp_path / "predictions.csv").write_text("predicted_answer,task,answer\n407,niah,['407']\n", encoding="utf-8")
    (tmp_path / "metrics.json").write_text('{"niah": {"string_match": 100.0}}', encoding="utf-8")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert [row.task_version for row in import_rows(tmp_path)] == [None]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, **changes}), encoding="utf-8")
    with pytest.raises(InvalidArgumentError):
        import_rows(tmp_path)


def test_what_cannot_be_a_file_is_refused_before_anything_is_written(tmp_path: Path, make_row: MakeRow) -> None:
    with pytest.raises(InvalidArgumentError, match="surrogate"):
        export_rows([make_row(prediction="\ud800")], tmp_path)
    with pytest.raises(InvalidArgumentError, match="got two of"):
        export_rows([make_row(), make_row()], tmp_path)
    with pytest.raises(InvalidArgumentError, match="one version of the task"):
        export_rows([make_row(), make_row(question_id="other", task_version=2)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_import_that_fails_leaves_no_rows(tmp_path: Path, make_row: MakeRow) -> None:
    def rows() -> Any:
        yield make_row()
        raise InvalidArgumentError("damaged")

    with pytest.raises(InvalidArgumentError, match="damaged"):
        store(rows(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match=r"without rows\.jsonl"):
        store([make_row()], tmp_path)
    assert (tmp_path / "rows.jsonl").is_symlink()
