"""What a request says of its context, and its refusal before the engine sees it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvzip_press.cache.file.reading import check_contents
from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.serving.folder import ContextFolder
from kvzip_press.serving.vllm.facts import ServedModel

if TYPE_CHECKING:
    from vllm import SamplingParams

FACTS = "KVZIP_PRESS_SERVED_MODEL"  # environment variable with the path of the facts, in every process of an engine


def context_of(params: object) -> str | None:
    """Returns the context that ``kv_transfer_params`` of a request name; None for a request without one.

    Raises:
        InvalidArgumentError: They are something else than an object with a text "context".
    """
    if params is None:
        return None
    name = params.get("context") if isinstance(params, Mapping) else params
    if not isinstance(params, Mapping) or not (name is None or isinstance(name, str)):
        raise InvalidArgumentError(f'expected kv_transfer_params {{"context": name}}, got {params!r:.80}')
    return name


class NameCheck:
    """Refuses what an engine could not answer: an unknown context, a torn file, another model's, one beyond the pool.

    A file is read once, whole, when it is first asked about, and again when it has changed.

    Args:
        served: The model and its contexts.
    """

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._folder = ContextFolder(served.folder, served.check)
        self._read: dict[str, object] = {}
        self._lock = threading.Lock()

    def __call__(self, params: object) -> None:
        """Raises InvalidArgumentError, a ValueError, for ``kv_transfer_params`` that cannot be answered."""
        name = context_of(params)
        if name is None:
            return
        with self._lock:
            file = self._folder.find(name)
            if self._read.get(name) == file.mark:
                return
            try:
                check_contents(file.path)
                self._served.check_room(file.path)
            except KVzipPressError as error:
                self._folder.refuse(name, file, error)
            self._folder.find(name)  # says why, without the path
            self._read[name] = file.mark


_CHECKS: dict[str, NameCheck] = {}  # by path of the facts


def context_params(name: str | None, **sampling: Any) -> SamplingParams:
    """Returns vLLM's sampling parameters for a question about a context, to be given to ``vllm.LLM`` and its like.

    Whether the engine can answer it is checked at once: it would find out too late to say more than that it failed.

    Args:
        name: The context; None for a question about none.
        **sampling: What ``vllm.SamplingParams`` takes.

    Raises:
        InvalidArgumentError: The context is unknown or cannot be read, or no engine was prepared
            (:func:`kvzip_press.serving.vllm.plugin.engine_options`): another one would answer without the context.
    """
    from vllm import SamplingParams

    if name is None:
        return SamplingParams(**sampling)
    path = os.environ.get(FACTS)
    if not path:
        raise InvalidArgumentError("expected an engine with the options of engine_options, got none yet")
    if path not in _CHECKS:
        _CHECKS[path] = NameCheck(ServedModel.read(path))
    params = {"context": name}
    _CHECKS[path](params)
    extra = {**(sampling.pop("extra_args", None) or {}), "kv_transfer_params": params}
    return SamplingParams(**sampling, extra_args=extra)
