"""The documents that gates are trained on, as token ids; some documents are held out for the evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError, MissingDependencyError
from kvzip_press.model.chat import encode

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
        raise InvalidArgumentError(
            f"expected at least {HELD_OUT} documents, so that one can be held out, got {len(taken[False])} pieces of "
            f"fewer; a JSONL file has a document a line"
        )
    return taken[False], taken[True]


def read_texts(sources: Sequence[str]) -> Iterator[str]:
    """Yields the texts of files (one each), JSONL files (one per line, under "text") and hub data sets, in order.

    Raises:
        InvalidArgumentError: A line without a text, or something that is neither a file nor the name of a data set.
        MissingDependencyError: A data set is named, but the package ``datasets`` is not installed.
    """
    for source in sources:
        path = Path(source)
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif path.is_file():
            yield path.read_text(encoding="utf-8")
        elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
            yield from _data_set(source)
        else:
            raise InvalidArgumentError(f"expected a text file, a .jsonl file or a hub data set, got {source!r}")


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line) if line.strip() else {"text": ""}
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise InvalidArgumentError(
                        f'expected {{"text": "..."}} in line {number} of {path}, got {line[:80]!r}'
                    )
                yield row["text"]
    except (OSError, json.JSONDecodeError) as error:
        raise InvalidArgumentError(f"expected a JSONL file at {path}, got {type(error).__name__}: {error}") from error


def _data_set(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError(
            "a data set of the hub needs the package datasets: pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, CONFIGS.get(name), split="train", streaming=True)
        for row in rows:
            yield str(row["text"])
    except (OSError, ValueError, KeyError) as error:
        raise DataNotFoundError(
            f"expected the hub data set {name} with a column 'text', cached or reachable, got "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
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
