"""Files that say which layers of a model read the keys and values of which: JSON. Reading one runs no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import replacing
from kvzip_press.untrusted import parse_json, read_bytes

FORMAT = "kvzip_press_shared_layers"
_MAX_BYTES = 2**20
_MAX_LAYERS = 10_000


def write_sources(path: Path, sources: Mapping[int, int], facts: Mapping[str, str], provenance: dict[str, Any]) -> None:
    """Writes which layers share, whole or not at all.

    Args:
        path: The file.
        sources: Index of each layer that reads another -> index of that other.
        facts: Facts of the model (:func:`kvzip_press.model.identity.facts_of`).
        provenance: Where the choice comes from.

    Raises:
        CacheFileError: The file cannot be written.
    """
    data = {
        "format": FORMAT,
        "model": dict(facts),
        "provenance": provenance,
        "sources": {str(layer): source for layer, source in sorted(sources.items())},
    }
    with replacing(path, parents=True) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_sources(path: Path) -> tuple[dict[int, int], dict[str, str]]:
    """Reads which layers share, and the facts of the model that they were chosen for.

    Raises:
        InvalidArgumentError: The file does not exist, or holds something else.
    """
    expected = f"expected shared layers in {path}, as `kvzip-press layers share` writes them"
    try:
        found = _ours(parse_json(read_bytes(path, max_bytes=_MAX_BYTES)))
        return _sources(found.get("sources")), _facts(found.get("model"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{expected}, got {type(error).__name__}: {error}") from error


def _ours(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"no JSON with format {FORMAT!r}")
    return found


def _sources(found: Any) -> dict[int, int]:
    items = found.items() if isinstance(found, dict) else ()
    if not items or not all(_is_index(name) and type(source) is int for name, source in items):
        raise ValueError("sources that are no layer indices for layer indices")
    return {int(name): source for name, source in items}


def _is_index(name: Any) -> bool:
    return isinstance(name, str) and name.isascii() and name.isdecimal() and int(name[:9]) < _MAX_LAYERS


def _facts(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("facts of a model that are no texts")
    return dict(found)
