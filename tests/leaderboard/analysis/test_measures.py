"""Measures beside accuracy: areas over bytes, what could be detected, which tasks count, how far models agree."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.correlation import _correlated, correlation_of_rows, rank_correlation
from kvzip_press.leaderboard.analysis.counting import task_ranges
from kvzip_press.leaderboard.analysis.curves import areas_over_bytes, areas_under_curves
from kvzip_press.leaderboard.analysis.statistics import compare
from kvzip_press.leaderboard.analysis.summary import summarise, summarise_tasks
from kvzip_press.leaderboard.analysis.written_table import written_table


def cells_at(make_row, points):
    """A cell for each (press, ratio, bytes, score)."""
    rows = [
        make_row(press=press, compression_ratio=ratio, resident_bytes=size, score=score, kept_fraction=1 - ratio)
        for press, ratio, size, score in points
    ]
    return summarise(rows)


def test_areas_are_over_the_logarithm_of_bytes(make_row) -> None:
    """From 1 to 4 MB are two halvings: a press at 0.5 in the first and rising to 1 in the second has 0.5 and 0.75."""
    cells = cells_at(
        make_row,
        [
            ("full cache", 0.0, 4_000_000, 1.0),
            ("a", 0.5, 2_000_000, 0.5),
            ("a", 0.75, 1_000_000, 0.5),
            ("b", 0.75, 1_000_000, 1.0),
            ("b", 0.5, 2_000_000, 1.0),
            ("short", 0.5, 2_000_000, 1.0),
        ],
    )
    found = areas_over_bytes(cells)
    assert found is not None
    assert (round(found.low), round(found.high)) == (1_000_000, 4_000_000)
    assert found.areas == {"a": pytest.approx(0.625), "b": pytest.approx(1.0), "short": None}
    unknown = [replace(cell, resident_bytes=None) for cell in cells]
    assert areas_over_bytes(unknown) is None
    assert areas_over_bytes([*cells[:2], cells[3]]) is None  # an amount each: no curve, but a line to the full cache


def test_a_press_measured_at_nothing_removed_shares_a_point_with_the_full_cache_and_has_an_area(make_row) -> None:
    """Storages at ratio 0 are smaller than the full cache, the model's own is not: all have both ratios."""
    points = [("full cache", 0.0, 4_000_000, 1.0), ("a", 0.0, 4_000_000, 1.0), ("a", 0.5, 2_000_000, 0.5)]
    points += [("a, int8", 0.0, 2_000_000, 1.0), ("a, int8", 0.5, 1_000_000, 0.5)]
    found = areas_over_bytes(cells_at(make_row, points))
    assert found is not None and (round(found.low), round(found.high)) == (2_000_000, 4_000_000)
    assert found.areas == {"a": pytest.approx(0.75), "a, int8": pytest.approx(1.0)}


def test_an_area_says_where_a_press_was_measured_last_if_others_were_measured_farther(make_row) -> None:
    """With int4 all pairs take a fourth of the bytes: three halvings of its four are a line to the full cache."""
    points = [("full cache", 0.0, 16_000_000, 1.0), ("a", 0.0, 15_900_000, 1.0), ("a", 0.75, 4_000_000, 0.25)]
    points += [("b", 0.0, 16_000_000, 1.0), ("b", 0.75, 4_000_000, 0.5)]
    points += [("a, int4", 0.0, 4_000_000, 0.5), ("a, int4", 0.75, 1_000_000, 0.25)]
    cells = cells_at(make_row, points)
    found = areas_over_bytes(cells)
    assert found is not None and found.ends == {"a, int4": 4_000_000} and found.areas["a, int4"] == found.areas["b"]
    of_kept = areas_under_curves(cells)
    assert of_kept is not None and of_kept.ends == {}
    said = written_table(cells, "markdown")
    assert re.search(r"\| a, int4 \|.*\| 0\.750 \(to 4 MB\) \|", said) and re.search(r"\| b \|.*\| 0\.750 \|", said)


def table_of(make_row, n_contexts, seed, **values):
    """Five presses whose accuracies lie 0.1 apart, on contexts of two tasks."""
    rng = np.random.default_rng(seed)
    return [
        make_row(press=press, compression_ratio=ratio, task=task, sample_id=f"{i:04d}", score=score, **values)
        for task in ("one", "two")
        for i in range(n_contexts)
        for ratio in (0.5, 0.9)
        for place, press in enumerate("abcde")
        for score in [float(rng.random() < 0.3 + 0.1 * place)]
    ]


def test_the_correlation_of_two_models_has_an_interval_of_contexts_drawn_anew(make_row) -> None:
    other = {"model": "bigger", "run_id": "other"}
    mine, theirs = table_of(make_row, 40, 1), table_of(make_row, 40, 2, **other)
    found = correlation_of_rows(mine, theirs, n_resamples=400)
    assert found.by_ratio == rank_correlation(summarise(mine), summarise(theirs)).by_ratio
    assert found.interval is not None and -1 <= found.interval[0] < found.mean <= found.interval[1] <= 1
    assert correlation_of_rows(mine, theirs, n_resamples=400) == found  # the same rows, the same draws
    few = correlation_of_rows(table_of(make_row, 5, 1), table_of(make_row, 5, 2, **other), n_resamples=400)
    assert few.interval is not None
    assert few.interval[1] - few.interval[0] > found.interval[1] - found.interval[0]
    assert correlation_of_rows(table_of(make_row, 1, 1), theirs, n_resamples=9).interval is None


def test_drawn_correlations_are_those_of_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(5)
    one, other = rng.integers(0, 3, (40, 6)).astype(float), rng.integers(0, 3, (40, 6)).astype(float)
    one[0] = 1.0
    found = _correlated(one, other)
    assert np.isnan(found[0])
    expected = [spearmanr(a, b).statistic for a, b in zip(one[1:], other[1:], strict=True)]
    np.testing.assert_allclose(found[1:], expected, atol=1e-12)


def test_a_difference_of_the_detectable_size_is_found_in_four_of_five_repetitions(make_row) -> None:
    rng = np.random.default_rng(3)
    n, spread, detected = 40, 0.2, []
    size = (1.960 + 0.842) * spread / math.sqrt(n)
    said = []
    for _ in range(60):
        differences = rng.normal(size, spread, n)
        rows = [
            make_row(press=press, sample_id=f"{i:04d}", score=float(0.5 + by * difference / 2))
            for i, difference in enumerate(np.clip(differences, -1, 1))
            for press, by in (("a", 1), ("b", -1))
        ]
        (one,) = compare(rows, "b", n_resamples=400)
        detected.append(one.p_value <= 0.05)
        said.append(one.detectable)
    assert np.mean(said) == pytest.approx(size, rel=0.05)
    assert 0.65 <= np.mean(detected) <= 0.93
    (alone,) = compare([make_row(press="a"), make_row(press="b")], "b", n_resamples=9)
    assert alone.detectable is None


def test_a_task_counts_where_presses_can_differ(make_row) -> None:
    scores = {"hard": (0.25, 0.2), "fair": (0.7, 0.1), "easy": (1.0, 0.0)}
    rows = [
        make_row(task=task, press=press, compression_ratio=ratio, score=score, sample_id=str(i))
        for task, (full, floor) in scores.items()
        for press, ratio, score in (("full cache", 0.0, full), ("random", 0.5, full), ("random", 0.9, floor))
        for i in range(3)
    ]
    found = {one.task: one for one in task_ranges(summarise_tasks(rows))}
    assert {task: one.counts for task, one in found.items()} == {"hard": False, "fair": True, "easy": False}
    assert found["fair"].floor == pytest.approx(0.1)
    assert "not clearly above the floor" in str(found["hard"]) and "at the ceiling" in str(found["easy"])
    spread = [replace(row, score=float(i % 2)) for i, row in enumerate(rows) if row.task == "fair"]
    assert not task_ranges(summarise_tasks(spread))[0].counts  # 0.7 on average, but with a large error
    assert task_ranges(summarise_tasks([row for row in rows if row.press == "random"])) == []
    followed = [replace(row, tags={"kl_nats": 0.0}) for row in rows]
    assert task_ranges(summarise_tasks(followed)) == []  # the full cache agrees with itself, whatever the task


def test_models_agree_by_ranks_within_a_ratio(make_row) -> None:
    mine = cells_at(
        make_row, [(p, r, 1, s - r / 2) for r in (0.5, 0.9) for p, s in zip("abcd", (0.9, 0.8, 0.7, 0.6), strict=True)]
    )
    same = cells_at(
        make_row, [(p, r, 1, s) for r in (0.5, 0.9) for p, s in zip("abcd", (0.4, 0.3, 0.2, 0.1), strict=True)]
    )
    back = cells_at(make_row, [(p, 0.5, 1, s) for p, s in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)])
    assert rank_correlation(mine, same).by_ratio == {0.5: pytest.approx(1), 0.9: pytest.approx(1)}
    assert rank_correlation(mine, back).by_ratio == {0.5: pytest.approx(-1)}
    assert rank_correlation(mine, back).n_presses == {0.5: 4}
    tied = cells_at(make_row, [(p, 0.5, 1, 0.5) for p in "abcd"])
    assert math.isnan(rank_correlation(mine, tied).mean)
    with pytest.raises(InvalidArgumentError, match="3 presses or more with the same label"):
        rank_correlation(mine, cells_at(make_row, [("a", 0.5, 1, 0.1), ("x", 0.5, 1, 0.1)]))


def test_a_written_table_has_presses_by_ratio(make_row) -> None:
    cells = cells_at(
        make_row,
        [
            ("full cache", 0.0, 4_000_000, 1.0),
            ("a_b & |c|", 0.5, 2_000_000, 0.5),
            ("a_b & |c|", 0.75, 1_000_000, 0.25),
            ("late", 0.75, 1_000_000, 0.75),
        ],
    )
    marks = {("a_b & |c|", 0.75): "†"}
    assert written_table(cells, "markdown", marks).splitlines() == [
        "| removed | 0.5 | 0.75 | area over bytes |",
        "| --- | ---: | ---: | ---: |",
        "| full cache | 1.00 | - | - |",
        "| a_b & &#124;c&#124; | 0.50 | 0.25 † | 0.562 |",
        "| late | - | 0.75 | 0.875 (to 1 MB) |",  # most of it is a line to the full cache
    ]
    latex = written_table(cells, "latex", marks).splitlines()
    assert latex[0] == r"\begin{tabular}{lrrr}" and latex[-1] == r"\end{tabular}"
    assert latex[5] == r"a\_b \& $|$c$|$ & 0.50 & 0.25 $^\dagger$ & 0.562 \\"
    with pytest.raises(InvalidArgumentError, match="latex, markdown"):
        written_table(cells, "html")


def cells_of_latex(text: str) -> list[list[str]]:
    """Reads a table as LaTeX would, strictly: braces and dollars balance, nothing active stands alone, rows are whole.

    Returns the cells of each row, as they are printed.
    """
    begin, *rows, end = text.splitlines()
    spec = re.fullmatch(r"\\begin\{tabular\}\{(l)(r+)\}", begin)
    assert spec and end == r"\end{tabular}"
    assert [rows.pop(0), rows.pop(1), rows.pop()] == [r"\toprule", r"\midrule", r"\bottomrule"]
    printed = []
    for row in rows:
        assert row.endswith(r" \\") and not re.match(r"\s*[\[*]", row), row
        cells = re.split(r"(?<!\\)&", row.removesuffix(r" \\"))
        assert len(cells) == 1 + len(spec[2]), row
        printed.append([printed_by_latex(cell.strip()) for cell in cells])
    return printed


SYMBOLS = {
    r"\pm": "±", r"^\dagger": "†", r"^\ddagger": "‡", r"^\S": "§", "<": "<", ">": ">", "|": "|", "-": "−",
    r"\times": "×", r"\mu": "µ",
}  # fmt: skip
TOKEN = re.compile(r"\$([^$]*)\$|\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\([&%$#_{}])|(\{\})|(.)")


def printed_by_latex(cell: str) -> str:
    said = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^"}
    found = ""
    for math_, command, escaped, empty, letter in TOKEN.findall(cell):
        assert letter not in set("\\{}$&#%_~^"), (cell, letter)  # active, and not escaped
        found += SYMBOLS[math_] if math_ else said.get(command, "") + escaped + letter if not empty else ""
    return found


@pytest.mark.parametrize(
    "name",
    [
        "kvzip_local, 70 % & more", r"a\b{c}$d#e~f^g", "[0.5ex] row", "* star", "two\nlines", r"\\", "$x$ |y| <z>",
        "%", "100×µ − §", r"\end{tabular}", r"\input{/etc/passwd}", "ünïcode 模型",
    ],
)  # fmt: skip
def test_any_name_is_itself_in_latex(name: str, make_row) -> None:
    points = [("full cache", 0.0, 4_000_000, 1.0), (name, 0.5, 2_000_000, 0.5), (name, 0.75, 1_000_000, 0.25)]
    head, full, row = cells_of_latex(written_table(cells_at(make_row, points), "latex", {(name, 0.75): "†‡"}))
    assert head == ["removed", "0.5", "0.75", "area over bytes"]
    assert full[:2] == ["full cache", "1.00"]
    assert row == [re.sub(r"\s+", " ", name).strip(), "0.50", "0.25 †‡", "0.562"]
