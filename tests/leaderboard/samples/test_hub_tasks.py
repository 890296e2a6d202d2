"""Tasks from the hub, on local files with the columns that the data sets have there."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.samples.task import Question, Sample, Task
from kvzip_press.leaderboard.tasks import FROM_HUB, get_task

datasets = pytest.importorskip("datasets", reason="needs the extra `tasks`")

MakeFile = Callable[[Sequence[Mapping[str, Any]]], str]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def jsonl(tmp_path: Path) -> MakeFile:
    def write(rows: Sequence[Mapping[str, Any]]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def samples(task: Task, seed: int = 0, n: int = 10, length_tokens: int = 1000) -> list[Sample]:
    return list(task.samples(seed=seed, n=n, length_tokens=length_tokens, count_tokens=lambda text: len(text.split())))


def squad_row(context: str, question: str, *answers: str) -> dict[str, Any]:
    return {
        "context": context,
        "question": question,
        "answers": {"text": list(answers), "answer_start": [0] * len(answers)},
    }


SQUAD = [
    squad_row("Ada built a mill.", "Who built it?", "Ada", "Ada"),
    squad_row("Bo lives in Oslo.", "Where does Bo live?", "Oslo", "in Oslo"),
    squad_row("Ada built a mill.", "What was built?", "a mill"),
]


def test_squad_has_all_questions_of_a_paragraph_together(jsonl: MakeFile) -> None:
    ada, bo = samples(get_task("squad", source=jsonl(SQUAD)))
    assert (ada.context, bo.context) == ("Ada built a mill.", "Bo lives in Oslo.")
    assert [q.text for q in ada.questions] == ["Q: Who built it?", "Q: What was built?"]
    assert [q.references for q in ada.questions] == [("Ada",), ("a mill",)]
    assert bo.questions[0].references == ("Oslo", "in Oslo")
    assert bo.questions[0].max_new_tokens == 256
    assert get_task("squad").score("He lives in oslo, I think.", bo.questions[0]) == 1.0


def test_a_parquet_file_gives_what_a_jsonl_file_gives(jsonl: MakeFile, tmp_path: Path) -> None:
    datasets.Dataset.from_list(SQUAD).to_parquet(tmp_path / "rows.parquet")
    assert samples(get_task("squad", source=str(tmp_path / "rows.parquet"))) == samples(
        get_task("squad", source=jsonl(SQUAD))
    )


def test_gsm8k_asks_the_last_sentence_of_problems_that_are_long_enough(jsonl: MakeFile) -> None:
    long = "Natalia sold clips to friends. " * 11
    rows = [
        {"question": "Two birds sit. How many?", "answer": "Two sit.\n#### 2"},
        {"question": f"{long}How many clips did she sell?", "answer": "48/2 = 24\n#### 1,072"},
    ]
    task = get_task("gsm8k", source=jsonl(rows))
    (sample,) = samples(task)
    (question,) = sample.questions
    assert sample.context == long.strip()
    assert question.text.endswith("beginning with 'The answer is'. Q: How many clips did she sell?")
    assert question.references == ("1,072",)
    assert task.score("She sold 1,072 of 3. The answer is 1,072.", question) == 1.0
    assert task.score("She sold 1,072. The answer is 72.", question) == 0.0


MRCR = {
    "prompt": json.dumps([
        {"role": "user", "content": "write a poem about tapirs"},
        {"role": "assistant", "content": "Tapirs rest."},
        {"role": "user", "content": "Prepend aB3 to the 1st (1 indexed) poem about tapirs."},
    ]),
    "answer": "aB3Tapirs rest.",
    "random_string_to_prepend": "aB3",
    "n_needles": 2,
}  # fmt: skip


def test_mrcr_is_a_conversation_as_one_text(jsonl: MakeFile) -> None:
    task = get_task("mrcr", source=jsonl([MRCR]))
    (sample,) = samples(task)
    (question,) = sample.questions
    assert sample.context == "User: write a poem about tapirs\n\nAssistant: Tapirs rest.\n\n"
    assert question.text == "Prepend aB3 to the 1st (1 indexed) poem about tapirs."
    assert task.score("aB3Tapirs rest.", question) == 1.0
    assert task.score("Tapirs rest.", question) == 0.0
    assert 0.5 < task.score("aB3Tapirs sleep.", question) < 1.0


@pytest.mark.parametrize(("name", "max_new_tokens"), [("aime24", 32768), ("math500", 16384)])
def test_problems_of_mathematics_have_no_context(jsonl: MakeFile, name: str, max_new_tokens: int) -> None:
    task = get_task(name, source=jsonl([{"problem": "What is $1+1$?", "answer": "2"}]))
    (sample,) = samples(task)
    (question,) = sample.questions
    assert sample.context == ""
    assert question.text.startswith("You are given a math problem.\n\nProblem: What is $1+1$?\n\n")
    assert question.text.endswith("Final answer:  \\boxed{}")
    assert question.max_new_tokens == max_new_tokens
    pytest.importorskip("math_verify")
    assert task.score("so Final answer: \\boxed{2}", question) == 1.0
    assert task.score("so Final answer: \\boxed{3}", question) == 0.0


def ruler_row(subset: str, context: str, question: str, *answers: str) -> dict[str, Any]:
    return {
        "context": context,
        "question": question,
        "answer_prefix": "The numbers are",
        "answer": list(answers),
        "task": subset,
        "max_new_tokens": 128,
    }


RULER = [
    ruler_row("niah_multivalue", "One is 12. One is 34.", "Which?", "12", "34"),
    ruler_row("qa_1", "Ada lives in Rome or Oslo.", "Where?", "Rome", "Oslo"),
]


def test_ruler_wants_all_references_and_of_its_qa_one(jsonl: MakeFile) -> None:
    task = get_task("ruler", source=jsonl(RULER), in_order=True)
    (many,), (qa,) = (sample.questions for sample in samples(task))
    assert many.answer_prefix == "The numbers are"
    assert many.max_new_tokens == 128
    assert many.tags == {"subset": "niah_multivalue"}
    assert task.score("12", many) == 0.5
    assert task.score("12 34", many) == 1.0
    assert task.score("in ROME", qa) == 1.0


def test_a_subset_of_ruler_is_chosen_by_name(jsonl: MakeFile) -> None:
    (sample,) = samples(get_task("ruler", source=jsonl(RULER), subset="qa_1"))
    assert sample.questions[0].tags == {"subset": "qa_1"}
    with pytest.raises(InvalidArgumentError, match="did you mean 'qa_1'"):
        get_task("ruler", subset="qa1")


def longbench_row(answers: Sequence[str], classes: Sequence[str] | None = None) -> dict[str, Any]:
    return {
        "context": "Some text.",
        "question": "Question: what?\n",
        "answer_prefix": "Answer:",
        "answers": list(answers),
        "all_classes": classes and list(classes),
        "max_new_tokens": 84,
    }


@pytest.mark.parametrize(
    ("name", "answers", "prediction", "score"),
    [
        ("longbench_qasper", ["red fox", "a fox"], "The fox!", 1.0),
        ("longbench_hotpotqa", ["red fox"], "fox", 2 / 3),
        ("longbench_triviaqa", ["fox"], "\n fox\nQuestion: next", 1.0),
        ("longbench_passage_count", ["7"], "7 or 8", 0.5),
        ("longbench_passage_retrieval_en", ["Paragraph 12"], "Paragraph 12", 1.0),
        ("longbench_lcc", ["return x"], "```python\nreturn x\n```", 1.0),
    ],
)
def test_longbench_has_a_metric_for_each_set(
    jsonl: MakeFile, name: str, answers: list[str], prediction: str, score: float
) -> None:
    task = get_task(name, source=jsonl([longbench_row(answers)]))
    (question,) = samples(task)[0].questions
    assert question.max_new_tokens == 84
    assert question.references == tuple(answers)
    assert task.score(prediction, question) == pytest.approx(score)


def test_a_class_of_trec_counts_less_where_several_are_named(jsonl: MakeFile) -> None:
    task = get_task("longbench_trec", source=jsonl([longbench_row(["City"], ["City", "Other city", "Date"])]))
    (question,) = samples(task)[0].questions
    assert task.score("City\nDate", question) == 1.0
    assert task.score("City, Date", question) == 0.5
    assert task.score("Date", question) == 0.0


ESSAYS = [
    {"context": "One went out early. It was cold there. " * 60},
    {"context": "Two came late. They sat down. " * 60},
]


def test_a_needle_in_essays_stands_behind_a_sentence_at_its_depth(jsonl: MakeFile) -> None:
    made = samples(get_task("niah_essays", source=jsonl(ESSAYS)), n=22, length_tokens=300)
    for index, sample in enumerate(made):
        before, needle, after = sample.context.partition("The best thing to do in San Francisco is eat a sandwich")
        assert needle
        assert after.startswith(" and sit in Dolores Park on a sunny day.")
        assert before.strip() == "" or before.strip().endswith(".") or index % 11 == 10
        before_needle = index % 11 / 10 * (300 - 21)  # words; the sentence before it ends at most five words earlier
        assert before_needle - 6 <= sample.questions[0].tags["depth"] * 300 <= before_needle + 1
        assert 295 <= len(sample.context.split()) <= 300
    assert made[0].context != made[11].context
    task = get_task("niah_essays")
    assert task.score("eat a sandwich, and sit in Dolores Park on a sunny day", made[0].questions[0]) == 1.0
    assert task.score("see the Golden Gate", made[0].questions[0]) == 0.0


def test_essays_that_are_too_short_come_again(jsonl: MakeFile) -> None:
    (sample,) = samples(get_task("niah_essays", source=jsonl(ESSAYS)), n=1, length_tokens=2000)
    assert 1995 <= len(sample.context.split()) <= 2000


def scbench_row(questions: Sequence[str], golds: Sequence[Any], **more: Any) -> dict[str, Any]:
    return {"prompts": ["The context.", *questions], "ground_truth": list(golds), **more}


@pytest.mark.parametrize(
    ("subset", "asked", "gold", "references", "right", "wrong"),
    [
        ("kv", "Key a?", "ab-1", ("ab-1",), "It is AB1.", "ab-2"),
        ("prefix_suffix", "Prefix?", "xyz", ("xyz",), "xyz", "xy"),
        ("vt", "Variables?", ["AAA", "BBB"], ("AAA", "BBB"), "AAA and BBB", "aaa"),
        ("qa_eng", "Who?", ["Ada"], ("Ada",), "It was Ada", "Bo"),
        ("choice_eng", "Which?", "Rome", ("Rome",), "Rome", "Oslo\nor Rome"),
        ("mf", "Largest?", 7, ("7",), "7", "7."),
        ("many_shot", "Pick.\n(A) red\n(B) blue", "B", ("(B) blue",), "(B) blue", "(A) red"),
        ("many_shot", "Pick.\n(A) red\n(B) blue", "B", ("(B) blue",), "blue", "red"),
    ],
)
def test_scbench_has_a_metric_for_each_set(
    jsonl: MakeFile, subset: str, asked: str, gold: Any, references: tuple[str, ...], right: str, wrong: str
) -> None:
    task = get_task(f"scbench_{subset}", source=jsonl([scbench_row([asked, asked], [gold, gold])]))
    (sample,) = samples(task)
    assert sample.context == "The context."
    assert [question.text for question in sample.questions] == [f"Q: {asked}"] * 2
    assert sample.questions[0].references == references
    assert sample.questions[0].max_new_tokens == (32 if subset == "mf" else 96)
    assert task.score(right, sample.questions[0]) == 1.0
    assert task.score(wrong, sample.questions[0]) == 0.0


def test_in_the_mixed_sets_each_question_has_its_own_metric(jsonl: MakeFile) -> None:
    pytest.importorskip("rouge_score")
    row = scbench_row(
        ["Sum up.", "The key?"], ["it rained all day", "1234"], task=["scbench_summary", "scbench_passkey"]
    )
    task = get_task("scbench_summary_with_needles", source=jsonl([row]))
    summary, passkey = samples(task)[0].questions
    assert (task.score("all day it rained", summary), task.score("It is 1234.", passkey)) == (0.5, 1.0)


FUNCTIONS = [
    "def add(first, second):\n    total = first + second\n    print(total)\n    return total",
    "def drop(items, count):\n    kept = items[count:]\n    items.clear()\n    return kept",
]


def test_a_function_is_right_where_it_is_most_like_the_one_that_was_asked_for(jsonl: MakeFile) -> None:
    pytest.importorskip("tree_sitter")
    pytest.importorskip("nltk")
    row = scbench_row(["Find add.", "Find drop."], FUNCTIONS, lang="python")
    task = get_task("scbench_repoqa", source=jsonl([row]))
    add, drop = samples(task)[0].questions
    assert drop.references == (FUNCTIONS[1], FUNCTIONS[0])
    assert task.score(f"Here:\n```python\n{FUNCTIONS[0]}\n```", add) == 1.0
    assert task.score(f"Here:\n```python\n{FUNCTIONS[0]}\n```", drop) == 0.0
    assert task.score("", add) == 0.0


def test_functions_and_keys_are_asked_of_one_context(jsonl: MakeFile) -> None:
    pytest.importorskip("tree_sitter")
    pytest.importorskip("nltk")
    more = {"lang": "python", "task": ["scbench_repoqa", "scbench_kv"]}
    task = get_task(
        "scbench_repoqa_and_kv", source=jsonl([scbench_row(["Find.", "Key?"], [FUNCTIONS[0], "ab"], **more)])
    )
    function, key = samples(task)[0].questions
    assert function.references == (FUNCTIONS[0],)
    assert (task.score(FUNCTIONS[0], function), task.score("ab", key)) == (1.0, 1.0)


def test_a_row_with_a_question_too_many_is_refused(jsonl: MakeFile) -> None:
    with pytest.raises(InvalidArgumentError, match="as many tasks and answers as questions, got 2, 2 and 1"):
        samples(get_task("scbench_kv", source=jsonl([scbench_row(["a?", "b?"], ["a"])])))


@pytest.mark.parametrize("subset", ["choice_eng", "qa_eng", "vt"])
def test_a_set_of_one_size_has_no_other(subset: str) -> None:
    with pytest.raises(InvalidArgumentError, match="one only"):
        get_task(f"scbench_{subset}", preset="short")


def test_sizes_of_scbench_are_other_files() -> None:
    assert get_task("scbench_kv").files.pattern == "scbench_kv.parquet"  # type: ignore[attr-defined]
    assert get_task("scbench_kv", preset="short").files.pattern == "scbench_kv_short.parquet"  # type: ignore[attr-defined]


MANY = [ruler_row("qa_1", f"Text {'long ' * index}.", f"Question {index}?", "x") for index in range(20)]


def test_a_seed_shuffles_and_more_samples_only_add(jsonl: MakeFile) -> None:
    task = get_task("ruler", source=jsonl(MANY))
    assert samples(task, n=5) == samples(task, n=12)[:5]
    assert {sample.seed for sample in samples(task, seed=3)} == {3}
    ids = [[sample.sample_id for sample in samples(task, seed=seed, n=20)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(ids[0]) == sorted(ids[2]) == [f"{index:05d}" for index in range(20)]


def test_contexts_that_are_too_long_are_left_out(jsonl: MakeFile) -> None:
    task = get_task("ruler", source=jsonl(MANY))
    kept = samples(task, n=20, length_tokens=8)
    assert {sample.sample_id for sample in kept} == {f"{index:05d}" for index in range(7)}
    with pytest.raises(InvalidArgumentError, match=r"at most 1 tokens.*got 20 whose shortest has 2"):
        samples(task, length_tokens=1)


def test_the_revision_of_a_file_is_its_hash(jsonl: MakeFile) -> None:
    one, other = (get_task("squad", source=jsonl(rows)).data_revision for rows in (SQUAD, SQUAD[:1]))
    assert one.startswith("sha256:")
    assert one != other


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Sequence[Mapping[str, Any]]], list[Any]]:
    """Stands for the hub client: a cache of one commit, to which files are added; and what was asked of it."""
    asked: list[Any] = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["repo_type"], options["revision"], options["allow_patterns"]))
        return str(tmp_path / "snapshots" / COMMIT)

    def add(path: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        file = tmp_path / "snapshots" / COMMIT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(list(rows)).to_parquet(file)
        return asked

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return add


def test_a_branch_is_resolved_to_its_commit_and_that_is_loaded(snapshot: Any) -> None:
    snapshot("4096/test-00000-of-00001.parquet", RULER)
    snapshot("8192/test-00000-of-00002.parquet", MANY[:3])
    asked = snapshot("8192/test-00001-of-00002.parquet", MANY[3:5])
    task = get_task("ruler", preset="8k", revision="main")
    assert task.data_revision == COMMIT
    assert {sample.context for sample in samples(task)} == {row["context"] for row in MANY[:5]}
    assert asked == [("simonjegou/ruler", "dataset", "main", "8192/test-*.parquet")]


def test_a_pinned_commit_is_taken_as_it_is_and_loaded(snapshot: Any) -> None:
    asked = snapshot("plain_text/train-0.parquet", SQUAD)
    task = get_task("squad", revision=COMMIT)
    assert (task.data_revision, asked) == (COMMIT, [])
    assert len(samples(task)) == 2
    assert asked == [("rajpurkar/squad", "dataset", COMMIT, "plain_text/train-*.parquet")]


@pytest.mark.parametrize("name", sorted(FROM_HUB))
def test_the_data_are_pinned_where_a_commit_is_on_record(name: str) -> None:
    """Then the revision is known without asking anybody."""
    task = get_task(name)
    if name.startswith(("scbench", "niah_essays")):
        assert task.revision == "main"
    else:
        assert len(task.revision) == 40
        assert task.data_revision == task.revision


def test_a_commit_without_the_files_is_refused(snapshot: Any) -> None:
    snapshot("plain_text/validation-0.parquet", SQUAD)
    with pytest.raises(DataNotFoundError, match=r"plain_text/train-\*\.parquet of .*rajpurkar/squad.*has no such file"):
        samples(get_task("squad"))


@pytest.mark.parametrize("name", sorted(FROM_HUB))
def test_without_a_network_the_error_says_what_to_do(name: str) -> None:
    assert get_task(name).name == name
    with pytest.raises(
        DataNotFoundError, match=r"neither on this machine nor reachable.*HF_HOME.*source='path'"
    ) as told:
        samples(get_task(name))
    assert get_task(name).files.repo_id in str(told.value)  # type: ignore[attr-defined]
    with pytest.raises(DataNotFoundError, match="HF_HOME"):
        samples(get_task(name, revision=COMMIT))


def test_an_import_without_the_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, jsonl: MakeFile) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"kvzip-press\[tasks\]"):
        samples(get_task("squad", source=jsonl(SQUAD)))


def test_a_file_that_cannot_be_used_is_refused(jsonl: MakeFile, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="expected rows with context, question, answers, got 1 with context"):
        samples(get_task("squad", source=jsonl([{"context": "x"}])))
    with pytest.raises(DataNotFoundError, match=r"expected a file at .*none\.jsonl, got nothing"):
        samples(get_task("squad", source=str(tmp_path / "none.jsonl")))
    (tmp_path / "rows.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"\.parquet, \.jsonl"):
        samples(get_task("squad", source=str(tmp_path / "rows.txt")))
    (tmp_path / "torn.jsonl").write_text('{"context": "x', encoding="utf-8")
    with pytest.raises(DataNotFoundError, match="cannot be read"):
        samples(get_task("squad", source=str(tmp_path / "torn.jsonl")))


def test_rows_that_were_read_are_no_part_of_a_task_s_configuration(jsonl: MakeFile) -> None:
    task: Any = get_task("squad", source=jsonl(SQUAD))
    before = asdict(task)
    samples(task)
    assert asdict(task) == before == asdict(get_task("squad", source=task.source))


def ruler_with(**values: Any) -> dict[str, Any]:
    return {**ruler_row("niah_single_1", "The number is 42.", "Which number?", "42"), **values}


def longbench_with(**values: Any) -> dict[str, Any]:
    return {
        "context": "Alice wrote it.", "question": "Who?", "answer_prefix": "", "answers": ["Alice"],
        "all_classes": ["a"], "max_new_tokens": 8, **values,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "references", "right", "wrong"),
    [
        ("ruler", ruler_with(answer="42"), ("42",), "It is 42.", "24 apples"),
        ("longbench_qasper", longbench_with(answers="Alice"), ("Alice",), "Alice", "i c"),
        ("squad", {"context": "Ada.", "question": "Who?", "answers": {"text": "Ada"}}, ("Ada",), "Ada", "a d"),
        ("math500", {"problem": "1+1", "answer": 12}, ("12",), "\\boxed{12}", "\\boxed{1}"),
        ("scbench_mf", scbench_row(["Largest?"], [12]), ("12",), "12", "1"),
        ("mrcr", {**MRCR, "answer": "aB3 x"}, ("aB3 x",), "aB3 x", "a"),
    ],
)
def test_a_text_is_one_reference(
    jsonl: MakeFile, name: str, row: dict[str, Any], references: tuple[str, ...], right: str, wrong: str
) -> None:
    task = get_task(name, source=jsonl([row]))
    (question,) = samples(task)[0].questions
    assert question.references == references
    if name != "math500":
        assert (task.score(right, question), task.score(wrong, question)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("ruler", ruler_with(answer=42), r"'answer' to be a text or a list of them, got 42 \(int\)"),
        ("ruler", ruler_with(answer=None), r"'answer' to be a text or a list of them, got None"),
        ("ruler", ruler_with(answer=[4, 2]), r"'answer\[0\]' to be a text, got 4 \(int\)"),
        ("ruler", ruler_with(answer={"a": "b"}), r"'answer' to be .* \(dict\)"),
        ("ruler", ruler_with(context=["x"]), r"'context' to be a text, got \['x'\] \(list\)"),
        ("ruler", ruler_with(question=None), r"'question' to be a text, got None"),
        ("ruler", ruler_with(task=1), r"'task' to be a text, got 1"),
        ("ruler", ruler_with(max_new_tokens="8"), r"'max_new_tokens' to be a whole number in .*, got '8' \(str\)"),
        ("ruler", ruler_with(max_new_tokens=8.5), r"'max_new_tokens' to be a whole number in .*, got 8.5"),
        ("ruler", ruler_with(max_new_tokens=-1), r"'max_new_tokens' to be a whole number in .*, got -1"),
        ("longbench_qasper", longbench_with(answers=7), r"'answers' to be a text or a list of them, got 7"),
        ("longbench_trec", longbench_with(all_classes="abc"), r"'all_classes' to be a list, got 'abc' \(str\)"),
        ("squad", {"context": "x", "question": "y", "answers": "Ada"}, r"'answers' to be a mapping, got 'Ada'"),
        ("squad", {"context": "x", "question": "y", "answers": {"a": "b"}}, r"answers: expected 'text', got only"),
        ("gsm8k", {"question": 3, "answer": "#### 3"}, r"'question' to be a text, got 3"),
        ("math500", {"problem": "x", "answer": 1.5}, r"'answer' to be a text, a whole number or a list .* got 1.5"),
        ("math500", {"problem": "x", "answer": True}, r"'answer' to be .* got True \(bool\)"),
        ("mrcr", {**MRCR, "prompt": "[1"}, r"row 1: expected 'prompt' to be JSON"),
        ("mrcr", {**MRCR, "prompt": "[]"}, r"'prompt' to be a list of messages, got \[\]"),
        ("mrcr", {**MRCR, "prompt": '[{"role": "user"}]'}, r"row 1, message 1: expected 'content', got only"),
        ("scbench_kv", {"prompts": "abc", "ground_truth": ["a", "b"]}, r"'prompts' to be a list, got 'abc'"),
        ("scbench_kv", {"prompts": ["c", "q"], "ground_truth": "a"}, r"'ground_truth' to be a list, got 'a'"),
        ("scbench_kv", scbench_row(["q"], [1.5]), r"'ground_truth\[0\]' to be .* got 1.5"),
        ("scbench_kv", {"prompts": [], "ground_truth": []}, "as many tasks and answers as questions, got 0, 0 and 0"),
        ("niah_essays", {"context": " "}, "expected essays in .*rows.jsonl, got no words"),
        ("niah_essays", {"context": 3}, r"'context' to be a text, got 3"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_row_and_field(
    jsonl: MakeFile, name: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as told:
        samples(get_task(name, source=jsonl([row])))
    assert "rows.jsonl" in str(told.value)


def test_the_row_that_is_wrong_is_named(jsonl: MakeFile) -> None:
    rows = [ruler_with(context=f"c{index}") for index in range(3)]
    rows[1]["max_new_tokens"] = 0.5
    with pytest.raises(InvalidArgumentError, match=r"rows\.jsonl, row 2: expected 'max_new_tokens'"):
        samples(get_task("ruler", source=jsonl(rows)))


def test_references_of_a_question_are_never_one_text() -> None:
    for wrong in ("42", ["42"], (42,), None):
        with pytest.raises(InvalidArgumentError, match="expected references as a tuple of texts"):
            Question("q", "Which?", wrong)  # type: ignore[arg-type]
