"""A run whose answers a server gives: the same rows, and what a server cannot answer is refused before it begins."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvzip_press import RaggedCache
from kvzip_press.cli.main import app
from kvzip_press.decoding.generation import eos_ids, generate
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard import launch
from kvzip_press.leaderboard.rows.results import Row, read_rows
from kvzip_press.leaderboard.running.endpoint import CONTEXT, Endpoint
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, plan
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TIMES = ("prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds")
RUN = Run(
    "tiny",
    (TaskSpec(get_task("hidden_facts", n_keys=3, max_new_tokens=4), n_contexts=2, length_tokens=120),),
    (PressSpec("none", "full cache", compression_ratios=(0.0,)), PressSpec("random", "random")),
    (0.5,),
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=2)


class Server(BaseHTTPRequestHandler):
    """What `kvzip-press serve` does, as far as it is asked: one context, and completions about it."""

    model: Any
    folder: Path
    lock = threading.Lock()
    cache: Any = None
    with_ids = True

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == f"/v1/contexts?name={CONTEXT}":
            path = self.folder / "sent.safetensors"
            path.write_bytes(data)
            type(self).cache = RaggedCache.load(path, self.model)
            self._send(201, {"id": CONTEXT})
            return
        asked = json.loads(data)
        assert (self.path, asked["model"], asked["temperature"]) == ("/v1/completions", "tiny", 0)
        assert asked["kv_transfer_params"] == {"context": CONTEXT} and asked["return_token_ids"]
        if asked["max_tokens"] > 100:
            self._send(400, {"error": {"message": "too long"}})
            return
        with self.lock:
            [ids] = generate(self.model, self.cache.fork(), [asked["prompt"]], asked["max_tokens"])
        ended = [] if len(ids) == asked["max_tokens"] else [min(eos_ids(self.model, TOKENIZER))]
        self._send(200, {"choices": [{"token_ids": [*ids, *ended]} if self.with_ids else {"text": "x"}]})

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Is quiet."""


@contextmanager
def served(model: Any, folder: Path, **options: Any) -> Iterator[str]:
    handler = type("Handler", (Server,), {"model": model, "folder": folder, **options})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def plain(row: Row) -> Row:
    return replace(row, **dict.fromkeys(TIMES, 0.0), provenance={})


def test_a_servers_answers_become_the_same_rows(model: Any, tmp_path: Path) -> None:
    works = plan(RUN, TOKENIZER)
    own = [plain(row) for row in execute(RUN, works, model, TOKENIZER)]
    with served(model, tmp_path) as address:
        endpoint = Endpoint(address, "tiny", model, TOKENIZER)
        endpoint.check(RUN, works)
        rows = list(execute(RUN, works, model, TOKENIZER, endpoint=endpoint))
    assert [plain(row) for row in rows] == own and len(own) == 12
    assert {row.provenance["executor"] for row in rows} == {"openai"}


def test_the_command_asks_the_server(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "load_for", lambda *_: (model, TOKENIZER))
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "model: tiny\ncompression_ratios: [0.5]\npresses: [{press: random}]\n"
        "tasks: [{task: hidden_facts, options: {n_keys: 2, max_new_tokens: 3}, contexts: 1, tokens: 100}]\n"
    )
    with served(model, tmp_path) as address:
        arguments = ["run", "--grid", str(grid), "--output", str(tmp_path / "run"), "--executor", "openai"]
        done = CliRunner().invoke(app, ["leaderboard", *arguments, "--address", address])
    assert done.exit_code == 0, done.output
    assert len(list(read_rows(tmp_path / "run" / "rows.jsonl"))) == 2


def test_what_a_server_cannot_answer_is_refused_before_the_run(model: Any, tmp_path: Path) -> None:
    works = plan(RUN, TOKENIZER)
    with served(model, tmp_path) as address:
        with pytest.raises(InvalidArgumentError, match="expected a server of other, got one of tiny"):
            Endpoint(address, "other", model, TOKENIZER).check(RUN, works)
        with pytest.raises(InvalidArgumentError, match="in batches of 1, for a server, got a batch size of 2"):
            Endpoint(address, "tiny", model, TOKENIZER).check(replace(RUN, batch_size=2), works)
    with pytest.raises(InvalidArgumentError, match=r"expected `kvzip-press serve` at .*, got URLError"):
        Endpoint(address, "tiny", model, TOKENIZER).check(RUN, works)
    with pytest.raises(InvalidArgumentError, match="expected the address of a server, such as http://"):
        Endpoint("file:///etc/passwd", "tiny", model, TOKENIZER)


def test_what_a_server_refuses_is_an_error_that_says_so(model: Any, tmp_path: Path) -> None:
    long = replace(
        RUN, tasks=(TaskSpec(get_task("hidden_facts", n_keys=1, max_new_tokens=101), n_contexts=1, length_tokens=60),)
    )
    for run, options, message in (
        (long, {}, r"/v1/completions: expected an answer, got status 400: .*too long"),
        (RUN, {"with_ids": False}, "expected a server that returns token ids"),
    ):
        with served(model, tmp_path, **options) as address, pytest.raises(InvalidArgumentError, match=message):
            list(
                execute(
                    run, plan(run, TOKENIZER), model, TOKENIZER, endpoint=Endpoint(address, "tiny", model, TOKENIZER)
                )
            )
