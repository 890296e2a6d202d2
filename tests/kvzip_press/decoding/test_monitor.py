"""A question is asked again, of more pairs, where the model is not sure of its answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kvzip_press import RandomPress, answer, answer_restoring, compress, generate, question_ids
from kvzip_press.errors import InvalidArgumentError, UnsupportedCacheError
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
MODEL = tiny_model(num_layers=2)
TEXT = "The key of the red box is under the mat, and the mat is at the door of the house."
QUESTION = "Where is it?"


def asked(cache: Any, **options: Any) -> Any:
    return answer_restoring(MODEL, TOKENIZER, cache, QUESTION, max_new_tokens=4, **options)


def test_a_sure_answer_is_that_of_the_small_cache_and_a_doubtful_one_that_of_all_pairs(tmp_path: Path) -> None:
    for cold in ("cpu", tmp_path / "evicted"):
        cache = compress(MODEL, TOKENIZER, TEXT, RandomPress(0.9, seed=1), cold=cold)
        small, size = answer(MODEL, TOKENIZER, cache, QUESTION, max_new_tokens=4), cache.resident_bytes
        full = compress(MODEL, TOKENIZER, TEXT, RandomPress(0.0))
        whole = answer(MODEL, TOKENIZER, full, QUESTION, max_new_tokens=4)
        assert small != whole
        sure = asked(cache, min_margin=0.0)
        assert (sure.text, sure.n_restored, sure.resident_bytes) == (small, 0, size)
        doubtful = asked(cache, min_margin=1.0)
        assert (doubtful.text, doubtful.n_restored, doubtful.resident_bytes) == (whole, 1, full.resident_bytes)
        assert asked(cache, max_entropy=0.0) == doubtful
        assert cache.resident_bytes == size  # a fork was restored


def test_ratios_are_gone_through_until_the_model_is_sure() -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, RandomPress(0.9, seed=1), cold="cpu")
    margins = [asked(cache, min_margin=0.0).margin]
    for ratio in (0.6, 0.3, 0.0):
        restored = cache.fork()
        restored.restore(ratio)
        margins.append(asked(restored, min_margin=0.0).margin)
    ratios = [0.6, 0.3, 0.0]
    for bound in margins:
        expected = next((n for n, margin in enumerate(margins) if margin >= bound), 3)
        got = asked(cache, min_margin=bound, compression_ratios=ratios)
        assert (got.n_restored, got.margin) == (expected, margins[expected])


def test_margin_and_entropy_are_those_of_the_worst_token() -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, RandomPress(0.5), cold="cpu")
    steps: list[torch.Tensor] = []
    ids = question_ids(TOKENIZER, QUESTION)
    generate(MODEL, cache.fork(), ids, 4, eos_ids={2}, watch=lambda logits: steps.append(logits.double().clone()))
    assert len(steps) == 4
    chances = torch.cat(steps).softmax(dim=-1)
    best = chances.topk(2).values
    got = asked(cache, min_margin=0.0)
    assert got.margin == pytest.approx(float((best[:, 0] - best[:, 1]).min()), abs=1e-6)
    assert got.entropy == pytest.approx(float((-chances * chances.log()).sum(dim=-1).max()), abs=1e-5)
    assert 0 <= got.margin <= 1
    assert got.entropy <= math.log(128)


def test_what_cannot_be_asked_so_is_refused() -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, RandomPress(0.5), cold="cpu")
    with pytest.raises(InvalidArgumentError, match="expected min_margin or max_entropy"):
        asked(cache)
    with pytest.raises(InvalidArgumentError, match="that descend"):
        asked(cache, min_margin=0.5, compression_ratios=[0.0, 0.3])
    with pytest.raises(InvalidArgumentError, match="one question of a cache of one row"):
        asked(compress(MODEL, TOKENIZER, [TEXT, TEXT], RandomPress(0.5), cold="cpu"), min_margin=0.5)
    with pytest.raises(UnsupportedCacheError, match="cold='cpu'"):
        asked(compress(MODEL, TOKENIZER, TEXT, RandomPress(0.5)), min_margin=0.5)
