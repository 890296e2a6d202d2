"""Caches of one context in one batch: each says what it says alone, and stays as it is."""

from __future__ import annotations

import pytest
import torch

from kvzip_press import RandomPress, answer, prefill, question_ids
from kvzip_press.errors import UnsupportedCacheError
from kvzip_press.leaderboard.benchmarks.side_by_side import groups, joined, log_probabilities_of_all
from kvzip_press.leaderboard.running.agreement import log_probabilities
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "The key of the red box is under the mat, and that of the blue one in the oven."
QUESTIONS = ["Where is it?", "Is the box of any other colour?"]


def test_each_says_what_it_says_alone() -> None:
    """Questions and answers of different lengths."""
    model = tiny_model()
    done = prefill(model, TOKENIZER, TEXT)
    scores = RandomPress(0.0, seed=4).score(done)
    caches = [done.evict(scores, ratio, allocation) for ratio in (0.0, 0.5, 0.8) for allocation in ("global", "head")]
    sizes = [(cache.get_seq_length(), cache.resident_bytes) for cache in caches]
    asked, written = [list(question_ids(TOKENIZER, text)) for text in QUESTIONS], [[5, 9, 77, 4], [8, 3]]
    found = list(log_probabilities_of_all(model, caches, asked, written))
    assert len(found) == len(caches)
    for cache, said in zip(caches, found, strict=True):
        torch.testing.assert_close(said, log_probabilities(model, cache, asked, written), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[-1], atol=1e-2), "they differ"
    answers = answer(model, TOKENIZER, joined(caches, len(QUESTIONS)), QUESTIONS * len(caches), max_new_tokens=6)
    assert answers == [one for cache in caches for one in answer(model, TOKENIZER, cache, QUESTIONS, max_new_tokens=6)]
    assert sizes == [(cache.get_seq_length(), cache.resident_bytes) for cache in caches]


def test_groups_hold_no_more_than_they_may_but_one_cache_at_least() -> None:
    done = prefill(tiny_model(), TOKENIZER, TEXT)
    scores = RandomPress(0.0).score(done)
    full, half = done.evict(scores, 0.0), done.evict(scores, 0.5)
    most = full.resident_bytes + half.resident_bytes
    assert list(groups([full, half, half, half, full, full], most)) == [[full, half], [half, half], [full], [full]]
    assert list(groups([full, half], 1)) == [[full], [half]]


def test_what_cannot_be_joined_is_asked_alone() -> None:
    model = tiny_model("gemma3_text")
    done = prefill(model, TOKENIZER, TEXT)
    cache = done.evict(RandomPress(0.5).score(done))
    assert list(groups([cache, cache], 10**9)) == [[cache], [cache]]
    with pytest.raises(UnsupportedCacheError, match="expected caches whose layers are all compressed and that have"):
        joined([cache, cache])
    assert joined([cache], 3).batch_size == 3
