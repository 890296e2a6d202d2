"""Names of presses, tasks and models are shown as text: in tables, on the bar, in pictures, in folders and answers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.analysis.table import results_table
from kvzip_press.leaderboard.pictures import save_all
from kvzip_press.leaderboard.progress import row_bar
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row, RowWriter
from kvzip_press.leaderboard.show import print_table
from kvzip_press.terminal import printable

MakeRow = Callable[..., Row]
HOSTILE = "[/b][red]x :boom: $\\frac{$ \x1b[31m\x07\u202e\nnext"
OBEYED = set("\x1b\x07\u202e\ud800")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=400, force_terminal=False)


@pytest.fixture
def row(make_row: MakeRow) -> Row:
    names = {"press": HOSTILE, "task": HOSTILE, "model": HOSTILE, "sample_id": HOSTILE, "question_id": HOSTILE}
    return make_row(**names, prediction=HOSTILE, tags={"depth": 0.5})


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_table_shows_them(row: Row, console: Console) -> None:
    console.print(results_table(summarise([row]), HOSTILE, {(row.press, row.compression_ratio): "†"}))
    assert printed(console).count(printable(HOSTILE)) == 2
    assert not set(printed(console)) & OBEYED


def test_the_table_of_a_directory_shows_them(row: Row, tmp_path: Path, console: Console) -> None:
    with RowWriter(tmp_path / "a[/b]\x1b" / "rows.jsonl") as writer:
        writer.write(row)
    print_table(tmp_path / "a[/b]\x1b", console=console)
    assert printed(console).count(printable(HOSTILE)) == 2
    assert "a[/b]\\x1b" in printed(console).replace("\n", "")
    assert not set(printed(console)) & OBEYED


def test_the_bar_shows_them(row: Row) -> None:
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system=None)
    with row_bar(console, 1) as on_row:
        on_row(row)
    assert printable(f"{HOSTILE} {HOSTILE}: {HOSTILE} 0.7") in printed(console)
    assert not set(printed(console)) & set("\x07\u202e")


@pytest.mark.filterwarnings("error")
def test_pictures_show_them(make_row: MakeRow, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "[/b] $\\frac{$ \x1b\ud800"
    row = make_row(press=name, task=name, model=name, tags={"depth": 0.5})
    heads = [HeadBudgets(row.run_id, row.task, row.sample_id, row.press, row.compression_ratio, (0,), ((0.5,),))]
    assert len(save_all([row], heads, tmp_path)) == 4
