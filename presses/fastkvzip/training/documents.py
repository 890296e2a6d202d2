"""The documents that gates are trained on, as token ids; some documents are held out for the evaluation."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError, MissingDependencyError
from kvzip_press.model.chat import encode
from kvzip_press.untrusted import JSON_BYTES, open_regular, parse_json, read_text

FINEWEB = "HuggingFaceFW/fineweb-edu"
CONFIGS = {FINEWEB: "sample-10BT"}  # the configuration to load, for hub data sets with several
SHORTEST = 32  # tokens; a shorter text does not show what a context needs
HELD_OUT = 8  # one document in this many is held out


@dataclass(frozen=True)
class Piece:
    """A document, or as much of one as the model reads at a time.

    Attributes:
        document: The document's number; its pieces are either all trained on or all held out.
        ids: Its token ids.
    """

    document: int
    ids: list[int]


def pieces(documents: Iterable[Sequence[int]], longest: int) -> Iterator[Piece]:
    """Cuts documents into pieces of at most ``longest`` tokens; pieces shorter than :data:`SHORTEST` are left out."""
    for number, ids in enumerate(documents):
        for start in range(0, len(ids), longest):
            piece = list(ids[start : start + longest])
            if len(piece) >= SHORTEST:
                yield Piece(number, piece)


def split(all_pieces: Iterable[Piece], tokens: int, held_out_tokens: int) -> tuple[list[Piece], list[Piece]]:
    """Takes pieces until there are enough tokens to train on and to evaluate with; the last piece is cut to fit.

    At regular intervals a document is held out, until enough tokens are; no document is in both parts.

    Raises:
        InvalidArgumentError: There are not enough documents for both parts.
    """
    taken: dict[bool, list[Piece]] = {False: [], True: []}
    left = {False: tokens, True: held_out_tokens}
    held_out = set[int]()
    for piece in all_pieces:
        if piece.document % HELD_OUT == HELD_OUT - 1 and left[True] >= SHORTEST:
            held_out.add(piece.document)
        kind = piece.document in held_out
        ids = piece.ids[: left[kind]]
        if len(ids) >= SHORTEST:
            taken[kind].append(Piece(piece.document, ids))
            left[kind] -= len(ids)
        if max(left.values()) < SHORTEST:
            break
    if not taken[True]:
        n_documents = len({piece.document for piece in taken[False]})
        raise InvalidArgumentError(
            f"expected at least {HELD_OUT} documents, so that one can be held out, got {n_documents}: a text file is "
            "one document, a JSONL file has one on each line"
        )
    return taken[False], taken[True]


def read_texts(sources: Sequence[str]) -> Iterator[str]:
    """Yields the texts of files (one each), JSONL files (one per line, under "text") and hub data sets, in order.

    A JSONL file may be of any length; a line of it has at most 16 MiB, a text file 256 MiB.

    Raises:
        InvalidArgumentError: A line without a text, a file that is not text in UTF-8, too long or no regular file, or
            something that is neither a file nor the name of a data set. The message names the file and the line.
        MissingDependencyError: A data set is named, but the package ``datasets`` is not installed.
        DataNotFoundError: A data set cannot be reached, or has a row without a text.
    """
    for source in sources:
        path = Path(source)
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif path.is_file():
            yield _text(path)
        elif _may_be_data_set(source) and (path.is_dir() or not path.exists()):
            yield from _data_set(source)
        else:
            raise InvalidArgumentError(f"expected a text file, a .jsonl file or a hub data set, got {source!r}")


def _may_be_data_set(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"expected a text file at {path}, got {type(error).__name__}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"expected a JSONL file at {path}, got {type(error).__name__}: {error}") from error
    with file:
        lines = iter(lambda: file.readline(JSON_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            try:
                yield _text_of(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
            except ValueError as error:
                raise InvalidArgumentError(
                    f'expected {{"text": "..."}} in line {number} of {path}, got {error}'
                ) from error


def _text_of(line: bytes) -> str:
    """Returns the text of a line of JSON; an empty one for an empty line.

    Raises:
        ValueError: The line has none; the message says what it is instead.
    """
    if len(line) > JSON_BYTES:
        raise ValueError(f"more than {JSON_BYTES} bytes")
    if not (line := line.strip()):
        return ""
    try:
        row = parse_json(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"a byte that is not UTF-8, 0x{line[error.start]:02x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at character {error.pos}): {line[:80]!r}") from error
    except ValueError as error:
        raise ValueError(f"JSON of another kind ({error}): {line[:80]!r}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not _is_text(text):
        raise ValueError(repr(line[:80]))
    return str(text)


def _is_text(value: object) -> bool:
    """Whether this is a string that UTF-8 can hold: JSON may spell half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _data_set(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError(
            "a data set of the hub needs the package datasets: pip install datasets"
        ) from error
    expected = f"expected the hub data set {name} with a column 'text'"
    try:
        for number, row in enumerate(load_dataset(name, CONFIGS.get(name), split="train", streaming=True)):
            if not _is_text(row["text"]):
                raise TypeError(f"{str(row['text'])[:80]!r} in row {number}")  # noqa: TRY301  # said below, with the name
            yield row["text"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataNotFoundError(
            f"{expected}, cached or reachable, got {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yields the token ids of each text."""
    return (list(encode(tokenizer, text)) for text in texts)


def digest(some: Sequence[Piece]) -> str:
    """Returns the SHA-256 of the pieces' token ids."""
    sha = hashlib.sha256()
    for piece in some:
        sha.update(torch.tensor([len(piece.ids), *piece.ids]).numpy().tobytes())
    return sha.hexdigest()
