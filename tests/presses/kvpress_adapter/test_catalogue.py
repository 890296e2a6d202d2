"""kvpress presses by name."""

from __future__ import annotations

from typing import Any

import pytest

from kvzip_press import RaggedPress, get_press
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses import PRESSES

pytestmark = pytest.mark.kvpress

NAMES = [info.name for info in PRESSES if info.needs_kvpress]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_press_of_that_ratio(name: str) -> None:
    press = get_press(name, 0.3)
    assert isinstance(press, RaggedPress)
    assert press.compression_ratio == 0.3


def test_options_reach_the_class_that_takes_them() -> None:
    press: Any = get_press("adakv_snapkv", 0.3, alpha_safeguard=0.1, window_size=32)
    assert (press.press.alpha_safeguard, press.press.press.window_size) == (0.1, 32)


def test_an_unknown_option_names_those_that_exist() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"options of AdaKVPress of SnapKVPress among alpha_safeguard, .*, got 'window'"
    ):
        get_press("adakv_snapkv", 0.3, window=32)


@pytest.mark.parametrize("name", ["kvpress_snapkv", "adakv_snapkv", "kvpress_duo_attention"])
@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(name: str, ratio: float) -> None:
    with pytest.raises(InvalidArgumentError, match="ompression"):
        get_press(name, ratio)
