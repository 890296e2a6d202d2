"""REPRODUCE.md: what it names exists, and every figure that it and three tables claim follows from committed rows."""

from __future__ import annotations

import gzip
import json
import re
import statistics
from functools import cache
from pathlib import Path

import pytest
from published_rows import mean_of

from kvzip_press.leaderboard.benchmarks.gpu_figures import FIGURES
from kvzip_press.leaderboard.running.grid import grid_names

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "leaderboard" / "results"
PAGE = (ROOT / "leaderboard" / "REPRODUCE.md").read_text(encoding="utf-8")


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines]


@cache
def accuracies(folder: str) -> dict[str, float]:
    """Means over tasks of means over contexts, as summaries have them, which `verify` computes again."""
    found: dict[str, float] = json.loads((RESULTS / folder / "summary.json").read_text())["accuracies"]
    return found


@cache
def shares(folder: str) -> dict[str, float]:
    """Means over all questions."""
    scores: dict[str, list[float]] = {}
    with gzip.open(RESULTS / folder / "rows.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            scores.setdefault(f"{row['press']} @ {row['compression_ratio']:g}", []).append(row["score"])
    return {name: statistics.fmean(values) for name, values in scores.items()}


def figure_of(folder: str, cell: str) -> float:
    if folder.startswith("evidence"):
        return mean_of(folder, cell)
    return (shares if folder.startswith("storages") else accuracies)(folder)[cell]


def test_every_place_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:README\.md|(?:docs|leaderboard|kernels|tests)/[\w./-]+\w)", PAGE))
    named = {name for name in named if not name.startswith("leaderboard/profile/results/") or "." in name}
    assert len(named) > 25
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_published_folder_and_file_of_rows_is_named() -> None:
    published = [path.name for path in RESULTS.iterdir() if path.is_dir()]
    published += [path.name for path in (ROOT / "leaderboard" / "profile" / "results").iterdir()]
    assert [name for name in published if name not in PAGE] == []


def test_every_figure_of_a_gpu_and_every_grid_that_is_named_exists() -> None:
    section = PAGE[PAGE.index("## Time and memory") : PAGE.index("## On a CPU")]
    known = {figure.name for figure in FIGURES}
    cells = [row[2] for row in rows_of(section)[2:]]
    named = {name for cell in cells for name in re.split(r", | and the others", cell) if name}
    assert len(named) > 8 and named <= known
    grids = set(re.findall(r"--grid ([\w-]+)", PAGE))
    assert len(grids) > 5 and grids <= set(grid_names())


def test_every_claim_follows_from_the_rows_and_stands_where_it_is_said_to() -> None:
    section = PAGE[PAGE.index("## Claims and the rows") : PAGE.index("## Claims of others")]
    claims = rows_of(section)[2:]
    assert len(claims) > 8
    for claim, page, folder, cell, figure in claims:
        assert f"{figure_of(folder, cell):.2f}" == figure, claim
        assert figure in (ROOT / page).read_text(encoding="utf-8"), claim


LEADERBOARD = {
    "KVzip": "kvzip", "local replay": "kvzip_local", "gated": "fastkvzip", "whole heads": "kvzip_head",
    "heads, last 16": "kvzip_head, window 16", "DuoAttention (measured)": "duo_attention", "SnapKV": "snapkv",
    "ExpectedAttention": "expected_attention", "Knorm": "knorm", "random": "random",
}  # fmt: skip
WEIGHTING = {
    "KVzip": "kvzip", "rows weighted by surprisal": "kvzip, surprisal", "local replay": "kvzip_local",
    "local replay, weighted by surprisal": "kvzip_local, surprisal",
    "local replay, weighted by 1 - p": "kvzip_local, probability",
}  # fmt: skip
REMOVED = {"nothing removed": 0.0, "50 %": 0.5, "70 %": 0.7, "90 %": 0.9, "16:1": 0.9375, "32:1": 0.96875}


def table_after(page: str, head: str) -> list[list[str]]:
    """The table whose first cell is ``head``."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(f"| {head} |"))
    length = next(i for i, line in enumerate([*lines[begin:], ""]) if not line.startswith("|"))
    return rows_of("\n".join(lines[begin : begin + length]))


def removed(text: str) -> float:
    name = text.split(" (", maxsplit=1)[0]
    return REMOVED[name] if name in REMOVED else float(name)


def first_figure(cell: str) -> str:
    found = re.match(r"\d\.\d+", cell)
    assert found, cell
    return found[0]


def test_the_table_of_the_leaderboard_follows_from_the_rows() -> None:
    head, _, *lines = table_after("docs/leaderboard.md", "removed (measured)")
    assert len(lines) == 7
    for line in lines:
        for column, cell in zip(head[1:], line[1:], strict=True):
            value = accuracies("smollm2-full")[f"{LEADERBOARD[column]} @ {removed(line[0]):g}"]
            assert abs(float(first_figure(cell)) - value) < 0.00501, (line[0], column)


def test_the_table_of_weighted_rows_follows_from_the_rows() -> None:
    head, _, *lines = table_after("docs/methods/kvzip.md", "removed | 0.5 | 0.7 | 0.8 | 0.9 | 0.94")
    assert [line[0] for line in lines] == list(WEIGHTING)
    for line in lines:
        for column, cell in zip(head[1:], line[1:], strict=True):
            value = accuracies("weighting-qwen05")[f"{WEIGHTING[line[0]]} @ {float(column):g}"]
            assert abs(float(first_figure(cell)) - value) < 0.00501, (line[0], column)


@pytest.mark.parametrize(
    ("folder", "head"), [("storages-qwen05", "Qwen2.5-Coder-0.5B"), ("storages-smollm2", "SmolLM2 135M")]
)
def test_the_tables_of_storages_follow_from_the_rows(folder: str, head: str) -> None:
    columns, _, *lines = table_after("docs/howto/storages.md", head)
    assert len(lines) >= 5
    for line in lines:
        storage = line[0].strip('`"')
        press = "kvzip" if storage == "model" else f"kvzip, {storage}"
        for column, cell in zip(columns[1:], line[1:], strict=True):
            value = shares(folder)[f"{press} @ {removed(column):g}"]
            assert abs(float(first_figure(cell)) - value) < 0.000501, (storage, column)
