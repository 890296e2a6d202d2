"""Generated tasks: the same seed gives the same samples, contexts have their length, every answer is in its context."""

from typing import Any

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.task import Sample, Task, approximate_tokens
from kvzip_press.leaderboard.tasks import TASKS, get_task


def count_words(text: str) -> int:
    return len(text.split())


def make(task: Task, seed: int = 0, n: int = 3, length_tokens: int = 400) -> list[Sample]:
    return list(task.samples(seed=seed, n=n, length_tokens=length_tokens, count_tokens=count_words))


every_task = pytest.mark.parametrize("name", sorted(TASKS))


GOLDEN_QUESTIONS = [
    ("What is the phone number of Carla?", ("97",)),
    ("What is the phone number of Boris?", ("52",)),
]
GOLDEN_CONTEXT = (
    "The phone number of Carla is 97. A group of students likes to stop beside the ferry landing and look at the water "
    "before going on. The phone number of Boris is 52."
)


@every_task
def test_a_task_has_the_name_it_is_found_by_and_fills_in_the_protocol(name: str) -> None:
    assert get_task(name).name == name
    assert isinstance(get_task(name), Task)


@every_task
def test_the_same_seed_gives_the_same_samples_and_more_samples_only_add(name: str) -> None:
    task = get_task(name)
    assert make(task, n=3) == make(task, n=5)[:3]


@every_task
def test_another_seed_gives_other_contexts_and_answers(name: str) -> None:
    task = get_task(name)
    for one, other in zip(make(task, seed=0), make(task, seed=1), strict=True):
        assert one.context != other.context
        assert [q.references for q in one.questions] != [q.references for q in other.questions]


def test_samples_stay_what_they_were() -> None:
    """Rows of different days are comparable only while a seed means the same context."""
    sample = make(get_task("hidden_facts", n_keys=2), seed=7, n=1, length_tokens=40)[0]
    assert sample.sample_id == "0000"
    assert [(q.text, q.references) for q in sample.questions] == GOLDEN_QUESTIONS
    assert sample.context == GOLDEN_CONTEXT


@every_task
@pytest.mark.parametrize("length_tokens", [200, 450, 3000])
def test_contexts_come_near_their_length_and_never_exceed_it(name: str, length_tokens: int) -> None:
    for sample in make(get_task(name), length_tokens=length_tokens):
        assert length_tokens - 30 <= count_words(sample.context) <= length_tokens


@every_task
def test_a_length_too_small_for_the_facts_gives_the_facts_alone(name: str) -> None:
    shortest = make(get_task(name), length_tokens=1)[0]
    assert 0 < count_words(shortest.context) < 120


@every_task
@pytest.mark.parametrize("seed", range(5))
def test_every_question_can_be_answered_from_the_context_alone(name: str, seed: int) -> None:
    task = get_task(name)
    for sample in make(task, seed=seed):
        assert sample.seed == seed
        assert len({question.question_id for question in sample.questions}) == len(sample.questions) >= 4
        for question in sample.questions:
            assert f"{question.answer_prefix} {question.references[0]}" in sample.context
            assert task.score(f"{question.references[0]}.", question) == 1.0
            assert task.score("nothing of the kind", question) == 0.0


def test_facts_stand_all_over_the_context() -> None:
    places = []
    for sample in make(get_task("hidden_facts"), n=50):
        places += [sample.context.index(q.answer_prefix) / len(sample.context) for q in sample.questions]
    assert min(places) < 0.1
    assert max(places) > 0.85
    assert 0.4 < sum(places) / len(places) < 0.6


def test_two_people_of_a_page_never_share_a_value() -> None:
    for sample in make(get_task("profile_qa", n_people=3, n_attributes=10), n=5):
        by_attribute: dict[str, list[str]] = {}
        for question in sample.questions:
            by_attribute.setdefault(question.question_id.split("/")[1], []).append(question.references[0])
        assert all(len(set(values)) == 3 for values in by_attribute.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hidden_fact", {}, "did you mean 'hidden_facts'"),
        ("nothing like it", {}, "expected a task out of"),
        ("profile_qa", {"n_keys": 3}, "n_keys"),
        ("hidden_facts", {"n_keys": 0}, "n_keys"),
        ("hidden_facts", {"n_keys": 25}, "n_keys"),
        ("hidden_facts", {"n_digits": 1}, "n_digits"),
        ("profile_qa", {"n_attributes": 11}, "n_attributes"),
        ("profile_qa", {"n_people": 0}, "n_people"),
    ],
)
def test_a_wrong_task_or_option_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        get_task(name, **options)


def test_tokens_are_guessed_to_a_tenth_of_what_english_prose_has() -> None:
    assert approximate_tokens("") == 0
    assert approximate_tokens("x" * 450) == 100
