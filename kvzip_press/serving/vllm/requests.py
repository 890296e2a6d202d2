"""What a request says of its context, and its refusal before the engine sees it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from kvzip_press.cache.file.reading import check_contents
from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.serving.folder import ContextFolder
from kvzip_press.serving.vllm.facts import ServedModel

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


def check_request(sampling_params: Any) -> None:
    """Raises InvalidArgumentError for sampling parameters of vLLM whose context cannot be asked about."""
    path = os.environ.get(FACTS)
    params = (getattr(sampling_params, "extra_args", None) or {}).get("kv_transfer_params")
    if path is None or params is None:
        return
    if path not in _CHECKS:
        _CHECKS[path] = NameCheck(ServedModel.read(path))
    _CHECKS[path](params)
