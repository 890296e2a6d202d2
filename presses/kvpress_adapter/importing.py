"""Imports kvpress without its side effect, and only with versions that work."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvzip_press import compat
from kvzip_press.errors import MissingDependencyError, install_command

# From the first version, below the second: as in the extra `kvpress` of pyproject.toml and, for transformers, kvpress's
# own metadata. Tests compare.
KVPRESS = ("0.5.5", "0.6")
TRANSFORMERS = ("4.56.2", "5.3")


def kvpress() -> Any:
    """Imports and returns the package kvpress.

    Importing it wraps every attention function of transformers, for all models of the process, and breaks
    flex_attention. That is undone if it is imported here. kvpress's masking presses need the wrappers when they are
    used by themselves, without :class:`RaggedPress`: in that case import kvpress first (or call
    ``kvpress.attention_patch.patch_attention_functions()``), and nothing of it is touched.

    Raises:
        MissingDependencyError: kvpress is missing, or a version is outside the range that works.
    """
    _check_versions()
    if "kvpress" in sys.modules:
        return sys.modules["kvpress"]
    with _attention_functions_restored():
        return importlib.import_module("kvpress")


def _check_versions() -> None:
    expected = (
        f"expected kvpress {KVPRESS[0]} or newer and below {KVPRESS[1]}, with transformers {TRANSFORMERS[0]} or newer "
        f"and below {TRANSFORMERS[1]} ({install_command('kvpress')})"
    )
    try:
        found = importlib.metadata.version("kvpress")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(f"{expected}, found no kvpress") from error
    transformers = str(compat.TRANSFORMERS_VERSION)
    if not compat.is_within(found, KVPRESS) or not compat.is_within(transformers, TRANSFORMERS):
        raise MissingDependencyError(f"{expected}, found kvpress {found} and transformers {transformers}")


@contextmanager
def _attention_functions_restored() -> Iterator[None]:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    try:
        yield
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is function:
                continue
            del ALL_ATTENTION_FUNCTIONS[name]  # the override that was put over the library-wide entry
            if ALL_ATTENTION_FUNCTIONS.get(name) is not function:
                ALL_ATTENTION_FUNCTIONS[name] = function  # that was an override, too
