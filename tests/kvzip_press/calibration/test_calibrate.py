"""A press calibrated on prompts: the fewest bytes whose rate of changed answers is bounded, with a certificate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvzip_press import ComposedPress, KVzipPress, RandomPress, answer, calibrate, compress
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
MODEL = tiny_model(num_layers=2)
PROMPTS = [(f"Fact {i} is about the number {i * i}.", f"What is fact {i}?") for i in range(8)]
OPTIONS: dict[str, Any] = {"max_loss": 0.5, "confidence": 0.8, "max_new_tokens": 1}


def first_that_fails(press: RandomPress, ratios: list[float], n_most: int, prompts: Any = PROMPTS) -> list[int]:
    """Changed answers at each ratio, asked one by one, up to the first with too many."""
    counts = []
    for ratio in ratios:
        n = 0
        for context, question in prompts:
            said = [
                answer(MODEL, TOKENIZER, compress(MODEL, TOKENIZER, context, one), question, max_new_tokens=1)
                for one in (replace(press, compression_ratio=0.0), replace(press, compression_ratio=ratio))
            ]
            n += said[0] != said[1]
        counts.append(n)
        if n > n_most:
            break
    return counts


def test_it_chooses_the_last_ratio_before_too_many_answers_change() -> None:
    ratios, press = [0.03, 0.1, 0.6, 0.9], RandomPress(seed=0)
    counts = first_that_fails(press, ratios, n_most=2)  # P(Bin(8, 0.5) <= 2) = 0.145, at most 3: 0.363
    chosen, certificate = calibrate(MODEL, TOKENIZER, press, PROMPTS, compression_ratios=ratios, **OPTIONS)
    tested = [step for step in certificate.steps if step.n == 8]
    assert [step.n_changed for step in tested if step.passed] == [n for n in counts if n <= 2]
    assert [step.passed for step in certificate.steps[: len(counts)]] == [n <= 2 for n in counts]
    assert 0 < sum(step.passed for step in certificate.steps) < 4  # the case is not an empty one
    best = [ratio for ratio, n in zip(ratios, counts, strict=False) if n <= 2][-1]
    assert (chosen, certificate.compression_ratio) == (replace(press, compression_ratio=best), best)
    assert (certificate.n, certificate.n_questions, certificate.storage) == (8, 8, "model")
    assert certificate.press == str(chosen)
    assert "50.00% of contexts" in str(certificate)


def test_storages_are_sequences_of_their_own_that_share_the_error() -> None:
    ratios = [0.02, 0.1]
    storages = ["model", "int8"]
    with pytest.raises(InvalidArgumentError, match="expected at least 4 contexts"):  # 0.5 ** 4 <= 0.2 / 2
        calibrate(MODEL, TOKENIZER, KVzipPress(), PROMPTS[:3], storages=storages, **OPTIONS)
    chosen, certificate = calibrate(
        MODEL, TOKENIZER, KVzipPress(), PROMPTS, compression_ratios=ratios, storages=storages, **OPTIONS
    )
    assert {step.storage for step in certificate.steps} == set(storages)
    assert next(step.compression_ratio for step in certificate.steps if step.storage == "int8") == 0.0
    passed = [step for step in certificate.steps if step.passed]
    assert chosen.storage == certificate.storage == "int8"
    assert certificate.resident_fraction == min(step.resident_fraction for step in passed) < 0.5


def test_questions_about_one_context_are_one_observation() -> None:
    one = [(PROMPTS[0][0], f"What is {i}?") for i in range(50)]
    with pytest.raises(InvalidArgumentError, match=r"expected at least 3 contexts .* got 1"):
        calibrate(MODEL, TOKENIZER, KVzipPress(), one, **OPTIONS)
    _, certificate = calibrate(
        MODEL,
        TOKENIZER,
        KVzipPress(),
        [*PROMPTS, *PROMPTS],
        compression_ratios=[0.5],
        changed=lambda old, new: True,
        **OPTIONS,
    )
    assert (certificate.n, certificate.n_questions) == (8, 16)
    assert (certificate.steps[0].n_changed, certificate.steps[0].n) == (3, 3)  # then it cannot pass any more


def test_where_nothing_passes_the_press_removes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    chosen, certificate = calibrate(
        MODEL, TOKENIZER, KVzipPress(0.7, storage="int8"), PROMPTS, changed=lambda old, new: True, **OPTIONS
    )
    assert chosen == KVzipPress(0.0)
    assert (certificate.compression_ratio, certificate.resident_fraction, certificate.n_changed) == (0.0, 1.0, 0)
    assert "removes nothing" in caplog.text


def test_too_few_contexts_are_refused_before_the_model_reads_anything() -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected at least 299 contexts .* got 8"):
        calibrate(MODEL, TOKENIZER, KVzipPress(), PROMPTS)


def test_a_certificate_knows_its_model() -> None:
    _, certificate = calibrate(MODEL, TOKENIZER, RandomPress(), PROMPTS, compression_ratios=[0.1], **OPTIONS)
    certificate.check(MODEL)
    with pytest.raises(CacheMismatchError, match="this certificate is about"):
        certificate.check(tiny_model(num_layers=2, seed=1))


@pytest.mark.parametrize(
    ("press", "changes", "message"),
    [
        (KVzipPress(budget=10), {}, "compression_ratio of its own"),
        (ComposedPress([RandomPress(0.5)]), {}, "a press that scores"),
        (KVzipPress(), {"compression_ratios": [0.5, 0.3]}, "that ascend"),
        (KVzipPress(), {"compression_ratios": [0.0, 0.3]}, "that ascend"),
        (KVzipPress(), {"storages": "int8"}, "a list of different names"),
        (KVzipPress(), {"max_loss": 1.0}, "max_loss and confidence"),
        (KVzipPress(), {"prompts": ["a text"]}, r"pairs \(context, question\)"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(press: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        calibrate(MODEL, TOKENIZER, press, **{"prompts": PROMPTS, **OPTIONS, **changes})


def test_a_press_of_kvpress_is_calibrated_and_stays_as_it_is(kvpress: Any) -> None:
    given = kvpress.KnormPress(0.7)
    chosen, certificate = calibrate(MODEL, TOKENIZER, given, PROMPTS, compression_ratios=[0.05], **OPTIONS)
    assert given.compression_ratio == 0.7
    assert chosen.compression_ratio == certificate.compression_ratio
