"""A GGUF is believed no length that it does not have."""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.loading.embedded import find_gguf
from kvzip_press.loading.gguf import GGUF
from kvzip_press.loading.gguf_lengths import check_lengths

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + elements


def gguf(
    *fields: bytes, n_fields: int | None = None, n_tensors: int = 0, tensors: bytes = b"", version: int = 3
) -> bytes:
    count = len(fields) if n_fields is None else n_fields
    named = b"".join(text(f"field.{number}") + field for number, field in enumerate(fields))
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, count) + named + tensors


NUMBER = struct.pack("<II", UINT32, 7)
WHOLE = gguf(
    NUMBER, struct.pack("<I", STRING) + text("x"), array(STRING, 2, text("a") + text("b")), array(UINT8, 2, b"ab")
)
NESTED = struct.pack("<IQ", ARRAY, 1)
FALSE = {
    "nothing": b"",
    "another format": b"GGML" + WHOLE[4:],
    "an old version": gguf(NUMBER, version=1),
    "numbers of the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "a quintillion fields": gguf(NUMBER, n_fields=2**60),
    "a quintillion tensors": gguf(NUMBER, n_tensors=2**63),
    "a field that is not there": gguf(NUMBER, n_fields=2),
    "a name of an exabyte": gguf(n_fields=1) + struct.pack("<Q", 2**60),
    "a text of an exabyte": gguf(struct.pack("<IQ", STRING, 2**60)),
    "an array of a quintillion numbers": gguf(array(UINT32, 2**60)),
    "an array of a quintillion texts": gguf(array(STRING, 2**60)),
    "an array of more elements than any vocabulary has": gguf(array(UINT8, 3_000_001, bytes(3_000_001))),
    "an array of arrays, a hundred deep": gguf(struct.pack("<I", ARRAY) + NESTED * 100),
    "a value of no known type": gguf(struct.pack("<I", 77)),
    "a tensor of a billion dimensions": gguf(n_tensors=1, tensors=text("x") + struct.pack("<I", 2**30)),
    "a tensor that is not there": gguf(n_tensors=1),
}


def test_a_whole_file_passes(tmp_path) -> None:
    (tmp_path / "a.gguf").write_bytes(WHOLE)
    check_lengths(tmp_path / "a.gguf")
    assert GGUF(tmp_path / "a.gguf").field("field.2") == ["a", "b"]


@pytest.mark.parametrize("what", FALSE)
def test_what_claims_more_than_it_has_is_refused_in_little_memory(tmp_path, what) -> None:
    (tmp_path / "a.gguf").write_bytes(FALSE[what])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidArgumentError, match=r"expected a whole GGUF file at .*, got"):
        GGUF(tmp_path / "a.gguf")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_a_pipe_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="FileNotFoundError"):
        GGUF(tmp_path / "a.gguf")
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(InvalidArgumentError, match="a pipe"):
        GGUF(tmp_path / "a.gguf")


def test_as_many_layers_as_there_are_tensors_are_the_most(tmp_path) -> None:
    """A config names each layer: four billion of them would be in no memory."""
    (tmp_path / "a.gguf").write_bytes(gguf(struct.pack("<II", UINT32, 2**32 - 1)))
    with pytest.raises(InvalidArgumentError, match="got 4294967295"):
        GGUF(tmp_path / "a.gguf").n_layers("field.0")


def test_a_token_of_a_million_letters_is_refused(tmp_path) -> None:
    fields = text("tokenizer.ggml.tokens") + array(STRING, 1, text("x" * 10**6))
    fields += text("tokenizer.ggml.token_type") + array(UINT32, 1, struct.pack("<I", 1))
    (tmp_path / "a.gguf").write_bytes(gguf(n_fields=2) + fields)
    with pytest.raises(InvalidArgumentError, match="at most 1000 letters"):
        GGUF(tmp_path / "a.gguf").tokens()


@pytest.mark.embedded
def test_the_embedded_models_file_passes() -> None:
    check_lengths(find_gguf()[0])
