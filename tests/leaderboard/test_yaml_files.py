"""YAML of others: plain values only, each key once, and nothing that grows or nests without end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.running.grid import load_grid
from kvzip_press.leaderboard.yaml_files import YAML_BYTES, parse_yaml, read_yaml

BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGES = "\n".join(["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))])
CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2000))])


@pytest.mark.parametrize(
    "text",
    [
        "", "a: 1", "- 1\n- -2\n- 0x1F\n- 1_000\n- 1:30", "[1.5, -0.25, 1.0e+3, 1e3]", "[true, no, null, ~, '', yes]",
        "a: &b {c: [1, 2]}\nd: *b\ne: {<<: *b, c: 3}\nf: {<<: *b}", "text: |\n  two\n  lines\n", '"\\x41 \\u00e9 \\U0001F600"',
        "{0: 0.5, 1: 0.9}", "a: 'it''s'", "# nothing\n---\nx: {}\n...",
    ],
)  # fmt: skip
def test_plain_values_are_those_of_the_safe_loader(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "at most 1048576 values and characters with all aliases expanded"),
        (MERGES, "at most 1048576 values and characters"),
        (f"a: &a '{'x' * 60_000}'\nb: [{'*a, ' * 30}]", "at most 1048576 values and characters"),
        (CHAIN, "nested at most 50 deep, got more, with all aliases expanded"),
        ("a: &a [*a]", r"expected values that end, got \*a inside itself \(line 1, column 8\)"),
        ("[" * 100_000, "nested at most 50 deep"),
        ("- " * 60_000, "nested at most 50 deep"),
        ("? " * 60_000, "nested at most 50 deep"),
        ("a: 1\nb: 2\na: 3", r"each key once in a mapping, got 'a' twice \(line 3, column 1\)"),
        ("{1: 2, 0x1: 3}", "got 1 twice"),
        ("{[a]: 1}", "expected a text or number before the colon, got a list or a mapping"),
        ("a: 2001-01-01", "got a value of the type 'timestamp' .in quotes it is a text."),
        ("!!binary aGk=", "of the type 'binary'"),
        ("!!python/object/apply:os.getcwd []", "of the type 'python/object/apply:os.getcwd'"),
        ("a: " + "9" * 30, r"integers of at most 64 bits, got 9{30} \(line 1, column 4\)"),
        ("a: " + "9" * 30_000, "numbers of at most 400 characters, got one of 30000"),
        ("a: 1" + ":1" * 30_000, "numbers of at most 400 characters, got one of 60001"),
        (".inf", "expected finite numbers, got .inf"),
        ("!!int x", "expected a number, got 'x'"),
        ("!!float ''", "expected a number, got ''"),
        ("!!bool x", "expected YAML, got KeyError"),
        ('"\\ud800"', "text in Unicode, got half of a surrogate pair"),
        ('"\\UFFFFFFFF"', "expected YAML, got"),
        ("%YAML 9" + "9" * 5000, "expected YAML, got"),
        ("a: [1", r"expected YAML, got an error while parsing a flow sequence, expected .* \(line 1, column 6\)"),
        ("a: \x1b", "unacceptable character #x001b"),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        parse_yaml(text)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: \xff", "expected text in UTF-8, got the byte 0xff at 7"),
        (b"\x00\x01\x02", "unacceptable character #x0000"),
        (b"a" * (YAML_BYTES + 1), "expected a file of at most 131072 bytes, got 131073"),
    ],
)
def test_an_error_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    for read in (read_yaml, load_grid):
        with pytest.raises(InvalidArgumentError, match=rf"mine\.yaml: .*{message}"):
            read(str(path))


def test_a_pipe_a_folder_and_nothing_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "a regular file, got a pipe"), ("", "Is a directory"), ("none", "No such file")):
        with pytest.raises(InvalidArgumentError, match=message):
            read_yaml(tmp_path / name)
    for name, message in (("pipe", "got a pipe"), ("", "Is a directory"), ("none", "expected a grid out of")):
        with pytest.raises(InvalidArgumentError, match=message):
            load_grid(str(tmp_path / name))


def test_a_quoted_text_of_sixty_thousand_characters_is_read(tmp_path: Path) -> None:
    for text in ("a" * 60_000, "a " * 30_000, "\\n" * 30_000, " " * 60_000, "'" * 60_000):
        assert parse_yaml(f'"{text}"') == text.replace("\\n", "\n")
