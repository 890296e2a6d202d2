"""Hidden states and scores on disk, one file per layer, read back as memory maps. A killed run can continue.

Every piece is recorded with the SHA-256 of what was written for it. So a file that was damaged, or did not reach the
disk before a power cut, is found before anything is learned from it, and its pieces are read by the model again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch

from kvzip_press.errors import RunDirectoryError
from kvzip_press.files import replacing
from kvzip_press.untrusted import parse_json, read_text

FEATURE_DTYPE = torch.bfloat16  # gates read the model's dtype, whichever it is; bf16 is close enough
DONE = "done.json"
_KINDS = ("hidden", "scores")
_BLOCK = 2**22
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shards:
    """The features of one round: for each layer, the tokens' hidden states and KVzip's scores.

    Attributes:
        folder: The folder of the files.
        layer_indices: The layers.
        hidden_size: The model's hidden size.
        num_key_value_heads: KV heads of each layer.
        training: Which training they are for; those of another are not continued.
    """

    folder: Path
    layer_indices: tuple[int, ...]
    hidden_size: int
    num_key_value_heads: int
    training: str = ""

    @property
    def token_bytes(self) -> int:
        """Bytes on disk of one token."""
        return len(self.layer_indices) * sum(map(self._row_bytes, _KINDS))

    @property
    def done(self) -> tuple[int, int]:
        """Number of pieces and tokens that are completely on disk."""
        return len(self._pieces), sum(tokens for tokens, _ in self._pieces)

    def append(self, features: Mapping[int, torch.Tensor], scores: Mapping[int, torch.Tensor]) -> None:
        """Adds one piece.

        Args:
            features: ``layer_idx -> [n, hidden_size]``.
            scores: ``layer_idx -> [num_key_value_heads, n]``.

        Raises:
            RunDirectoryError: A link, or something else that this class did not make, is in the place of a file.
            OSError: The files cannot be written.
            CacheFileError: The record of the piece cannot be written.
        """
        _, n_tokens = self.done
        if self.folder.is_symlink():
            raise RunDirectoryError(f"expected a folder of the training at {self.folder}, got a link: remove it")
        self.folder.mkdir(parents=True, exist_ok=True)

        def write(kind: str, layer_idx: int) -> bytes:
            values = features[layer_idx].to(FEATURE_DTYPE) if kind == "hidden" else scores[layer_idx].T.float()
            return _write(self._path(kind, layer_idx), n_tokens * self._row_bytes(kind), values)

        piece = (features[self.layer_indices[0]].shape[0], self._of_all_files(write))
        with replacing(self.folder / DONE) as temporary:
            record = {"training": self.training, "pieces": [*self._pieces, piece]}
            temporary.write_text(json.dumps(record), encoding="utf-8")
        self._pieces.append(piece)

    def recover(self, lengths: Sequence[int]) -> int:
        """Counts the pieces on disk that are whole; those behind are forgotten, with a note, and to be added again.

        Args:
            lengths: Tokens of all pieces that the round will have, in order.
        """
        whole, row = 0, 0
        for (tokens, digest), length in zip(self._pieces, lengths, strict=False):
            if tokens != length or digest != self._digest(row, tokens):
                break
            whole, row = whole + 1, row + tokens
        if whole < len(self._pieces):
            note = "%s: of %d pieces the first %d are whole; the others are damaged, and are read again"
            logger.warning(note, self.folder, len(self._pieces), whole)
            del self._pieces[whole:]
        return whole

    def read(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Maps, for each layer, ``[tokens, hidden_size]`` in bf16 and ``[tokens, num_key_value_heads]`` in fp32.

        All that was written is on the disk before, and was compared with its record.

        Raises:
            RunDirectoryError: A file was changed since it was written.
        """
        self._sync()
        n_pieces, n = self.done
        if self.recover([tokens for tokens, _ in self._pieces]) < n_pieces:
            raise RunDirectoryError(f"expected the features in {self.folder} as written, got others: start again")
        shapes = {"hidden": (n, self.hidden_size), "scores": (n, self.num_key_value_heads)}
        dtypes = {"hidden": FEATURE_DTYPE, "scores": torch.float32}

        def mapped(kind: str) -> list[torch.Tensor]:
            size = shapes[kind][0] * shapes[kind][1]
            files = (str(self._path(kind, layer_idx)) for layer_idx in self.layer_indices)
            return [torch.from_file(file, size=size, dtype=dtypes[kind]).view(shapes[kind]) for file in files]

        return mapped("hidden"), mapped("scores")

    @cached_property
    def _pieces(self) -> list[tuple[int, str]]:
        """Tokens and SHA-256 of each piece on record; none if there is no record, or none of this training."""
        path = self.folder / DONE
        if not path.exists():
            return []
        try:
            record: Any = parse_json(read_text(path))
            pieces = [(tokens, str(digest)) for tokens, digest in record["pieces"]]
            if record["training"] == self.training and all(type(tokens) is int and tokens > 0 for tokens, _ in pieces):
                return pieces
        except (OSError, ValueError, TypeError, LookupError):  # not as it was written
            pass
        logger.warning("%s is damaged or of another training: the whole round is read again", path)
        return []

    def _row_bytes(self, kind: str) -> int:
        return self.hidden_size * FEATURE_DTYPE.itemsize if kind == "hidden" else self.num_key_value_heads * 4

    def _path(self, kind: str, layer_idx: int) -> Path:
        return self.folder / f"{kind}-{layer_idx:03}.bin"

    def _digest(self, row: int, tokens: int) -> str:
        """Returns the SHA-256 of a piece as it lies in the files."""

        def read(kind: str, layer_idx: int) -> bytes:
            size = self._row_bytes(kind)
            return _digest(self._path(kind, layer_idx), row * size, tokens * size)

        return self._of_all_files(read)

    def _of_all_files(self, digest: Callable[[str, int], bytes]) -> str:
        """Returns the SHA-256 of the digests of all files, which threads make side by side."""
        files = [(kind, layer_idx) for kind in _KINDS for layer_idx in self.layer_indices]
        with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
            return hashlib.sha256(b"".join(pool.map(digest, *zip(*files, strict=True)))).hexdigest()

    def _sync(self) -> None:
        def sync(kind: str, layer_idx: int) -> bytes:
            with suppress(FileNotFoundError), _opened(self._path(kind, layer_idx)) as file:
                os.fsync(file.fileno())
            return b""

        self._of_all_files(sync)
        with suppress(OSError):  # where folders cannot be opened
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _write(path: Path, offset: int, values: torch.Tensor) -> bytes:
    """Writes values from an offset on, over whatever a killed run may have left there; returns their SHA-256."""
    data = values.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data  # flat: size 1 allows any stride
    with _opened(path, os.O_CREAT) as file:
        file.seek(offset)
        file.write(data)
        file.truncate()
    return hashlib.sha256(data).digest()


def _digest(path: Path, offset: int, size: int) -> bytes:
    """Returns the SHA-256 of a part of a file; that of less if the file is shorter, is missing or is a link."""
    sha = hashlib.sha256()
    with suppress(OSError), _opened(path) as file:
        file.seek(offset)
        while block := file.read(min(size, _BLOCK)):
            sha.update(block)
            size -= len(block)
    return sha.digest()


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[IO[bytes]]:
    """Opens a file to read and write it, but no link, and none that has another name somewhere else."""
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    with suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise RunDirectoryError(f"expected a file of the training at {path}, got a link or a folder: remove it")
    with os.fdopen(os.open(path, os.O_RDWR | flags, 0o666), "r+b") as file:
        yield file
