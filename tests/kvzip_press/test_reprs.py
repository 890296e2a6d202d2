"""What a person sees of a cache, scores and a prefill; and a press that removed nothing says so."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvzip_press import (
    ComposedPress,
    DuoAttentionPress,
    HeadScores,
    KVzipPress,
    Prefill,
    RaggedCache,
    RandomPress,
    compress,
    compress_in_chunks,
    prefill,
)
from kvzip_press.prefilling import whole
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL, TOKENIZER = tiny_model(), ByteTokenizer()
TEXT = "The key of the red box is under the mat, and the mat is at the door."
HALF = RandomPress(0.5)


def in_place(model: Any, press: RandomPress) -> Any:
    with press(model), torch.no_grad():
        return model(torch.randint(3, 120, (1, 40))).past_key_values


def test_a_cache_says_what_it_holds_of_what_it_has_seen_and_who_chose(tmp_path) -> None:
    """In one line, also of a fork, a batch whose rows differ, a file, and a cache that was compressed in place."""
    cache = compress(MODEL, TOKENIZER, TEXT, KVzipPress(0.6, replay="local"))
    expected = r"RaggedCache(1 row, 69 tokens seen, 40.8% of pairs kept, 0.0 of 0.1 MB, by "
    made_by = "KVzipPress(compression_ratio=0.6, replay='local'))"
    assert repr(cache) == repr(cache.fork()) == expected + made_by
    cache.save(tmp_path / "cache.safetensors", press="mine")
    assert repr(RaggedCache.load(tmp_path / "cache.safetensors", MODEL)) == f"{expected}mine)"
    rows = compress(MODEL, TOKENIZER, [TEXT, TEXT[20:]], HALF)
    assert repr(rows).startswith("RaggedCache(2 rows, 69 tokens seen, ")
    in_chunks = compress_in_chunks(MODEL, TOKENIZER, TEXT, HALF, chunk_size=30, window_size=8)
    assert repr(in_chunks).endswith("MB, by RandomPress(compression_ratio=0.5))")
    own = repr(RaggedCache.of(in_place(MODEL, HALF)))
    assert own.startswith("RaggedCache(1 row, 40 tokens seen, ") and own.endswith(
        "by RandomPress(compression_ratio=0.5))"
    )
    assert repr(RaggedCache([])) == "RaggedCache(0 layers, none compressed)"


def test_scores_and_a_prefill_say_what_they_are_about() -> None:
    done = prefill(MODEL, TOKENIZER, [TEXT, TEXT[20:]], observers=[HALF])
    scores = HALF.score(done)
    assert repr(scores) == (
        "Scores(3 layers, 2 rows, 69 tokens, 2 protected, Ratio(compression_ratio=0.5), global, "
        "by RandomPress(compression_ratio=0.5))"
    )
    assert repr(done).startswith("Prefill(2 rows, 69 tokens, 0.1 MB uncompressed, read in ")
    assert repr(ComposedPress([HALF]).score(done)).endswith(
        "Decided, by ComposedPress(presses=[RandomPress(compression_ratio=0.5)]))"
    )
    assert repr(done.evict(scores, 0.8)).endswith("by RandomPress(compression_ratio=0.5))")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, as if nothing had been said before."""
    whole._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="kvzip_press")
    return caplog


class AllProtected(RandomPress):
    """Protects whatever it is given."""

    def score(self, prefill: Prefill) -> Any:
        return replace(super().score(prefill), protected=prefill.valid)


SIX = HeadScores(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]))
NOTHING: dict[str, tuple[Any, str, str]] = {
    "sink and window": (DuoAttentionPress(0.5, SIX), TEXT, "ends that it keeps of each head, say, reach over so short"),
    "protected": (AllProtected(0.5), TEXT, "it protects every token of so short a context"),
    "rounded": (RandomPress(0.01), TEXT[:5], "its budget, rounded and with its floors, holds every pair"),
}


@pytest.mark.parametrize("why", NOTHING)
def test_a_press_that_removed_nothing_of_what_was_asked_says_why_once(why: str, said) -> None:
    press, text, reason = NOTHING[why]
    for _ in range(2):
        assert compress(MODEL, TOKENIZER, text, press).kept_fraction == 1.0
    [line] = [record.getMessage() for record in said.records]
    assert line.startswith(f"{type(press).__name__}(compression_ratio=") and reason in line


def test_a_press_that_was_asked_for_nothing_or_did_remove_something_says_nothing(said) -> None:
    compress(MODEL, TOKENIZER, TEXT, RandomPress(0.0))
    compress(MODEL, TOKENIZER, TEXT, RandomPress(budget=1000))
    compress(MODEL, TOKENIZER, TEXT, HALF)
    assert said.records == []
