"""A value of another kind than a press's field is refused when the press is made, in an error of ours."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from kvzip_press import RandomPress, Scores, get_press, prefill
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress
from kvzip_press.presses import PRESSES
from kvzip_press.presses.decoding import KnormDecodePress
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.any_transformers

OF_OTHER_KINDS: dict[str, list[Any]] = {
    "bool": ["no", None, 0, 1, 1.0],
    "int": ["4", None, True, 1.5, float("nan"), [1]],
    "float": ["0.5", None, True, float("nan"), [0.5]],
}


def ours() -> dict[str, type]:
    """The classes of the presses by name; where the table has a function, its class is another line's."""
    found = {}
    for info in PRESSES:
        if isinstance(info.target, str) and not info.needs_kvpress:
            module, name = info.target.split(":")
            kind = getattr(import_module(module), name)
            if isinstance(kind, type) and kind is not type(None):
                found[info.name] = kind
    return found


CASES = [
    pytest.param(kind, field.name, value, id=f"{name}-{field.name}-{value!r}")
    for name, kind in ours().items()
    for field in fields(kind)
    if field.init and field.name != "compression_ratio"
    for value in OF_OTHER_KINDS.get(str(field.type), [])
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_value_of_another_kind_is_refused(kind: Any, name: str, value: Any) -> None:
    budget = {"budget": 64} if hasattr(kind, "n_queries") else {}
    with pytest.raises(
        InvalidArgumentError, match=rf"{kind.__name__}: expected {name} to be (True or F|an int|a numb)"
    ):
        kind(**budget, **{name: value})


def test_there_are_cases_of_every_kind() -> None:
    assert len(CASES) > 200 and {"snapkv", "kvzip", "rkv", "fastkvzip", "random"} <= set(ours())


def test_numbers_of_numpy_and_integers_for_floats_are_taken() -> None:
    """Also in a press of a user's own, whose types are no strings."""
    own = _OwnPress(weight=1, n_last=np.int64(3))
    assert (own.weight, own.n_last) == (1, 3)
    assert _OwnPress(weight=np.float32(0.5)).weight == 0.5
    with pytest.raises(InvalidArgumentError, match="_OwnPress: expected n_last to be an int, got '3'"):
        _OwnPress(n_last="3")
    with pytest.raises(InvalidArgumentError, match="expected seed to be an int, got None"):
        RandomPress(0.5, seed=None)


@pytest.mark.parametrize("given", [None, 1, True, 0.5, "01", [True], [0.0], {0: 1}])
def test_layers_to_skip_are_a_sequence_of_indices(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="expected skip_layers as a sequence of indices of layers, got"):
        KnormDecodePress(budget=64, skip_layers=given)
    assert KnormDecodePress(budget=64, skip_layers=[1]).skip_layers == (1,)


@pytest.mark.parametrize("given", [5, 5.5, [1], b"x"])
def test_what_is_read_from_a_file_is_that_or_its_path(given: Any) -> None:
    for name, field, message in (
        ("fastkvzip", "gate", "expected Gates, a path or a hub repository, got"),
        ("trimkv", "gate", "TrimKVPress: expected gate as TrimKVGates or the path of a folder, got"),
        ("triattention", "queries", "TriAttentionPress: expected queries as QueryStatistics or a path, got"),
        ("kvzip_head", "scores", "expected HeadScores or a path, got"),
        ("duo_attention", "scores", "expected HeadScores or a path, got"),
        ("kvzip", "tokenizer", r"KVzipPress\(tokenizer=...\): expected a tokenizer, got"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            get_press(name, **({"budget": 300} if name.startswith("tri") else {}), **{field: given})


def test_seeds_and_first_tokens_out_of_range_are_refused() -> None:
    for seed in (-1, 2**40, 10**30):
        for press in ("random", "none", "random_decode"):
            with pytest.raises(InvalidArgumentError, match=f"expected a seed from 0 to 1099511627775, got {seed}"):
                get_press(press, seed=seed, **({"budget": 300} if press == "random_decode" else {}))
    with pytest.raises(InvalidArgumentError, match="expected n_sink >= 0, got -1"):
        RandomPress(0.5, n_sink=-1)
    read = prefill(tiny_model(), ByteTokenizer(), list(range(3, 43)))
    drawn = [RandomPress(0.5, seed=seed).score(read) for seed in (7, np.int64(7))]
    assert all(torch.equal(drawn[0].layers[i], drawn[1].layers[i]) for i in drawn[0].layers)


@dataclass(frozen=True)
class _OwnPress(AllocatingPress):
    weight: float = 0.5
    n_last: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or self.n_last < 0:
            raise InvalidArgumentError("out of range")
        super().__post_init__()

    def score(self, prefill: Prefill) -> Scores:
        return Scores(prefill.blank_scores(), prefill.first_tokens(0), self.policy)


_OwnPress.__dataclass_fields__["weight"].type = float  # as without `from __future__ import annotations`
