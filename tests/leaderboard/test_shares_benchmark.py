"""A searched table of shares against equal ones: a run on a tiny model, on the text that is read if none is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from kvzip_press.leaderboard.benchmarks import shares
from kvzip_press.loading import by_name
from kvzip_press.testing import ByteTokenizer, tiny_model


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_layers=2)
    monkeypatch.setattr(by_name, "load_model", lambda name, **_: (model, ByteTokenizer()))


def test_pieces_of_pythons_reference_are_searched_and_held_out(tmp_path: Path) -> None:
    file = tmp_path / "cells.json"
    shares.main(None, length=64, pieces=5, press=["snapkv"], removed=[0.5, 0.8], model="tiny", output=file)
    said = json.loads(file.read_text(encoding="utf-8"))
    assert said["length"] == 64 and [cell["removed"] for cell in said["cells"]] == [0.5, 0.8]
    for cell in said["cells"]:
        assert cell["pieces"] == 2  # of five, three of which are searched on
        assert cell["table"] - cell["equal"] == pytest.approx(cell["difference"])
        assert cell["settings"] is not None or cell["difference"] == 0


def test_texts_of_fewer_than_four_pieces_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a" * 190, encoding="utf-8")
    with pytest.raises(typer.BadParameter, match="expected text of at least 4 pieces of 64 tokens, got 2"):
        shares.main([text], length=64, model="tiny")
