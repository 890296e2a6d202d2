"""A summary file ties figures to rows: `verify` is green on what was run, and red on whatever was changed since."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError, RunDirectoryError
from kvzip_press.leaderboard import run_summary
from kvzip_press.leaderboard.rows.results import Row, read_rows, run_id
from kvzip_press.leaderboard.run_summary import RunSummary, verify
from kvzip_press.leaderboard.running.grid import load_grid
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec
from kvzip_press.leaderboard.running.run_directory import RunRecord
from kvzip_press.leaderboard.tasks import get_task


@pytest.fixture
def run(tmp_path: Path, make_row: Callable[..., Row]) -> Path:
    """The directory of a whole run of eight rows."""
    task = replace(get_task("hidden_facts"), name="facts")  # as a grid names it
    config = Run(
        "tiny", (TaskSpec(task, 4, 100),), (PressSpec("kvzip", "kvzip"), PressSpec("random", "random")), (0.7,)
    ).config
    folder, known = tmp_path / "run", run_id(config)
    folder.mkdir()
    rows = [
        make_row(
            run_id=known, task="facts", press=press, sample_id=f"{i:04d}", prediction=said, score=float(said == "407.")
        )
        for press in ("kvzip", "random")
        for i, said in enumerate(["407.", "12.", "407.", "no"])
    ]
    (folder / "run.json").write_text(RunRecord(known, config, {"torch": "2"}, len(rows)).to_line())
    write(folder, rows)
    return folder


def write(folder: Path, rows: list[Row]) -> None:
    (folder / "rows.jsonl").write_text("".join(row.to_line() + "\n" for row in rows))


def rows_in(folder: Path) -> list[Row]:
    return list(read_rows(folder / "rows.jsonl"))


def test_rows_that_follow_the_full_cache_are_summed_up_apart_and_not_scored_again(run: Path, tmp_path: Path) -> None:
    """Their score does not follow from a text; a changed one is seen by the hash of all rows."""
    file, first = tmp_path / "summary.json", rows_in(run)
    write(run, [*first[:4], *(replace(row, score=0.25, tags={"kl_nats": 0.5}) for row in first[4:])])
    RunSummary.of(run).save(file)
    figures = {"kvzip @ 0.7": 0.5, "random @ 0.7, agreement": 0.25, "random @ 0.7, KL in nats": 0.5}
    assert RunSummary.load(file).accuracies == figures
    assert "4 scores follow from their predictions; 4 are of agreement" in verify(run, file)
    write(run, [replace(row, score=0.75) if row.tags else row for row in rows_in(run)])
    with pytest.raises(InvalidArgumentError, match="rows_sha256"):
        verify(run, file)


def test_what_was_run_is_verified_in_any_order(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    made = RunSummary.of(run)
    made.save(file)
    assert RunSummary.load(file) == made
    assert made.accuracies == {"kvzip @ 0.7": 0.5, "random @ 0.7": 0.5}
    write(run, rows_in(run)[::-1])
    assert verify(run, file).startswith("8 rows and the configuration")
    assert "8 scores follow from their predictions" in verify(run, file)


def test_rows_that_follow_the_full_cache_have_figures_of_their_own(run: Path, tmp_path: Path) -> None:
    """In the same run; their scores are no metric's, whatever the task."""
    task, press = get_task("hidden_facts"), PressSpec("kvzip", "kvzip")
    tasks = (TaskSpec(replace(task, name="facts"), 2, 100), TaskSpec(replace(task, name="f, a"), 2, 100, "agreement"))
    config = Run("tiny", tasks, (press,), (0.7,)).config
    first, second = (replace(row, run_id=run_id(config)) for row in rows_in(run)[:2])
    rows = [first, second]
    for row, kl in zip(rows[:2], (0.25, 0.75), strict=True):
        rows.append(replace(row, task="f, a", score=0.5, tags={**row.tags, "kl_nats": kl, "until_first": 3.0}))
    (run / "run.json").write_text(RunRecord(run_id(config), config, {"torch": "2"}, 4).to_line())
    write(run, rows)
    made = RunSummary.of(run)
    figures = {"kvzip @ 0.7": 0.5, "kvzip @ 0.7, agreement": 0.5, "kvzip @ 0.7, KL in nats": 0.5}
    assert made.accuracies == figures and made.n_questions == dict.fromkeys(figures, 2)
    made.save(tmp_path / "summary.json")
    said = verify(run, tmp_path / "summary.json")
    assert "2 scores follow from their predictions; 2 are of agreement" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": 1.0}, "rows_sha256, accuracies differ, in 'kvzip @ 0.7'"),
        ({"prediction": "407."}, "rows_sha256 differ"),
        ({"answer_seconds": 0.1}, "rows_sha256 differ"),
    ],
)
def test_a_changed_row_is_found_though_it_has_a_new_seal(run: Path, tmp_path: Path, change: Any, said: str) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    first, second, *others = rows_in(run)
    write(run, [first, replace(second, **change), *others])
    with pytest.raises(InvalidArgumentError, match=said):
        verify(run, file)


def test_a_changed_file_and_a_missing_row_are_found(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    values = json.loads(file.read_text())
    values["accuracies"]["kvzip @ 0.7"] = 0.9
    file.write_text(json.dumps(values))
    with pytest.raises(InvalidArgumentError, match="changed after it was written"):
        verify(run, file)
    write(run, rows_in(run)[1:])
    with pytest.raises(RunDirectoryError, match="7 of the run's 8 rows: go on with it first"):
        RunSummary.of(run)


def test_a_row_more_is_found(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    rows = rows_in(run)
    write(run, [*rows, replace(rows[0], sample_id="0009")])
    with pytest.raises(InvalidArgumentError, match="rows_sha256, n_rows"):
        verify(run, file)
    write(run, [*rows, rows[0]])
    with pytest.raises(RunDirectoryError, match="each line once"):
        verify(run, file)


def test_a_row_less_is_found_though_the_record_knows_of_none_more(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    write(run, rows_in(run)[1:])
    with pytest.raises(RunDirectoryError, match="7 of the run's 8 rows"):
        verify(run, file)
    (run / "run.json").write_text(replace(RunRecord.read(run), n_rows=7).to_line())
    with pytest.raises(InvalidArgumentError, match="rows_sha256, n_rows, accuracies, n_questions differ, in 'kvzip @"):
        verify(run, file)


def test_a_changed_record_is_found(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    record = RunRecord.read(run)
    (run / "run.json").write_text(record.to_line().replace('"tiny"', '"huge"'))
    with pytest.raises(RunDirectoryError, match="changed after it was written"):
        verify(run, file)
    config = {**record.config, "seed": 7}
    (run / "run.json").write_text(replace(record, config=config, run_id=run_id(config)).to_line())
    with pytest.raises(RunDirectoryError, match="to hold lines of the run"):
        verify(run, file)
    (run / "run.json").write_text(replace(record, provenance={"torch": "3"}).to_line())
    with pytest.raises(InvalidArgumentError, match="provenance differ"):
        verify(run, file)
    (run / "run.json").unlink()
    with pytest.raises(InvalidArgumentError, match="config_sha256, provenance differ"):
        verify(run, file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", r"it lacks 'run_id', 'model', 'config_sha256' and 5 more"),
        ("", "another file"),
        ("[]", "it is no object"),
        ('{"run_id": "a"', "another file"),
        ("\x00\xff", "another file"),
        (None, "a file that cannot be read"),
        ("folder", "a file that cannot be read: Is a directory"),
    ],
)
def test_a_file_that_is_no_summary_is_named(text: str | None, said: str, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    if text == "folder":
        file.mkdir()
    elif text is not None:
        file.write_text(text)
    with pytest.raises(
        InvalidArgumentError, match=rf"summary.json to be what .*summary` wrote, got .*{said}"
    ) as raised:
        verify(run, file)
    assert "__init__" not in str(raised.value)


def test_a_summary_whose_seal_was_taken_off_is_refused(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    RunSummary.of(run).save(file)
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "seal"}))
    with pytest.raises(InvalidArgumentError, match="without its seal"):
        verify(run, file)


def test_rows_without_a_record_are_verified_as_far_as_they_can_be(
    run: Path, tmp_path: Path, make_row: Callable[..., Row]
) -> None:
    file, alone = tmp_path / "summary.json", tmp_path / "alone"
    alone.mkdir()
    rows = [make_row(press="kvzip", sample_id=str(i), task=task) for i, task in enumerate(("hidden_facts", "of_ours"))]
    write(alone, rows)
    RunSummary.of(alone).save(file)
    assert RunSummary.load(file).config_sha256 is None
    said = verify(alone, file)
    assert (
        said.startswith("2 rows are those of") and "1 scores follow" in said and "of 1 the metric is not known" in said
    )
    assert "There is no run.json: with which configuration and versions these rows were made" in said
    write(alone, [replace(rows[0], score=0.0), rows[1]])
    with pytest.raises(InvalidArgumentError, match="rows_sha256"):
        verify(alone, file)
    RunSummary.of(alone).save(file)
    with pytest.raises(InvalidArgumentError, match=r"expected the score 1 of the prediction '407\.'"):
        verify(alone, file)
    known = run_id(load_grid("smollm2-storages").run.config)
    write(alone, [replace(row, run_id=known) for row in rows])
    RunSummary.of(alone).save(file)
    assert f"{known} is the configuration of the grid 'smollm2-storages', but whether" in verify(alone, file)
    with pytest.raises(RunDirectoryError, match="a run with rows"):
        write(alone, [])
        RunSummary.of(alone)


def test_fields_that_later_versions_give_a_row_do_not_change_its_hash(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = RunSummary.of(run).rows_sha256
    monkeypatch.setitem(run_summary._DEFAULTS, "later", 3)
    monkeypatch.setattr(Row, "later", 3, raising=False)
    assert RunSummary.of(run).rows_sha256 == before
    write(run, [replace(row, storage="int8") for row in rows_in(run)])
    assert RunSummary.of(run).rows_sha256 != before


RESULTS = Path(__file__).resolve().parents[2] / "leaderboard" / "results"
OF_CELLS = {"allocations", "sharing"}  # of benchmarks, which keep no answers: tests/docs/test_reproduce.py has these


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({path.name for path in RESULTS.iterdir() if path.is_dir()} - OF_CELLS))
def test_the_committed_runs_are_verified(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Green as they are, red when one row is changed, and their README has the command that made them.

    Rows are read once for both, which takes most of the time; the tests above change them in their file.
    """
    folder = RESULTS / name
    (tmp_path / "rows.jsonl").write_bytes(gzip.decompress((folder / "rows.jsonl.gz").read_bytes()))
    if (folder / "run.json").exists():
        (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    rows = run_summary.rows_of(tmp_path)
    monkeypatch.setattr(run_summary, "rows_of", lambda _: rows)
    said = verify(tmp_path, folder / "summary.json")
    assert "is not known here" not in said
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "kvzip-press leaderboard run --grid" in readme and "verify" in readme
    changed = replace(rows[0], score=1 - rows[0].score)
    monkeypatch.setattr(run_summary, "rows_of", lambda _: [changed, *rows[1:]])
    with pytest.raises(InvalidArgumentError, match="rows_sha256"):
        verify(tmp_path, folder / "summary.json")


def test_a_score_that_its_prediction_does_not_have_is_found(run: Path, tmp_path: Path) -> None:
    """Also where rows and summary were made anew together."""
    file = tmp_path / "summary.json"
    first, second, *others = rows_in(run)
    write(run, [first, replace(second, score=1.0), *others])
    RunSummary.of(run).save(file)
    with pytest.raises(InvalidArgumentError, match=r"expected the score 0 of the prediction '12\.' .* got 1"):
        verify(run, file)


def test_the_commands_write_verify_and_compare(run: Path, tmp_path: Path, make_table: Callable[..., list[Row]]) -> None:
    def command(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, ["leaderboard", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    file, other = tmp_path / "summary.json", tmp_path / "other"
    assert "8 rows, sha256" in command("summary", run, "--output", file)
    assert "8 scores follow from their predictions" in command("verify", run, file)
    other.mkdir()
    write(other, make_table())
    assert command("table", other, "--format", "markdown").splitlines()[1].startswith("| --- |")
    assert r"\begin{tabular}" in command("table", other, "--format", "latex")
    assert "mean over ratios: +1.00" in " ".join(command("correlate", other, other).split())
    bigger = tmp_path / "bigger"
    bigger.mkdir()
    write(bigger, make_table(model="bigger", run_id="ba9876543210"))
    said = command("correlate", other, bigger)
    assert "on tiny and bigger, mean over ratios: +1.00 [" in " ".join(said.split())
    page = tmp_path / "page.html"
    command("report", other, bigger, "--output", page)
    assert '"correlations":[{"runs":[["tiny","' in page.read_text(encoding="utf-8")
    shown = " ".join(command("table", other).split())
    assert "Area under accuracy over" in shown and "Smallest difference from the full cache" in shown
