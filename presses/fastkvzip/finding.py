"""Finds the gates of a model: those that were given, else those that come with the package, else those on the hub."""

from __future__ import annotations

import weakref
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.identity import same_shape, same_weights, shape_of
from kvzip_press.presses.fastkvzip import gate_file, published
from kvzip_press.presses.fastkvzip.gates import Gates

_FOLDER = Path(__file__).parent / "data"
_found: weakref.WeakKeyDictionary[nn.Module, dict[str, Gates]] = weakref.WeakKeyDictionary()


def gates_for(model: nn.Module, source: Gates | str | PathLike[str] | None) -> Gates:
    """Returns the gates of a model; each model is looked up only once.

    Args:
        model: The model.
        source: The gates; a file of them (our ``.safetensors``, or ``.pt`` as published); a folder or a hub repository
            (``name``, or ``name@revision``) laid out like Fast KVzip's; None for those that come with the package, else those in that repository.

    Raises:
        InvalidArgumentError: There are none, or they do not fit the model.
    """
    if isinstance(source, Gates):
        return source.check(model)
    known = _found.setdefault(model, {})
    if str(source) not in known:
        known[str(source)] = _read(model, source).check(model)
    return known[str(source)]


def _read(model: nn.Module, source: str | PathLike[str] | None) -> Gates:
    if source is None:
        return shipped_gates(model) or _downloaded(model)
    path = Path(source)
    if path.is_dir():
        return Gates.load(published.find(model, path))
    if path.suffix in (".pt", ".safetensors") or path.exists():
        return Gates.load(path)
    return Gates.load(published.download(model, str(source)))


def shipped_gates(model: nn.Module) -> Gates | None:
    """Returns the gates that come with the package for a model's shape and weights, or None if there are none."""
    for path in sorted(_FOLDER.glob("*.safetensors")):
        facts = gate_file.read_header(path)
        if same_shape(facts, model) and same_weights(facts, model):
            return Gates.load(path)
    return None


def _downloaded(model: Any) -> Gates:
    described = ", ".join(f"{name}={value}" for name, value in shape_of(model).items())
    wanted = f"expected gates for {type(model).__name__} ({described}), got none in the package"
    advice = "make them with `kvzip-press gates train --model MODEL --out FILE` and pass gate=FILE"
    path = str(getattr(model.config, "name_or_path", "") or "")
    if not path or Path(path).is_dir():  # a local folder's name stays private, and is no name in the repository
        raise InvalidArgumentError(f"{wanted}; {advice}, or pass gate={published.REPOSITORY!r} to look there by name")
    try:
        return Gates.load(published.download(model))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{wanted} and none on the hub ({error}); {advice}") from error
