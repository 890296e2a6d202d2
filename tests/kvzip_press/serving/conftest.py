"""Two contexts of a tiny model, compressed unevenly, as caches and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvzip_press import RaggedCache, RandomPress, compress
from kvzip_press.testing import ByteTokenizer, tiny_model

TEXTS = {
    "lighthouse": "The lighthouse of Skarne stands on a cliff. Its keeper is Ingrid Holm, who came from Bergen. " * 2,
    "archive": "In the archive of Tolva there are nine rooms. Room four holds the maps of the salt road.",
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests of serving."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_layers=2)


@pytest.fixture(scope="module")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="module")
def caches(model: Any, tokenizer: ByteTokenizer) -> dict[str, RaggedCache]:
    return {name: compress(model, tokenizer, text, RandomPress(0.5)) for name, text in TEXTS.items()}


@pytest.fixture
def folder(tmp_path: Path, caches: dict[str, RaggedCache]) -> Path:
    for name, cache in caches.items():
        cache.save(tmp_path / f"{name}.safetensors")
    return tmp_path
