"""The measure of agreement with the full cache: nothing removed agrees whole, and less agrees less."""

from __future__ import annotations

import torch

from kvzip_press.leaderboard.benchmarks.agreement import agreement, written
from kvzip_press.registry import get_press
from kvzip_press.testing import tiny_model


def test_a_cache_that_loses_nothing_agrees_and_one_that_does_differs() -> None:
    """In every measure: tokens, tokens until the first other, KL divergence and bytes."""
    model = tiny_model(num_layers=2, vocab_size=256)
    prompt = 3 + torch.randperm(250, generator=torch.Generator().manual_seed(0))[None, :40]
    tokens, logits = written(model, prompt, 30)
    assert (
        tokens.tolist()
        == model.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)[:, 40:].tolist()
    )
    whole, most_bytes = agreement(model, get_press("rkv", budget=100, buffer=8), prompt, tokens, logits)
    assert (whole.share, whole.until_first) == (1.0, 30) and abs(whole.mean_kl) < 1e-5
    less, fewer_bytes = agreement(model, get_press("random_decode", budget=12, buffer=4), prompt, tokens, logits)
    assert less.share < 1.0 and less.until_first < 30 and less.mean_kl > 1e-3 and fewer_bytes < most_bytes
