"""Tables for a paper, in Markdown or LaTeX; the first of them has presses by removed fraction."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvzip_press.leaderboard.analysis.curves import Areas, areas_over_bytes
from kvzip_press.leaderboard.analysis.references import CellKey
from kvzip_press.leaderboard.analysis.summary import Cell, find_full
from kvzip_press.leaderboard.options import check_name

FORMS = ("markdown", "latex")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "§": r"$^\S$",
    "−": r"$-$", "×": r"$\times$", "µ": r"$\mu$",
    "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"$|$",
}  # fmt: skip


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: What it shows; empty for a table that needs no title.
        head: The names of its columns.
        rows: As many texts each.
        note: How to read it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def written_table(cells: Sequence[Cell], form: str, marks: Mapping[CellKey, str] | None = None) -> str:
    """Returns the accuracies of all presses as text for a paper; see `accuracy_lines`.

    Args:
        cells: Cells of one table, from `summarise`.
        form: "markdown" or "latex" (for the package booktabs).
        marks: Shown behind a cell's accuracy, by press and ratio, such as "†".

    Raises:
        InvalidArgumentError: There is no such form.
    """
    return written(*accuracy_lines(cells, marks), form)


def accuracy_lines(
    cells: Sequence[Cell], marks: Mapping[CellKey, str] | None = None, *, decimals: int = 2
) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of a table of accuracies: a row for each press, a column for each removed fraction.

    The full cache's row has its accuracy in the first column; the last column is the area under accuracy over resident
    bytes (`areas_over_bytes`), a dash where a press was not measured over all of its range. In brackets stands where a
    press was measured last, if others were measured farther. Cells of rows that follow the full cache also have the KL
    divergence from it, in nats.

    Args:
        cells: Cells of one table, from `summarise`; presses stay in their order.
        marks: Shown behind a cell's accuracy, by press and ratio, such as "†".
        decimals: Of accuracies and their errors.
    """
    areas, full = areas_over_bytes(cells), find_full(cells)
    ratios = sorted({cell.compression_ratio for cell in cells if cell.press != full})
    known = {(cell.press, cell.compression_ratio): cell for cell in cells}
    head = ["removed", *(f"{ratio:g}" for ratio in ratios), "area over bytes"]
    rows = []
    for press in dict.fromkeys(cell.press for cell in cells):
        at = [0.0, *ratios[1:]] if press == full else ratios
        found = [_figure(known.get((press, ratio)), (marks or {}).get((press, ratio), ""), decimals) for ratio in at]
        rows.append([press, *found, "-" if areas is None else area_text(areas, press)])
    return head, rows


def area_text(areas: Areas, press: str) -> str:
    """Returns a press's area, in brackets where it was measured last if others were measured farther; or a dash."""
    area, end = areas.areas.get(press), areas.ends.get(press)
    if area is None:
        return "-"
    return f"{area:.3f}" if end is None else f"{area:.3f} (to {end / 1e6:.3g} MB)"


def written(head: Sequence[str], rows: Sequence[Sequence[str]], form: str) -> str:
    """Returns a table of texts, the first column to the left and the others to the right; forms as `written_table`."""
    check_name("a form", form, FORMS)
    return (_markdown if form == "markdown" else _latex)(head, rows)


def written_whole(table: TextTable, form: str) -> str:
    """Returns a table with its title above and its note below, both comments in LaTeX; forms as `written_table`."""
    title, note = _one_line(table.title), _one_line(table.note)
    mark, between = ("## ", "\n\n") if form == "markdown" else ("% ", "\n")
    told = f"{'' if form == 'markdown' else '% '}{note}"
    parts = [title and mark + title, written(table.head, table.rows, form), note and told]
    return between.join(part for part in parts if part)


def _figure(cell: Cell | None, mark: str, decimals: int) -> str:
    if cell is None:
        return "-"
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.{decimals}f}"
    kl = "" if cell.kl is None else f", {cell.kl:z.3f}"
    return f"{cell.accuracy:.{decimals}f}{error}{kl}{mark and ' '}{mark}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(_one_line(value).replace('|', '&#124;') for value in line)} |" for line in lines)


def _latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(values: Sequence[str]) -> str:
        cells = ["".join(_LATEX.get(letter, letter) for letter in _one_line(value)) for value in values]
        if cells[0].startswith(("[", "*")):  # behind the \\\\ of the row above they would be an option of it
            cells[0] = "{}" + cells[0]
        return f"{' & '.join(cells)} \\\\"

    columns = f"l{'r' * (len(head) - 1)}"
    body = [r"\toprule", line(head), r"\midrule", *map(line, rows), r"\bottomrule"]
    return "\n".join([f"\\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
