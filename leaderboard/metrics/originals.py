"""Metrics as the benchmarks and KVzip's evaluation define them, for comparison with their numbers.

They differ from those of `words`: a reference is looked for as characters, so "18" is found in "180". There is one
deliberate difference: a reference that is empty when normalised (such as "a") never matches here; the original finds
it in anything.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

from kvzip_press.errors import MissingDependencyError, install_command
from kvzip_press.leaderboard.metrics.references import compared_with_texts

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = {
    word: str(digit)
    for digit, word in enumerate("zero one two three four five six seven eight nine".split())  # noqa: SIM905
}
_NUMBER_WORDS = re.compile(rf"\b({'|'.join(_DIGITS)})\b")
_CONTROL = re.compile(r"[\x00-\x1f]")
MAX_COMPARED = 20_000  # characters that difflib compares, whose time grows with their square: ten times any real answer


def squad_normalise(text: str, *, digits: bool = False) -> str:
    """Normalises a text: lower case, no punctuation, no articles, single spaces (SQuAD's own script).

    Args:
        text: What to normalise.
        digits: Whether the words zero to nine finally become digits, as in KVzip's evaluation.
    """
    text = " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())
    return _NUMBER_WORDS.sub(lambda found: _DIGITS[found[0]], text) if digits else text


@compared_with_texts
def contains(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if a reference is in the prediction, both normalised with digits (KVzip: SQuAD, NIAH and most)."""
    text = squad_normalise(prediction, digits=True)
    found = (squad_normalise(reference, digits=True) for reference in references)
    return float(any(reference and reference in text for reference in found))


@compared_with_texts
def contains_as_is(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if a reference is in the prediction, character by character."""
    return float(any(reference and reference in prediction for reference in references))


@compared_with_texts
def part_contained(prediction: str, references: Sequence[str]) -> float:
    """Returns the fraction of the references in the prediction, character by character (KVzip: variable tracking)."""
    return sum(contains_as_is(prediction, [reference]) for reference in references) / max(len(references), 1)


@compared_with_texts
def exactly(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the prediction is a reference, character by character (KVzip: Math.Find)."""
    return float(prediction in references)


@compared_with_texts
def f1(prediction: str, references: Sequence[str], *, digits: bool = False) -> float:
    """Returns the best F1 over normalised words (LongBench; ``digits`` as in KVzip's evaluation)."""
    words = Counter(squad_normalise(prediction, digits=digits).split())
    return max((_f1(words, Counter(squad_normalise(r, digits=digits).split())) for r in references), default=0.0)


@compared_with_texts
def f1_or_contains(prediction: str, references: Sequence[str]) -> float:
    """Returns the larger of `f1` with digits and `contains` (KVzip: En.QA)."""
    return max(f1(prediction, references, digits=True), contains(prediction, references))


@compared_with_texts
def first_line_contains(prediction: str, references: Sequence[str]) -> float:
    """Applies `contains` to the first line alone; an explanation after it does not count (KVzip: En.MultiChoice)."""
    return contains(prediction.partition("\n")[0], references)


@compared_with_texts
def option(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 for the right option "(X) text": by letter if the prediction begins with "(", else by text."""
    letters = {reference.partition(")")[0] for reference in references if reference.startswith("(")}
    if letters and prediction.startswith("("):
        return float(prediction.partition(")")[0] in letters)
    return contains(prediction, [r.partition(")")[2].strip() if r.startswith("(") else r for r in references])


@compared_with_texts
def last_answer(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the number is in what follows the last "the answer is" (KVzip: GSM8K)."""
    return contains_as_is(prediction.strip().lower().split("the answer is ")[-1], references)


@compared_with_texts
def ruler_all(prediction: str, references: Sequence[str]) -> float:
    """Returns the fraction of the references in the prediction, ignoring case (RULER: all tasks but QA)."""
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return sum(reference.lower() in text for reference in references) / max(len(references), 1)


@compared_with_texts
def ruler_any(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if a reference is in the prediction, ignoring case (RULER: QA)."""
    return max((ruler_all(prediction, [reference]) for reference in references), default=0.0)


@compared_with_texts
def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Returns the best ROUGE-L F1, by the package ``rouge-score`` without stemming.

    The originals use the package ``rouge``, which is no longer maintained and counts the union of the common
    subsequences of sentences; for one sentence without repeated words the two agree.

    Raises:
        MissingDependencyError: ``rouge-score`` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import scoring, tokenizers
    except ImportError as error:
        raise MissingDependencyError(f"ROUGE needs rouge-score: {install_command('tasks')}") from error

    def score(predicted: Sequence[str], expected: Sequence[str]) -> float:
        common = longest_common(predicted, expected)
        return float(scoring.fmeasure(common / len(predicted), common / len(expected))) if common else 0.0

    tokenize = tokenizers.DefaultTokenizer(use_stemmer=False).tokenize
    words = tokenize(prediction)
    return max((score(words, tokenize(reference)) for reference in references), default=0.0)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence.

    A row of the usual table is the bits of one integer, so that ten thousand words against ten thousand take
    milliseconds and kilobytes; the package's own table takes a minute and a gigabyte. (Hyyrö, 2004.)
    """
    places: dict[str, int] = {}
    for place, word in enumerate(other):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(other)) - 1
    row = whole  # a bit is 0 where the table grows by 1
    for word in one:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & whole
    return len(other) - row.bit_count()


@compared_with_texts
def numbers_right(prediction: str, references: Sequence[str]) -> float:
    """Returns the fraction of the prediction's numbers that are the reference's last (LongBench: counts, retrieval)."""
    numbers = re.findall(r"\d+", prediction)
    wanted = {number for reference in references for number in re.findall(r"\d+", reference)[-1:]}
    return sum(number in wanted for number in numbers) / max(len(numbers), 1)


@compared_with_texts
def code_line(prediction: str, references: Sequence[str]) -> float:
    """Returns the similarity of the first line of code: one without backtick, # or // (LongBench: lcc, repobench-p)."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max((round(_likeness(line, reference), 2) for reference in references), default=0.0)


@compared_with_texts
def right_class(prediction: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """Returns 1 / (classes named) if the right one is among them; names contained in the right one do not count."""
    named = [name for name in classes if name in prediction]
    return max((_right_class(named, reference) for reference in references), default=0.0)


@compared_with_texts
def mrcr(prediction: str, references: Sequence[str], prefix: str) -> float:
    """Returns 0.0 unless the answer begins with ``prefix``, else the similarity of the rest (`difflib`, as in MRCR)."""
    if not prediction.startswith(prefix):
        return 0.0
    text = prediction.removeprefix(prefix)
    return max((_likeness(text, reference.removeprefix(prefix)) for reference in references), default=0.0)


def _likeness(text: str, reference: str) -> float:
    """Returns the ratio of `difflib` between the first `MAX_COMPARED` characters of both."""
    return difflib.SequenceMatcher(None, text[:MAX_COMPARED], reference[:MAX_COMPARED]).ratio()


def _f1(predicted: Counter[str], expected: Counter[str]) -> float:
    common = (predicted & expected).total()
    return 2 * common / (predicted.total() + expected.total()) if common else 0.0


def _right_class(named: Sequence[str], reference: str) -> float:
    others = [name for name in named if name == reference or name not in reference]
    return 1.0 / len(others) if reference in others else 0.0
