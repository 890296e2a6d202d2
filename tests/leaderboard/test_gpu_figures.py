"""Figures of a GPU one after the other: resumed, bounded, each with its log; here with commands that stand in."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvzip_press.leaderboard.benchmarks import gpu_figures
from kvzip_press.leaderboard.benchmarks.gpu_figures import (
    FIGURES,
    Figure,
    choose,
    is_done,
    run_all,
    run_one,
    run_side_by_side,
)
from kvzip_press.leaderboard.running.grid import load_grid

ROOT = Path(__file__).resolve().parents[2]


def figure(name: str, program: str, minutes: float = 1.0, *, goes_on: bool = False) -> Figure:
    return Figure(name, ("-c", program, "{folder}"), minutes, "nothing", goes_on)


ADDS = "import sys; open(sys.argv[1] + '/runs', 'a').write('x'); print('said')"
FAILS = "import sys; print('why'); sys.exit(3)"
STARTS_ANOTHER = """
import subprocess, time
print(subprocess.Popen(["sleep", "infinity"]).pid, flush=True)
while True:
    time.sleep(60)
"""


def ending(out: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_what_is_done_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    figures = [figure("good", ADDS), figure("bad", FAILS), figure("after", ADDS)]
    assert run_all(figures, tmp_path) == ["bad"] == run_all(figures, tmp_path)
    assert (tmp_path / "good" / "runs").read_text() == "x" == (tmp_path / "after" / "runs").read_text()
    assert (tmp_path / "good.log").read_text() == "said\n" and (tmp_path / "bad.log").read_text() == "why\n"
    assert (ending(tmp_path, "good")["status"], ending(tmp_path, "good")["returncode"]) == ("done", 0)
    assert (ending(tmp_path, "bad")["status"], ending(tmp_path, "bad")["returncode"]) == ("failed", 3)
    assert run_all(figures[:1], tmp_path, again=True) == []
    assert (tmp_path / "good" / "runs").read_text() == "xx"
    changed = replace(figures[0], command=("-c", f"{ADDS} ", "{folder}"))
    assert not is_done(changed, tmp_path)
    (tmp_path / "good.json").write_text('{"status": "done"')
    assert not is_done(figures[0], tmp_path)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_one_that_runs_past_its_limit_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is over once it has started another: neither would end by itself."""
    started: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "long.log"

    class Process(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self)
                while not log.read_text().endswith("\n"):
                    assert self.poll() is None, log.read_text()
                    time.sleep(0.01)
                raise subprocess.TimeoutExpired(self.args, 60.0)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Process)
    found = run_one(figure("long", STARTS_ANOTHER), tmp_path, 60.0)
    assert (found.status, found.returncode) == ("stopped", None)
    assert started[0].returncode == -signal.SIGTERM, "it was asked to end, and did"
    other = int(log.read_text())
    until = time.monotonic() + 600
    while not has_ended(other):  # it was told, and ends when it has its turn
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not is_done(figure("long", STARTS_ANOTHER), tmp_path)


def test_a_limit_is_seconds_that_a_process_is_waited_for(tmp_path: Path) -> None:
    found = run_one(figure("long", STARTS_ANOTHER), tmp_path, 0.1)
    assert (found.status, found.returncode) == ("stopped", None) and found.seconds >= 0.1


def test_what_does_not_fit_in_the_time_is_left_out_and_shorter_ones_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    until = time.monotonic() + 60 + gpu_figures._GRACE
    figures = [figure("long", ADDS, 5.0), figure("short", ADDS, 0.5), figure("resumes", ADDS, 5.0, goes_on=True)]
    assert run_all(figures, tmp_path, until=until) == ["long"]
    assert re.search(r"long: left out, \d+ of its 300 seconds are left", capsys.readouterr().out)
    assert not (tmp_path / "long.json").exists() and (tmp_path / "short.json").exists()
    assert run_all([figure("late", ADDS, 0.1, goes_on=True)], tmp_path, until=time.monotonic()) == ["late"]


def test_with_several_gpus_those_whose_times_count_have_the_first_alone(tmp_path: Path) -> None:
    says = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    figures = [figure("a", says), replace(figure("b", says), times=False), figure("c", says)]
    assert run_side_by_side(figures, tmp_path / "3", ["4", "5", "6"]) == []
    assert [(tmp_path / "3" / f"{name}.log").read_text() for name in "abc"] == ["4\n", "5,6\n", "4\n"]
    assert run_side_by_side(figures, tmp_path / "1", ["0"]) == []
    outside = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    assert [(tmp_path / "1" / f"{name}.log").read_text() for name in "abc"] == [f"{outside}\n"] * 3
    bad = [figure("a", FAILS), replace(figure("b", FAILS), times=False)]
    assert run_side_by_side(bad, tmp_path / "bad", ["0", "1"]) == ["a", "b"]


def test_a_grid_is_spread_over_processes_and_then_counts_as_made(tmp_path: Path) -> None:
    says = "import sys; print(*sys.argv[1:])"
    one = Figure("grid", ("-c", says, "run", "{workers}"), 1.0, "nothing", times=False)
    run_one(one, tmp_path, 60, workers=7)
    assert (tmp_path / "grid.log").read_text() == "run --executor processes --workers 7\n"
    assert is_done(one, tmp_path)
    run_one(one, tmp_path, 60)
    assert (tmp_path / "grid.log").read_text() == "run\n"


def test_a_benchmark_is_spread_over_processes_by_its_own_option(tmp_path: Path) -> None:
    says = "import sys; print(*sys.argv[1:])"
    one = Figure("bench", ("-c", says, "{processes}"), 1.0, "nothing", times=False)
    run_one(one, tmp_path, 60, workers=3)
    assert (tmp_path / "bench.log").read_text() == "--workers 3\n"
    assert is_done(one, tmp_path)
    spread = {one.name for one in FIGURES if "{processes}" in one.command}
    assert spread == {one.name for one in FIGURES if one.name.startswith(("allocations-", "sharing-"))}
    assert all(one.goes_on and not one.times for one in FIGURES if one.name in spread)


def test_files_that_grids_need_are_made_where_they_look_for_them() -> None:
    made = {one.command[one.command.index("--out") + 1]: one for one in FIGURES if "--out" in one.command}
    for name in ("evidence", "evidence-gemma3", "decode-qwen05"):
        for file in (file for press in load_grid(name).run.presses for file in press.files.values()):
            command = ["kvzip-press", *made[file.path].command[2:]]
            assert command == file.command.split(), (name, file.path)
            order = [one.name for one in FIGURES]
            assert order.index(made[file.path].name) < order.index(f"grid-{name}")


def test_the_command_lists_runs_and_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_figures, "FIGURES", (figure("good", ADDS), figure("bad", FAILS)))

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(gpu_figures.app, ["--out", str(tmp_path / "out"), *arguments])
        return done.exit_code, done.output

    assert run("--list")[0] == 0 and "bad\n  at most 1 minutes; nothing" in run("--list")[1]
    assert not (tmp_path / "out").exists()
    code, said = run()
    assert code == 1 and "not made yet: bad; the same command goes on" in said
    assert run("--only", "good") == (0, "good: done before\n")
    assert run("--only", "better")[0] == 2 and run("--minutes", "0")[0] == 2
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(gpu_figures.app, ["--out", str(tmp_path / "file")])
    assert done.exit_code == 1 and "expected --out to be a folder to write" in done.output


def test_every_figure_has_a_name_of_its_own_and_a_module_that_exists() -> None:
    names = [one.name for one in FIGURES]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    modules = [one.command[1] for one in FIGURES if one.command[0] == "-m"]
    assert modules and all(importlib.util.find_spec(module) for module in modules)
    with pytest.raises(typer.BadParameter, match="expected --only to be one of"):
        choose(FIGURES, ["nothing"])


def test_every_kernel_benchmark_has_a_figure_and_every_file_and_page_that_is_named_exists() -> None:
    folder = ROOT / "kernels" / "benchmarks"
    runs = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert runs == {one.command[1].rsplit(".", 1)[1] for one in FIGURES if "kernels" in one.command[1]}
    for one in FIGURES:
        for named in re.findall(r"(?:kernels|leaderboard|docs)/[\w./-]+", one.makes):
            assert (ROOT / named.rstrip(".")).exists(), (one.name, named)


def test_every_published_profile_and_run_has_a_figure() -> None:
    makes = " ".join(one.makes for one in FIGURES)
    published = [*(ROOT / "leaderboard" / "results").iterdir(), *(ROOT / "leaderboard/profile/results").glob("*.jsonl")]
    published += [*(ROOT / "kernels" / "benchmarks" / "results").glob("*.csv")]
    of_a_cpu = ["decode-small"]
    assert [path.name for path in published if path.relative_to(ROOT).as_posix() not in makes] == of_a_cpu


@pytest.mark.parametrize("one", FIGURES, ids=lambda one: one.name)
def test_the_commands_of_figures_parse(one: Figure, tmp_path: Path) -> None:
    """Those of kvzip-press and of benchmarks with typer; those of kernels share one parser."""
    arguments = gpu_figures._command(one, tmp_path, workers=2)[3:]
    if one.command[0] == "-c":
        from kvzip_press.cli.main import app
        from kvzip_press.leaderboard.cli import app as leaderboard

        command = typer.main.get_command(leaderboard if arguments[0] == "leaderboard" else app)
        name, *rest = arguments[1:] if arguments[0] == "leaderboard" else arguments
        while hasattr(command, "commands") and hasattr(command.commands[name], "commands"):
            command, (name, *rest) = command.commands[name], rest
        command.commands[name].make_context(name, rest)  # type: ignore[attr-defined]
    elif "kernels" not in one.command[1]:
        module = importlib.import_module(one.command[1])
        typer.main.get_command(typer_of(module.main)).make_context("main", arguments)


def typer_of(function: object) -> typer.Typer:
    app = typer.Typer()
    app.command()(function)  # type: ignore[type-var]
    return app
