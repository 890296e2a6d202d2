"""Golden cases of the benchmarks' metrics: worked out by hand from the definition that each case names."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.metrics import mathematics, originals, words
from kvzip_press.leaderboard.metrics.code import repoqa, written_function
from kvzip_press.leaderboard.metrics.mathematics import math_equal, result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Answer,\nis: 42!", "answer is 42"),
        ("red-brown", "redbrown"),  # SQuAD's script drops punctuation and leaves no space
        ("two of the ones, and Seven", "2 of ones and 7"),  # KVzip: whole words zero..nine
        ("Twenty-one", "twentyone"),
        ("Crème “brûlée”", "crème “brûlée”"),  # only ASCII punctuation goes
        ("", ""),
        ("the a an", ""),
    ],
)
def test_normalising_is_squad_s_with_digits(text: str, expected: str) -> None:
    assert originals.squad_normalise(text, digits=True) == expected


def test_number_words_stay_without_digits() -> None:
    assert originals.squad_normalise("Two birds") == "two birds"


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("It was seven.", ["7"], 1.0),
        ("180", ["18"], 1.0),  # characters, not words: as in KVzip's evaluation
        ("walkers", ["the walker"], 1.0),
        ("Rome", ["Oslo", "rome!"], 1.0),
        ("anything", ["a"], 0.0),  # an empty reference matches anything in the original; never here
        ("", ["x"], 0.0),
        ("x", [], 0.0),
        ("naïve café", ["Café"], 1.0),
    ],
)
def test_contains(prediction: str, references: list[str], expected: float) -> None:
    assert originals.contains(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [("AAA, CCC", ["AAA", "BBB", "CCC", "DDD"], 0.5), ("aaa", ["AAA"], 0.0), ("", ["AAA"], 0.0), ("AAA", [], 0.0)],
)
def test_part_contained_keeps_case(prediction: str, references: list[str], expected: float) -> None:
    assert originals.part_contained(prediction, references) == expected


@pytest.mark.parametrize(("prediction", "expected"), [("7", 1.0), ("7.", 0.0), ("The 7", 0.0), ("", 0.0)])
def test_exactly_normalises_nothing(prediction: str, expected: float) -> None:
    assert originals.exactly(prediction, ["7"]) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("red blue", ["red green"], 0.5),
        ("the red", ["red green"], 2 / 3),
        ("red red", ["red"], 2 / 3),
        ("red", ["x", "the red"], 1.0),
        ("", ["red"], 0.0),
        ("red", [], 0.0),
        ("two", ["2"], 0.0),  # LongBench knows no number words
    ],
)
def test_f1(prediction: str, references: list[str], expected: float) -> None:
    assert originals.f1(prediction, references) == pytest.approx(expected)


def test_f1_or_contains_takes_the_better_one() -> None:
    assert originals.f1_or_contains("I think that it was Ada Bell", ["Ada"]) == 1.0
    assert originals.f1_or_contains("two red", ["2 blue"]) == 0.5


def test_what_follows_the_first_line_does_not_count() -> None:
    assert originals.first_line_contains("Rome\nbecause", ["rome"]) == 1.0
    assert originals.first_line_contains("It is\nRome", ["rome"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("(B) anything", "(B) blue", 1.0),  # by letter
        ("(A) blue", "(B) blue", 0.0),
        ("(B", "(B) blue", 1.0),
        ("the blue one", "(B) blue", 1.0),  # by text
        ("B", "(B) blue", 0.0),
        ("", "(B) blue", 0.0),
        ("(A) blue", "blue", 1.0),  # a reference without a letter
    ],
)
def test_an_option_is_right_by_letter_or_by_text(prediction: str, reference: str, expected: float) -> None:
    assert originals.option(prediction, [reference]) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("so 3. The answer is 18.", 1.0),
        ("The answer is 3. No, the answer is 18", 1.0),
        ("The answer is 18. No, the answer is 3", 0.0),
        ("18", 1.0),  # without the phrase the whole text counts
        ("", 0.0),
    ],
)
def test_the_last_answer_counts(prediction: str, expected: float) -> None:
    assert originals.last_answer(prediction, ["18"]) == expected


@pytest.mark.parametrize(
    ("prediction", "whole", "one"), [("a B", 1.0, 1.0), ("\x00A", 0.5, 1.0), ("c", 0.0, 0.0), ("", 0.0, 0.0)]
)
def test_ruler_wants_all_references_or_one(prediction: str, whole: float, one: float) -> None:
    assert originals.ruler_all(prediction, ["A", "b"]) == whole
    assert originals.ruler_any(prediction, ["A", "b"]) == one


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("police kill the gunman", ["police killed the gunman"], 0.75),  # ROUGE's paper (Lin 2004), section 3.1, S2
        ("the gunman kill police", ["police killed the gunman"], 0.5),  # the same, S3
        ("the gunman police killed", ["police killed the gunman"], 0.5),  # S4: only one run of two words counts
        ("", ["x"], 0.0),
        ("x", [], 0.0),
    ],
)
def test_rouge_l(prediction: str, references: list[str], expected: float) -> None:
    pytest.importorskip("rouge_score")
    assert originals.rouge_l(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Paragraph 12", 1.0), ("12 or 3 or 4", 1 / 3), ("Paragraph 1", 0.0), ("none", 0.0), ("", 0.0)],
)
def test_a_right_number_counts_less_among_others(prediction: str, expected: float) -> None:
    assert originals.numbers_right(prediction, ["Paragraph 12"]) == pytest.approx(expected)
    assert originals.numbers_right(prediction, ["none"]) == 0.0


def test_the_first_line_of_code_is_compared() -> None:
    assert originals.code_line("# sum\nreturn a + b\nx", ["return a + b"]) == 1.0
    assert originals.code_line("abcd", ["abxd"]) == 0.75
    assert originals.code_line("```\n// no code", ["x"]) == 0.0
    assert originals.code_line("", ["x"]) == 0.0


def test_a_class_inside_the_right_one_is_not_another() -> None:
    classes = ["Other city", "city", "date"]
    assert originals.right_class("It is Other city", ["Other city"], classes) == 1.0
    assert originals.right_class("city or date", ["city"], classes) == 0.5
    assert originals.right_class("", ["city"], classes) == 0.0


def test_mrcr_needs_its_prefix() -> None:
    assert originals.mrcr("xY1abcd", ["xY1abcd"], "xY1") == 1.0
    assert originals.mrcr("xY1abxd", ["xY1abcd"], "xY1") == 0.75
    assert originals.mrcr(" xY1abcd", ["xY1abcd"], "xY1") == 0.0
    assert originals.mrcr("", ["xY1abcd"], "xY1") == 0.0


CODE = "def add(first, second):\n    total = first + second\n    return total"
OTHER = "def drop(items):\n    items.clear()\n    return items"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"Sure.\n```python\nimport os\n\n{CODE}\n\nadd(1, 2)\n```\nDone.", CODE),
        ("```python\nx = 1\n```\n", "x = 1\n"),
        (f"```\nx = 1\n```\n```python\n{CODE}\n```", CODE),  # RepoQA: the first block that has a function
        (f"  {CODE}  ", CODE),
        ("", ""),
    ],
)
def test_the_first_function_in_a_block_of_code_counts(answer: str, expected: str) -> None:
    pytest.importorskip("tree_sitter")
    assert written_function(answer, "python") == expected


@pytest.mark.parametrize(
    ("language", "function"),
    [
        ("java", "int add(int a) { return a; }"),
        ("typescript", "function add(a: number) { return a }"),
        ("rust", "fn add(a: i32) -> i32 { a }"),
        ("cpp", "int add(int a) { return a; }"),
        ("go", "func add(a int) int { return a }"),
    ],
)
def test_functions_are_found_in_every_language_of_repoqa(language: str, function: str) -> None:
    pytest.importorskip("tree_sitter")
    code = f"class A {{ {function} }}" if language == "java" else function
    assert written_function(f"```\n{code}\n```", language) == function


def test_repoqa_wants_the_best_and_a_likeness_of_four_fifths() -> None:
    pytest.importorskip("nltk")
    assert repoqa(CODE, [CODE, OTHER], "python") == 1.0
    assert repoqa(CODE, [OTHER, CODE], "python") == 0.0
    assert repoqa("def add(first, second): return first", [CODE, OTHER], "python") == 0.0  # the best, but not like it
    assert repoqa("", [CODE], "python") == 0.0
    with pytest.raises(InvalidArgumentError, match=r"rust.*got 'lisp'"):
        repoqa("```\n(x)\n```", [CODE], "lisp")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"so \boxed{12} or \boxed{\frac{1}{2}} at last", r"\frac{1}{2}"),
        (r"\boxed 7$.", "7"),
        ("The answer is 18.\nBye", "18"),
        ("I count 3 and 1,204 birds", "1204"),
        (r"\boxed{unfinished", "unfinished"),
        ("no number", ""),
        ("", ""),
    ],
)
def test_the_result_of_a_worked_answer(answer: str, expected: str) -> None:
    assert result(answer) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (r"\boxed{042}", "42", 1.0),
        (r"\boxed{0.5}", "50", 1.0),  # of a hundred, as in the original
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{43}", "42", 0.0),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^2+2x+1}", r"(x+1)^2", 1.0),
        (r"\boxed{x^2+2x}", r"(x+1)^2", 0.0),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)", 1.0),
        (r"\boxed{(4, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", 0.0),
        (r"\boxed{}", "1", 0.0),
        ("", "1", 0.0),
    ],
)
def test_results_are_equal_as_text_number_or_mathematics(
    answer: str, reference: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(mathematics, "TIMEOUT_SECONDS", 600)  # a busy machine takes long, and is not what is judged
    assert math_equal(answer, [reference]) == expected


def test_mathematics_that_takes_too_long_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """These would take for ever: that there is an answer, and why, is what the limit is for."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(mathematics, "TIMEOUT_SECONDS", 1)
    assert math_equal(r"\boxed{9^{9^{9^{9}}}}", [r"7^{7^{7^{7^{8}}}}"]) == 0.0
    assert "Timeout during" in caplog.text


def test_mathematics_works_beside_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math_equal, r"\boxed{x^2+2x+1}", [r"(x+1)^2"]).result() == 1.0


@pytest.mark.parametrize("package", ["rouge_score.rouge_scorer", "nltk.translate.bleu_score", "math_verify"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"kvzip-press\[tasks\]"):
        if package == "math_verify":
            math_equal(r"\boxed{x}", ["y"])
        elif package.startswith("nltk"):
            repoqa("x", ["y"], "python")
        else:
            originals.rouge_l("x", ["y"])


def test_rouge_l_is_that_of_the_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = random.Random(0)
    for _ in range(500):
        one, other = (
            " ".join(rng.choices(["a", "b", "Cc", "d1", "é", "--", "x-y"], k=rng.randrange(30))) for _ in range(2)
        )
        expected = scorer.score(other, one)["rougeL"].fmeasure
        assert originals.rouge_l(one, [other]) == expected


@pytest.mark.parametrize(
    ("metric", "piece"),
    [
        (lambda text: originals.rouge_l(text, [text]), "a b "),
        (lambda text: originals.contains(text, ["42"]), "the a "),
        (lambda text: originals.f1(text, ["one two"]), "one "),
        (lambda text: originals.numbers_right(text, ["3"]), "3 1"),
        (lambda text: originals.code_line(text, ["x = abs(y)"]), "x = "),
        (lambda text: originals.mrcr(text, [f"{text}y"], ""), "ab"),
        (lambda text: words.words_in_order(text, ["b c d"]), "b c "),
        (lambda text: written_function(f"```{text}", "python"), "\n"),
        (lambda text: written_function(f"```{text}", "python"), "a"),
        (lambda text: written_function(text, "python"), "```\n"),
        (result, "1."),
        (result, "\\boxed{"),
        (lambda text: math_equal(f"\\boxed{{{text}}}", ["1/2"]), "("),
        (lambda text: math_equal(text, ["1/2"]), "7"),
    ],
)
def test_an_answer_of_eighty_thousand_characters_is_scored_soon(metric: Callable[[str], object], piece: str) -> None:
    for package in ("rouge_score", "tree_sitter", "math_verify"):
        pytest.importorskip(package)
    begin = time.process_time()
    metric(piece * (80_000 // len(piece)))
    assert time.process_time() - begin < 20  # most take milliseconds; what is quadratic takes minutes
