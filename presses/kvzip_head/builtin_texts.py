"""The texts that scores of heads are made of where none are given."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "texts"


def builtin_texts() -> dict[str, str]:
    """Name -> text: pages of prose, code, dialogue, records, instructions and argument, written for this package.

    Behind the pages each half of them again as one text, three times as long: heads that look far back show there.
    """
    pages = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.txt"))}
    texts, half = list(pages.values()), len(pages) // 2
    return {**pages, "first half": "\n\n".join(texts[:half]), "second half": "\n\n".join(texts[half:])}
