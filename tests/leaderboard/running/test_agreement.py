"""How closely a cache follows the full one: by hand, and against a model that reads everything at once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvzip_press import RandomPress, compress, question_ids
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.rows.results import KL, Row
from kvzip_press.leaderboard.running.agreement import Agreement, log_probabilities, log_probabilities_at_once
from kvzip_press.leaderboard.running.endpoint import Endpoint
from kvzip_press.leaderboard.running.plan import AGREEMENT, PressSpec, Run, TaskSpec, plan
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.leaderboard.tasks import get_task
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


def test_one_forward_says_what_a_forward_a_token_says() -> None:
    """Of a cache that lost pairs, too; and the cache stays as it is."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, TEXT, RandomPress(0.5))
    asked, written = list(question_ids(TOKENIZER, "Where is it?")), [5, 9, 77, 4]
    n_seen, n_bytes = cache.get_seq_length(), cache.resident_bytes
    found = log_probabilities_at_once(model, cache, asked, written)
    torch.testing.assert_close(
        found.double(), log_probabilities(model, cache, [asked], [written]), rtol=1e-4, atol=1e-4
    )
    assert (cache.get_seq_length(), cache.resident_bytes) == (n_seen, n_bytes)


RUN = Run(
    "tiny",
    (TaskSpec(get_task("hidden_facts", n_keys=1, max_new_tokens=4), 2, 50, AGREEMENT),),
    (
        PressSpec("none", "full cache", {}, (0.0,)),
        PressSpec("random", "random"),
        PressSpec("none", "int4", {"storage": "int4"}, (0.0,)),
    ),
    (0.5, 0.9375),
    seed=3,
)


def rows_of(run: Run, done: Any = frozenset()) -> dict[Any, Row]:
    return {row.key: row for row in execute(run, plan(run, TOKENIZER), tiny_model(num_layers=1), TOKENIZER, done=done)}


def test_caches_of_a_context_are_compared_along_what_the_full_one_wrote() -> None:
    """The full cache agrees with itself, bit for bit; one that lost pairs, or bits, does not."""
    rows = rows_of(RUN)
    assert len(rows) == 2 * 4 and all(row.follows_full_cache for row in rows.values())
    for key, row in rows.items():
        assert row.n_answer_tokens == 4 and row.answer_seconds is None and row.resident_bytes
        full = rows[key._replace(press="full cache", compression_ratio=0.0)]
        assert row.references == full.references
        if row.press == "full cache":
            assert (row.score, row.tags[KL], row.tags["until_first"]) == (1.0, 0.0, 4.0)
        else:
            assert row.tags[KL] > 0
    found = {(cell.press, cell.compression_ratio): cell.kl for cell in summarise(rows.values())}
    assert found["random", 0.9375] != found["random", 0.5] and found["int4", 0.0] > 0


def test_what_is_followed_depends_neither_on_the_batch_nor_on_what_was_done() -> None:
    rows = rows_of(RUN)
    together = rows_of(replace(RUN, batch_size=2))
    assert {key: row.references for key, row in together.items()} == {key: row.references for key, row in rows.items()}
    for key, row in rows.items():
        assert together[key].tags[KL] == pytest.approx(row.tags[KL], rel=1e-3, abs=1e-5)
    done = {key for key in rows if key.press != "random"}
    rest = rows_of(RUN, done)
    assert rest.keys() == rows.keys() - done
    assert all((row.references, row.score) == (rows[key].references, rows[key].score) for key, row in rest.items())


def test_a_server_is_not_asked_for_agreement() -> None:
    with pytest.raises(InvalidArgumentError, match=r"2 samples that .* are measured by agreement"):
        Endpoint("http://localhost:1", "tiny", None, TOKENIZER).check(RUN, plan(RUN, TOKENIZER))
