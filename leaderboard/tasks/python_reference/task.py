"""Python's language reference, which every Python brings along: documents of real technical prose."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvzip_press.errors import DataNotFoundError
from kvzip_press.leaderboard.samples.documents import Document, DocumentTask
from kvzip_press.leaderboard.samples.installed import python_revision

LEAST_CHARACTERS = 300
_HEADING = re.compile(r"^(?P<title>\S.*)\n(?P<line>[*=~\-])(?P=line){2,}\n", re.MULTILINE)


@dataclass(frozen=True)
class PythonReferenceTask(DocumentTask):
    """Sections of the language reference that `help()` shows (`pydoc_data.topics`).

    The texts are those of the Python that runs; `data_revision` says which.
    """

    name: str = "python_reference"

    @property
    def data_revision(self) -> str:  # type: ignore[override]
        """Python's version, and the hash of its texts."""
        return python_revision(*(text for _, text in sorted(topics().items())))

    @cached_property
    def documents(self) -> Sequence[Document]:
        """The sections, each once: topics repeat those of other topics."""
        sections = {one.text: one for _, text in sorted(topics().items()) for one in sections_of(text)}
        titles: dict[str, int] = {}
        for one in sections.values():
            titles[one.title] = titles.get(one.title, 0) + 1
        return tuple(one for one in sections.values() if titles[one.title] == 1)


def topics() -> dict[str, str]:
    """Returns the topics of this Python.

    Raises:
        DataNotFoundError: It was built without them.
    """
    try:
        from pydoc_data.topics import topics as found
    except ImportError as error:
        raise DataNotFoundError(
            f"expected pydoc_data.topics, which CPython brings along, got {error}: use a Python that has it"
        ) from error
    return dict(found)


def sections_of(text: str) -> Iterator[Document]:
    """Yields the sections below the headings of a text that are long enough to be asked about."""
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=True):
        body = text[heading.end() : end].strip("\n")
        if len(body) >= LEAST_CHARACTERS:
            yield Document(heading["title"].strip(), body)
