"""REPRODUCE.md: what it names exists, and every figure that it and several tables claim follows from committed rows."""

from __future__ import annotations

import csv
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


CELLS = {"KVzip": "kvzip", "SnapKV": "snapkv", "Expected Attention": "expected_attention"}
MODELS = {"SmolLM2": "smollm2", "Qwen": "Qwen/Qwen2.5-Coder-0.5B-Instruct"}
OUTCOMES = {
    "tolerance, each head": "tolerance a head",
    "tolerance, per=layer": "tolerance a layer",
    "threshold": "threshold",
}


@cache
def cells(folder: str, *columns: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a `cells.csv`, by model and these columns."""
    with (RESULTS / folder / "cells.csv").open(encoding="utf-8", newline="") as file:
        return {tuple(row[name] for name in ("model", *columns)): row for row in csv.DictReader(file)}


def accuracy_and_kl(row: dict[str, str]) -> str:
    kl = float(row["kl"])
    return f"{float(row['scores']):.2f} ± {float(row['scores_error']):.2f} ({kl:.{3 if kl < 0.1 else 2}f})"


def without_marks(line: list[str]) -> list[str]:
    return [cell.replace("`", "").replace('"', "") for cell in line]


def test_the_table_of_allocations_follows_from_the_cells() -> None:
    head, _, full, *lines = table_after("docs/howto/budgets.md", "removed | allocation | KVzip, SmolLM2")
    known = cells("allocations", "scorer", "allocation", "removed")
    assert len(lines) == 22
    for column, cell in zip(head[2:], full[2:], strict=True):
        row = known[MODELS[column.split(", ")[1]], "full cache", "", "0"]
        assert cell == (f"{float(row['scores']):.2f} ± 0.03" if row["scores"] != "1" else "1.00")
    ratio = ""
    for line in map(without_marks, lines):
        ratio, name = line[0] or ratio, line[1].replace("searched table", "table")
        if name in OUTCOMES:
            name, removed_by = f"{OUTCOMES[name]}, kept about {1 - float(ratio):.1f}", "0"
        else:
            removed_by = ratio
        for column, cell in zip(head[2:], line[2:], strict=True):
            scorer, model = column.split(", ")
            assert cell == accuracy_and_kl(known[MODELS[model], CELLS[scorer], name, removed_by]), (line[:2], column)


def test_the_table_of_tolerances_follows_from_the_cells() -> None:
    _, _, *lines = table_after("docs/howto/budgets.md", "ranked by | tolerance")
    known = cells("allocations", "scorer", "allocation")
    assert len(lines) == 12
    for line in map(without_marks, lines):
        (scorer, per), tolerance = line[0].split(", "), line[1]
        name = f"tolerance {tolerance} a {'head' if per == 'each head' else 'layer'}"
        for model, kept, unchanged in zip(MODELS.values(), line[2::2], line[3::2], strict=True):
            row = known[model, CELLS[scorer], name]
            mean, least, most = (f"{float(row[which]):.2f}" for which in ("kept", "kept_least", "kept_most"))
            assert (kept, unchanged) == (f"{mean}, {least} to {most}", f"{float(row['unchanged']):.2f}"), line


def test_what_pages_hold_follows_from_the_cells() -> None:
    _, _, *lines = table_after("docs/howto/budgets.md", "removed | budgets | SmolLM2: kept")
    known = cells("allocations", "scorer", "allocation", "removed")
    ratio = ""
    for line in lines:
        ratio = line[0] or ratio
        for model, kept, held in zip(MODELS.values(), (line[2], line[6]), (line[3], line[7]), strict=True):
            row = known[model, "kvzip", line[1], ratio]
            figures = [f"{float(row[f'in_pages_of_{size}']):.3f}" for size in (16, 64)]
            said = [part.strip() for part in f"{held} ".split("/")]
            assert kept == f"{float(row['kept']):.3f}"
            assert all(not one or one == other for one, other in zip(said, figures, strict=True)), line


def test_differences_on_the_same_questions_follow_from_the_contexts() -> None:
    with (RESULTS / "allocations" / "contexts-smollm2-kvzip.csv").open(encoding="utf-8", newline="") as file:
        of_context: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in csv.DictReader(file):
            of_context.setdefault((row["allocation"], row["removed"]), []).append(row)
    _, _, *lines = table_after("docs/howto/budgets.md", "removed | budgets | SmolLM2: kept")
    ratio, compared = "", 0
    for line in lines:
        ratio = line[0] or ratio
        for figure, digits, said in (("scores", 3, line[4]), ("kl", 4, line[5])):
            pairs = zip(of_context[line[1], ratio], of_context["global", ratio], strict=True)
            differences = [float(one[figure]) - float(other[figure]) for one, other in pairs]
            mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
            assert said == ("" if line[1] == "global" else f"{mean:+.{digits}f} ± {error:.{digits}f}"), line
            compared += bool(said)
    assert compared == 8


def test_the_table_of_shared_layers_follows_from_the_cells() -> None:
    _, _, *lines = table_after("docs/methods/kvsharer.md", "share | tried first")
    known = cells("sharing", "layers", "removed")
    assert len(lines) == 9
    for line in lines:
        layers = f"{line[0]}, {line[1]} first" if line[1] else line[0]
        for model, at in zip(MODELS.values(), (2, 5), strict=True):
            whole, pressed = known[model, layers, "0"], known[model, layers, "0.7"]
            sizes = f"{float(whole['size']):.2f}, {float(pressed['size']):.2f}"
            assert line[at : at + 3] == [sizes, accuracy_and_kl(whole), accuracy_and_kl(pressed)], line


def test_the_table_of_many_contexts_follows_from_the_file() -> None:
    file = json.loads((ROOT / "leaderboard" / "profile" / "results" / "many-contexts-h200.json").read_text())
    fits = {row["storage"]: row for row in file["rows"] if "fit" in row}
    steps = {row["storage"]: row for row in file["rows"] if row.get("contexts") == 32}
    _, _, *lines = table_after("docs/performance.md", "[storage](howto/storages.md) | a context")
    assert [line[0].split(" (")[0] for line in lines] == list(fits)
    for line, fit, step in zip(lines, fits.values(), steps.values(), strict=True):
        size, tokens_a_second = fit["context_bytes"] / 1e9, 32e3 / step["compiled_ms"]
        times = [f"{step[name]:.1f}" for name in ("compiled_ms", "floor_ms")]
        said = [f"{size:.2f} GB", str(fit["fit"]), f"{step['graph_ms']:.1f} ms", *times, f"{tokens_a_second:.0f}"]
        assert line[1:] == said
