"""Runs of the `evidence` grids: every table of their folder, and of the pages about them, follows from the rows."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from published_rows import EVIDENCE, RESULTS, cells_of, ranges, rows_of

from kvzip_press.leaderboard.analysis.curves import areas_over_bytes
from kvzip_press.leaderboard.analysis.statistics import Comparison, compare

ROOT = Path(__file__).resolve().parents[2]
RATIOS = (0.5, 0.7, 0.8, 0.9, 0.94, 0.96875)
LAST = {"32:1": 0.96875}
NAMES = {
    "KVzip": "kvzip", "by surprisal": "kvzip, surprisal", "local replay": "kvzip_local", "gated": "fastkvzip",
    "whole heads": "kvzip_head", "heads, last 16": "kvzip_head, window 16", "KeyDiff": "keydiff", "SnapKV": "snapkv",
    "ExpectedAttention": "expected_attention", "random": "random",
}  # fmt: skip
Table = list[list[str]]


def tables_in(page: Path, section: str) -> dict[str, Table]:
    """The tables of a section by their first cell."""
    text = page.read_text(encoding="utf-8")
    begin = re.search(rf"^##+ {re.escape(section)}$", text, re.MULTILINE)
    assert begin, section
    blocks = re.findall(r"(?:^\|.*\n)+", re.split(r"^##+ ", text[begin.end() :], flags=re.MULTILINE)[0], re.MULTILINE)
    split = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    return {table[0][0]: [table[0], *table[2:]] for table in split}


@cache
def readme(folder: str, section: str) -> dict[str, Table]:
    return tables_in(RESULTS / folder / "README.md", section)


def compared(folder: str, kind: str, reference: str, presses: list[str]) -> dict[tuple[str, float], Comparison]:
    rows = [row for row in rows_of(folder, kind) if row.press in {reference, *presses}]
    return {(one.press, one.compression_ratio): one for one in compare(rows, reference)}


def is_difference(text: str, found: Comparison) -> bool:
    """Whether a text such as "-0.021 (0.10)" or "... (-0.021, p 0.10)" has this difference and p."""
    said = re.search(r"([+-]\d\.\d{3}) ?(?:\(|, p )(<?)(\d\.\d+)\)", text)
    assert said, text
    p = float(said[3])
    is_p = found.p_value < 0.0015 if said[2] else abs(found.p_value - p) < 0.01 + 0.1 * p
    return abs(float(said[1]) - found.difference) < 0.000501 and is_p


@pytest.mark.parametrize("folder", EVIDENCE)
def test_which_tasks_count_follows_from_the_rows(folder: str) -> None:
    _, *lines = readme(folder, "Which tasks count")["task"]
    assert {line[0] for line in lines} == set(ranges(folder))
    for line in lines:
        found = ranges(folder)[line[0]]
        assert line[4:] == [
            f"{found.full:.3f} ± {found.standard_error:.3f}", f"{found.floor:.3f}", "yes" if found.counts else "no"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("Presses at equal ratios", "counted"),
        ("Made and real text", "real text"),
        ("Made and real text", "made text"),
        ("Agreement", "agreement"),
    ],
)
@pytest.mark.parametrize("folder", EVIDENCE)
def test_accuracies_errors_and_areas_follow_from_the_rows(folder: str, section: str, kind: str) -> None:
    head, *lines = readme(folder, section)["removed" if "text" not in kind else f"removed, {kind}"]
    cells = cells_of(folder, kind)
    areas = areas_over_bytes(list(cells.values()))
    assert len(lines) == 11 and [float(name) for name in head[1:7]] == list(RATIOS) and areas
    for press, *figures in lines:
        for ratio, figure in zip(RATIOS, figures, strict=False):
            cell = cells[press, ratio]
            kl = "" if cell.kl is None else f", {cell.kl:.3f}"
            assert figure == f"{cell.accuracy:.3f} ± {cell.standard_error:.3f}{kl}", (press, ratio)
        assert figures[6:] in ([], [f"{areas.areas[press]:.3f}"]), press


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "head", "kind", "reference"),
    [
        ("Presses at equal ratios", "minus kvzip", "counted", "kvzip"),
        ("Presses at equal ratios", "minus the full cache", "counted", "full cache"),
        ("Agreement", "agreement minus kvzip", "agreement", "kvzip"),
    ],
)
@pytest.mark.parametrize("folder", EVIDENCE)
def test_paired_differences_follow_from_the_rows(
    folder: str, section: str, head: str, kind: str, reference: str
) -> None:
    _, *lines = readme(folder, section)[head]
    found = compared(folder, kind, reference, [line[0] for line in lines])
    for press, *figures in lines:
        mine = [found[press, ratio] for ratio in RATIOS]
        for one, figure in zip(mine, figures, strict=False):
            assert is_difference(figure, one), (one, figure)
        if len(figures) > len(RATIOS):
            assert [figure.endswith("*") for figure in figures[:6]] == [one.is_significant for one in mine]
            detectable = [one.detectable or 0.0 for one in mine]
            assert figures[6] == f"{min(detectable):.3f} to {max(detectable):.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("folder", EVIDENCE)
def test_storages_follow_from_the_rows(folder: str) -> None:
    _, *lines = readme(folder, "Storages at equal bytes")["storage"]
    assert len(lines) == 8
    for name, *figures in lines:
        press, _, storage = name.partition(", ")
        for reference, ratios, some in (("full cache", (0.0,), figures[:1]), (press, RATIOS, figures[1:])):
            label = reference if storage == "model" else f"{reference}, {storage}"
            found = {} if storage == "model" else compared(folder, "counted", reference, [label])
            for ratio, figure in zip(ratios, some, strict=True):
                cell = cells_of(folder)[label, ratio]
                assert figure.startswith(f"{cell.accuracy:.3f}, {(cell.resident_bytes or 0) / 1e6:.1f} MB"), figure
                assert not found or is_difference(figure, found[label, ratio]), figure


def weighted(line: list[str], folder: str, kind: str) -> None:
    """Asserts that a line has the differences of weighting by surprisal, their intervals and their p."""
    found = compared(folder, kind, "kvzip", ["kvzip, surprisal"])
    for ratio, figure in zip(RATIOS, line[1:], strict=True):
        one = found["kvzip, surprisal", ratio]
        assert one.interval
        low, high = map(float, re.findall(r"[+-]\d\.\d{3}", figure)[1:3])
        assert abs(low - one.interval[0]) < 0.004 and abs(high - one.interval[1]) < 0.004, figure
        assert is_difference(re.sub(r" \(.*\), p (.*)", r" (\1)", figure), one), figure


KINDS = ("counted", "made text", "real text")


@pytest.mark.slow
@pytest.mark.parametrize("folder", EVIDENCE)
def test_differences_of_weighting_follow_from_the_rows(folder: str) -> None:
    page = (RESULTS / folder / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## (.*weighting by surprisal.*)$", page, re.MULTILINE)
    assert section
    _, *lines = readme(folder, section[1])["surprisal minus kvzip"]
    for kind, line in zip(KINDS, lines[:3], strict=True):
        weighted(line, folder, kind)


@pytest.mark.slow
def test_the_page_of_kvzip_has_the_differences_of_weighting_on_smollm2() -> None:
    _, *lines = tables_in(ROOT / "docs" / "methods" / "kvzip.md", "How good weighting is")["minus KVzip"]
    assert len(lines) == len(KINDS)
    for kind, line in zip(KINDS, lines, strict=True):
        weighted(line, "evidence-smollm2", kind)


@pytest.mark.parametrize(("head", "kind"), [("removed, eight tasks", "counted"), ("removed, real text", "real text")])
def test_the_tables_of_the_leaderboard_follow_from_the_rows(head: str, kind: str) -> None:
    page = ROOT / "docs" / "leaderboard.md"
    columns, *lines = tables_in(page, "Real text, and storages at equal bytes")[head]
    assert len(lines) == len(RATIOS) and columns[1:] == list(NAMES)
    assert [LAST.get(line[0]) or float(line[0]) for line in lines] == list(RATIOS)
    for ratio, line in zip(RATIOS, lines, strict=True):
        for column, figure in zip(columns[1:], line[1:], strict=True):
            assert figure == f"{cells_of('evidence-smollm2', kind)[NAMES[column], ratio].accuracy:.2f}", (ratio, column)


def test_what_is_said_of_made_and_real_text_follows_from_the_rows() -> None:
    page = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    shares = {}
    for kind in ("real text", "made text"):
        cells = cells_of("evidence-smollm2", kind)
        shares[kind] = cells["kvzip", 0.8].accuracy / cells["full cache", 0.0].accuracy
    assert (
        f"KVzip has {shares['real text']:.2f} of the full cache's accuracy there, and {shares['made text']:.2f}" in page
    )
