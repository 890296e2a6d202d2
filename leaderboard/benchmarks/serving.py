"""Measures vLLM with compressed contexts beside vLLM alone: users on distinct contexts and on one, and users on none.

``python -m kvzip_press.leaderboard.benchmarks.serving --engine ours --output serving.jsonl``, once for each engine:

- "plain": vLLM alone. One context is a shared prefix in its pages; a first token costs a prefill of what is not there;
- "cascade": the same with cascade attention, where that vLLM has it;
- "full": vLLM alone, whose pages its DecodeBenchConnector fills: a full cache for each user, as many as fit at once;
- "ours", "ours-int8": vLLM with our pool.

The model has the shape of Llama 3.1 8B and dummy weights, and contexts hold random pairs, unevenly shared by heads:
what is measured does not depend on either, and no file of 100 GB is needed.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.benchmarks.cases import uneven_lengths
from kvzip_press.serving.shares import Share
from kvzip_press.serving.vllm import plugin, requests
from kvzip_press.serving.vllm.facts import ServedModel

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rope_theta": 500000.0,
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
ENGINES = ("plain", "cascade", "full", "ours", "ours-int8")
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
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=n_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": {"context": context}} if context else None,
            )
            for context in contexts
        ]
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


def measured(name: str, engine: Engine, pool: tuple[ServedModel, torch.Tensor] | None) -> dict[str, float | None]:
    """Returns the figures of an engine, by name."""
    load, users = engine.load, engine.load.users
    none, one, distinct = [None] * users, ["one"] * users, [f"context {user}" for user in range(users)]
    if pool is not None:
        served, lengths = pool
        places = served.pool_bytes // served.shape.pair_bytes
        asked = engine.questions()
        return {
            "distinct contexts resident": float(places // Share(0, served.n_ranks).room(lengths)),
            "tokens/s on distinct contexts": engine.tokens_per_second(asked, distinct),
            "tokens/s on one context": engine.tokens_per_second(asked, one),
            "step of plain requests, ms": engine.step_ms(),
            "first token about a context, ms": engine.first_token_ms(engine.questions(seed=300)[:6], "one"),
        }
    if name == "full":
        cache = engine.llm.llm_engine.vllm_config.cache_config
        prompts = [engine.ids(load.context + load.question, user) for user in range(users)]
        resident = None
        if cache.num_gpu_blocks is not None:
            resident = float(cache.num_gpu_blocks * cache.block_size // (load.context + load.question + load.answer))
        return {
            "distinct contexts resident": resident,
            "tokens/s on distinct contexts": engine.tokens_per_second(prompts, none),
        }
    prefix = engine.ids(load.context, 7)
    engine.seconds([[*prefix, 1]], 1, [None])  # it is in the pages now
    figures: dict[str, float | None] = {
        "tokens/s on one context": engine.tokens_per_second(engine.questions(prefix), none)
    }
    if name == "plain":
        figures["step of plain requests, ms"] = engine.step_ms()
        fresh = [engine.ids(load.context + load.question, 500 + number) for number in range(4)]
        figures["first token about a context, ms"] = engine.first_token_ms(fresh, None)
    return figures


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


def main(
    engine: Annotated[str, typer.Option(help=f"One of {', '.join(ENGINES)}.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama3.1-8b",
    users: Annotated[int, typer.Option(help="Requests at a time.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens of a context.")] = 32768,
    kept: Annotated[float, typer.Option(help="Fraction of pairs kept.")] = 0.3,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    pool_gb: Annotated[float, typer.Option(help="Memory for contexts, in 1e9 bytes.")] = 100.0,
    memory: Annotated[float, typer.Option(help="Fraction of the GPU that vLLM takes in all.")] = 0.92,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="vLLM's compiled model; graphs always.")
    ] = True,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the heads.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File to which the figures are added, a line of JSON.")] = None,
) -> None:
    """Starts one engine, measures it, and prints its figures."""
    if engine not in ENGINES or shape not in SHAPES:
        raise InvalidArgumentError(
            f"expected an engine out of {', '.join(ENGINES)} and a shape out of {', '.join(SHAPES)}, got "
            f"{engine!r:.80} and {shape!r:.80}"
        )
    load, config = Load(users, context, kept, answer=answer), SHAPES[shape]
    on_gpu = bool(torch.version.cuda)  # not torch.cuda.is_available(): what has touched a GPU cannot be forked
    dtype = "bfloat16" if on_gpu else "float32"
    with TemporaryDirectory(prefix="kvzip-press-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}), encoding="utf-8")
        options: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": dtype,
            "max_model_len": context + load.question + answer + 8,
            "max_num_seqs": users,
            "tensor_parallel_size": tensor_parallel,
            "disable_log_stats": True,
            **(_on_gpu(users, memory, compiled) if on_gpu else {"enforce_eager": True}),
        }
        pool = None
        if engine.startswith("ours"):
            storage = "int8" if engine == "ours-int8" else "model"
            served = served_of(config, dtype, storage, int(pool_gb * 1e9), tensor_parallel)
            options |= _with_pool(served, load, folder / "served.json")
            shape_of_pool = served.shape
            heads = shape_of_pool.num_key_value_heads
            lengths = uneven_lengths(shape_of_pool.num_layers * heads, context, kept, 1.0)
            pool = served, torch.tensor(lengths).view(-1, heads)
        elif engine == "full":
            fill = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}
            options |= {"enable_prefix_caching": False, "kv_transfer_config": fill}
        else:
            options |= {"enable_prefix_caching": True, "disable_cascade_attn": engine != "cascade"}
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "fork")

        def make() -> Any:
            from vllm import LLM

            return LLM(name, **options)

        running = Engine(make, load, int(str(config["vocab_size"])))
        figures = measured(engine, running, pool)
    row = {"engine": engine, "shape": shape, **vars(load), "compiled": compiled, "storage_pool_gb": pool_gb, **figures}
    row["seconds to start"] = running.seconds_to_start
    line = json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    typer.echo(line)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    typer.run(main)
