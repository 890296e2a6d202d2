"""Contexts over HTTP: routes of vLLM's server of our own, and a guard in front of those that ask about contexts.

Both stand behind the server's key and its limits. They come by an ASGI middleware (``--middleware``), since plugins of
vLLM 0.24 have no routes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from kvzip_press.errors import KVzipPressError
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.guard import Application, Guard, Message, Receive, Send, json_answer, refusal
from kvzip_press.serving.vllm.requests import FACTS, NameCheck
from kvzip_press.serving.vllm.uploads import Uploads

PATH = "/v1/contexts"


class ContextRoutes:
    """Adds the guard and the routes when the server begins, and hands on whatever comes.

    It answers nothing itself: a middleware stands before the check of the server's key, a route behind it.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Takes what a server gives an ASGI application."""
        if scope["type"] == "lifespan":
            served = ServedModel.read(os.environ[FACTS])
            guard_routes(scope["app"], NameCheck(served))
            add_routes(scope["app"], Uploads(served))
        await self._app(scope, receive, send)


def guard_routes(app: Any, check: Callable[[object], None]) -> None:
    """Puts a :class:`Guard` in front of all routes that a server has so far and that take a body.

    Args:
        app: The server's application, of Starlette.
        check: Raises for ``kv_transfer_params`` that cannot be answered.
    """
    for route in app.routes:
        if "POST" in (getattr(route, "methods", None) or ()):
            route.app = Guard(route.app, check)


def add_routes(app: Any, uploads: Uploads) -> None:
    """Adds two routes to a server.

    ``GET /v1/contexts`` lists contexts, ``POST /v1/contexts?name=report`` adds one: the body is its file.

    Args:
        app: The server's application, of Starlette.
        uploads: The contexts.
    """

    def listed(_: Any) -> Any:
        return json_answer(200, uploads.listed())

    async def add(request: Any) -> Any:
        try:
            return json_answer(201, await uploads.add(request.query_params.get("name"), request.stream()))
        except KVzipPressError as error:
            return refusal(error)

    app.add_route(PATH, listed, methods=["GET"])
    app.add_route(PATH, add, methods=["POST"])
