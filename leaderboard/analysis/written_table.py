"""A table for a paper: presses by removed fraction, in Markdown or LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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


def written_table(cells: Sequence[Cell], form: str, marks: Mapping[CellKey, str] | None = None) -> str:
    """Returns the accuracies of all presses: a row for each, a column for each removed fraction.

    The full cache's row has its accuracy in the first column; the last column is the area under accuracy over resident
    bytes (`areas_over_bytes`), a dash where a press was not measured over all of its range. In brackets stands where a
    press was measured last, if others were measured farther.

    Args:
        cells: Cells of one table, from `summarise`.
        form: "markdown" or "latex" (for the package booktabs).
        marks: Shown behind a cell's accuracy, by press and ratio, such as "†".

    Raises:
        InvalidArgumentError: There is no such form.
    """
    check_name("a form", form, FORMS)
    areas, full = areas_over_bytes(cells), find_full(cells)
    ratios = sorted({cell.compression_ratio for cell in cells if cell.press != full})
    known = {(cell.press, cell.compression_ratio): cell for cell in cells}
    head = ["removed", *(f"{ratio:g}" for ratio in ratios), "area over bytes"]
    rows = []
    for press in dict.fromkeys(cell.press for cell in cells):
        at = [0.0, *ratios[1:]] if press == full else ratios
        found = [_figure(known.get((press, ratio)), (marks or {}).get((press, ratio), "")) for ratio in at]
        rows.append([press, *found, "-" if areas is None else _area(areas, press)])
    return written(head, rows, form)


def written(head: Sequence[str], rows: Sequence[Sequence[str]], form: str) -> str:
    """Returns a table of texts, the first column to the left and the others to the right; forms as `written_table`."""
    check_name("a form", form, FORMS)
    return (_markdown if form == "markdown" else _latex)(head, rows)


def _figure(cell: Cell | None, mark: str) -> str:
    if cell is None:
        return "-"
    error = "" if cell.standard_error is None else f" ± {cell.standard_error:.2f}"
    return f"{cell.accuracy:.2f}{error}{mark and ' '}{mark}"


def _area(areas: Areas, press: str) -> str:
    area, end = areas.areas.get(press), areas.ends.get(press)
    if area is None:
        return "-"
    return f"{area:.3f}" if end is None else f"{area:.3f} (to {end / 1e6:.3g} MB)"


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
