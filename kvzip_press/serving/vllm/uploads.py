"""Contexts that come to a server while it runs, and a list of those that it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from kvzip_press.cache.file.reading import check_contents, read_record
from kvzip_press.errors import CacheFileError, InvalidArgumentError, KVzipPressError
from kvzip_press.files import replacing
from kvzip_press.serving.folder import SUFFIX, ContextFolder, check_name
from kvzip_press.serving.packing import check_one_context
from kvzip_press.serving.vllm.facts import ServedModel

_BESIDE_PAIRS = 64_000_000  # bytes of a file that are not pairs: metadata, lengths


class Uploads:
    """The contexts of a server's folder, for those who ask it over HTTP.

    Args:
        served: The model and its contexts.
    """

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._folder = ContextFolder(served.folder, served.check)

    @property
    def max_bytes(self) -> int:
        """Most bytes of a file: positions and scores make a pair larger there than in the pool."""
        return 2 * self._served.pool_bytes * self._served.n_ranks + _BESIDE_PAIRS

    def listed(self) -> dict[str, Any]:
        """Returns the contexts that can be asked about, and why the folder's other files cannot."""
        self._folder.refresh()
        data = []
        for name in self._folder.names:
            try:
                data.append(_described(name, self._folder.find(name).path))
            except KVzipPressError:  # it has gone, or was replaced by something else, since
                continue
        return {"object": "list", "data": data, "refused": self._folder.refused}

    async def add(self, name: object, chunks: AsyncIterator[bytes]) -> dict[str, Any]:
        """Takes a file that ``RaggedCache.save`` wrote as a context, in place of an older one of that name.

        It is checked whole before it can be asked about; if it is refused, or the client goes, nothing has changed.

        Args:
            name: What it is asked for by.
            chunks: The file's bytes.

        Raises:
            CacheFileError: It is not one of this package's cache files, whole.
            CacheMismatchError: Another model made it.
            InvalidArgumentError: The name cannot be asked for, the file is too large, or it does not fit into the pool.
            UnsupportedCacheError: The pool cannot hold it.
        """
        if not isinstance(name, str):
            raise InvalidArgumentError(
                "expected the name of the context, as in POST /v1/contexts?name=report, got none"
            )
        check_name(name)
        target = self._folder.path / f"{name}{SUFFIX}"
        try:
            with replacing(target) as temporary:
                await self._write(temporary, chunks)
                await asyncio.to_thread(self._check, temporary)
        except KVzipPressError as error:
            raise type(error)(_without_folder(error, self._folder.path)) from error
        return _described(name, target)

    async def _write(self, path: Path, chunks: AsyncIterator[bytes]) -> None:
        n_bytes = 0
        with path.open("wb") as file:  # the kernel buffers; what waits is the check, in a thread
            async for chunk in chunks:
                n_bytes += len(chunk)
                if n_bytes > self.max_bytes:
                    raise InvalidArgumentError(
                        f"expected at most {self.max_bytes} bytes, more than fits into the pool, got a larger file"
                    )
                file.write(chunk)

    def _check(self, path: Path) -> None:
        check_contents(path)
        record = read_record(path)
        self._served.check(record)
        n_ragged = sum(layer.kind == "ragged" for layer in record.layers)
        check_one_context(len(record.layers), n_ragged, record.batch_size)
        self._served.check_room(path)


def _described(name: str, path: Path) -> dict[str, Any]:
    try:
        record, n_bytes = read_record(path), path.stat().st_size
    except OSError as error:
        raise CacheFileError(f"expected the file of {name!r}, got {type(error).__name__}") from error
    storage = record.layers[0].storage
    return {"id": name, "object": "context", "tokens": record.n_seen, "bytes": n_bytes, "storage": storage}


def _without_folder(error: KVzipPressError, folder: Path) -> str:
    """Returns a message without paths, which are nobody's business who only knows a name."""
    first, colon, rest = str(error).partition(": ")
    return (rest if colon and first.startswith(str(folder)) else str(error)).replace(str(folder), "the folder")
