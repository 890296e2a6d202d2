"""The command that starts vLLM's server, without vLLM."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import jinja2
import pytest
from typer.testing import CliRunner

from kvzip_press import question_ids
from kvzip_press.cli.main import app
from kvzip_press.errors import MissingDependencyError
from kvzip_press.serving.vllm import requests, server
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.testing import ByteTokenizer

pytestmark = pytest.mark.any_transformers


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: ByteTokenizer) -> list[Any]:
    """What would have been run, with the files that it would have read."""
    commands: list[Any] = []

    def run(command: list[str], env: dict[str, str]) -> int:
        served = ServedModel.read(env[requests.FACTS])
        template = Path(command[command.index("--chat-template") + 1]).read_text(encoding="utf-8")
        commands.append((command, served, template))
        assert env["PYTHONSAFEPATH"] == "1", "a folder named as a package, where the server is started, is not one"
        return 7

    monkeypatch.setenv(requests.FACTS, "")
    monkeypatch.setattr(server, "run_until_it_ends", run)
    monkeypatch.setattr(server, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(server, "load_model", lambda name: (model, tokenizer))
    return commands


def test_serve_starts_the_server_over_the_folder(started: list[Any], folder: Path) -> None:
    arguments = ["serve", "--model", "tiny", "--contexts", str(folder), "--pool-gb", "0.5", "--port", "9", "--x"]
    finished = CliRunner().invoke(app, arguments)
    assert finished.exit_code == 7, finished.output
    [(command, served, _)] = started
    assert (served.folder, served.pool_bytes) == (str(folder), 5 * 10**8)
    options = dict(zip(command[1:-3:2], command[2:-3:2], strict=False))
    assert (options["-m"], options["--served-model-name"]) == ("vllm.entrypoints.openai.api_server", "tiny")
    assert "--no-enable-prefix-caching" in command and command[-3:] == ["--port", "9", "--x"]
    assert command[command.index("--dtype") + 1] == "float32"
    module, name = command[command.index("--middleware") + 1].rsplit(".", 1)
    assert isinstance(getattr(importlib.import_module(module), name), type), "vLLM imports it"
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert config["kv_connector"] == "ContextConnector"
    path = config["kv_connector_extra_config"]["served_model"]
    assert path == os.environ[requests.FACTS] and not Path(path).exists(), "its files are gone with the server"


CHILD = """
import os, pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
try:
    print("begun", flush=True)
    while True:
        signal.pause()
finally:
    print("ended by itself", flush=True)
"""
PARENT = """
import os, sys
from kvzip_press.serving.vllm.server import run_until_it_ends
status = run_until_it_ends([sys.executable, "-c", sys.argv[1]], os.environ)
print("cleaned up", flush=True)
sys.exit(status)
"""


def test_a_server_that_is_asked_to_end_ends_its_engine_first() -> None:
    """`docker stop` signals this process alone: the engine must not be left behind, nor what was made for it."""
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "begun\n"
        parent.send_signal(signal.SIGINT)  # of ctrl-C the engine hears from the terminal, not from this process
        parent.send_signal(signal.SIGTERM)
        assert parent.stdout.read().split("\n") == ["ended by itself", "cleaned up", ""]
        assert parent.wait() == 3


def test_the_chat_template_frames_a_question_as_answer_does(tokenizer: ByteTokenizer) -> None:
    """The ids of what it renders are those that `answer` reads behind a context."""

    class Decoding(ByteTokenizer):
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return "".join({13: "\n"}[one] for one in ids)

    rendered = jinja2.Template(server.question_template(Decoding())).render(
        messages=[{"role": "user", "content": 'Earlier "'}, {"role": "user", "content": " Which {{ lamp }}? "}]
    )
    assert rendered == "\n\nWhich {{ lamp }}?\n"
    assert tokenizer.encode("\n\nWhich {{ lamp }}?") + tokenizer.encode("\n") == question_ids(
        tokenizer, " Which {{ lamp }}? "
    )


def test_without_vllm_the_message_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"needs the package vllm: pip install 'kvzip-press\[vllm\]'"):
        server.serve("tiny", folder, pool_bytes=1, options=())
