"""The table of presses says what each is; the papers are those that the presses themselves name."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from kvzip_press import presses_table
from kvzip_press.arguments import named
from kvzip_press.arguments.named import PressInfo
from kvzip_press.presses import PRESSES, WRAPPERS

PAPER = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{5})")


def test_every_press_has_one_line_and_a_name_of_its_own() -> None:
    """Short enough for a table; only the baselines have no paper."""
    assert len({info.name for info in PRESSES}) == len(PRESSES)
    for info in PRESSES:
        assert 10 < len(info.summary) <= 80 and "\n" not in info.summary and not info.summary.endswith(".")
        assert re.fullmatch(r"\d{4}\.\d{5}", info.paper) or info.name in ("none", "random", "random_decode")
    of_a_budget = [info.name for info in PRESSES if ".presses.decoding." in str(info.target)]
    assert [info.name for info in PRESSES if not info.takes_ratio] == ["none", "leankv", *of_a_budget]


def named_by(module: str) -> set[str]:
    return set(PAPER.findall(importlib.import_module(module).__doc__ or ""))


@pytest.mark.parametrize(
    "info", [info for info in PRESSES if not info.needs_kvpress and info.paper], ids=lambda info: info.name
)
def test_a_press_of_ours_names_the_paper_of_its_line(info: PressInfo, kvpress: Any) -> None:
    assert isinstance(info.target, str)
    module = info.target.partition(":")[0]
    assert info.paper in named_by(module)


@pytest.mark.kvpress
@pytest.mark.parametrize("info", [info for info in PRESSES if info.needs_kvpress], ids=lambda info: info.name)
def test_a_press_of_kvpress_names_the_paper_of_its_line(info: PressInfo, kvpress: Any) -> None:
    """Expected Attention's names none."""
    from kvzip_press.presses.kvpress_adapter import catalogue

    outermost = getattr(kvpress, getattr(catalogue, info.name).classes[0])
    papers = PAPER.findall(outermost.__doc__)
    assert info.paper in papers or (not papers and info.name == "kvpress_expected_attention")


def test_a_table_of_presses_loads_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what they need: it is there where kvpress is not."""
    monkeypatch.setattr(named.importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    assert [info.name for info in presses_table()] == sorted(info.name for info in PRESSES)


def test_what_wraps_objects_of_another_library_exists() -> None:
    for target in WRAPPERS.values():
        module, _, name = target.partition(":")
        assert hasattr(importlib.import_module(module), name)
