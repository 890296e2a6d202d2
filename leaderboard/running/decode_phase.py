"""Runs samples without a context: the prompt and the answer are compressed while the answer is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.cache.pair_pool.worth import staying_pairs
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.compat import DynamicCache
from kvzip_press.decoding.generation import eos_ids, generate
from kvzip_press.errors import BudgetMismatchError, InvalidArgumentError
from kvzip_press.leaderboard.running.contexts import Context, prompt_ids
from kvzip_press.leaderboard.running.following import FullAnswer, follow, full_answer
from kvzip_press.leaderboard.running.measured import Measured
from kvzip_press.leaderboard.running.plan import AGREEMENT
from kvzip_press.model.devices import input_device, timed
from kvzip_press.model.structure import text_config
from kvzip_press.press import Press


@dataclass(frozen=True)
class Written:
    """What came of one question inside a press.

    Attributes:
        ids: The answer's ids; where the full cache is followed, those that were most likely.
        n_prompt: Tokens of the prompt.
        cache: The cache as it is afterwards.
        measured: What it holds then, but for ``resident_bytes``: the most that it held between two tokens.
        seconds: Of reading the prompt and writing the answer; None where nothing was written.
        score: How closely the full cache was followed; None leaves the score to the task.
        references: What the full cache wrote; None leaves the references to the question.
        tags: Further figures of a row.
    """

    ids: Sequence[int]
    n_prompt: int
    cache: RaggedCache
    measured: Measured
    seconds: float | None
    score: float | None = None
    references: Sequence[int] | None = None
    tags: Mapping[str, float] = field(default_factory=dict)


class Writing:
    """The questions of one sample, asked of one press after another; all follow the same answers of the full cache.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        context: The sample; it has no context.
    """

    def __init__(self, model: Any, tokenizer: Any, context: Context) -> None:
        self._model, self._tokenizer, self._context = model, tokenizer, context
        self._full: dict[int, FullAnswer] = {}

    def under(self, label: str, press: Press, number: int) -> Written:
        """Asks question ``number`` inside a press.

        Raises:
            BudgetMismatchError: The cache held more pairs than the press's budget allows.
        """
        question = self._context.questions[number]
        prompt = prompt_ids(self._tokenizer, question)
        if self._context.work.measure == AGREEMENT:
            return self._followed(label, press, number, prompt)
        asked = self._model, self._tokenizer, press, prompt, question.max_new_tokens
        (ids, cache, most_bytes), seconds = timed(input_device(self._model), generate_evicting, *asked)
        measured = replace(measure_grown(label, press, cache), resident_bytes=most_bytes)
        return Written(ids, len(prompt), cache, measured, seconds)

    def _followed(self, label: str, press: Press, number: int, prompt: Sequence[int]) -> Written:
        if number not in self._full:
            question, seed = self._context.questions[number], self._context.work.sample.seed
            self._full[number] = full_answer(self._model, prompt, question.max_new_tokens, seed=seed)
        full = self._full[number]
        followed = follow(self._model, press, full)
        agreement = followed.agreement
        return Written(
            followed.likeliest,
            len(prompt),
            followed.cache,
            replace(measure_grown(label, press, followed.cache), resident_bytes=followed.most_bytes),
            None,
            score=agreement.share,
            references=full.tokens[0].tolist(),
            tags=agreement.tags,
        )


def check_decodes(label: str, press: Press, *, keeps_all: bool) -> None:
    """Raises InvalidArgumentError for a press that evicts pairs, but not while decoding."""
    if not keeps_all and not press.evicts_while_decoding:
        raise InvalidArgumentError(
            "expected presses that evict while decoding (a `budget`, or `decoding: true`), or the full cache, in a run "
            f"with samples without a context, got {label!r}: give such tasks a grid of their own"
        )


def generate_evicting(
    model: Any, tokenizer: Any, press: Press, prompt: Sequence[int], max_new_tokens: int
) -> tuple[list[int], RaggedCache, int]:
    """Answers a prompt greedily inside ``with press(model)``.

    Returns:
        The answer's ids, without the end token, the cache as it is afterwards, and the most bytes that it held between
        two tokens, queries and room in its tails included.
    """
    ids = torch.tensor([list(prompt)], device=input_device(model))
    cache, ended = DynamicCache(config=text_config(model)), eos_ids(model, tokenizer)
    with torch.no_grad(), press(model):
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **compat.cache_argument(model, cache)).logits
        first = logits[:, -1].argmax(dim=-1, keepdim=True)
        compressed = RaggedCache.of(cache)
        sizes = [compressed.resident_bytes]
        if int(first) in ended:
            return [], compressed, sizes[0]
        (rest,) = generate(
            model,
            compressed,
            first,
            max_new_tokens - 1,
            eos_ids=ended,
            watch=lambda _: sizes.append(compressed.resident_bytes),
        )
    return [int(first), *rest], compressed, max(sizes)


def measure_grown(label: str, press: Press, cache: RaggedCache) -> Measured:
    """Measures a one-row cache after an answer, including the tokens since the last eviction.

    Raises:
        BudgetMismatchError: The cache holds more pairs than the sum of the press's budget, the buffer that it may fill
            between evictions, the protected first tokens and the pairs that stay outside its budget.
    """
    layers = dict(cache.ragged_layers())
    kept = {
        layer_idx: [pairs + layer.tail.length for pairs in layer.packed.seqlens[0].tolist()]
        for layer_idx, layer in layers.items()
    }
    found = Measured(int(cache.get_seq_length()), kept, cache.resident_bytes, cache.dense_bytes)
    if press.budget is not None:
        a_head = press.budget if press.schedule is None else press.schedule.limit
        most = sum((a_head + layer.n_protected[0]) * len(kept[layer_idx]) for layer_idx, layer in layers.items())
        most += sum(int(staying_pairs(layer.packed).sum()) for layer in layers.values())
        if found.n_kept > most:
            raise BudgetMismatchError(
                f"{label} with budget {press.budget}: expected at most {most} pairs, got {found.n_kept}"
            )
    return found
