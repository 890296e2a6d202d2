"""Runs of the `evidence` grids: every table of their folder, and of the pages about them, follows from the rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from published_rows import EVIDENCE, RESULTS, cells_of, published, rows_of

from kvzip_press.leaderboard.analysis.comparison_tables import comparison_tables, press_table
from kvzip_press.leaderboard.analysis.correlation import rank_correlation
from kvzip_press.leaderboard.analysis.statistics import Comparison, compare
from kvzip_press.leaderboard.analysis.summary import Cell, split_tables
from kvzip_press.leaderboard.analysis.written_table import TextTable, written

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


def is_difference(text: str, found: Comparison) -> bool:
    """Whether a text such as "-0.021 (0.10)" or "... (-0.021, p 0.10)" has this difference and p."""
    said = re.search(r"([+-]\d\.\d{3}) ?(?:\(|, p )(<?)(\d\.\d+)\)", text)
    assert said, text
    p = float(said[3])
    is_p = found.p_value < 0.0015 if said[2] else abs(found.p_value - p) < 0.01 + 0.1 * p
    return abs(float(said[1]) - found.difference) < 0.000501 and is_p


@pytest.mark.slow
@pytest.mark.parametrize("folder", EVIDENCE)
def test_every_table_of_a_run_is_one_that_compare_makes_of_its_rows(folder: str) -> None:
    page = (RESULTS / folder / "README.md").read_text(encoding="utf-8")
    made = {
        exact(text := written(one.head, one.rows, "markdown")): (one.title, drawn(text)) for one in compared(folder)
    }
    told = set()
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert exact(table) in made, table
        title, numbers = made[exact(table)]
        for said, found in zip(drawn(table), numbers, strict=True):
            assert is_drawn_alike(said, found), (title, said, found)
        told.add(title)
    assert {"Which tasks count", "Accuracy, tasks that count", "Minus kvzip, tasks that count"} < told
    assert {"Storages, tasks that count", "Accuracy, existing text", "kvzip, surprisal minus kvzip"} < told


DRAWN = r"p <?\d\.\d+|\(<?\d\.\d+\)|[+-]\d\.\d{3}(?= to )|(?<= to )[+-]\d\.\d{3}"  # p and intervals


def exact(table: str) -> str:
    """A table without what depends on how scipy draws samples."""
    return re.sub(DRAWN, "#", table.strip())


def drawn(table: str) -> list[str]:
    return re.findall(DRAWN, table)


def is_drawn_alike(said: str, found: str) -> bool:
    mine, theirs = (float(text.strip("p (<)")) for text in (said, found))
    return abs(mine - theirs) < (0.004 if said[0] in "+-" else 0.01 + 0.1 * theirs)


def compared(folder: str) -> list[TextTable]:
    """What `kvzip-press leaderboard compare` prints of a run, without and with ``--press``."""
    groups = split_tables(published(folder))
    whole = [table for group in groups for table in comparison_tables(group)]
    return [*whole, *(press_table(group, press) for group in groups for press in ("kvzip, surprisal", "fastkvzip"))]


def weighted(line: list[str], folder: str, kind: str) -> None:
    """Asserts that a line has the differences of weighting by surprisal, their intervals and their p."""
    rows = [row for row in rows_of(folder, kind) if row.press in ("kvzip", "kvzip, surprisal")]
    found = {(one.press, one.compression_ratio): one for one in compare(rows, "kvzip")}
    for ratio, figure in zip(RATIOS, line[1:], strict=True):
        one = found["kvzip, surprisal", ratio]
        assert one.interval
        low, high = map(float, re.findall(r"[+-]\d\.\d{3}", figure)[1:3])
        assert abs(low - one.interval[0]) < 0.004 and abs(high - one.interval[1]) < 0.004, figure
        assert is_difference(re.sub(r" \(.*\), p (.*)", r" (\1)", figure), one), figure


KINDS = ("counted", "made text", "real text")


@pytest.mark.slow
def test_the_page_of_kvzip_has_the_differences_of_weighting_on_smollm2() -> None:
    _, *lines = tables_in(ROOT / "docs" / "methods" / "kvzip.md", "How good weighting is")["minus KVzip"]
    assert len(lines) == len(KINDS)
    for kind, line in zip(KINDS, lines, strict=True):
        weighted(line, "evidence-smollm2", kind)


@pytest.mark.slow
def test_the_page_of_kvzip_has_the_differences_of_weighting_on_two_more_models() -> None:
    _, *lines = tables_in(ROOT / "docs" / "methods" / "kvzip.md", "How good weighting is")["minus KVzip, fresh seed"]
    runs = [*(("evidence-qwen05", kind) for kind in KINDS), ("evidence-gemma3", "counted")]
    for line, run in zip(lines, runs, strict=True):
        weighted(line, *run)


SMOLLM2, TWO_MORE = "Real text, and storages at equal bytes", "Two more models"


@pytest.mark.parametrize(
    ("section", "head", "folder", "kind"),
    [
        (SMOLLM2, "removed, eight tasks", "evidence-smollm2", "counted"),
        (SMOLLM2, "removed, real text", "evidence-smollm2", "real text"),
        (TWO_MORE, "removed, Qwen, eight tasks", "evidence-qwen05", "counted"),
        (TWO_MORE, "removed, Qwen, real text", "evidence-qwen05", "real text"),
        (TWO_MORE, "removed, Gemma, five tasks", "evidence-gemma3", "counted"),
    ],
)
def test_the_tables_of_the_leaderboard_follow_from_the_rows(section: str, head: str, folder: str, kind: str) -> None:
    page = ROOT / "docs" / "leaderboard.md"
    columns, *lines = tables_in(page, section)[head]
    assert len(lines) == len(RATIOS) and columns[1:] == list(NAMES)
    assert [LAST.get(line[0]) or float(line[0]) for line in lines] == list(RATIOS)
    for ratio, line in zip(RATIOS, lines, strict=True):
        for column, figure in zip(columns[1:], line[1:], strict=True):
            assert figure == f"{cells_of(folder, kind)[NAMES[column], ratio].accuracy:.2f}", (ratio, column)


def test_the_order_of_presses_on_one_model_foretells_another_s_as_far_as_is_said() -> None:
    _, *lines = tables_in(ROOT / "docs" / "leaderboard.md", TWO_MORE)["models"]
    folders = {"SmolLM2": "evidence-smollm2", "Qwen": "evidence-qwen05", "Gemma": "evidence-gemma3"}
    for names, mean, ends in lines:
        found = rank_correlation(*(own_cells(folders[name]) for name in names.split(" and ")))
        assert set(found.n_presses.values()) == {11}
        assert mean.split(" ")[0] == f"{found.mean:+.2f}", names
        assert ends == f"{min(found.by_ratio.values()):+.2f} to {max(found.by_ratio.values()):+.2f}", names
    assert len(lines) == 3


def own_cells(folder: str) -> list[Cell]:
    """The cells of a run whose pairs are in the model's own storage."""
    own = {row.press for row in rows_of(folder) if row.storage == "model"}
    return [cell for cell in cells_of(folder).values() if cell.press in own]


def test_what_is_said_of_made_and_real_text_follows_from_the_rows() -> None:
    page = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    shares = {}
    for kind in ("real text", "made text"):
        cells = cells_of("evidence-smollm2", kind)
        shares[kind] = cells["kvzip", 0.8].accuracy / cells["full cache", 0.0].accuracy
    assert (
        f"KVzip has {shares['real text']:.2f} of the full cache's accuracy there, and {shares['made text']:.2f}" in page
    )
