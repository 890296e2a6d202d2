"""The benchmark of serving, against a stand-in of vLLM: what it asks, and what it makes of the times."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.benchmarks import serving, serving_engine
from kvzip_press.leaderboard.benchmarks.serving_engine import Job, Load
from kvzip_press.serving.vllm import plugin, replicas, requests


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that were made; each answers at once."""
    made: list[Any] = []

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            self.config = json.loads(Path(model, "config.json").read_text())
            self.options, self.asked = options, []
            cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
            self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))
            made.append(self)

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
            assert not use_tqdm and all(one.ignore_eos for one in params)
            self.asked.append((prompts, params))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * one.max_tokens)]) for one in params]

    module = ModuleType("vllm")
    vars(module).update(LLM=LLM, SamplingParams=lambda **given: SimpleNamespace(**{"extra_args": None, **given}))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(plugin, "register", lambda: None)
    monkeypatch.setattr(requests, "_CHECKS", {})
    monkeypatch.setenv(requests.FACTS, "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")
    return made


SMALL = Job("ours", "tiny", Load(3, 50, 0.5, answer=4), 1e-3, 0.9, compiled=False, tensor_parallel=1)


def figures_of(engine: str, tmp_path: Path, rows: Sequence[str]) -> dict[str, float]:
    job = replace(SMALL, engine=engine)
    serving_engine.main(job, rows, tmp_path / "f")
    return serving.known(job, tmp_path / "f")


def test_users_of_our_pool_ask_about_distinct_contexts_about_one_and_about_none(
    engines: list[Any], tmp_path: Path
) -> None:
    row = figures_of("ours", tmp_path, list(serving.ROWS))
    [engine] = engines
    asked = [
        {(one.extra_args or {}).get("kv_transfer_params", {}).get("context") for one in params}
        for _, params in engine.asked
    ]
    assert asked[:5] == [{"context 0", "context 1", "context 2"}] * 2 + [{"one"}] * 2 + [{None}]
    assert engine.options["enable_prefix_caching"] is False and requests._CHECKS != {}
    pairs = 1e-3 * 1e9 // (2 * 32 * 4)
    assert 0.5 < row["resident"] / (pairs / (2 * 2 * 50 * 0.5)) < 1.5
    assert set(row) == set(serving.ROWS)
    more = figures_of("ours-int8", tmp_path, ["resident"])["resident"] / row["resident"]
    assert more == pytest.approx(2 * 32 * 4 / (2 * 34), rel=0.05)


def test_vllm_alone_is_asked_the_same_with_its_own_caches(engines: list[Any], tmp_path: Path) -> None:
    figures_of("plain", tmp_path, ["one", "idle", "first"])
    full = figures_of("full", tmp_path, ["resident", "distinct"])
    assert full["resident"] == 100 * 16 // (50 + 64 + 4)
    assert engines[1].options["kv_transfer_config"]["kv_connector"] == "DecodeBenchConnector"
    prompts = [one["prompt_token_ids"] for one in engines[0].asked[1][0]]
    assert len({tuple(ids[:50]) for ids in prompts}) == 1 and len({tuple(ids) for ids in prompts}) == 3
    assert engines[0].options["enable_prefix_caching"] and engines[0].options["disable_cascade_attn"]
    figures_of("cascade", tmp_path, ["one"])
    assert not engines[2].options["disable_cascade_attn"]


@pytest.mark.parametrize(
    ("engine", "runner"), [("ours-v1", "0"), ("ours-v2", "1"), ("plain-v1", "0"), ("plain-v2", "1")]
)
def test_an_engine_runs_on_the_model_runner_that_its_name_says(
    engine: str, runner: str, engines: list[Any], tmp_path: Path
) -> None:
    assert list(figures_of(engine, tmp_path, ["idle"])) == ["idle"]
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == runner
    assert ("kv_transfer_config" in engines[0].options) == engine.startswith("ours")


def test_runners_are_compared_when_they_are_asked_for(processes: list[list[str]], tmp_path: Path) -> None:
    shown = command(tmp_path / "out", "--rows", "idle", "--engines", "plain-v2,ours-v2")
    assert processes == [["plain-v2", "idle"], ["ours-v2", "idle"]]
    assert "ours-v2" in shown and "ours-v1" not in shown


def test_a_figure_is_written_before_the_next_is_measured(engines: list[Any], tmp_path: Path) -> None:
    """A crash loses the row in which it happens."""
    job = replace(SMALL, engine="full")
    with pytest.raises(AttributeError, match="_unknown"):
        serving_engine.main(job, ["resident", "unknown", "distinct"], tmp_path / "f")
    assert list(serving.known(job, tmp_path / "f")) == ["resident"]
    [line] = map(json.loads, (tmp_path / "f").read_text().splitlines())
    assert line["torch"] == torch.__version__ and line["commit"] and line["seconds_to_start"] >= 0


# a stand-in of the engine's process: it measures rows until one that kills it, or that takes too long
PROCESS = """
import json, os, sys, time
asked = json.loads(sys.argv[1])
job = asked["job"]
print("an engine's log", flush=True)
for row in asked["rows"]:
    if [job["engine"], row] == json.loads(os.environ["DIES"]):
        os.kill(os.getpid(), 9)
    if row == os.environ.get("HANGS"):
        time.sleep(600)
    settings = {**{k: v for k, v in job.items() if k != "load"}, **job["load"]}
    with open(asked["output"], "a") as file:
        file.write(json.dumps({"row": row, **settings, "figure": 7.0}) + "\\n")
"""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The rows that each process was asked for, which are started for true."""
    script, asked = tmp_path / "engine.py", []
    script.write_text(PROCESS)
    popen = subprocess.Popen

    def started(command: list[str], **options: Any) -> Any:
        rows = json.loads(command[3])
        asked.append([rows["job"]["engine"], *rows["rows"]])
        return popen([command[0], str(script), command[3]], **options)

    monkeypatch.setenv("DIES", "[]")
    monkeypatch.setattr(serving.subprocess, "Popen", started)
    return asked


def command(folder: Path, *options: str) -> str:
    app = typer.Typer()
    app.command()(serving.main)
    finished = CliRunner().invoke(app, ["--output", str(folder), "--shape", "tiny", *options], catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    return finished.output


def test_what_one_row_kills_the_next_engine_goes_on_with(
    processes: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIES", '["ours", "one"]')
    shown = command(tmp_path / "out", "--engines", "ours,plain")
    assert processes == [["ours", *serving.ROWS], ["ours", "idle", "first"], ["plain", "one", "idle", "first"]]
    assert "ours, one: exit status -9" in shown
    assert "an engine's log" in (tmp_path / "out" / "ours.log").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "figures.jsonl").read_text().splitlines()]
    assert sum("figure" in line for line in lines) == 7 and [line["row"] for line in lines if "error" in line] == [
        "one"
    ]


def test_the_command_given_again_measures_what_is_missing(
    processes: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIES", '["full", "distinct"]')
    command(tmp_path / "out", "--rows", "resident,distinct")
    monkeypatch.setenv("DIES", "[]")
    processes.clear()
    shown = command(tmp_path / "out", "--rows", "resident,distinct")
    assert processes == [["full", "distinct"]]
    assert "1.00" in shown, "ours over the baseline"
    processes.clear()
    command(tmp_path / "out", "--rows", "resident", "--users", "3", "--engines", "full")
    assert processes == [["full", "resident"]], "another load has figures of its own"


def test_an_engine_that_hangs_is_ended(
    processes: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", "first")
    shown = command(tmp_path / "out", "--rows", "first", "--engines", "plain", "--seconds", "1")
    assert processes == [["plain", "first"]] and "plain, first: no end after 1 s" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [("--rows", "expected some of resident, distinct"), ("--engines", "some of ours, plain"), ("--shape", "a shape")],
)
def test_names_that_are_none_are_refused(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        command(tmp_path, option, "theirs")


def test_contexts_of_random_pairs_are_as_long_as_asked_in_scheduler_and_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = ModuleType("kvzip_press.serving.vllm.connector")
    vars(base)["ContextConnector"] = object
    workers = ModuleType("kvzip_press.serving.vllm.attention")
    vars(workers)["served_by"] = None
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, workers.__name__, workers)
    name = "kvzip_press.leaderboard.benchmarks.random_contexts"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for attribute in ("ContextFolder", "read_record", "pair_counts", "packed_pairs"):
        monkeypatch.setattr(replicas, attribute, getattr(replicas, attribute))
    served = serving_engine.served_of(serving_engine.SHAPES["tiny"], "float32", "int8", 10**6)
    importlib.import_module(name).use_random_contexts(served, 50, 0.5)
    scheduler, worker = replicas.SchedulerPool(served), replicas.WorkerPool(served, device="cpu")
    worker.begin(4)
    for block, context in enumerate(("any", "other")):
        assert scheduler.admit(context, context)
        scheduler.start(context, block)
    worker.obey(scheduler.take_orders())
    rows = worker.row_of_block.tolist()
    assert rows[0] != rows[1] and rows[2:] == [0, 0]
    assert worker.pool.lengths[:, rows[0]].float().mean() == pytest.approx(25, rel=0.5)
    assert torch.equal(worker.pool.lengths[:, rows[0]], worker.pool.lengths[:, rows[1]])
    sys.modules.pop(name)
