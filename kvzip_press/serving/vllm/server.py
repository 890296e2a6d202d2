"""Starts vLLM's OpenAI-compatible server over a folder of contexts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvzip_press.errors import MissingDependencyError, install_command
from kvzip_press.loading.by_name import load_model
from kvzip_press.model.chat import chat_frame
from kvzip_press.serving.vllm.endpoints import ContextRoutes
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.plugin import engine_options

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def serve(
    model_name: str,
    contexts: Path,
    *,
    pool_bytes: int,
    n_ranks: int = 1,
    storage: str = "model",
    options: Sequence[str] = (),
) -> int:
    """Serves a model and the contexts of a folder until the server ends, and returns its exit status.

    The model is loaded once by transformers first, on the CPU, to see how it turns keys and which weights it has.

    Args:
        model_name: An alias, a folder or a hub id.
        contexts: The folder.
        pool_bytes: Bytes of the pool of contexts, on each GPU.
        n_ranks: Number of GPUs that share the heads.
        storage: How the pool holds pairs: "model" or "int8".
        options: Further options of vLLM's server.

    Raises:
        CacheFileError: The folder cannot be read.
        MissingDependencyError: vLLM is not installed.
        UnsupportedModelError: The model's contexts cannot be shared; the message says why.
    """
    if find_spec("vllm") is None:
        raise MissingDependencyError(f"serving needs the package vllm: {install_command('vllm')}")
    model, tokenizer = load_model(model_name)
    served, path = _facts(model, contexts, pool_bytes, n_ranks, storage), str(model.name_or_path)
    del model
    with TemporaryDirectory(prefix="kvzip-press-") as folder:
        facts, template = Path(folder, "served.json"), Path(folder, "question.jinja")
        served.write(facts)
        template.write_text(question_template(tokenizer), encoding="utf-8")
        command = server_command(path, model_name, served, facts, template)
        environment = {
            "PYTHONSAFEPATH": "1",  # run with -m, vLLM would import what lies in this folder before its own packages
            **os.environ,
            **with_own_plugin(os.environ.get("VLLM_PLUGINS")),
        }
        return run_until_it_ends([*command, *options], environment)


def run_until_it_ends(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a program and returns its exit status. When this process is asked to end, the program is asked, too.

    A SIGTERM (``docker stop``, systemd) is handed on; ctrl-C reaches both from the terminal. Either way the program
    ends by itself, and what was made for it can be removed.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        return subprocess.run(command, env=environment, check=False).returncode
    started: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: object) -> None:
        for process in started:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on), signal.signal(signal.SIGINT, lambda *_: None)
    try:
        started.append(subprocess.Popen(command, env=environment))
        return started[0].wait()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


def with_own_plugin(allowed: str | None) -> dict[str, str]:
    """Returns ``VLLM_PLUGINS`` with our plugin among those that a user allows; nothing where all are loaded.

    Args:
        allowed: The variable as it is; None if it is not set.
    """
    return {} if allowed is None else {"VLLM_PLUGINS": ",".join(dict.fromkeys([*allowed.split(","), "kvzip_press"]))}


def _facts(model: Any, contexts: Path, pool_bytes: int, n_ranks: int, storage: str) -> ServedModel:
    return ServedModel.of(model, contexts, pool_bytes=pool_bytes, n_ranks=n_ranks, storage=storage)


def question_template(tokenizer: Any) -> str:
    """Returns a chat template that frames the last message as ``answer`` frames a question right behind its context."""
    suffix = tokenizer.decode(list(chat_frame(tokenizer).suffix))
    return "{{ " + json.dumps("\n\n") + " + messages[-1]['content'] | trim + " + json.dumps(suffix) + " }}"


def server_command(path: str, name: str, served: ServedModel, facts: Path, template: Path) -> list[str]:
    """Returns the command that starts the server, and prepares the environment that it inherits.

    Args:
        path: The model's files.
        name: What the model is called in requests.
        served: The model and its contexts.
        facts: The file that holds the same.
        template: The file with the chat template.
    """
    engine = engine_options(str(facts))
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", path, "--served-model-name", name, "--dtype", _DTYPES[served.dtype]),
        *("--chat-template", str(template), "--no-enable-prefix-caching"),
        *("--tensor-parallel-size", str(served.n_ranks)),
        *("--middleware", f"{ContextRoutes.__module__}.{ContextRoutes.__name__}"),
        *("--kv-transfer-config", json.dumps(engine["kv_transfer_config"])),
    ]
