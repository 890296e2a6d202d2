"""Rows survive the folders of kvpress's leaderboard; results of kvpress itself become rows that claim no more."""

import csv
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("yaml")

import yaml

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.kvpress_format import export_rows, import_rows
from kvzip_press.leaderboard.kvpress_format.files import parse_answers
from kvzip_press.leaderboard.rows.results import Row

MakeRow = Callable[..., Row]


@pytest.fixture
def rows(make_row: MakeRow) -> list[Row]:
    hostile = "two\nlines, \"quoted\", 'single' and a tab\t<b>"
    of_ours = {"task": "of_ours", "model": "org/tiny"}  # no task of this package, so that scores may be anything
    found = [make_row(press="full cache", compression_ratio=0.0, kept_fraction=1.0, **of_ours)]
    found += [
        make_row(
            **of_ours,
            press="KVzip (local replay)",
            compression_ratio=ratio,
            kept_fraction=(1 - ratio) / 3,
            sample_id=str(number),
            score=number / 3,
            prediction=hostile,
            references=("407", "it's", hostile, ""),
            tags={"depth": 0.1 * number, "subset": "niah_single_1"},
            provenance={"device": f"cuda:{number % 2}"},
        )
        for ratio in (0.5, 0.96875)
        for number in range(3)
    ]
    return found


def test_exported_rows_come_back_as_they_were(rows: list[Row], tmp_path: Path) -> None:
    export_rows(rows, tmp_path)
    assert sorted(import_rows(tmp_path), key=repr) == sorted(rows, key=repr)


def test_folders_and_files_are_those_of_kvpress(rows: list[Row], tmp_path: Path) -> None:
    rows = [replace(row, task="ruler") for row in rows]
    names = [path.name for path in export_rows(rows, tmp_path, data_dir="4096")]
    assert names == [
        "ruler__4096__org--tiny__no_press__0.00",
        "ruler__4096__org--tiny__kvzip_local_replay__0.50",
        "ruler__4096__org--tiny__kvzip_local_replay__0.97",
    ]
    folder = tmp_path / names[2]
    assert json.loads((folder / "metrics.json").read_text()) == {"niah_single_1": {"string_match": 33.33}}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: config[name] for name in ("dataset", "data_dir", "model", "press_name", "compression_ratio")} == {
        "dataset": "ruler",
        "data_dir": "4096",
        "model": "org/tiny",
        "press_name": "kvzip_local_replay",
        "compression_ratio": 0.96875,
    }
    with (folder / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["task"] for line in lines] == ["niah_single_1"] * 3
    assert lines[0]["predicted_answer"] == rows[-1].prediction


def test_query_aware_rows_have_folders_of_their_own(make_row: MakeRow, tmp_path: Path) -> None:
    export_rows([make_row(), make_row(query_aware=True)], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hidden_facts__tiny__kvzip__0.70",
        "hidden_facts__tiny__kvzip__0.70__query_aware",
    ]
    assert {row.query_aware for row in import_rows(tmp_path)} == {False, True}


def write_kvpress(folder: Path, press: str, ratio: float, answers: list[str], **changes: object) -> None:
    """Results as kvpress's evaluation writes them: no column of ours, references as numpy prints them."""
    folder.mkdir(parents=True)
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "predicted_answer", "task", "answer", "compression_ratio"])
        writer.writeheader()
        for number, answer in enumerate(answers):
            task = ("niah_multivalue", "qa_1")[number % 2]
            of = {"question": "?", "compression_ratio": ratio, "answer": "['407' '12']"}
            writer.writerow({**of, "predicted_answer": answer, "task": task})
    metrics = {"niah_multivalue": {"string_match": 75.0}, "qa_1": {"string_match": 50.0}}
    (folder / "metrics.json").write_text(json.dumps(changes.get("metrics", metrics)))
    config = {"dataset": changes.get("dataset", "ruler"), "data_dir": "4096", "model": "org/tiny", "press_name": press}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "compression_ratio": ratio, "seed": 42}))


ANSWERS = ["407 and 12", "It is 12.", "only 12", "neither"]


def test_results_of_kvpress_become_rows_of_one_run_without_what_nobody_knows(tmp_path: Path) -> None:
    write_kvpress(tmp_path / "a", "no_press", 0.0, ANSWERS)
    write_kvpress(tmp_path / "b" / "1", "kvzip", 0.5, ANSWERS)
    rows = import_rows(tmp_path)
    assert [row.score for row in rows[:4]] == [1.0, 1.0, 0.5, 0.0]
    assert rows[0].references == ("407", "12")
    assert {row.kept_fraction for row in rows} == {row.resident_bytes for row in rows} == {None}
    full, press = summarise(rows)  # one run, so that they can be compared
    assert (full.press, press.press, press.compression_ratio) == ("no_press", "kvzip", 0.5)
    assert (press.accuracy, press.n_contexts, press.ms_per_token, press.compress_seconds) == (0.625, 4, None, None)


def test_a_metric_that_does_not_give_the_folders_scores_is_refused(tmp_path: Path) -> None:
    write_kvpress(tmp_path / "a", "kvzip", 0.5, ANSWERS, metrics={"niah_multivalue": {"string_match": 75.0}})
    with pytest.raises(InvalidArgumentError, match=r"expected 50\.00 for 'qa_1', got None"):
        import_rows(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"expected 0\.00 for 'niah_multivalue', got 75\.0"):
        import_rows(tmp_path, score=lambda prediction, references, subset: 0.0)


def test_another_data_set_needs_its_metric(tmp_path: Path) -> None:
    write_kvpress(tmp_path / "a", "kvzip", 0.5, ANSWERS, dataset="loogle", metrics={"bleu": 3.0})
    with pytest.raises(InvalidArgumentError, match="got results of 'loogle' without one"):
        import_rows(tmp_path)
    assert {row.score for row in import_rows(tmp_path, score=lambda prediction, references, subset: 0.25)} == {0.25}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['407']", ("407",)),
        ("['a', 'b']", ("a", "b")),
        ("['a' 'b']", ("a", "b")),
        ("['a'\n 'b'\n \"it's\"]", ("a", "b", "it's")),
        (r"['a\'b']", ("a'b",)),
        ("[]", ()),
        ("407", ("407",)),
        ("[see note 'a']", ("[see note 'a']",)),
        ("", ("",)),
        ("""['a\\\\' 'b' "c\\"d"]""", ("a\\", "b", 'c"d')),
        ("['a' 'b]", ("['a' 'b]",)),
        ("['two\nlines']", ("['two\nlines']",)),  # no list that Python or numpy prints
        (r"['\x']", (r"['\x']",)),
    ],
)
def test_references_are_read_as_python_and_as_numpy_print_them(text: str, expected: tuple[str, ...]) -> None:
    assert parse_answers(text) == expected


@pytest.mark.parametrize("piece", ["\"'\\", "'\"", "'", '"', "\\'", "'\\'", "'a' ", "\\", "["])
def test_references_of_eighty_thousand_characters_are_read_in_time_that_grows_with_them(piece: str) -> None:
    text = f"[{piece * (80_000 // len(piece))}]"
    begin = time.process_time()
    parse_answers(text)
    assert time.process_time() - begin < 10  # a tenth of a second; with a search to the end from every quote, minutes


def test_ratios_that_two_decimals_would_merge_keep_folders_of_their_own(rows: list[Row], tmp_path: Path) -> None:
    """The one that two decimals name exactly has that name, as in kvpress; the others are written in full."""
    rows += [replace(rows[-1], compression_ratio=ratio) for ratio in (0.97, 0.9375)]
    names = {path.name.rpartition("__")[2] for path in export_rows(rows, tmp_path)}
    assert names == {"0.00", "0.50", "0.96875", "0.97", "0.94"}
    assert sorted(import_rows(tmp_path), key=repr) == sorted(rows, key=repr)


def test_what_cannot_be_exported_is_named(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="got none"):
        export_rows([], tmp_path)
    with pytest.raises(
        InvalidArgumentError, match=r"several with the name of_ours__org--tiny__kvzip_local_replay__0\.97"
    ):
        export_rows([*rows, replace(rows[-1], run_id="another")], tmp_path)
    assert not list(tmp_path.iterdir())
    export_rows(rows, tmp_path)
    with pytest.raises(InvalidArgumentError, match="which is there"):
        export_rows(rows, tmp_path)


def break_file(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), r"expected metrics\.json beside"),
        (lambda folder: (folder / "config.yaml").unlink(), r"expected folders with config\.yaml"),
        (break_file("metrics.json", "{"), "expected JSON"),
        (break_file("metrics.json", "[]"), "expected an object, got list"),
        (break_file("config.yaml", "a: [}"), "expected YAML"),
        (break_file("config.yaml", "dataset: ruler"), "expected the settings dataset, model"),
        (break_file("predictions.csv", "a,b\n1,2\n"), r"expected the columns \['answer', 'predicted_answer'\]"),
        (break_file("predictions.csv", "answer,predicted_answer\n1\n"), "as many cells as columns"),
        (break_file("kvzip_press.json", "{}"), "expected what `export` wrote"),
    ],
)
def test_a_wrong_folder_is_named(broken: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write_kvpress(tmp_path / "a", "kvzip", 0.5, ANSWERS)
    broken(tmp_path / "a")
    with pytest.raises(InvalidArgumentError, match=message):
        import_rows(tmp_path)
