"""Every picture is drawn from none, one and many rows; names cross nothing, and text is readable on its ground."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from kvzip_press.errors import MissingDependencyError
from kvzip_press.leaderboard.analysis.looks import FULL_MARKER, MARKERS
from kvzip_press.leaderboard.analysis.maps import needle_maps
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.pictures import draw_tokens, save_all
from kvzip_press.leaderboard.pictures.canvas import HEAT, SIGNS, ink_on, luminance
from kvzip_press.leaderboard.pictures.pareto import KEPT, TIME, Cost, save_pareto
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

MakeTable = Callable[..., list[Row]]
MakeHeads = Callable[..., list[HeadBudgets]]


def test_a_table_has_all_pictures(make_table: MakeTable, make_heads: MakeHeads, tmp_path: Path) -> None:
    paths = save_all(make_table(4), make_heads(), tmp_path / "new")
    names = ["pareto-kept.png", "pareto-time.png", "tasks.png", "heads.png", "needles-niah.png"]
    assert paths == [tmp_path / "new" / name for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


def test_storages_are_lines_over_bytes(make_row: Callable[..., Row], tmp_path: Path, figures: list[Any]) -> None:
    """The first picture, where there are several: the same pairs, at another place for each storage."""
    times = {"model": 1.0, "int8": 2.0, "int4": 4.0}
    rows = [
        make_row(press=f"kvzip, {name}", storage=name, compression_ratio=ratio, kept_fraction=1 - ratio,
                 dense_bytes=1000, resident_bytes=round(1000 * (1 - ratio) / smaller))
        for name, smaller in times.items()
        for ratio in (0.0, 0.5)
    ]  # fmt: skip
    assert save_all(rows, [], tmp_path)[0] == tmp_path / "pareto-bytes.png"
    ((axes,), *_) = (figure.axes for figure in figures)
    places = sorted(tuple(sorted(one[0].get_xdata())) for one in axes.containers)
    assert places == [(0.125, 0.25), (0.25, 0.5), (0.5, 1.0)]
    names = [path.name for path in save_all([row for row in rows if row.storage == "int8"], [], tmp_path)]
    assert "pareto-bytes.png" not in names


@pytest.mark.parametrize("n_rows", [0, 1])
def test_few_rows_give_pictures_too(n_rows: int, make_table: MakeTable, tmp_path: Path) -> None:
    paths = save_all(make_table(1)[:n_rows], [], tmp_path)
    assert [path.name for path in paths[:2]] == ["pareto-kept.png", "tasks.png"]  # one cell's time differs from none
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_each_table_has_a_folder_when_there_are_several(make_table: MakeTable, tmp_path: Path) -> None:
    rows = make_table(1) + make_table(1, query_aware=True) + make_table(1, model="org/big", run_id="other")
    folders = {path.parent.name for path in save_all(rows, [], tmp_path)}
    assert folders == {"tiny-0123456789ab", "tiny-0123456789ab-query-aware", "org-big-other"}


def test_what_heads_of_two_models_keep_is_drawn_side_by_side(
    make_table: MakeTable, make_heads: MakeHeads, tmp_path: Path, figures: list[Any]
) -> None:
    rows = make_table(2) + make_table(2, model="org/bigger", run_id="other")
    paths = save_all(rows, make_heads() + make_heads("other"), tmp_path)
    assert paths[-1] == tmp_path / "heads-of-models.png"
    maps = [axes for axes in figures[-1].axes if axes.get_xlabel() == "layer"]
    assert [axes.get_title() for axes in maps] == [
        "tiny: KVzip, 0.75 removed",
        "org/bigger: KVzip, 0.75 removed",
    ]
    boxes = [axes.get_position() for axes in maps]
    assert boxes[0].x1 < boxes[1].x0 and boxes[0].y0 == pytest.approx(boxes[1].y0)
    names = [path.name for path in save_all(rows, make_heads(), tmp_path / "one")]
    assert "heads.png" in names and "heads-of-models.png" not in names
    again = make_table(2) + make_table(2, run_id="other")  # two runs of one model are no two models
    heads = make_heads() + make_heads("other")
    assert "heads-of-models.png" not in [path.name for path in save_all(again, heads, tmp_path / "again")]


def test_rows_without_sizes_and_times_are_drawn_without_them(make_table: MakeTable, tmp_path: Path) -> None:
    unknown = {"n_answer_tokens": None, "prefill_seconds": None, "score_seconds": None}
    names = [path.name for path in save_all(make_table(1, **unknown), [], tmp_path)]
    assert names == ["pareto-kept.png", "tasks.png", "needles-niah.png"]


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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that would have been saved."""
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def contrast(ink: Sequence[float], ground: Sequence[float]) -> float:
    low, high = sorted((luminance(ink) + 0.05, luminance(ground) + 0.05))
    return high / low


@pytest.mark.parametrize("n_presses", [3, 11, 60])
def test_names_stand_beside_the_axes_where_no_line_runs(
    n_presses: int, make_row: Callable[..., Row], tmp_path: Path, figures: list[Any]
) -> None:
    presses = [f"a press with a long name {place}" for place in range(n_presses)]
    rows = [
        make_row(press=press, compression_ratio=ratio, kept_fraction=1 - ratio, score=0.75)
        for press in presses
        for ratio in (0.5, 0.9)
    ]
    save_pareto(summarise(rows), tmp_path / "pareto.png")
    (figure,) = figures
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.get_legend().get_texts()]
    inside, whole = axes.get_window_extent(), figure.bbox
    assert len(boxes) == n_presses
    assert all(inside.x1 < box.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 for box in boxes)
    assert not any(box.overlaps(other) for place, box in enumerate(boxes) for other in boxes[:place])
    assert len(axes.texts) == 0  # nothing is written among the curves


def test_every_marker_has_a_sign() -> None:
    assert SIGNS.keys() == {*MARKERS, FULL_MARKER}


def test_text_is_readable_on_every_ground_of_a_heat_map() -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    for value in range(101):
        ground = colormaps[HEAT](value / 100)
        assert contrast(to_rgb(ink_on(ground)), ground) >= 4.5, value


def test_tokens_are_readable_and_end_lines() -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    tokens = ["The", " cat", "\n", " sat", " $x", "\n\n", " down"]
    draw_tokens(axes, tokens, [place / 6 for place in range(7)], "a title", columns=10)
    grounds = [patch.get_facecolor() for patch in axes.patches]
    found = [(text.get_text(), text.get_position()) for text in axes.texts]
    assert [text for text, _ in found] == ["The", " cat", "", " sat", " $x", "  ", "down"]
    assert [line for _, (_, line) in found] == [0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 2.5]
    for text, ground in zip(axes.texts, grounds, strict=True):
        assert contrast(to_rgb(text.get_color()), ground) >= 4.5
    with pytest.raises(ValueError, match="zip"):
        draw_tokens(axes, tokens, [0.5])


def test_needles_of_one_length_are_drawn_by_press_and_depth(
    make_table: MakeTable, tmp_path: Path, figures: list[Any]
) -> None:
    """A map of one column says less than a line of the table."""
    rows = make_table(4, tasks=("niah",))
    save_all(rows, [], tmp_path)
    lengths = figures[-1].axes[0]
    assert len(lengths.get_xticks()) == 2 and lengths.get_ylabel() == "depth"
    one_length = [row for row in rows if row.n_context_tokens is not None and row.n_context_tokens < 600]
    save_all(one_length, [], tmp_path)
    depths = figures[-1].axes[0]
    assert [text.get_text() for text in depths.get_yticklabels()] == ["full cache", "KVzip", "SnapKV", "random"]
    assert depths.get_xticklabels()[0].get_text() == "0–10 %"
    maps = {one.press: one for one in needle_maps(one_length) if one.compression_ratio in (0, 0.75)}
    written = [float(text.get_text()) for text in depths.texts]
    expected = [score for one in maps.values() for score in one.scores_by_depth if score is not None]
    assert written == pytest.approx(expected, abs=0.005) and len(written) == 8


def test_a_mean_over_lengths_counts_questions(make_row: Callable[..., Row]) -> None:
    rows = [
        make_row(question_id=str(place), tags={"depth": 0.05}, n_context_tokens=length, score=score)
        for place, (length, score) in enumerate([(500, 1.0), (1000, 0.0), (1000, 0.0), (1000, 0.0)])
    ]
    (found,) = needle_maps(rows)
    assert found.scores_by_depth == [0.25, *[None] * 9]


@pytest.mark.parametrize("differ", [True, False])
def test_times_are_drawn_only_where_they_differ(differ: bool, make_table: MakeTable, tmp_path: Path) -> None:
    rows = make_table(3)
    if not differ:
        rows = [replace(row, answer_seconds=0.2 + 0.01 * (place % 7)) for place, row in enumerate(rows)]
    names = [path.name for path in save_all(rows, [], tmp_path)]
    assert ("pareto-time.png" in names) is differ


def test_without_matplotlib_the_command_is_named(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        save_all(make_table(1), [], tmp_path)
