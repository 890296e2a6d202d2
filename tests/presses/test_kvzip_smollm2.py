"""KVzip on real weights: our scores are those of kvpress's KVzipPress where the two do the same."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvzip_press import KVzipPress, detach, load_model, prefill
from kvzip_press.leaderboard.samples.prose import filler_sentences
from kvzip_press.presses.kvzip import replay_press as kvzip

pytestmark = [pytest.mark.embedded, pytest.mark.kvpress, pytest.mark.slow]


def ranks(values: torch.Tensor) -> np.ndarray:
    return values.flatten().argsort().argsort().numpy().astype(float)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


@pytest.fixture(scope="module")
def scored(kvpress):
    """Our scores and kvpress's of a prose context in chunks of 100, the two known differences taken out.

    kvpress drops the trailing space of the later prompts, and takes four sink tokens instead of the whole prefix.
    """
    model, tokenizer = load_model("smollm2")
    text = " ".join(itertools.islice(filler_sentences(random.Random(5)), 14))
    done = prefill(model, tokenizer, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvzip, "NEXT_PROMPT", kvzip.NEXT_PROMPT.rstrip())
        patched = KVzipPress(0.7, chunk_size=100).score(done)
    plain = KVzipPress(0.7, chunk_size=100).score(done)
    detach(model)
    return done, plain, patched, kvpress_scores(kvpress, model, tokenizer, done)


def kvpress_scores(kvpress, model, tokenizer, done) -> torch.Tensor:
    press = kvpress.KVzipPress(compression_ratio=0.7, chunk_size=100, n_sink=done.prefix_length)
    seen, finish = [], press.compress_post

    def spy(model):
        seen.append(press.score_val.detach().clone())
        return finish(model)

    press.compress_post = spy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvpress.presses.kvzip_press.AutoTokenizer.from_pretrained", lambda *_: tokenizer)
        with press(model), torch.no_grad():
            model.model(input_ids=done.input_ids, past_key_values=DynamicCache())
    for layer in model.model.layers:
        layer.self_attn.__dict__.pop("masked_key_indices", None)
    return seen[0]


def test_scores_equal_kvpress(scored) -> None:
    """With its prompt and its sinks made alike, our scores rank all pairs as kvpress's do (Spearman >= 0.999)."""
    done, plain, patched, theirs = scored
    start = done.prefix_length
    ours = torch.stack([patched.layers[i] for i in sorted(patched.layers)])
    assert spearman(ours[..., start:], theirs[..., start:]) >= 0.999
    assert (ours - theirs)[..., start:].abs().max() < 1e-3
    real = torch.stack([plain.layers[i] for i in sorted(plain.layers)])
    assert spearman(real[..., start:], theirs[..., start:]) >= 0.98


def test_chat_template_prefix_is_kept_whole(scored) -> None:
    """kvpress gives template tokens behind its sink a score of zero and evicts them first; here no head loses one."""
    done, plain, _, _ = scored
    cache = done.evict(plain, 0.9)
    assert done.prefix_length > 4
    for layer_idx, _ in cache.ragged_layers():
        for positions in cache.kept_positions(layer_idx)[0]:
            assert positions[: done.prefix_length].tolist() == list(range(done.prefix_length))
