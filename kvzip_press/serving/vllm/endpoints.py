"""Contexts over HTTP, as routes of vLLM's server: behind its key and its limits.

They come by an ASGI middleware (``--middleware``), since plugins of vLLM 0.24 have no routes.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from kvzip_press.errors import KVzipPressError
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.requests import FACTS
from kvzip_press.serving.vllm.uploads import Uploads

PATH = "/v1/contexts"
Application = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class ContextRoutes:
    """Adds the routes when the server begins, and hands on whatever comes.

    It answers nothing itself: a middleware stands before the check of the server's key, a route behind it.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Takes what a server gives an ASGI application."""
        if scope["type"] == "lifespan":
            add_routes(scope["app"], Uploads(ServedModel.read(os.environ[FACTS])))
        await self._app(scope, receive, send)


def add_routes(app: Any, uploads: Uploads) -> None:
    """Adds two routes to a server.

    ``GET /v1/contexts`` lists contexts, ``POST /v1/contexts?name=report`` adds one: the body is its file.

    Args:
        app: The server's application, of Starlette.
        uploads: The contexts.
    """

    def listed(_: Any) -> Any:
        return _answer(200, uploads.listed())

    async def add(request: Any) -> Any:
        try:
            return _answer(201, await uploads.add(request.query_params.get("name"), request.stream()))
        except KVzipPressError as error:  # in the form of the server's own errors
            problem = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
            return _answer(400, {"error": problem})

    app.add_route(PATH, listed, methods=["GET"])
    app.add_route(PATH, add, methods=["POST"])


def _answer(status: int, content: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status)
