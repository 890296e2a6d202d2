"""Rows: one line of JSON for each answer, on disk as soon as it is known."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.rows.line_file import LineWriter, read_lines
from kvzip_press.leaderboard.rows.sealed_line import SealedLine, check_fractions

_BOUNDS = {  # seconds, tokens and bytes that nobody measures; sums of such values stay finite
    **dict.fromkeys(("prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds"), 1e9),
    **dict.fromkeys(("n_context_tokens", "n_answer_tokens", "resident_bytes", "dense_bytes"), 10**18),
}


KL = "kl_nats"
"""The tag of rows that compare a cache with the full one: the mean KL divergence from its probabilities, in nats."""


class RowKey(NamedTuple):
    """The fields that tell the rows of one run apart."""

    task: str
    sample_id: str
    question_id: str
    press: str
    compression_ratio: float
    query_aware: bool


@dataclass(frozen=True)
class Row(SealedLine):
    """One answer, with everything needed to judge it. Times are wall seconds, sizes bytes of keys and values.

    Sizes, times and token counts are None in rows that were read from another program's results, which have none. In
    rows that compare a cache with the full one (``measure: agreement`` of a task), the prediction is each next token
    that the cache held for most likely along what the full cache wrote, which is the reference, and the score is the
    share of those that are the same.

    Attributes:
        run_id: Identifies the configuration that made it, see `run_id`.
        task: The task's name.
        model: The model's name, as it was asked for.
        press: The press's label.
        compression_ratio: The fraction of pairs asked to be removed.
        kept_fraction: Pairs that are kept over pairs seen, measured on the cache that answered.
        sample_id: The context, unique inside task and seed.
        question_id: The question, unique inside its sample.
        seed: The seed that the samples were made from.
        prediction: What the model said.
        references: The accepted answers.
        score: The task's metric, in [0, 1].
        query_aware: Whether the question was known when the context was compressed; tables never mix the two.
        n_context_tokens: Tokens of the context, chat template included.
        n_answer_tokens: Tokens that were generated.
        resident_bytes: What the compressed cache holds; of a sample without a context, the most that it held between
            two tokens of the answer, queries and room for tokens included.
        dense_bytes: What the uncompressed cache holds.
        prefill_seconds: The one forward pass over the context, shared by all presses, including those that observe it.
        score_seconds: Scoring, shared by all ratios of a press.
        evict_seconds: Making the compressed cache from the scores.
        answer_seconds: Reading the question and writing the answer; its share if several were asked at once. None where
            the full cache's answer was read instead.
        tags: What the task records about this question besides the metric, such as its depth in the context.
        provenance: Versions, device, dtype and the like.
        task_version: The version of the task that asked; 1 in rows that older versions of this package wrote, None if
            nobody recorded it.
        question: The question as it was put to the model, without a chat template; empty where nobody recorded it.
        storage: The name of how the kept pairs are stored; "model" in rows of older versions, which knew no other.

    Raises:
        InvalidArgumentError: A field is of another type, or not finite. A row that is out of range (a score outside
            0..1, a negative size) is neither read nor written.
    """

    kind: ClassVar[str] = "a row"

    run_id: str
    task: str
    model: str
    press: str
    compression_ratio: float
    kept_fraction: float | None
    sample_id: str
    question_id: str
    seed: int
    prediction: str
    references: tuple[str, ...]
    score: float
    query_aware: bool
    n_context_tokens: int | None
    n_answer_tokens: int | None
    resident_bytes: int | None
    dense_bytes: int | None
    prefill_seconds: float | None
    score_seconds: float | None
    evict_seconds: float | None
    answer_seconds: float | None
    tags: dict[str, float | str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    task_version: int | None = 1
    question: str = ""
    storage: str = "model"

    @property
    def key(self) -> RowKey:
        """Identifies the row within its run."""
        return RowKey(*(getattr(self, name) for name in RowKey._fields))

    @property
    def follows_full_cache(self) -> bool:
        """Whether the score says how closely the full cache was followed, and not how good an answer is."""
        return KL in self.tags

    def check(self) -> None:
        """Raises InvalidArgumentError for fractions outside 0..1, and for negative or absurd times and sizes."""
        check_fractions(self.kind, score=self.score, compression_ratio=self.compression_ratio)
        if self.kept_fraction is not None:
            check_fractions(self.kind, kept_fraction=self.kept_fraction)
        for name, most in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise InvalidArgumentError(f"expected {self.kind} with {name} in 0..{most:g}, got {value:.20g}")


class RowWriter(LineWriter[Row]):
    """Appends rows to a file, see `LineWriter`.

    Args:
        path: The file; it and its directory are created if they do not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, Row)


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Yields the rows of a file in order, see `read_lines`."""
    return read_lines(path, Row)


def run_id(config: Mapping[str, Any]) -> str:
    """Names a configuration: 12 hexadecimal digits of the hash of its JSON form, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
