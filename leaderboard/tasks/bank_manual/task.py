"""A bank's manual for its support desk, out of the package inspect-evals."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvzip_press.errors import DataNotFoundError
from kvzip_press.leaderboard.samples.documents import Document, DocumentTask
from kvzip_press.leaderboard.samples.installed import MAX_BYTES, InstalledFile
from kvzip_press.leaderboard.samples.record import Record
from kvzip_press.untrusted import parse_json

FILE = InstalledFile(
    "inspect-evals",
    "0.28.0",
    "inspect_evals/tau2/data/domains/banking_knowledge/documents.json.gz",
    "1f973db8dc22db49c0ad06533a6e33458a27291925f107d48a95bd6fb7a30f00",
    "pip install --no-deps inspect-evals==0.28.0",  # its own dependencies are many, and only this file is read
)


@dataclass(frozen=True)
class BankManualTask(DocumentTask):
    """Some of the manual's 698 documents."""

    name: str = "bank_manual"

    @property
    def data_revision(self) -> str:  # type: ignore[override]
        """The package's version, and the file's hash."""
        return FILE.revision

    @cached_property
    def documents(self) -> Sequence[Document]:
        """The documents; of those with one title, the first. Raises as `InstalledFile.read` does."""
        with gzip.open(io.BytesIO(FILE.read())) as packed:
            text = packed.read(MAX_BYTES)
        rows = parse_json(text, max_bytes=MAX_BYTES)
        if not isinstance(rows, list):
            raise DataNotFoundError(f"{FILE.path}: expected a list of documents, got {type(rows).__name__}")
        records = (Record(f"{FILE.path}, document {place}", row) for place, row in enumerate(rows, start=1))
        found: dict[str, Document] = {}
        for one in records:
            title = one.text("title").strip()
            found.setdefault(title, Document(title, one.text("content").strip()))
        return tuple(found.values())
