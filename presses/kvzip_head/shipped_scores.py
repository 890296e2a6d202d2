"""Scores that come with the package, found by a model's shape and its weights, and the texts that they were made of."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.kvzip_head.head_scores import HeadScores
from kvzip_press.presses.kvzip_head.model_facts import SHAPE, alike, shape_of, weight_sketch

_FOLDER = Path(__file__).parent


def builtin_texts() -> dict[str, str]:
    """Name -> text: a page of prose and a page of code, both written for this package."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((_FOLDER / "texts").glob("*.txt"))}


def shipped_scores(model: nn.Module) -> HeadScores:
    """The scores that come with the package for a model.

    Raises:
        InvalidArgumentError: There are none for a model of this shape, or only for other weights of this shape.
    """
    shape, sketch = shape_of(model), None
    same_shape = []
    for path in sorted((_FOLDER / "data").glob("*.safetensors")):
        scores = HeadScores.load(path)
        if any(scores.provenance[name] != shape[name] for name in SHAPE):
            continue
        sketch = weight_sketch(model) if sketch is None else sketch
        if alike(json.loads(scores.provenance["k_proj_norms"]), sketch):
            return scores.check(model)
        same_shape.append(scores.provenance["model"])
    got = f"only those of other weights of this shape ({', '.join(same_shape)})" if same_shape else "none"
    described = ", ".join(f"{name}={value}" for name, value in shape.items())
    raise InvalidArgumentError(
        f"expected head scores shipped for {type(model).__name__} ({described}), got {got}: make them with "
        "`kvzip-press heads compute --model MODEL --out FILE` and pass scores=FILE"
    )
