"""The storages by the names that users give them."""

from __future__ import annotations

from kvzip_press.cache.codecs.fp8 import Fp8
from kvzip_press.cache.codecs.int4 import Int4
from kvzip_press.cache.codecs.int8 import Int8
from kvzip_press.cache.codecs.k8v4 import K8V4
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Storage
from kvzip_press.errors import InvalidArgumentError, did_you_mean

#: Name -> storage.
STORAGES: dict[str, type[Storage]] = {
    "model": ModelDtype,
    "int8": Int8,
    "fp8": Fp8,
    "k8v4": K8V4,
    "int4": Int4,
}


def storage_named(name: str) -> type[Storage]:
    """Returns the storage of a name.

    Raises:
        InvalidArgumentError: There is none; the message names all, and the nearest one.
    """
    if not isinstance(name, str) or name not in STORAGES:
        hint = did_you_mean(name, STORAGES) if isinstance(name, str) else ""
        raise InvalidArgumentError(f"expected a storage out of {', '.join(STORAGES)}, got {name!r:.80}{hint}")
    return STORAGES[name]


def name_of(storage: type[Storage]) -> str:
    """Returns the name of a storage."""
    return next(name for name, kind in STORAGES.items() if kind is storage)
