"""The contexts that can be asked about by name, in memory or in a folder, and their way into the pool."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from kvzip_press.cache.file.reading import check_model
from kvzip_press.cache.file.record import CacheRecord
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.errors import CacheFileError, InvalidArgumentError, UnsupportedCacheError, did_you_mean
from kvzip_press.serving.folder import ContextFile, ContextFolder
from kvzip_press.serving.packing import (
    Packing,
    check_storage,
    packed_cache,
    packed_file,
    pairs_in_cache,
    pairs_in_file,
)
from kvzip_press.serving.pool import NO_CONTEXT, ContextPool, Held


class KnownContexts:
    """Names, and what they stand for; one thread at a time.

    Args:
        model: The model.
        pool: The pool.
        packing: How contexts are made into what the pool holds.
        folder: A folder of files; None for none.

    Raises:
        CacheFileError: The folder cannot be read.
    """

    def __init__(self, model: Any, pool: ContextPool, packing: Packing, folder: str | Path | None) -> None:
        self._model, self._pool, self._packing = model, pool, packing
        check = partial(_check, model=model, storage=packing.storage)
        self.folder = None if folder is None else ContextFolder(folder, check)
        self._caches: dict[str, RaggedCache] = {}
        self._loaded: dict[str, ContextFile] = {}  # what the pool's contexts of these names were read from

    @property
    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted({*self._caches, *(() if self.folder is None else self.folder.names)})

    def add(self, name: str, cache: RaggedCache) -> None:
        """Makes a cache known by a name; it goes before a file of that name.

        Raises:
            CacheMismatchError: Another model made the cache.
            InvalidArgumentError: It does not fit into the pool.
            UnsupportedCacheError: It cannot be shared, or not in the pool's storage.
        """
        context = packed_cache(cache, self._model, self._packing)
        self._pool.put(name, context)  # if there is no room now, it is packed again when it is asked about
        self._caches[name] = cache

    def check(self, name: str) -> None:
        """Raises InvalidArgumentError if there is no context of this name, or what there is cannot be read."""
        if name in self._caches:
            return
        if self.folder is None:
            raise InvalidArgumentError(
                f"expected the name of a context, got {name!r:.80}{did_you_mean(name, self._caches)}"
            )
        self.folder.find(name)

    def hold(self, name: str | None) -> Held | None:
        """Returns a context for a reader, brought into the pool if need be; None if there is no room for it now."""
        if name is None:
            return NO_CONTEXT
        cache = self._caches.get(name)
        file = None if cache is not None or self.folder is None else self.folder.find(name)
        if cache is not None or self._loaded.get(name) == file:
            held = self._pool.hold(name)
            if held is not None:
                return held
        n_pairs = pairs_in_file(file.path) if file is not None else pairs_in_cache(self._caches[name])
        if not self._pool.has_room(name, n_pairs):  # nothing is read that would have to wait
            return None
        if cache is not None:
            context = packed_cache(cache, self._model, self._packing)
        else:
            assert self.folder is not None and file is not None
            try:
                context = packed_file(file.path, self._model, self._packing)
            except (CacheFileError, UnsupportedCacheError) as error:
                self.folder.refuse(name, file, error)
                self.folder.find(name)  # says why, without the path
                raise
        if not self._pool.put(name, context):
            return None
        if file is not None:
            self._loaded[name] = file
        return self._pool.hold(name)

    def forget(self) -> None:
        """Forgets the caches in memory, and drops all contexts that nobody reads from the pool."""
        self._caches.clear()
        for name in self._pool.names:
            self._pool.drop(name)


def _check(record: CacheRecord, *, model: Any, storage: str) -> None:
    check_model(record, model)
    check_storage(record, storage)
