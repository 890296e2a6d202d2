"""Generated tasks: the same seed gives the same samples, contexts have their length, every answer is in its context."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.samples.task import Question, Sample, Task, approximate_tokens
from kvzip_press.leaderboard.tasks import GENERATED, get_task
from kvzip_press.testing import ByteTokenizer


def count_words(text: str) -> int:
    return len(text.split())


def count_bytes(text: str) -> int:
    return len(ByteTokenizer().encode(text, add_special_tokens=False))


def make(task: Task, seed: int = 0, n: int = 3, length_tokens: int = 400, count: Any = count_words) -> list[Sample]:
    return list(task.samples(seed=seed, n=n, length_tokens=length_tokens, count_tokens=count))


NEARLY = {"hidden_facts", "profile_qa", "profile_qa_turns"}  # as long as whole sentences allow
EXACT = sorted(GENERATED.keys() - NEARLY)
PRESETS = [(name, preset) for name in sorted(GENERATED) for preset in get_task(name).presets]
every_task = pytest.mark.parametrize("name", sorted(GENERATED))
every_preset = pytest.mark.parametrize(("name", "preset"), PRESETS)

GOLDEN_QUESTIONS = [
    ("What is the phone number of Carla?", ("97",)),
    ("What is the phone number of Boris?", ("52",)),
]
GOLDEN_CONTEXT = (
    "The phone number of Carla is 97. A group of students likes to stop beside the ferry landing and look at the water "
    "before going on. The phone number of Boris is 52."
)
NEEDLE_CONTEXT = (
    "Children chase each other beside the ferry landing until somebody calls them in. The flight number of daring "
    "balcony is 20. And so it went on from day to day"
)
NEEDLE_QUESTION = Question(
    question_id="daring balcony",
    text="What is the flight number of daring balcony?",
    references=("20",),
    answer_prefix="The flight number of daring balcony is",
    max_new_tokens=3,
    tags={"depth": 13 / 30},
)


@pytest.fixture(scope="module")
def smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from kvzip_press.loading.embedded import embedded_model_dir

    return AutoTokenizer.from_pretrained(embedded_model_dir())


@every_task
def test_a_task_has_the_name_it_is_found_by_and_fills_in_the_protocol(name: str) -> None:
    assert get_task(name).name == name
    assert get_task(name).data_revision == "generated"
    assert isinstance(get_task(name), Task)


@every_preset
def test_the_same_seed_gives_the_same_samples_and_more_samples_only_add(name: str, preset: str) -> None:
    task = get_task(name, preset=preset)
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


def test_needles_stay_what_they_were() -> None:
    task = get_task("niah_single", preset="smollm2", n_questions=1, n_keys=1, n_kinds=1)
    (sample,) = make(task, seed=7, n=1, length_tokens=30)
    assert sample.context == NEEDLE_CONTEXT
    assert sample.questions == (NEEDLE_QUESTION,)


@pytest.mark.parametrize("name", sorted(NEARLY))
@pytest.mark.parametrize("length_tokens", [200, 450, 3000])
def test_contexts_of_whole_sentences_come_near_their_length(name: str, length_tokens: int) -> None:
    for sample in make(get_task(name), length_tokens=length_tokens):
        assert length_tokens - 30 <= count_words(sample.context) <= length_tokens


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("preset", ["default", "smollm2"])
@pytest.mark.parametrize(("count", "length"), [(count_words, 700), (count_words, 3001), (count_bytes, 9999)])
def test_the_other_contexts_have_their_length_to_a_token(
    name: str, preset: str, count: Callable[[str], int], length: int
) -> None:
    for sample in make(get_task(name, preset=preset), length_tokens=length, count=count):
        assert count(sample.context) == length


@pytest.mark.embedded
@pytest.mark.parametrize("name", EXACT)
def test_lengths_are_exact_in_a_real_vocabulary(name: str, smollm2_tokenizer: Any) -> None:
    def count(text: str) -> int:
        return len(smollm2_tokenizer.encode(text, add_special_tokens=False))

    for length in (2000, 8003):
        assert count(make(get_task(name), n=1, length_tokens=length, count=count)[0].context) == length


@every_task
def test_a_length_too_small_for_the_facts_is_refused_with_what_they_take(name: str) -> None:
    said = rf"task '{name}': expected length_tokens of at least (\d+), which .* alone, got 5: give more"
    with pytest.raises(InvalidArgumentError, match=said) as refused:
        make(get_task(name), n=1, length_tokens=5)
    (least,) = map(int, re.findall(r"at least (\d+)", str(refused.value)))
    (shortest,) = make(get_task(name), n=1, length_tokens=least)
    assert count_words(shortest.context) <= least < 400


@every_preset
@pytest.mark.parametrize("seed", range(3))
def test_every_question_is_answered_by_the_context_and_by_nothing_else(name: str, preset: str, seed: int) -> None:
    task = get_task(name, preset=preset)
    for sample in make(task, seed=seed):
        assert sample.seed == seed
        assert len({question.question_id for question in sample.questions}) == len(sample.questions) > 0
        for question in sample.questions:
            asked = f"{question.text} {question.answer_prefix}"
            assert all(reference in sample.context for reference in question.references)
            assert not any(reference in asked for reference in question.references)
            assert task.score(f" {' and '.join(question.references)}.", question) == 1.0
            assert task.score("", question) == 0.0
            assert task.score(asked, question) < 0.4


@pytest.mark.parametrize(
    ("name", "most"), [(name, 0.25 if name == "long_copy" else 0.05) for name in sorted(GENERATED)]
)
def test_answers_of_another_context_score_no_more_than_chance(name: str, most: float) -> None:
    """A guess that knows all but the context: 12 values of an attribute, 90 numbers, prose of the same kind."""
    task = get_task(name, preset="smollm2")
    scores = []
    for one, other in zip(make(task, n=40), make(task, n=40, seed=9), strict=True):
        pairs = zip(one.questions, other.questions, strict=True)
        scores += [task.score(" and ".join(theirs.references), mine) for mine, theirs in pairs]
    assert sum(scores) / len(scores) <= most


@pytest.mark.parametrize(("name", "parts"), [("niah_multivalue", 4), ("niah_multiquery", 4), ("variable_tracking", 5)])
def test_where_several_answers_are_wanted_each_counts_its_part(name: str, parts: int) -> None:
    task = get_task(name)
    question = make(task)[0].questions[0]
    assert len(question.references) == parts
    assert task.score(question.references[2], question) == 1 / parts
    assert task.score(", ".join(question.references[1:]), question) == 1 - 1 / parts


def places(name: str, sample: Sample, question: Question) -> list[int]:
    """Where in the context what is asked for begins: found again in the text."""
    context = sample.context
    if name == "niah_paraphrased":  # its facts begin with whom they are about
        return [context.index(f"{question.references[0]} {question.question_id}.")]
    if name.startswith(("niah", "hidden")):
        ends = [re.search(rf"(is|include) {value}\.", context).start() for value in question.references]  # type: ignore[union-attr]
        return [context.rfind("The ", 0, end) for end in ends]
    needle = {
        "kv_retrieval": f'"{question.question_id}": ',
        "prefix_suffix": question.question_id,
        "long_copy": f"Note on the {question.question_id}:",
        "variable_tracking": f"VAR {question.references[0]} = ",
    }[name]
    assert context.count(needle) == 1
    return [context.index(needle)]


DEEP = [name for name in sorted(GENERATED) if not name.startswith(("profile", "common"))]


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in DEEP for preset in ("default", "smollm2")])
def test_the_depth_of_a_question_is_where_its_needle_is_in_tokens(name: str, preset: str) -> None:
    depths = []
    for sample in make(get_task(name, preset=preset), n=12, length_tokens=3000):
        for question in sample.questions:
            before = [count_words(sample.context[:place]) for place in places(name, sample, question)]
            depth = sum(before) / len(before) / count_words(sample.context)
            assert question.tags["depth"] == pytest.approx(depth, abs=2 / 3000)
            depths.append(depth)
    assert 0 <= min(depths) < 0.3
    assert 0.7 < max(depths) < 1 or name == "variable_tracking"  # the last assignment is deep, the first is not


def test_facts_stand_all_over_the_context() -> None:
    places = []
    for sample in make(get_task("hidden_facts"), n=50):
        places += [sample.context.index(q.answer_prefix) / len(sample.context) for q in sample.questions]
    assert min(places) < 0.1
    assert max(places) > 0.85
    assert 0.4 < sum(places) / len(places) < 0.6


def test_single_needles_are_of_different_forms_and_those_of_many_keys_are_of_one() -> None:
    single, many = (
        [
            set(re.findall(r"The (.+?) of", question.answer_prefix)).pop()
            for question in make(get_task(name))[0].questions
        ]
        for name in ("niah_single", "niah_multikey")
    )
    assert (len(set(single)), len(set(many))) == (4, 1)


def test_a_haystack_of_needles_is_needles_only() -> None:
    sample = make(get_task("niah_multikey", preset="needles"), n=1)[0]
    sentences = sample.context.split(". ")
    assert sum(" of " in sentence and " is " in sentence for sentence in sentences) >= len(sentences) - 1 > 40


def test_a_chain_of_variables_is_in_order_and_hands_its_number_on() -> None:
    sample = make(get_task("variable_tracking"))[0]
    value: dict[str, str] = {}
    for name, given in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)\.", sample.context):
        value[name] = value.get(given, given)
    for question in sample.questions:
        assert {name for name, number in value.items() if number == question.question_id} == set(question.references)


def test_common_words_are_the_commonest() -> None:
    sample = make(get_task("common_words"), length_tokens=2000)[0]
    words = re.findall(r"[a-z]+-[a-z]+", sample.context)
    common = set(sample.questions[0].references)
    assert {words.count(word) for word in common} == {30}
    assert {words.count(word) for word in set(words) - common} == {3}


@pytest.mark.parametrize(("name", "options"), [("kv_retrieval", {"n_pairs": 5}), ("prefix_suffix", {"n_entries": 12})])
def test_a_short_list_stands_somewhere_in_prose(name: str, options: dict[str, int]) -> None:
    for sample in make(get_task(name, **options), length_tokens=2000):
        (n_lines,) = options.values()
        assert sum(line.count("-") >= 5 for line in sample.context.split("\n")) == n_lines
        assert count_words(sample.context) == 2000


def test_siblings_share_one_end_of_an_entry_only() -> None:
    sample = make(get_task("prefix_suffix", n_siblings=2))[0]
    for question in sample.questions:
        first, last = question.question_id.split("-")[0], question.question_id.split("-")[-1]
        entries = [line for line in sample.context.split("\n") if "-" in line]
        assert sum(entry.startswith(first) for entry in entries) == 3
        assert sum(entry.endswith(last) for entry in entries) == 3
        assert [e for e in entries if e.startswith(first) and e.endswith(last)] == [question.question_id]


def test_two_people_of_a_page_never_share_a_value() -> None:
    for sample in make(get_task("profile_qa", n_people=3, n_attributes=10), n=5):
        by_attribute: dict[str, list[str]] = {}
        for question in sample.questions:
            by_attribute.setdefault(question.question_id.split("/")[1], []).append(question.references[0])
        assert all(len(set(values)) == 3 for values in by_attribute.values())


def test_in_a_conversation_only_the_first_question_about_a_person_names_them() -> None:
    sample = make(get_task("profile_qa_turns", n_people=2, n_attributes=3))[0]
    named = [question.question_id.split("/")[0] in question.text for question in sample.questions]
    assert sample.multi_turn
    assert named == [True, False, False] * 2
    assert all(
        ("this person" in question.text) is not name for question, name in zip(sample.questions, named, strict=True)
    )
    assert not make(get_task("profile_qa"))[0].multi_turn


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hidden_fact", {}, "did you mean 'hidden_facts'"),
        ("nothing like it", {}, "expected a task out of"),
        ("niah_single", {"preset": "smolm2"}, "a preset of task 'niah_single'.* did you mean 'smollm2'"),
        ("profile_qa", {"n_keys": 3}, "n_keys"),
        ("hidden_facts", {"n_keys": 0}, "n_keys"),
        ("hidden_facts", {"n_keys": 25}, "n_keys"),
        ("hidden_facts", {"n_digits": 1}, "n_digits"),
        ("profile_qa", {"n_attributes": 11}, "n_attributes"),
        ("profile_qa", {"n_people": 0}, "n_people"),
        ("niah_multikey", {"n_keys": 3}, "expected n_keys in 4"),
        ("niah_multikey", {"n_digits": 2, "n_keys": 91}, "n_keys"),
        ("niah_multikey", {"haystack": "pros"}, "did you mean 'prose'"),
        ("niah_multiquery", {"n_queried": 0}, "n_queried"),
        ("niah_single", {"n_kinds": 9}, "n_kinds"),
        ("variable_tracking", {"n_hops": -1}, "n_hops"),
        ("common_words", {"common_times": 3}, "common_times"),
        ("kv_retrieval", {"ids": "word"}, "did you mean 'words'"),
        ("kv_retrieval", {"n_pairs": 3}, "n_pairs >= 4"),
        ("prefix_suffix", {"n_entries": 11}, "n_entries >= 12"),
        ("prefix_suffix", {"n_parts": 2}, "n_parts"),
        ("long_copy", {"n_sentences": 0}, "n_sentences"),
    ],
)
def test_a_wrong_task_or_option_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        get_task(name, **options)


def test_a_context_with_more_names_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="hex"):
        make(get_task("kv_retrieval", ids="words"), n=1, length_tokens=40_000)


def test_tokens_are_guessed_to_a_tenth_of_what_english_prose_has() -> None:
    assert approximate_tokens("") == 0
    assert approximate_tokens("x" * 450) == 100
