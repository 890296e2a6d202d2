"""Requests over HTTP about contexts that cannot be asked about: refused before vLLM's engine sees them."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.serving.vllm.requests import context_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
PARAMS = "kv_transfer_params"
_SIGNS = PARAMS.encode(), rb"\u", b"\0"  # as JSON may spell it: letters, escapes, 16 or 32 bits a letter


class Guard:
    """Stands in front of what answers a route, behind the server's key: strangers do not learn which names there are.

    What it does not refuse passes as it came, whatever the client sends, or its going, afterwards included.

    Args:
        app: What answers the route.
        check: Raises an error of this package for ``kv_transfer_params`` that cannot be answered. It is called in a
            thread, since it may read files.
    """

    def __init__(self, app: Application, check: Callable[[object], None]) -> None:
        self._app, self._check = app, check

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Takes what a route gives to what answers it."""
        read = await _body(receive) if _is_json(scope) else deque()
        body = b"".join(message.get("body", b"") for message in read)
        answers: Application = self._app
        if any(sign in body for sign in _SIGNS):  # so few requests are read twice
            try:
                await asyncio.to_thread(check_body, body, self._check)
            except KVzipPressError as error:
                answers = refusal(error)

        async def again() -> Message:
            return read.popleft() if read else await receive()

        await answers(scope, again, send)


def check_body(body: bytes, check: Callable[[object], None]) -> None:
    """Checks all that the body of a request says of contexts.

    Args:
        body: JSON; what it says in another form, the server refuses itself.
        check: Raises for ``kv_transfer_params`` that cannot be answered.

    Raises:
        InvalidArgumentError: One of them cannot be answered, or beam search would, without the context.
    """
    try:
        request = json.loads(body)  # as the server reads it, which takes the last one of equal names
    except (ValueError, RecursionError):
        return
    for params in _asked_for(request):
        check(params)
        if context_of(params) is not None and request.get("use_beam_search"):
            raise InvalidArgumentError("expected a question about a context without beam search, which would ignore it")


def json_answer(status: int, content: Any) -> Any:
    """Returns an answer in JSON, an application of Starlette's."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status)


def refusal(error: KVzipPressError) -> Any:
    """Returns an answer with status 400, in the form of the server's own errors."""
    problem = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
    return json_answer(400, {"error": problem})


def _asked_for(request: Any) -> Iterator[object]:
    """Yields ``kv_transfer_params`` from wherever vLLM takes them."""
    if not isinstance(request, Mapping):
        return
    sampling = request.get("sampling_params")  # of /inference/v1/generate, vLLM's own
    own = sampling.get("extra_args") if isinstance(sampling, Mapping) else None
    for place in (request, request.get("vllm_xargs"), own):
        if isinstance(place, Mapping):
            yield place.get(PARAMS)


def _is_json(scope: Message) -> bool:
    return any(name == b"content-type" and b"json" in value.lower() for name, value in scope["headers"])


async def _body(receive: Receive) -> deque[Message]:
    """Returns the messages that make up a request's body, the last of which may say that the client has gone."""
    read: deque[Message] = deque()
    while not read or read[-1].get("more_body"):
        read.append(await receive())
    return read
