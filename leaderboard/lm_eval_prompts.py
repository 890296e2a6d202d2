"""Interprets lm-evaluation-harness's requests: where a prompt's context ends, and how far to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

from kvzip_press.errors import InvalidArgumentError

Split = Callable[[str], int]
"""Takes a prompt; returns how many of its first characters are the context. The rest is the question."""

DEFAULT_MAX_NEW_TOKENS = 256  # lm-evaluation-harness's own default


def last_paragraph(prompt: str) -> int:
    """Takes the last paragraph as the question; examples, documents and instructions before it are the context."""
    before, gap, _ = prompt.rstrip().rpartition("\n\n")
    return len(before + gap)


def whole_prompt(prompt: str) -> int:
    """Takes the whole prompt as the context: for tasks that continue a passage, and for query-aware results."""
    return len(prompt)


SPLITS: Mapping[str, Split] = {"last_paragraph": last_paragraph, "whole_prompt": whole_prompt}


def find_split(split: Split | str) -> Split:
    """Returns the rule of that name, or the rule itself if one is given.

    Raises:
        InvalidArgumentError: An unknown name.
    """
    if not isinstance(split, str):
        return split
    if split not in SPLITS:
        raise InvalidArgumentError(f"expected a split among {', '.join(SPLITS)}, got {split!r}")
    return SPLITS[split]


def n_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the common beginning of two sequences of ids."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@dataclass(frozen=True)
class Generation:
    """How far to generate.

    Attributes:
        until: Stop sequences; the answer ends before the first.
        max_new_tokens: The most tokens of an answer.
    """

    until: tuple[str, ...]
    max_new_tokens: int

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Reads a request's options.

        Raises:
            InvalidArgumentError: They ask for sampling, or for anything but ``until`` and ``max_gen_toks``.
        """
        options = dict(options)
        until = options.pop("until", None) or ()
        bounds = [options.pop(name, None) for name in ("max_gen_toks", "max_new_tokens")]
        temperature, do_sample = options.pop("temperature", None), options.pop("do_sample", None)
        options.pop("top_p", None)  # has no effect when the likeliest token is taken
        if options or do_sample or (do_sample is None and temperature):
            got = {"do_sample": do_sample, "temperature": temperature, **options}
            raise InvalidArgumentError(f"expected greedy generation with until and max_gen_toks, got {got}")
        bound = next((bound for bound in bounds if bound is not None), DEFAULT_MAX_NEW_TOKENS)
        return cls((until,) if isinstance(until, str) else tuple(filter(None, until)), int(bound))

    def stop_ids(self, tokenizer: Any) -> set[int]:
        """Returns the ids of stop sequences that are special tokens, which decoded texts do not show."""
        return set(tokenizer.convert_tokens_to_ids(list(self.until))) & set(tokenizer.all_special_ids)

    def is_over(self, text: str) -> bool:
        """Whether an answer has reached a stop sequence."""
        return any(stop in text for stop in self.until)

    def cut(self, text: str) -> str:
        """Returns the text before the first stop sequence."""
        return text[: min((text.find(stop) for stop in self.until if stop in text), default=len(text))]
