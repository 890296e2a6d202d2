"""Following the full cache: read stretch by stretch, it is as if every token had been written by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvzip_press import compat
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.compat import DynamicCache
from kvzip_press.leaderboard.running.agreement import Agreement
from kvzip_press.leaderboard.running.decode_phase import generate_evicting
from kvzip_press.leaderboard.running.following import FullAnswer, follow, full_answer
from kvzip_press.model.structure import text_config
from kvzip_press.registry import get_press
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = (3 + torch.randperm(250, generator=torch.Generator().manual_seed(0))[:40]).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_model(num_layers=1, vocab_size=256)
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def full(model: Any) -> FullAnswer:
    return full_answer(model, PROMPT, 44, seed=1)


@torch.no_grad()
def one_by_one(model: Any, press: Any, answer: FullAnswer) -> tuple[Agreement, int]:
    """What :func:`follow` returns, with a forward for each token."""
    cache, logits, most = DynamicCache(config=text_config(model)), [], 0
    with press(model):
        for ids in (answer.prompt, *answer.tokens[:, :-1].split(1, dim=1)):
            output = model(input_ids=ids, use_cache=True, **compat.cache_argument(model, cache))
            logits.append(output.logits[0, -1])
            most = max(most, RaggedCache.of(cache).resident_bytes)
    return Agreement.of(answer.logits.log_softmax(-1), torch.stack(logits).log_softmax(-1)), most


@pytest.mark.parametrize("name", ["random_decode", "streaming_llm_decode", "knorm_decode", "tova_decode", "h2o", "rkv"])
def test_stretches_are_as_single_tokens(model: Any, full: FullAnswer, name: str) -> None:
    """The same pairs go at the same tokens, and the most bytes are the same to the byte."""
    press = get_press(name, budget=24, buffer=9)
    expected, most_bytes = one_by_one(model, press, full)
    found = follow(model, press, full)
    torch.testing.assert_close(torch.tensor(found.agreement.kl), torch.tensor(expected.kl), rtol=1e-3, atol=1e-5)
    assert found.agreement.same == expected.same and min(expected.same) == 0
    assert found.most_bytes == most_bytes
    assert len(found.likeliest) == 44


def test_what_loses_nothing_agrees(model: Any, full: FullAnswer) -> None:
    found = follow(model, get_press("none"), full)
    assert found.agreement.share == 1.0 and found.agreement.until_first == 44 and found.agreement.mean_kl < 1e-5
    assert follow(model, get_press("rkv", budget=100, buffer=8), full).agreement.share == 1.0


def test_the_full_answer_is_what_the_model_writes_and_no_token_ends_it(model: Any, full: FullAnswer) -> None:
    ids = torch.tensor([PROMPT])
    likeliest = full_answer(model, PROMPT, 30)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert likeliest.tokens.tolist() == plain[:, 40:].tolist()
    assert full_answer(model, PROMPT, 44, seed=1).tokens.equal(full.tokens)  # so that a run goes on as it began
    assert not full_answer(model, PROMPT, 44, seed=2).tokens.equal(full.tokens)
    with torch.no_grad():
        whole = model(torch.cat([ids, full.tokens[:, :-1]], dim=1)).logits[0, 39:]
    torch.testing.assert_close(full.logits, whole, rtol=1e-3, atol=1e-4)


def test_what_is_written_holds_as_much_as_what_is_followed(model: Any, full: FullAnswer) -> None:
    """At most, to the byte: sizes do not depend on the tokens. Behind the last eviction the cache is smaller."""
    press = get_press("rkv", budget=24, buffer=9)
    ids, cache, most_bytes = generate_evicting(model, SimpleNamespace(eos_token_id=None), press, PROMPT, 44)
    assert len(ids) == 44
    assert most_bytes == follow(model, press, full).most_bytes >= cache.resident_bytes
