"""A run on disk: killed and gone on with, locked, torn, full, of another configuration, in shards."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FORBIDDEN, FULL, TORN, every_fault

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, RunDirectoryError
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets, read_heads
from kvzip_press.leaderboard.rows.results import Row, RowWriter, read_rows, run_id
from kvzip_press.leaderboard.run_files import rows_of
from kvzip_press.leaderboard.running import runner
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, count_rows, plan, shard
from kvzip_press.leaderboard.running.run_directory import RunDirectory, RunRecord
from kvzip_press.leaderboard.running.shards import merge, run_shard
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.any_transformers

TOKENIZER = ByteTokenizer()
TIMES = ("prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds")
KILLED = """
import importlib.util, pathlib, sys
sys.path.insert(0, sys.argv[1])
faults = importlib.util.spec_from_file_location("faults", pathlib.Path(sys.argv[1]).parents[1] / "faults.py")
sys.modules["faults"] = importlib.util.module_from_spec(faults)
faults.loader.exec_module(sys.modules["faults"])
from test_run_directory import RUNS, make_model, run_in
rows = []
def on_row(row):
    rows.append(row)
    if len(rows) == int(sys.argv[4]):
        print(flush=True)
        sys.stdin.read()  # waits to be killed
run_in(sys.argv[2], RUNS[sys.argv[3]](), make_model(), on_row=on_row)
"""
N_SURVIVE = 13  # rows, which end in the middle of a context


def make_run() -> Run:
    tasks = (
        TaskSpec(get_task("hidden_facts", n_keys=2, max_new_tokens=2), n_contexts=6, length_tokens=120),
        TaskSpec(get_task("profile_qa_turns", n_people=1, n_attributes=2, max_new_tokens=2), 2, 160),
    )
    presses = (PressSpec("none", "full cache", compression_ratios=(0.0,)), PressSpec("random", "random"))
    return Run("tiny", tasks, presses, (0.5, 0.9), seed=3)


def make_decode_run() -> Run:
    """Presses that evict while the model writes, by answers and by agreement with the full cache."""
    options = {"n_sentences": 1, "max_new_tokens": 8}
    tasks = (
        TaskSpec(get_task("repeated_paragraph", **options), n_contexts=3, length_tokens=200),
        TaskSpec(replace(get_task("repeated_paragraph", **options), name="agreeing"), 3, 200, "agreement"),
    )
    presses = [PressSpec("none", "full cache")]
    presses += [PressSpec(name, name, {"budget": 24, "buffer": 4}) for name in ("random_decode", "h2o", "rkv")]
    return Run("tiny", tasks, tuple(presses), (0.0,), seed=3)


RUNS = {"read": make_run, "written": make_decode_run}


def make_model() -> Any:
    return tiny_model(num_layers=1)


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def run_in(
    path: str | Path,
    run: Run,
    model: Any,
    *,
    force: bool = False,
    shard_of: tuple[int, int] = (0, 1),
    on_row: Callable[[Row], None] | None = None,
) -> None:
    works = plan(run, TOKENIZER)
    with RunDirectory(path, RunRecord.of(run, model, count_rows(run, works)), force=force) as directory:
        run_shard(run, shard(works, *shard_of), model, TOKENIZER, directory, on_row=on_row)


def rows_in(path: Path, name: str = "rows.jsonl") -> list[Row]:
    """The rows in an order of their own, without times and what depends on the process."""
    rows = [replace(row, **dict.fromkeys(TIMES, 0.0), provenance={}) for row in read_rows(path / name)]
    return sorted(rows, key=lambda row: row.key)


@pytest.fixture(scope="module")
def undisturbed(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Row]]:
    """The rows of a run that nothing happened to."""

    @cache
    def rows(kind: str) -> list[Row]:
        path = tmp_path_factory.mktemp(kind)
        run_in(path, RUNS[kind](), model)
        return rows_in(path)

    return rows


@pytest.fixture(scope="module")
def whole(undisturbed: Callable[[str], list[Row]]) -> list[Row]:
    return undisturbed("read")


class StoppedError(Exception):
    """A run that ends in the middle."""


def stop_after(n_rows: int) -> Callable[[Row], None]:
    left = iter(range(n_rows))

    def on_row(row: Row) -> None:
        if next(left, None) is None:
            raise StoppedError

    return on_row


# A run that ends in the middle ---------------------------------------------------------------------------------------


@pytest.fixture(params=RUNS)
def kind(request: pytest.FixtureRequest) -> str:
    """Whether contexts are read, or prompts and answers written."""
    return request.param


@pytest.fixture
def process(tmp_path: Path, kind: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes a run, stopped where it has written a few rows."""
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), kind, str(N_SURVIVE)]
    threads = str(torch.get_num_threads())  # sums run in the same order then
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": threads}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n", child.communicate()[1]
            yield child
        finally:
            child.kill()


@pytest.mark.slow
def test_a_killed_run_loses_the_context_in_flight_at_most_and_leaves_no_lock(
    process: subprocess.Popen[bytes],
    tmp_path: Path,
    kind: str,
    model: Any,
    undisturbed: Callable[[str], list[Row]],
) -> None:
    run = RUNS[kind]()
    with pytest.raises(RunDirectoryError, match="another process writes to it"):
        run_in(tmp_path, run, model)
    process.kill()
    process.wait()
    survived, whole = rows_in(tmp_path), undisturbed(kind)
    assert len(survived) == N_SURVIVE < len(whole)
    before = (tmp_path / "rows.jsonl").read_bytes()
    redone: list[Row] = []
    run_in(tmp_path, run, model, on_row=redone.append)
    assert rows_in(tmp_path) == whole
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(before.rpartition(b"\n")[0])
    assert len(redone) == len(whole) - len(survived)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 7, 10, 11])
def test_what_is_missing_of_a_context_is_all_that_is_done_again(
    tmp_path: Path, run: Run, model: Any, whole: list[Row], n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoppedError):
        run_in(tmp_path, run, model, on_row=stop_after(n_rows))
    there = {row.key for row in read_rows(tmp_path / "rows.jsonl")}
    assert len(there) == n_rows + 1  # a row is on the disk before anybody is told
    prefills: list[Any] = []
    prefill = runner.prefill
    monkeypatch.setattr(runner, "prefill", lambda *args, **options: prefills.append(1) or prefill(*args, **options))
    redone: list[Row] = []
    run_in(tmp_path, run, model, on_row=redone.append)
    assert rows_in(tmp_path) == whole
    assert there.isdisjoint(row.key for row in redone)
    assert len(prefills) == len({(row.task, row.sample_id) for row in redone})


def test_a_finished_run_reads_nothing_again(tmp_path: Path, run: Run, model: Any, monkeypatch: Any) -> None:
    run_in(tmp_path, run, model)
    before = (tmp_path / "rows.jsonl").read_bytes(), (tmp_path / "heads.jsonl").read_bytes()
    monkeypatch.setattr(runner, "prefill", lambda *args, **options: pytest.fail("read"))
    run_in(tmp_path, run, model)
    assert ((tmp_path / "rows.jsonl").read_bytes(), (tmp_path / "heads.jsonl").read_bytes()) == before


@pytest.mark.parametrize("cut", [1, 200])
def test_a_torn_last_line_is_that_row_again(
    tmp_path: Path, run: Run, model: Any, whole: list[Row], cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    run_in(tmp_path, run, model)
    for name, lost in {"rows.jsonl": cut, "heads.jsonl": 1}.items():
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-lost])
    redone: list[Row] = []
    run_in(tmp_path, run, model, on_row=redone.append)
    assert rows_in(tmp_path) == whole
    assert len(redone) == 1
    assert "half a row" in caplog.text
    assert len(list(read_heads(tmp_path / "heads.jsonl"))) == 8 * 3


# The disk ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_clearly_and_it_goes_on_later(
    tmp_path: Path, run: Run, model: Any, whole: list[Row]
) -> None:
    """A limit on the size of files stands in for the disk: the kernel writes a part of a line, then refuses."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, unlimited[1]))
    try:
        with pytest.raises(RunDirectoryError, match=r"expected to write a row to .*rows\.jsonl.*goes on behind them"):
            run_in(tmp_path, run, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    survived = (tmp_path / "rows.jsonl").read_bytes()
    assert 3000 < len(survived) <= 9000
    assert survived.endswith(b"\n")
    run_in(tmp_path, run, model)
    assert rows_in(tmp_path) == whole
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(survived)


def test_a_device_without_room_is_named(
    tmp_path: Path, make_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with RowWriter(tmp_path / "new.jsonl") as writer:
        writer.write(make_row(question_id="first"))
        with Path("/dev/full").open("ab", buffering=0) as full, monkeypatch.context() as patch:
            patch.setattr(writer, "_file", full)
            with pytest.raises(RunDirectoryError, match="No space left on device"):
                writer.write(make_row(question_id="second"))
        writer.write(make_row(question_id="third"))
    assert [row.question_id for row in read_rows(tmp_path / "new.jsonl")] == ["first", "third"]


def test_a_directory_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path, run: Run, model: Any) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=r"expected to write to .*file/run"):
        run_in(tmp_path / "file" / "run", run, model)


# Whose directory it is -----------------------------------------------------------------------------------------------


def test_the_directory_of_another_run_is_refused_with_the_keys_that_differ(
    tmp_path: Path, run: Run, model: Any
) -> None:
    run_in(tmp_path, run, model, shard_of=(0, 8))
    content = (tmp_path / "rows.jsonl").read_bytes()
    others = {
        r"seed: 3, 4": replace(run, seed=4),
        r"compression_ratios\[1\]: 0.9, 0.8": replace(run, compression_ratios=(0.5, 0.8)),
        r"presses\[1\].label: 'random', 'r'": replace(run, presses=(run.presses[0], PressSpec("random", "r"))),
        r"tasks\[0\].n_contexts: 6, 7": replace(run, tasks=(replace(run.tasks[0], n_contexts=7), run.tasks[1])),
        r"truncate: False, True": replace(run, truncate=True),
        r"tasks\[1\].n_contexts: 2, nothing": replace(run, tasks=run.tasks[:1]),
    }
    for message, other in others.items():
        with pytest.raises(RunDirectoryError, match=message):
            run_in(tmp_path, other, model)
    with pytest.raises(RunDirectoryError, match="model_revision: 'weights:"):
        run_in(tmp_path, run, tiny_model(num_layers=1, seed=1))
    assert (tmp_path / "rows.jsonl").read_bytes() == content


@pytest.mark.parametrize("n_rows", [3, None])
def test_a_run_with_further_presses_goes_on_with_the_rows_that_are_there(
    tmp_path: Path, run: Run, model: Any, whole: list[Row], n_rows: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a press that was left out, for want of its gates, is to be had later. A kill on the way costs nothing."""
    fewer = replace(run, presses=run.presses[1:])
    with suppress(StoppedError):
        run_in(tmp_path, fewer, model, on_row=n_rows and stop_after(n_rows))
    before = {row.key for row in read_rows(tmp_path / "rows.jsonl")}
    began = (tmp_path / "run.json").read_bytes()
    redone: list[Row] = []
    with pytest.raises(StoppedError):
        run_in(tmp_path, run, model, on_row=stop_after(2))
    assert f"the run {fewer.run_id} goes on as {run.run_id}, with full cache" in caplog.text
    (tmp_path / "run.json").write_bytes(began)  # as if killed before the record was written
    run_in(tmp_path, run, model, on_row=redone.append)
    assert rows_in(tmp_path) == whole
    assert before.isdisjoint(row.key for row in redone)
    assert {heads.run_id for heads in read_heads(tmp_path / "heads.jsonl")} == {run.run_id}
    assert RunRecord.read(tmp_path).n_rows == len(whole)
    content = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"presses\[1\].*: .*, nothing"):  # presses do not go again
        run_in(tmp_path, fewer, model)
    assert (tmp_path / "rows.jsonl").read_bytes() == content


def test_presses_are_added_only_to_a_run_that_differs_in_nothing_else(tmp_path: Path, run: Run, model: Any) -> None:
    fewer = replace(run, presses=run.presses[:1])
    run_in(tmp_path, fewer, model, shard_of=(0, 8))
    content = [(tmp_path / name).read_bytes() for name in ("run.json", "rows.jsonl", "heads.jsonl")]
    for other in (
        replace(run, seed=4),
        replace(run, presses=(PressSpec("none", "all", compression_ratios=(0.0,)), *run.presses[1:])),
    ):
        with pytest.raises(RunDirectoryError, match="holds another run"):
            run_in(tmp_path, other, model)
    with pytest.raises(RunDirectoryError, match="model_revision: 'weights:"):
        run_in(tmp_path, run, tiny_model(num_layers=1, seed=1))
    (tmp_path / "rows.jsonl").write_bytes(content[1] + b"a note of mine")
    with pytest.raises(RunDirectoryError, match="this is left as it is"):
        run_in(tmp_path, run, model)
    assert (tmp_path / "rows.jsonl").read_bytes() == content[1] + b"a note of mine"
    foreign = replace(next(read_rows(tmp_path / "rows.jsonl")), run_id="other", question_id="foreign")
    (tmp_path / "rows.jsonl").write_bytes(content[1] + f"{foreign.to_line()}\n".encode())
    with pytest.raises(RunDirectoryError, match=r"hold lines of the run .* only"):
        run_in(tmp_path, run, model)
    assert [(tmp_path / name).read_bytes() for name in ("run.json", "heads.jsonl")] == [content[0], content[2]]


def test_force_begins_again_and_loses_nothing(tmp_path: Path, run: Run, model: Any, whole: list[Row]) -> None:
    other = replace(run, seed=4)
    run_in(tmp_path, other, model, shard_of=(0, 8))
    old = [rows_in(tmp_path)]
    run_in(tmp_path, run, model, force=True, shard_of=(0, 8))
    old.append(rows_in(tmp_path))
    run_in(tmp_path, run, model, force=True)
    assert rows_in(tmp_path) == whole
    assert [rows_in(tmp_path, f"rows.{n}.jsonl") for n in (1, 2)] == old
    assert json.loads((tmp_path / "run.1.json").read_text())["run_id"] == other.run_id
    assert len(list(read_heads(tmp_path / "heads.1.jsonl"))) == 3


def test_rows_without_a_run_and_a_damaged_run_are_refused(tmp_path: Path, run: Run, model: Any) -> None:
    (tmp_path / "rows.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match=r"holds rows.jsonl without run.json"):
        run_in(tmp_path, run, model)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="expected the directory of a run"):
        run_in(tmp_path, run, model)


def test_the_record_of_a_run_says_all_that_it_depends_on(tmp_path: Path, run: Run, model: Any) -> None:
    run_in(tmp_path, run, model, shard_of=(0, 8))
    record = RunRecord.read(tmp_path)
    assert (record.run_id, record.config, record.n_rows) == (run.run_id, run.config, 8 * 2 * 3)
    assert record.config["seed"] == 3
    assert record.config["tasks"][0]["data_revision"] == "generated"
    known = {"torch", "transformers", "kvpress", "triton", "kvzip_press", "python", "commit", "device", "gpu", "dtype"}
    assert known | {"threads", "model_revision"} == set(record.provenance) - {"machine"}
    row = next(read_rows(tmp_path / "rows.jsonl"))
    assert row.provenance == {**record.provenance, "data_revision": "generated"}
    assert row.run_id == record.run_id


# Shards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [2, 3, 20])
def test_shards_together_are_the_serial_run(
    tmp_path: Path, run: Run, model: Any, whole: list[Row], n_shards: int
) -> None:
    paths = [tmp_path / str(index) for index in range(n_shards)]
    for index, path in enumerate(paths):
        run_in(path, run, model, shard_of=(index, n_shards))
    assert sum(len(rows_in(path)) for path in paths) == len(whole)
    merge(paths, tmp_path / "all")
    assert rows_in(tmp_path / "all") == whole
    assert len(list(read_heads(tmp_path / "all" / "heads.jsonl"))) == 8 * 3
    run_in(tmp_path / "all", run, model, on_row=lambda row: pytest.fail("was complete"))


def test_shards_of_different_runs_are_not_joined(tmp_path: Path, run: Run, model: Any) -> None:
    run_in(tmp_path / "a", run, model, shard_of=(0, 8))
    run_in(tmp_path / "b", replace(run, seed=9), model, shard_of=(1, 8))
    with pytest.raises(RunDirectoryError, match=r"a and .*b differ in seed: 3, 9"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    with pytest.raises(InvalidArgumentError, match="got none"):
        merge([], tmp_path / "all")


def test_an_incomplete_whole_is_said(tmp_path: Path, run: Run, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    run_in(tmp_path / "a", run, model, shard_of=(0, 2))
    merge([tmp_path / "a"], tmp_path / "all")
    assert "24 of the run's 48 rows" in caplog.text


@pytest.mark.parametrize("index_count", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_outside_its_range_is_refused(run: Run, index_count: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="expected shard I/N"):
        shard(plan(run, TOKENIZER), *index_count)


# What heads kept -----------------------------------------------------------------------------------------------------


def test_a_line_a_compressed_context_says_what_its_heads_kept(tmp_path: Path, run: Run, model: Any) -> None:
    run_in(tmp_path, run, model)
    heads = list(read_heads(tmp_path / "heads.jsonl"))
    kept = {row.key[:2] + row.key[3:5]: row.kept_fraction for row in read_rows(tmp_path / "rows.jsonl")}
    assert len(heads) == len(kept) == 8 * 3
    for line in heads:
        assert line.layer_idx == (0,)
        mean = sum(line.kept[0]) / len(line.kept[0])
        assert mean == pytest.approx(kept[line.task, line.sample_id, line.press, line.compression_ratio], abs=1e-4)
        assert HeadBudgets.from_json(line.to_json()) == line


@pytest.mark.parametrize("line", ["{", "[]", '{"kept": [[1]]}', '{"kept": 3, "layer_idx": 1}'])
def test_a_broken_line_of_heads_is_refused(line: str) -> None:
    with pytest.raises(InvalidArgumentError, match="expected head budgets"):
        HeadBudgets.from_json(line)


# What someone else does to the directory -----------------------------------------------------------------------------


def test_a_run_whose_lock_was_removed_lets_nobody_in(tmp_path: Path, run: Run, model: Any) -> None:
    pytest.importorskip("fcntl")
    told: list[Row] = []

    def another(row: Row) -> None:
        (tmp_path / "lock").unlink(missing_ok=True)
        for force in (False, True) if not told else ():
            with pytest.raises(RunDirectoryError, match=r"another process writes to rows\.jsonl"):
                run_in(tmp_path, run, model, force=force)
        told.append(row)

    run_in(tmp_path, run, model, shard_of=(0, 8), on_row=another)
    assert [row.key for row in read_rows(tmp_path / "rows.jsonl")] == [row.key for row in told]
    assert len({row.key for row in told}) == len(told) == 6


def test_rows_of_another_run_do_not_count_and_are_refused(tmp_path: Path, run: Run, model: Any) -> None:
    run_in(tmp_path, run, model, shard_of=(0, 8))
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    foreign = replace(next(read_rows(tmp_path / "rows.jsonl")), run_id="0123456789ab", sample_id="0001")
    (tmp_path / "rows.jsonl").write_text(f"{rows}{foreign.to_line()}\n", encoding="utf-8")
    said = r"lines of the run .* only.* got one of '0123456789ab'"
    with pytest.raises(RunDirectoryError, match=said):
        run_in(tmp_path, run, model)
    with pytest.raises(RunDirectoryError, match=said):
        merge([tmp_path], tmp_path / "all")
    with pytest.raises(RunDirectoryError, match=said):
        rows_of(tmp_path)
    assert not (tmp_path / "all" / "rows.jsonl").read_text(encoding="utf-8").count("0123456789ab")


def test_a_directory_whose_rows_are_a_link_is_refused_and_the_file_left_alone(
    tmp_path: Path, run: Run, model: Any
) -> None:
    (tmp_path / "thesis.txt").write_text("my thesis, in one line", encoding="utf-8")
    run_in(tmp_path / "run", run, model, shard_of=(0, 8))
    for name in ("rows.jsonl", "heads.jsonl"):
        (tmp_path / "run" / name).rename(tmp_path / name)
        (tmp_path / "run" / name).symlink_to(tmp_path / "thesis.txt")
        with pytest.raises(KVzipPressError):
            run_in(tmp_path / "run", run, model)
        (tmp_path / "run" / name).unlink()
        (tmp_path / name).rename(tmp_path / "run" / name)
    (tmp_path / "run" / "rows.jsonl").write_text("no rows of ours\nmy thesis", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"rows\.jsonl:1"):
        run_in(tmp_path / "run", run, model)
    assert (tmp_path / "run" / "rows.jsonl").read_text(encoding="utf-8") == "no rows of ours\nmy thesis"
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "my thesis, in one line"


def test_what_killed_runs_left_half_written_is_removed_and_nothing_else(tmp_path: Path, run: Run, model: Any) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / ".kvzip-press-1-0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"mine")
    run_in(tmp_path, run, model, shard_of=(0, 8))
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden == {".mine.tmp"}


def test_a_record_that_was_changed_is_refused(tmp_path: Path, run: Run, model: Any) -> None:
    run_in(tmp_path, run, model, shard_of=(0, 8))
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    older = {name: value for name, value in json.loads(text).items() if name != "seal"}
    for changed in (
        text.replace('"n_rows": 48', '"n_rows": 6'),
        json.dumps({**older, "config": {**older["config"], "seed": 4}}),
        json.dumps({**older, "n_rows": -1}),
        json.dumps({**older, "n_rows": "48"}),
    ):
        (tmp_path / "run.json").write_text(changed, encoding="utf-8")
        with pytest.raises(RunDirectoryError, match="expected the directory of a run"):
            run_in(tmp_path, run, model)
    (tmp_path / "run.json").write_text(json.dumps(older), encoding="utf-8")
    run_in(tmp_path, run, model)
    assert len(rows_in(tmp_path)) == 48


def test_a_shard_without_rows_is_an_error_of_ours(tmp_path: Path, run: Run, model: Any) -> None:
    run_in(tmp_path / "a", run, model, shard_of=(0, 8))
    (tmp_path / "a" / "rows.jsonl").unlink()
    with pytest.raises(RunDirectoryError, match=r"rows\.jsonl"):
        merge([tmp_path / "a"], tmp_path / "all")


@pytest.mark.parametrize("error", [FULL, FORBIDDEN, TORN], ids=["full", "forbidden", "torn"])
def test_a_fault_at_any_write_of_a_run_loses_no_row_and_the_next_run_goes_on(
    tmp_path: Path, make_row: Callable[..., Row], make_heads: Callable[..., list[HeadBudgets]], error: OSError
) -> None:
    config = {"seed": 3}
    record = RunRecord(run_id(config), config, {}, 3)
    rows = [make_row(run_id=record.run_id, question_id=str(number)) for number in range(3)]
    heads, told, rounds = make_heads(record.run_id)[0], list[Row](), list[str]()

    def write(path: Path) -> None:
        told.clear()
        with RunDirectory(path, record) as directory:
            directory.write_heads(heads)
            for row in rows:
                directory.write(row)
                told.append(row)

    for fault, raised in every_fault(lambda: write(tmp_path / str(len(rounds))), error):
        path = tmp_path / str(len(rounds))
        rounds.append(fault)
        assert raised is None or isinstance(raised, KVzipPressError), (fault, raised)
        there = list(read_rows(path / "rows.jsonl")) if (path / "rows.jsonl").exists() else []
        assert there == rows[: len(there)] and len(there) >= len(told), fault
        write(path)
        assert list(read_rows(path / "rows.jsonl")) == rows, fault
        assert len(list(read_heads(path / "heads.jsonl"))) == 1
        assert {one.name for one in path.iterdir()} == {"run.json", "rows.jsonl", "heads.jsonl", "lock"}, fault
    assert rounds.count("write to a file") >= 5


@pytest.mark.parametrize("error", [FULL, FORBIDDEN, TORN], ids=["full", "forbidden", "torn"])
def test_a_fault_while_a_run_takes_over_the_rows_of_one_with_fewer_presses_loses_none(
    tmp_path: Path, make_row: Callable[..., Row], make_heads: Callable[..., list[HeadBudgets]], error: OSError
) -> None:
    presses, rounds = [{"label": "a"}, {"label": "b"}], list[str]()
    configs = {"seed": 3, "presses": presses[:1]}, {"seed": 3, "presses": presses}
    fewer, more = (RunRecord(run_id(config), config, {}, 3) for config in configs)
    rows = [make_row(run_id=fewer.run_id, question_id=str(number)) for number in range(3)]
    with RunDirectory(tmp_path / "0", fewer) as directory:
        directory.write_heads(make_heads(fewer.run_id)[0])
        for row in rows:
            directory.write(row)

    def take_over(path: Path) -> None:
        with RunDirectory(path, more) as directory:
            assert directory.done == {row.key for row in rows}

    shutil.copytree(tmp_path / "0", tmp_path / "1")  # each round has a directory of its own, made before
    for fault, raised in every_fault(lambda: take_over(tmp_path / str(len(rounds) + 1)), error):
        path = tmp_path / str(len(rounds) + 1)
        rounds.append(fault)
        assert raised is None or isinstance(raised, KVzipPressError), (fault, raised)
        there = [replace(row, run_id=fewer.run_id) for row in read_rows(path / "rows.jsonl")]
        assert there == rows, fault
        take_over(path)
        assert list(read_rows(path / "rows.jsonl")) == [replace(row, run_id=more.run_id) for row in rows], fault
        assert [heads.run_id for heads in read_heads(path / "heads.jsonl")] == [more.run_id]
        assert {one.name for one in path.iterdir()} == {"run.json", "rows.jsonl", "heads.jsonl", "lock"}, fault
        shutil.copytree(tmp_path / "0", tmp_path / str(len(rounds) + 1))
    assert len(rounds) >= 8


# Versions of tasks ---------------------------------------------------------------------------------------------------


def test_each_row_says_the_version_of_its_task_and_a_new_version_is_another_run(
    tmp_path: Path, run: Run, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in(tmp_path, run, model, shard_of=(0, 8))
    assert {row.task_version for row in read_rows(tmp_path / "rows.jsonl")} == {1}
    assert not any("version" in task for task in run.config["tasks"])  # runs of before go on
    monkeypatch.setattr(type(run.tasks[0].task), "version", 2)
    with pytest.raises(RunDirectoryError, match=r"tasks\[0\]\.version: nothing, 2"):
        run_in(tmp_path, run, model)
    run_in(tmp_path / "new", run, model, shard_of=(0, 8))
    assert {(row.task, row.task_version) for row in read_rows(tmp_path / "new" / "rows.jsonl")} == {("hidden_facts", 2)}
