"""Every picture is drawn from none, one and many rows, and labels stay apart."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from kvzip_press.errors import MissingDependencyError
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.pictures import save_all
from kvzip_press.leaderboard.pictures.canvas import looks
from kvzip_press.leaderboard.pictures.pareto import KEPT, TIME, Cost, save_pareto, spread
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

MakeTable = Callable[..., list[Row]]
MakeHeads = Callable[..., list[HeadBudgets]]


def test_a_table_has_all_pictures(make_table: MakeTable, make_heads: MakeHeads, tmp_path: Path) -> None:
    paths = save_all(make_table(4), make_heads(), tmp_path / "new")
    names = ["pareto-kept.png", "pareto-time.png", "tasks.png", "heads.png", "needles-niah.png"]
    assert paths == [tmp_path / "new" / name for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


@pytest.mark.parametrize("n_rows", [0, 1])
def test_few_rows_give_pictures_too(n_rows: int, make_table: MakeTable, tmp_path: Path) -> None:
    paths = save_all(make_table(1)[:n_rows], [], tmp_path)
    assert [path.name for path in paths[:3]] == ["pareto-kept.png", "pareto-time.png", "tasks.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_each_table_has_a_folder_when_there_are_several(make_table: MakeTable, tmp_path: Path) -> None:
    rows = make_table(1) + make_table(1, query_aware=True) + make_table(1, model="org/big", run_id="other")
    folders = {path.parent.name for path in save_all(rows, [], tmp_path)}
    assert folders == {"tiny-0123456789ab", "tiny-0123456789ab-query-aware", "org-big-other"}


def test_rows_without_sizes_and_times_are_drawn_without_them(make_table: MakeTable, tmp_path: Path) -> None:
    unknown = {"n_answer_tokens": None, "prefill_seconds": None, "score_seconds": None}
    save_all(make_table(1, **unknown), [], tmp_path)
    assert (tmp_path / "pareto-time.png").is_file()


@pytest.mark.parametrize("cost", [KEPT, TIME])
def test_every_point_lies_inside_the_axes(
    cost: Cost, make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    cells = summarise(make_table(2))
    save_pareto(cells, tmp_path / "pareto.png", cost=cost)
    ((axes,),) = (figure.axes for figure in drawn)
    low, high = axes.get_xlim()
    places = [cost.value(cell) or 0.0 for cell in cells]
    assert low <= min(places) and max(places) <= high <= 2 * max(places)


def test_forty_two_presses_look_different() -> None:
    found = looks([f"press {i}" for i in range(42)], None)
    assert len(set(found.values())) == 42


def test_labels_keep_their_distance_and_their_order() -> None:
    heights = spread([0.0, 0.01, 0.5, 0.98, 0.99, 1.0], 0.05, highest=1.0)
    assert all(above - below >= 0.05 - 1e-9 for below, above in itertools.pairwise(heights))
    assert heights[0] == 0.0 and heights[2] == 0.5 and heights[-1] == 1.0
    assert spread([], 0.05, highest=1.0) == []


def test_without_matplotlib_the_command_is_named(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        save_all(make_table(1), [], tmp_path)
