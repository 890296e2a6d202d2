"""Writes the page: the template with style, program and data put into it."""

import html
import json
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvzip_press.files import replacing, sweep_temporaries
from kvzip_press.leaderboard.analysis.references import MARKS_CAPTION
from kvzip_press.leaderboard.report.data import page_data
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.version import __version__

_PROGRAM = ("elements.js", "tips.js", "table.js", "curves.js", "maps.js", "examples.js", "page.js")
_ESCAPED = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_TITLE = "kvzip-press leaderboard"


def write_report(
    rows: Iterable[Row],
    heads: Iterable[HeadBudgets],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    command: str = "",
) -> None:
    """Writes one HTML file that needs nothing else: no network, no other file, no server.

    Rows of several runs may be given; the page shows one run and model at a time, query-aware and query-agnostic rows
    apart. The file holds aggregated numbers and a few examples. It is written whole or not at all.

    Args:
        rows: May be empty.
        heads: What the heads kept (`HeadBudgets`) in the same runs; may be empty.
        path: The file; its directory is created if it does not exist.
        title: Shown at the top; a standard title by default.
        command: The command that made the rows, shown at the bottom.

    Raises:
        InvalidArgumentError: A press answered a question of a run twice at the same ratio, or a row has a value that
            no table can be made of.
        MissingDependencyError: scipy is not installed.
        CacheFileError: The file cannot be written.
    """
    page = render(page_data(rows, heads), title=title or _TITLE, command=command)
    path = Path(path)
    sweep_temporaries(path.parent)
    with replacing(path, parents=True) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def render(data: dict[str, Any], *, title: str, command: str) -> str:
    """Returns the text of the page. Title, command and data are shown literally and never parsed as HTML."""
    parts = {
        "title": html.escape(title).encode("utf-8", "replace").decode(),
        "style": _part("style.css"),
        "data": script_json({**data, "command": command, "version": __version__, "marks": MARKS_CAPTION}),
        "program": "\n".join(_part(name) for name in _PROGRAM),
    }
    before, *sections = _part("template.html").split("{{")
    filled = (parts[name] + rest for name, rest in (section.split("}}", 1) for section in sections))
    return before + "".join(filled)


def script_json(value: Any) -> str:
    """Returns JSON that is safe in a script element: no character in it can end the element or begin another.

    Halves of surrogate pairs, which UTF-8 cannot hold, are escaped too.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
