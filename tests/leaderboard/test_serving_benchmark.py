"""The benchmark of serving, against a stand-in of vLLM: what it asks, and what it makes of the times."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.benchmarks import serving
from kvzip_press.serving.vllm import plugin, replicas, requests


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that were made; each answers at once."""
    made: list[Any] = []

    class LLM:
        def __init__(self, path: str, **options: Any) -> None:
            self.config = json.loads(Path(path, "config.json").read_text())
            self.options, self.asked = options, []
            cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
            self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))
            made.append(self)

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
            assert not use_tqdm and all(one.ignore_eos for one in params)
            self.asked.append((prompts, params))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * one.max_tokens)]) for one in params]

    module = ModuleType("vllm")
    vars(module).update(LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(plugin, "register", lambda: None)
    monkeypatch.setattr(requests, "_CHECKS", {})
    monkeypatch.setenv(requests.FACTS, "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")
    return made


def figures_of(engine: str, tmp_path: Path, **options: Any) -> dict[str, Any]:
    size = {"shape": "tiny", "users": 3, "context": 50, "kept": 0.5, "answer": 4, "pool_gb": 1e-3}
    serving.main(
        engine, **{**size, "memory": 0.9, "compiled": False, "tensor_parallel": 1, **options}, output=tmp_path / "f"
    )
    row: dict[str, Any] = json.loads((tmp_path / "f").read_text().splitlines()[-1])
    return row


def test_users_of_our_pool_ask_about_distinct_contexts_about_one_and_about_none(
    engines: list[Any], tmp_path: Path
) -> None:
    row = figures_of("ours", tmp_path)
    [engine] = engines
    asked = [
        {(one.extra_args or {}).get("kv_transfer_params", {}).get("context") for one in params}
        for _, params in engine.asked
    ]
    assert asked[:5] == [{"context 0", "context 1", "context 2"}] * 2 + [{"one"}] * 2 + [{None}]
    assert engine.options["enable_prefix_caching"] is False and requests._CHECKS != {}
    pairs = 1e-3 * 1e9 // (2 * 32 * 4)
    assert 0.5 < row["distinct contexts resident"] / (pairs / (2 * 2 * 50 * 0.5)) < 1.5
    assert {"tokens/s on distinct contexts", "tokens/s on one context", "step of plain requests, ms"} < set(row)
    more = figures_of("ours-int8", tmp_path)["distinct contexts resident"] / row["distinct contexts resident"]
    assert more == pytest.approx(2 * 32 * 4 / (2 * 34), rel=0.05)


def test_vllm_alone_is_asked_the_same_with_its_own_caches(engines: list[Any], tmp_path: Path) -> None:
    plain, full = figures_of("plain", tmp_path), figures_of("full", tmp_path)
    assert full["distinct contexts resident"] == 100 * 16 // (50 + 64 + 4)
    assert engines[1].options["kv_transfer_config"]["kv_connector"] == "DecodeBenchConnector"
    assert "first token about a context, ms" in plain and "cascade" in serving.ENGINES
    prompts = [one["prompt_token_ids"] for one in engines[0].asked[1][0]]
    assert len({tuple(ids[:50]) for ids in prompts}) == 1 and len({tuple(ids) for ids in prompts}) == 3
    assert engines[0].options["enable_prefix_caching"] and engines[0].options["disable_cascade_attn"]
    with pytest.raises(InvalidArgumentError, match="expected an engine out of plain, cascade, full, ours"):
        figures_of("theirs", tmp_path)


def test_contexts_of_random_pairs_are_as_long_as_asked_in_scheduler_and_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = ModuleType("kvzip_press.serving.vllm.connector")
    vars(base)["ContextConnector"] = object
    workers = ModuleType("kvzip_press.serving.vllm.workers")
    vars(workers)["served_by"] = None
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, workers.__name__, workers)
    name = "kvzip_press.leaderboard.benchmarks.random_contexts"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for attribute in ("ContextFolder", "read_record", "pair_counts", "packed_pairs"):
        monkeypatch.setattr(replicas, attribute, getattr(replicas, attribute))
    served = serving.served_of(serving.SHAPES["tiny"], "float32", "int8", 10**6)
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
