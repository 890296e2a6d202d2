"""Reads the files of a folder; every error names its file."""

import csv
import io
import re
from ast import literal_eval
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.yaml_files import read_yaml
from kvzip_press.untrusted import parse_json, read_bytes

_QUOTES = {"'": re.compile(r"'(?:[^'\\]|\\.)*+'", re.DOTALL), '"': re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)}


def parse_answers(text: str) -> tuple[str, ...]:
    """Parses the references in a cell of the table: one plain text, or a list as Python or numpy prints it.

    numpy puts no commas between strings, and Python would read such a list as one long string. A text that is in
    brackets but is no list of strings stays as it is.
    """
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        return (text,)
    found, rest = _quoted(inner[1:-1])
    if rest.strip(" ,\n\r\t"):
        return (text,)
    try:
        return tuple(literal_eval(one) for one in found)
    except (SyntaxError, ValueError):  # a line break, a null byte or half an escape between quotes
        return (text,)


def _quoted(text: str) -> tuple[list[str], str]:
    """Returns the quoted strings in a text, from the left, and what is left without them; in time linear in the text.

    A quote that is never closed is text. Then no later quote of its kind is closed either (an escape that is seen from
    the one is also seen from the other), so the text is searched to its end at most once for each kind.
    """
    strings, rest, at, kinds = [], [], 0, "'\""
    while kinds and (begin := re.compile(f"[{kinds}]").search(text, at)):
        if closed := _QUOTES[begin[0]].match(text, begin.start()):
            strings.append(closed[0])
            rest.append(text[at : begin.start()])
            at = closed.end()
        else:
            kinds = kinds.replace(begin[0], "")
    return strings, "".join([*rest, text[at:]])


def read_table(path: Path) -> Iterator[dict[str, str]]:
    """Reads the lines of a CSV table, by column."""
    text = _decoded(path)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        names = list(reader.fieldnames or [])
        if twice := {name for name in names if names.count(name) > 1}:
            raise InvalidArgumentError(f"{path}: expected columns of different names, got {min(twice)!r:.80} twice")
        for line in reader:
            if None in line or None in line.values():
                raise InvalidArgumentError(
                    f"{path}: expected as many cells as columns in every line, got {line!r:.200}"
                )
            yield line
    except csv.Error as error:
        raise InvalidArgumentError(f"{path}: expected a table in CSV, got {error}") from error


def read_config(path: Path) -> Mapping[str, Any]:
    """Reads the settings of an evaluation."""
    config = read_yaml(path)
    needed = {"dataset": str, "model": str, "press_name": str, "compression_ratio": int | float}
    found = {name: config.get(name) for name in needed} if isinstance(config, dict) else dict.fromkeys(needed)
    if any(isinstance(value, bool) or not isinstance(value, needed[name]) for name, value in found.items()):
        raise InvalidArgumentError(f"{path}: expected the settings {', '.join(needed)}, got {config!r:.200}")
    return {**config, "compression_ratio": float(config["compression_ratio"])}


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        value = parse_json(_decoded(path))
    except ValueError as error:
        raise InvalidArgumentError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def read_file(path: Path) -> bytes:
    """Reads the bytes of a file."""
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path}: expected a file that can be read, got {error}") from error


def _decoded(path: Path) -> str:
    """Reads a text as it is: newlines in cells are not changed."""
    try:
        return read_file(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path}: expected text in UTF-8, got {error}") from error
