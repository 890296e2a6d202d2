"""vLLM's entry point ``vllm.endpoint_plugins``: contexts over HTTP, behind the server's own key and limits."""

from __future__ import annotations

import os
from typing import Any

from kvzip_press.errors import KVzipPressError
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.requests import FACTS
from kvzip_press.serving.vllm.uploads import Uploads

PATH = "/v1/contexts"


class ContextEndpoints:
    """``GET /v1/contexts`` lists contexts, ``POST /v1/contexts?name=report`` adds one: the body is its file.

    Attributes:
        name: What ``VLLM_PLUGINS`` calls it.
        required_tasks: Servers that it is for: those that generate.
    """

    name = "kvzip_press"
    required_tasks: tuple[str, ...] = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Adds the routes to a server of ours; to others, none."""
        path = os.environ.get(FACTS)
        if path is None:
            return
        uploads = Uploads(ServedModel.read(path))

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

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Does nothing: the engine finds a context in the folder when it is asked about."""


def _answer(status: int, content: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status)
