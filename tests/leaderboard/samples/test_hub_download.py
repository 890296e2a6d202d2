"""The real client of the hub against a stand-in on this machine: which commit is loaded, and what is left later."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

pytest.importorskip("datasets", reason="needs the extra `tasks`")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "test.jsonl": "".join(f'{{"problem": "What is 1+{number}?", "answer": "{number + 1}"}}\n' for number in range(3)),
    "README.md": "not wanted",
}
PROGRAM = """
import json, sys
from kvzip_press.errors import KVzipPressError
from kvzip_press.leaderboard.tasks import get_task
task = get_task("math500", **json.loads(sys.argv[1]))
try:
    samples = list(task.samples(seed=0, n=9, length_tokens=9))
    print(json.dumps([task.data_revision, sorted(q.references[0] for s in samples for q in s.questions)]))
except KVzipPressError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one data set takes: what a revision is, and its files."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        repo = "datasets/HuggingFaceH4/MATH-500"
        path = self.path.split("?")[0]
        file = FILES.get(path.removeprefix(f"/{repo}/resolve/{COMMIT}/"))
        if path in {f"/api/{repo}/revision/main", f"/api/{repo}/revision/{COMMIT}"}:
            info = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self._send(json.dumps({**info, "siblings": [{"rfilename": name} for name in FILES]}).encode())
        elif path == f"/api/{repo}/tree/{COMMIT}":
            entries = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": "0" * 40} for name in FILES]
            self._send(json.dumps(entries).encode())
        elif file is not None:
            self._send(file.encode(), {"ETag": f'"{sha1(file.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(b"", {"X-Error-Code": "EntryNotFound"}, status=404)

    do_HEAD = do_GET  # noqa: N815  # the name that http.server calls

    def log_message(self, *args: Any) -> None:
        """Is silent."""

    def _send(self, body: bytes, headers: Mapping[str, str] = MappingProxyType({}), status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(hub: ThreadingHTTPServer, cache: Path, *, offline: bool = False, **options: str) -> Any:
    """What the task says in a process of its own: the client reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "600",  # seconds: the server is this process, which may wait for its turn
        "HF_HUB_DOWNLOAD_TIMEOUT": "600",
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(options)]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        command, env={**environment, **settings}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_branch_is_loaded_by_its_commit_and_stays_when_the_hub_is_gone(hub: Any, tmp_path: Path) -> None:
    expected = [COMMIT, ["1", "2", "3"]]
    assert run(hub, tmp_path, revision="main") == expected
    assert f"GET /datasets/HuggingFaceH4/MATH-500/resolve/{COMMIT}/test.jsonl" in Hub.asked
    assert not any("README" in asked for asked in Hub.asked)
    n_asked = len(Hub.asked)
    assert run(hub, tmp_path, offline=True, revision="main") == expected
    assert run(hub, tmp_path, offline=True, revision=COMMIT) == expected
    assert len(Hub.asked) == n_asked
    kind, message = run(hub, tmp_path, offline=True, revision="f" * 40)  # the cache has another commit
    assert kind == "DataNotFoundError"
    assert "HF_HOME" in message
