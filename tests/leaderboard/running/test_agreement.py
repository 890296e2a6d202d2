"""How closely a cache follows the full one: by hand, and against a model that reads everything at once."""

from __future__ import annotations

import math

import pytest
import torch

from kvzip_press import RandomPress, compress, question_ids
from kvzip_press.leaderboard.running.agreement import Agreement, log_probabilities
from kvzip_press.model.chat import chat_frame
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "The key of the red box is under the mat."


def test_divergence_and_likeliest_token_are_those_of_the_formula() -> None:
    p, q = [0.5, 0.25, 0.25], [0.2, 0.4, 0.4]
    found = Agreement.of(torch.tensor([p, p]).double().log(), torch.tensor([q, p]).double().log())
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found.kl == (pytest.approx(expected), pytest.approx(0))
    assert found.same == (False, True)
    assert (found + found).same == (False, True, False, True)


def test_a_full_cache_says_what_the_model_says_without_one_to_each_of_several_questions() -> None:
    """Questions and answers of different lengths; the cache stays as it is."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, TEXT, RandomPress(0.0))
    asked = [list(question_ids(TOKENIZER, text)) for text in ("Where is it?", "Is the box of any other colour?")]
    written = [[5, 9, 77, 4], [8, 3]]
    n_seen, n_bytes = cache.get_seq_length(), cache.resident_bytes
    found = log_probabilities(model, cache, asked, written)
    context = [*chat_frame(TOKENIZER).prefix, *TOKENIZER.encode(TEXT)]
    expected = []
    for ids, answer in zip(asked, written, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *ids, *answer[:-1]]])).logits[0, -len(answer) :]
        expected.append(logits.double().log_softmax(-1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert (cache.get_seq_length(), cache.resident_bytes) == (n_seen, n_bytes)
