"""Reads the files of a folder; every error names its file."""

import csv
import io
import math
import re
from ast import literal_eval
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.kvpress_format.layout import MEASURED
from kvzip_press.leaderboard.yaml_files import read_yaml
from kvzip_press.untrusted import parse_json, read_bytes

_TEXTS = ("dataset", "model", "press_name")
_NUMBERS = (*MEASURED, "fraction", "max_context_length", "key_channel_compression_ratio", "needle_depth")
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
    """Reads the settings of an evaluation. Their ratio is None where it was not asked for but measured."""
    config = checked_settings(read_yaml(path), str(path))
    ratio = config.get("compression_ratio")
    if any(config.get(name) is not None for name in MEASURED):
        ratio = None
    elif not _is_number(ratio):
        raise InvalidArgumentError(f"{path}: expected a compression_ratio, or one of {MEASURED}, got {config!r:.200}")
    return {**config, "compression_ratio": None if ratio is None else float(ratio)}


def checked_settings(config: Any, where: str) -> dict[str, Any]:
    """Returns settings of an evaluation, once those that this package reads are of their kinds.

    Raises:
        InvalidArgumentError: They are not; the message names them and begins with ``where``.
    """
    if not isinstance(config, dict) or not all(isinstance(config.get(name), str) for name in _TEXTS):
        raise InvalidArgumentError(f"{where}: expected the settings {', '.join(_TEXTS)}, got {config!r:.200}")
    for name in _NUMBERS:
        if (value := config.get(name)) is not None and not _is_number(value):
            raise InvalidArgumentError(f"{where}: expected a number for the setting {name}, got {value!r:.80}")
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
