"""The storages by the names that users give them."""

from __future__ import annotations

from kvzip_press.cache.codecs.fp8 import Fp8
from kvzip_press.cache.codecs.int4 import Int4
from kvzip_press.cache.codecs.int8 import Int8
from kvzip_press.cache.codecs.k8v4 import K8V4
from kvzip_press.cache.codecs.kivi import Kivi2, Kivi4
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.cache.codecs.storage import Storage
from kvzip_press.cache.codecs.tiers import Tiers
from kvzip_press.errors import InvalidArgumentError, did_you_mean

#: Name -> storage.
STORAGES: dict[str, type[Storage]] = {
    "model": ModelDtype,
    "int8": Int8,
    "fp8": Fp8,
    "k8v4": K8V4,
    "int4": Int4,
    "kivi4": Kivi4,
    "kivi2": Kivi2,
    "tiers": Tiers,
}


def storage_named(name: str) -> type[Storage]:
    """Returns the storage of a name, which may be followed by a colon and parameters, as in "tiers:0.5".

    Raises:
        InvalidArgumentError: There is none; the message names all, and the nearest one.
    """
    plain, colon, parameters = name.partition(":") if isinstance(name, str) else (name, "", "")
    if not isinstance(plain, str) or plain not in STORAGES:
        hint = did_you_mean(plain, STORAGES) if isinstance(plain, str) else ""
        raise InvalidArgumentError(f"expected a storage out of {', '.join(STORAGES)}, got {name!r:.80}{hint}")
    kind = STORAGES[plain]
    return kind.with_parameters(parameters) if colon else kind


def name_of(storage: type[Storage]) -> str:
    """Returns the name of a storage, with its parameters."""
    plain = next((name for name, kind in STORAGES.items() if kind is storage), "")
    if plain:
        return plain
    return f"{next(name for name, kind in STORAGES.items() if issubclass(storage, kind))}:{storage.parameters}"
