"""What others wrote is read strictly, and bounded before memory is taken."""

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvzip_press.untrusted import MAX_DEPTH, parse_json, read_bytes, read_text

pytestmark = pytest.mark.any_transformers

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_VALUES)
def test_what_json_writes_is_read_back(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("1e999", "within float64"),
        ("1" * 5000, "one of 5000"),
        ("[" * 100_000, "deep"),
        ('{"a":' * 100_000, "deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
        (b'"\xff"', "utf-8"),
        ("", "Expecting value"),
        (b"[" + b"1," * 10**7 + b"1]", "at most"),
    ],
)
def test_what_is_not_sound_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_brackets_in_strings_are_no_depth() -> None:
    value = ["[" * 1000, '"{[' * 1000, "\\" * 1001]
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text", ['"' * 200_001, '"\\' * 200_000, '"' + "\\" * 400_001], ids=["quotes", "both", "backs"]
)
def test_the_depth_is_counted_in_one_pass(text: str) -> None:
    begin = time.process_time()
    with pytest.raises(json.JSONDecodeError):
        parse_json(text)
    assert time.process_time() - begin < 5  # quadratic, it is minutes


def test_only_regular_files_of_bounded_length_are_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="regular file"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(ValueError, match="at most 10 bytes, got 11"):
        read_bytes(tmp_path / "long", max_bytes=10)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


def test_text_is_utf_8(tmp_path) -> None:
    (tmp_path / "marked").write_bytes("\ufeffé\r\n".encode())
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert read_text(tmp_path / "marked") == "é\n"
    with pytest.raises(ValueError, match="UTF-8, got the byte 0xe9 at 3"):
        read_text(tmp_path / "latin")
