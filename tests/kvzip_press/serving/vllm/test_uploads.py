"""Contexts over HTTP: what comes is checked whole before it can be asked about, and names are never paths."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvzip_press import RandomPress, compress
from kvzip_press.errors import KVzipPressError
from kvzip_press.serving.vllm import requests
from kvzip_press.serving.vllm.endpoints import ContextRoutes
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.requests import NameCheck
from kvzip_press.serving.vllm.server import with_own_plugin
from kvzip_press.serving.vllm.uploads import Uploads
from kvzip_press.testing import ByteTokenizer, tiny_model

Send = Callable[[object, bytes], Any]


@pytest.fixture
def served(model: Any, folder: Path) -> ServedModel:
    return ServedModel.of(model, folder, pool_bytes=10**6)


async def chunks_of(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def add(uploads: Uploads, name: object, data: bytes) -> dict[str, Any]:
    return asyncio.run(uploads.add(name, chunks_of(data)))


def test_a_file_that_is_sent_can_be_asked_about(served: ServedModel, folder: Path) -> None:
    data = (folder / "archive.safetensors").read_bytes()
    uploads = Uploads(served)
    described = add(uploads, "sent.1", data)
    n_tokens = described.pop("tokens")
    assert described == {"id": "sent.1", "object": "context", "bytes": len(data), "storage": "model"}
    assert [one["id"] for one in uploads.listed()["data"]] == ["archive", "lighthouse", "sent.1"]
    NameCheck(served)({"context": "sent.1"})
    assert (folder / "sent.1.safetensors").read_bytes() == data
    add(uploads, "sent.1", (folder / "lighthouse.safetensors").read_bytes())
    assert uploads.listed()["data"][2]["tokens"] > n_tokens, "an older one of that name is replaced"


def test_what_cannot_be_asked_about_changes_nothing(
    served: ServedModel, folder: Path, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is refused leaves the folder as it was, and no message says where it is."""
    whole = (folder / "archive.safetensors").read_bytes()
    changed = bytearray(whole)
    changed[-40] ^= 1
    other = tiny_model("llama", num_layers=2, seed=1)
    compress(other, tokenizer, "Of another model.", RandomPress(0.5)).save(folder.parent / "other")
    same = tiny_model("llama", num_layers=2)
    compress(same, tokenizer, ["Two contexts.", "In one file."], RandomPress(0.5)).save(folder.parent / "two")
    before = sorted(folder.iterdir())
    cases: list[tuple[object, bytes, str]] = [
        ("../archive", whole, "expected a name of letters"),
        ("/etc/passwd", whole, "expected a name of letters"),
        ("", whole, "expected a name of letters"),
        (None, whole, "expected the name of the context, as in POST"),
        ("torn", whole[:-30], "whole"),
        ("none", b"", "expected a cache"),
        ("changed", bytes(changed), "SHA-256"),
        ("other", (folder.parent / "other").read_bytes(), "made by another model"),
        ("two", (folder.parent / "two").read_bytes(), "expected a cache of one context"),
    ]
    for name, data, message in cases:
        with pytest.raises(KVzipPressError, match=message) as raised:
            add(Uploads(served), name, data)
        assert str(folder) not in str(raised.value)
    with pytest.raises(KVzipPressError, match=r"fits into a pool of 900 bytes, got one of \d+: compress it"):
        add(Uploads(replace(served, pool_bytes=900)), "large", whole)
    monkeypatch.setattr(Uploads, "max_bytes", 5000)
    with pytest.raises(KVzipPressError, match="expected at most 5000 bytes"):
        add(Uploads(served), "long", whole)
    assert sorted(folder.iterdir()) == before


def test_a_client_that_goes_leaves_nothing(served: ServedModel, folder: Path) -> None:
    before = sorted(folder.iterdir())

    async def gone() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(KVzipPressError, match="ConnectionResetError"):
        asyncio.run(Uploads(served).add("half", gone()))
    assert sorted(folder.iterdir()) == before


def test_a_context_beyond_the_pool_is_an_error_of_the_client_and_waits_for_nothing(served: ServedModel) -> None:
    with pytest.raises(ValueError, match="expected a context that fits into a pool of 900 bytes"):
        NameCheck(replace(served, pool_bytes=900))({"context": "archive"})


@pytest.fixture
def send(served: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Send:
    """Asks the routes as vLLM's server does."""
    served.write(tmp_path / "served.json")
    monkeypatch.setenv(requests.FACTS, str(tmp_path / "served.json"))
    responses = ModuleType("starlette.responses")
    vars(responses)["JSONResponse"] = lambda content, status_code: (status_code, json.loads(json.dumps(content)))
    monkeypatch.setitem(sys.modules, "starlette", ModuleType("starlette"))
    monkeypatch.setitem(sys.modules, "starlette.responses", responses)
    routes: dict[str, Any] = {}

    def add_route(path: str, route: Any, methods: list[str]) -> None:
        assert path == "/v1/contexts", "behind the prefix that the server's key guards"
        routes[methods[0]] = route

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        assert "POST" in routes, "what follows finds them"

    app = SimpleNamespace(add_route=add_route, routes=[])
    asyncio.run(ContextRoutes(vllm)({"type": "lifespan", "app": app}, None, None))  # type: ignore[arg-type]

    def ask(name: object, data: bytes) -> Any:
        if not data:
            return routes["GET"](None)
        query = {} if name is None else {"name": name}
        return asyncio.run(routes["POST"](SimpleNamespace(query_params=query, stream=lambda: chunks_of(data))))

    return ask


def test_the_routes_list_and_add(send: Send, folder: Path) -> None:
    (folder / "torn.safetensors").write_bytes(b"half")
    whole = (folder / "archive.safetensors").read_bytes()
    status, listed = send(None, b"")
    assert (status, [one["id"] for one in listed["data"]]) == (200, ["archive", "lighthouse"])
    assert list(listed["refused"]) == ["torn"]
    assert send("late", whole)[0] == 201
    for name in ("../late", None):
        status, problem = send(name, whole)
        assert status == problem["error"]["code"] == 400 and "expected" in problem["error"]["message"]


def test_requests_pass_the_middleware_as_they_came() -> None:
    """It stands before the check of the server's key, so it answers nothing."""
    came: list[Any] = []

    async def vllm(*given: Any) -> None:
        came.extend(given)

    request = {"type": "http", "path": "/v1/contexts", "app": None}
    asyncio.run(ContextRoutes(vllm)(request, 1, 2))  # type: ignore[arg-type]
    assert came == [request, 1, 2]


def test_our_plugin_is_loaded_beside_those_that_a_user_allows() -> None:
    assert with_own_plugin(None) == {}, "all are loaded"
    assert with_own_plugin("lora") == {"VLLM_PLUGINS": "lora,kvzip_press"}
