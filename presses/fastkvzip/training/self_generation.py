"""Samples training text from the model itself: nothing is downloaded, and its licence is that of the model's output.

Batches of continuations of random openings (``openings.py``) are joined into documents of several lengths. A batch
depends only on the model, the seed and its number, and is kept in a file with its SHA-256, so that a killed run can
continue. A damaged file is sampled again.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.decoding.generation import eos_ids, generate
from kvzip_press.decoding.sampling import Sampling
from kvzip_press.errors import InvalidArgumentError, RunDirectoryError
from kvzip_press.files import digest_of, replacing, to_json
from kvzip_press.model.chat import encode
from kvzip_press.model.identity import facts_of
from kvzip_press.model.structure import text_config
from kvzip_press.presses.fastkvzip.training.openings import opening
from kvzip_press.untrusted import parse_json, read_text

Documents = list[list[int]]

_BATCH_BYTES = 2**28  # 512 texts of 256 tokens are a megabyte
logger = logging.getLogger(__name__)
_STEP = 8  # openings are cut to multiples of this many tokens, so that rows of one length fill a batch


@dataclass(frozen=True)
class SelfGeneration:
    """How text is sampled.

    Attributes:
        seed: Seed of openings, samples and lengths.
        batch_size: Continuations sampled at a time; on a GPU several hundred take as long as one.
        new_tokens: The most tokens of a continuation.
        temperature: Sampling temperature.
        top_k: Number of most likely tokens to sample from.
        lengths: Tokens of a document, drawn log-uniformly between these two.
    """

    seed: int = 0
    batch_size: int = 64
    new_tokens: int = 256
    temperature: float = 0.9
    top_k: int = 100
    lengths: tuple[int, int] = (128, 2048)

    def documents(self, model: nn.Module, tokenizer: Any, folder: Path) -> Iterator[list[int]]:
        """Yields documents without end, as token ids. Batches that are in the folder are not sampled again.

        Raises:
            InvalidArgumentError: The folder holds samples of another model, another seed or other settings.
            RunDirectoryError: The folder is a link.
            CacheFileError: A batch cannot be written.
        """
        if folder.is_symlink():
            raise RunDirectoryError(f"expected a folder for samples at {folder}, got a link: remove it")
        folder.mkdir(parents=True, exist_ok=True)
        sampling = digest_of(to_json([facts_of(model), repr(self)]).encode())
        batch = 0
        while True:
            path = folder / f"batch-{batch:05}.json"
            documents = _read(path, sampling) if path.exists() else None
            if documents is None:
                documents = self._batch(model, tokenizer, batch)
                with replacing(path) as temporary:
                    temporary.write_text(_sealed(sampling, documents), encoding="utf-8")
            yield from documents
            batch += 1

    def _batch(self, model: Any, tokenizer: Any, batch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{batch}")
        openings = self._openings(tokenizer, rng)
        sampling = Sampling(self.temperature, self.top_k, seed=rng.getrandbits(31))
        written = generate(
            model,
            compat.DynamicCache(config=text_config(model)),
            torch.tensor(openings),
            self.new_tokens,
            eos_ids=eos_ids(model, tokenizer),
            sampling=sampling,
            graph=False,  # a dense cache grows by concatenation, which no graph can hold
        )
        pieces = [[*first, *rest] for first, rest in zip(openings, written, strict=True)]
        return list(self._joined(pieces, encode(tokenizer, "\n\n"), rng))

    def _openings(self, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        """Returns openings of one length, enough to fill a batch."""
        by_length: dict[int, list[list[int]]] = {}
        while True:
            ids = list(encode(tokenizer, opening(rng)))
            ids = ids[: max(len(ids) // _STEP, 1) * _STEP]
            alike = by_length.setdefault(len(ids), [])
            alike.append(ids)
            if len(alike) == self.batch_size:
                return alike

    def _joined(self, pieces: list[list[int]], between: tuple[int, ...], rng: random.Random) -> Iterator[list[int]]:
        shortest, longest = self.lengths
        length, document = 0, list[int]()
        for piece in pieces:
            if not document:
                length = round(shortest * (longest / shortest) ** rng.random())
            document += [*(between if document else ()), *piece]
            if len(document) >= length:
                yield document[:length]
                document = []
        if len(document) >= shortest:
            yield document


def _sealed(sampling: str, documents: Documents) -> str:
    return to_json({"sampling": sampling, "documents": documents, "sha256": _digest(sampling, documents)})


def _read(path: Path, sampling: str) -> Documents | None:
    """Returns the documents of a batch, or None, with a note, if its file is damaged."""
    try:
        record = parse_json(read_text(path), max_bytes=_BATCH_BYTES)
        documents: Documents = record["documents"]
        if record["sha256"] != _digest(record["sampling"], documents):
            raise ValueError("a SHA-256 that is not that of the documents")  # noqa: TRY301  # handled as all damage
    except (OSError, ValueError, TypeError, LookupError) as error:
        logger.warning("%s is damaged (%s) and is sampled again", path, error)
        return None
    if record["sampling"] != sampling:
        raise InvalidArgumentError(
            f"expected {path.parent} to be new or to hold samples of this model with these settings, got others: name "
            "another folder, or remove it"
        )
    return documents


def _digest(sampling: str, documents: Documents) -> str:
    return digest_of(to_json([sampling, documents]).encode())
