"""Needles that are asked for in other words: nothing in a question can be found by matching words."""

from __future__ import annotations

import re

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.samples import prose
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.leaderboard.tasks.niah_paraphrased.facts import FACTS

FUNCTION_WORDS = {
    "a", "an", "the", "of", "is", "who", "whose", "has", "had", "does", "in", "to", "at", "by", "with", "for", "and",
    "it", "from",
}  # fmt: skip


def stems(text: str) -> set[str]:
    """The content words of a text, each cut to four letters: coarser than any stemmer, so that none is overlooked."""
    return {word[:4] for word in re.findall(r"[a-z]+", text.lower()) if word not in FUNCTION_WORDS}


FILLER = stems(" ".join([*prose._PATTERNS, *(word for words in prose._WORDS.values() for word in words)]))


@pytest.mark.parametrize("fact", FACTS)
def test_a_question_shares_no_content_word_with_any_fact_nor_with_the_filler(fact: str) -> None:
    asked = stems(FACTS[fact])
    assert asked and not asked & FILLER
    assert {other for other in FACTS if asked & stems(other)} == set()


def test_each_fact_has_a_question_of_its_own_with_other_content_words() -> None:
    assert len(set(FACTS.values())) == len(FACTS) >= 30
    known = [stems(question) for question in FACTS.values()]
    assert all(known.count(one) == 1 for one in known)


def test_the_control_asks_about_the_same_contexts_in_the_facts_own_words() -> None:
    other, same = (get_task("niah_paraphrased", wording=wording) for wording in ("other", "same"))
    (hard,), (easy,) = (list(task.samples(seed=5, n=1, length_tokens=500)) for task in (other, same))
    assert hard.context == easy.context and len(hard.questions) == 8
    for one, twin in zip(hard.questions, easy.questions, strict=True):
        assert one.references == twin.references and one.tags == twin.tags
        assert twin.text == f"Who {one.question_id}?" and f"{one.references[0]} {one.question_id}." in hard.context
        assert not stems(one.text) & stems(hard.context) and stems(twin.text) <= stems(hard.context)


def test_only_the_name_that_an_answer_begins_with_counts() -> None:
    task = get_task("niah_paraphrased")
    (sample,) = task.samples(seed=5, n=1, length_tokens=500)
    question, other = sample.questions[0], sample.questions[1].references[0]
    name = question.references[0]
    assert [task.score(said, question) for said in (f" **{name}**.", f"{other} or {name}", "", f"{name}s")] == [
        1,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("options", [{"wording": "none"}, {"n_facts": 3}, {"n_facts": 99}, {"n_questions": 0}])
def test_what_cannot_be_asked_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        get_task("niah_paraphrased", **options)
