"""The texts from which head scores are computed if none are given."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "texts"


def builtin_pages() -> dict[str, str]:
    """Returns name -> text: prose, code, dialogue, records, instructions and argument, written for this package."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.txt"))}


def builtin_texts() -> dict[str, str]:
    """Returns the pages, and behind them two longer texts.

    Each is half of the pages joined into one, three times as long: they show which heads look far back.
    """
    pages = builtin_pages()
    texts, half = list(pages.values()), len(pages) // 2
    return {**pages, "first half": "\n\n".join(texts[:half]), "second half": "\n\n".join(texts[half:])}
