"""What stands in front of a server's routes: refuses what cannot be answered, and hands on all else as it came."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.serving.vllm.endpoints import guard_routes
from kvzip_press.serving.vllm.guard import Guard

pytestmark = pytest.mark.any_transformers
JSON = [(b"host", b"here"), (b"content-type", b"application/json; charset=utf-8")]
GONE = {"type": "http.disconnect"}


class Server:
    """A route of a server: notes what it is given, and says whether the request's client has gone."""

    def __init__(self) -> None:
        self.came: list[Any] = []
        self.checked: list[tuple[object, int]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while not self.came or self.came[-1] != GONE:
            self.came.append(await receive())
        await send("answered")

    def check(self, params: object) -> None:
        self.checked.append((params, threading.get_ident()))
        if isinstance(params, dict) and params.get("context") == "unknown":
            raise InvalidArgumentError("expected the name of a context, got 'unknown'")

    def ask(self, messages: Sequence[Any], headers: Sequence[tuple[bytes, bytes]] = JSON) -> list[Any]:
        """What is sent to a client that sends these messages, and then goes."""
        left, sent = [*messages, GONE], []

        async def receive() -> Any:
            return left.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(Guard(self, self.check)({"type": "http", "headers": headers}, receive, send))
        return sent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    class JSONResponse:
        def __init__(self, content: Any, status_code: int) -> None:
            self._sent = status_code, content

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send(self._sent)

    module = ModuleType("starlette.responses")
    vars(module)["JSONResponse"] = JSONResponse
    monkeypatch.setitem(sys.modules, "starlette", ModuleType("starlette"))
    monkeypatch.setitem(sys.modules, "starlette.responses", module)
    return Server()


def sent(body: bytes, n_bytes: int = 10) -> list[Any]:
    parts = [body[start : start + n_bytes] for start in range(0, len(body), n_bytes)]
    return [{"type": "http.request", "body": one, "more_body": one is not parts[-1]} for one in parts]


def named(name: str) -> bytes:
    return json.dumps({"prompt": "Who?", "kv_transfer_params": {"context": name}}).encode()


@pytest.mark.parametrize("body", [named("archive"), b'{"prompt": "Who?"}', b"{"], ids=["a context", "none", "no JSON"])
def test_what_is_not_refused_passes_as_it_came_and_the_client_that_goes_is_seen(server: Server, body: bytes) -> None:
    """A server ends an answer that it streams when it is told so, by the same messages."""
    assert server.ask(sent(body)) == ["answered"]
    assert server.came == [*sent(body), GONE]


def test_a_client_that_goes_before_its_request_is_whole_is_seen(server: Server) -> None:
    half = sent(named("unknown"))[:2]
    assert server.ask(half) == ["answered"]
    assert server.came == [*half, GONE] and not server.checked


@pytest.mark.parametrize(
    "body",
    [
        named("unknown"),
        named("unknown").replace(b"kv_", rb"kv\u005f"),
        named("unknown").decode().encode("utf-16"),
        b'{"kv_transfer_params": null, ' + named("unknown")[1:],
    ],
    ids=["plain", "escaped", "in 16 bits", "named twice"],
)
def test_what_cannot_be_answered_does_not_reach_the_server(server: Server, body: bytes) -> None:
    """It is read as the server reads it, however it is written."""
    problem = {"message": "expected the name of a context, got 'unknown'", "type": "BadRequestError"}
    assert server.ask(sent(body)) == [(400, {"error": {**problem, "param": None, "code": 400}})]
    assert not server.came


def test_files_are_read_beside_the_servers_own_thread(server: Server) -> None:
    server.ask(sent(named("archive")))
    [(params, thread), *_] = server.checked
    assert params == {"context": "archive"} and thread != threading.get_ident()
    server.checked.clear()
    server.ask(sent(b'{"prompt": "Who?"}'))
    assert not server.checked, "a request that names nothing is not read twice"


def test_a_form_is_not_read_before_the_server_reads_it(server: Server) -> None:
    body = sent(named("unknown"))
    assert server.ask(body, [(b"content-type", b"multipart/form-data; boundary=x")]) == ["answered"]
    assert server.came == [*body, GONE]


def test_routes_that_take_a_body_are_guarded(server: Server) -> None:
    routes = [SimpleNamespace(methods=methods, app=server) for methods in ({"POST"}, {"GET", "HEAD"}, None)]
    guard_routes(SimpleNamespace(routes=[*routes, SimpleNamespace(path="/mounted")]), server.check)
    assert [isinstance(route.app, Guard) for route in routes] == [True, False, False]
