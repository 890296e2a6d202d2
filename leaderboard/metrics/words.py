"""The generated tasks' metrics, which compare short answers by whole words."""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

from kvzip_press.leaderboard.metrics.references import compared_with_texts

MAX_WORDS = 20_000
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " ") | {"'": "", "’": ""})


def normalise(text: str) -> str:
    """Normalises to lower case; punctuation becomes a space (an apostrophe vanishes); articles and extra spaces go.

    As in SQuAD's metric, except that punctuation separates words here, so that "red-brown" has the word "red".
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


@compared_with_texts
def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the prediction is one of the references, both normalised."""
    return float(any(normalise(prediction) == normalise(reference) for reference in references))


@compared_with_texts
def substring_match(prediction: str, references: Sequence[str]) -> float:
    """Returns 1.0 if the words of a reference appear consecutively in the prediction, both normalised.

    Whole words only: "18" is not found in "180". A reference without words never matches.
    """
    words = f" {normalise(prediction)} "
    found = (normalise(reference) for reference in references)
    return float(any(reference and f" {reference} " in words for reference in found))


@compared_with_texts
def fraction_found(prediction: str, references: Sequence[str]) -> float:
    """Returns the fraction of the references that `substring_match` finds; 0.0 without references."""
    found = [substring_match(prediction, [reference]) for reference in references]
    return sum(found) / len(found) if found else 0.0


@compared_with_texts
def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Returns the best F1 over words, both sides normalised; 0.0 without references."""
    return max(
        (_f1(normalise(prediction).split(), normalise(reference).split()) for reference in references), default=0.0
    )


def _f1(predicted: list[str], expected: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


@compared_with_texts
def words_in_order(prediction: str, references: Sequence[str]) -> float:
    """Returns the fraction of the best reference's words that the prediction has in the same order, both normalised.

    These are the words in the matching blocks of `difflib.SequenceMatcher`; other words between them cost nothing. Its
    time grows with the square of the words, so that those behind the first `MAX_WORDS` of a prediction do not count.
    """
    words = normalise(prediction).split()[:MAX_WORDS]
    return max((_in_order(words, normalise(reference).split()) for reference in references), default=0.0)


def _in_order(words: list[str], expected: list[str]) -> float:
    blocks = difflib.SequenceMatcher(None, words, expected, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(expected) if expected else 0.0
