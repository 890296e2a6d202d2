r"""Answers tasks of EleutherAI's lm-evaluation-harness from compressed caches.

This needs the extra ``lm-eval``. In Python::

    from kvzip_press.leaderboard.lm_eval import PressLM

    lm_eval.simple_evaluate(PressLM(model, KVzipPress(0.7), tokenizer=tokenizer), tasks=["longbench_hotpotqa"])

and as a command, with all options of ``lm_eval``::

    python -m kvzip_press.leaderboard.lm_eval --model kvzip-press --tasks longbench_hotpotqa --apply_chat_template \
        --model_args pretrained=Qwen/Qwen3-8B,press=kvzip,compression_ratio=0.7
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from kvzip_press import RaggedCache, attach, compat, generate
from kvzip_press.arguments.press import ForeignPress, as_press
from kvzip_press.decoding.generation import eos_ids
from kvzip_press.errors import MissingDependencyError, NothingEvictedError, install_command
from kvzip_press.leaderboard.lm_eval_prompts import SPLITS, Generation, Split, find_split, last_paragraph, n_equal
from kvzip_press.leaderboard.running.measured import Measured, measure
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import check_length
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.press import Press

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingDependencyError(
        f"lm-evaluation-harness cannot be imported ({error}): {install_command('lm-eval')}"
    ) from error

READ_AT_ONCE = 16  # continuations in one batch
WRITTEN_AT_ONCE = 32  # tokens generated between two looks for a stop sequence


@dataclass(frozen=True)
class _Asked:
    """A question behind a context: the index of its request among all, and the question's ids, at least one."""

    place: int
    question: list[int]


@register_model("kvzip-press")
class PressLM(HFLM):
    """A Hugging Face model for lm-evaluation-harness that compresses contexts and answers from what is left of them.

    A prompt is split in two. The context is read alone and compressed; behind it the model reads the question and
    generates, or scores the continuations. So what is evicted does not depend on the question. Requests with the same
    context share its cache. Prompts are tokenized as lm-evaluation-harness does for the model without a press, and this
    class adds no chat template: the harness does, with ``apply_chat_template``. Nothing is truncated.

    A result under a press's name always had pairs removed: a context from which nothing was evicted is an error. Use
    lm-evaluation-harness's own ``hf`` for the full cache.

    Args:
        pretrained: The model, or its name.
        press: The press, one of kvpress, or a name in the registry.
        compression_ratio: The ratio of a press that is given by its name.
        split: Where a prompt's context ends, a name in ``SPLITS`` or a function: by default the question is the last
            paragraph. A context always leaves at least the prompt's last token to the question.
        min_context_tokens: Contexts with fewer tokens are refused, as are those from which no pair was evicted.
        options: Options of ``lm_eval.models.huggingface.HFLM``: ``tokenizer``, ``dtype``, ``device``, ``add_bos_token``
            ... Its ``batch_size`` and ``max_length`` have no effect: contexts are read one by one, whole.

    Attributes:
        measured: What the cache of each context held, in the order of their compression.

    Raises:
        InvalidArgumentError: An unknown press or split, or a ratio given beside a press that has its own.
        NothingEvictedError: While answering: a context is too short, or there is none (``loglikelihood_rolling``).
    """

    def __init__(
        self,
        pretrained: Any,
        press: Press | ForeignPress | str,
        *,
        compression_ratio: float | None = None,
        split: Split | str = last_paragraph,
        min_context_tokens: int = 64,
        **options: Any,
    ) -> None:
        self.split = find_split(split)
        self.press: Press = as_press(press, compression_ratio)
        self.min_context_tokens = min_context_tokens
        self.measured: list[Measured] = []
        super().__init__(pretrained, **options)

    def get_model_info(self) -> dict[str, Any]:
        """Returns the record in the results: the model, the press, and the mean fraction kept, as measured."""
        kept = statistics.fmean(row.kept_fraction for row in self.measured) if self.measured else None
        return {**super().get_model_info(), "press": repr(self.press), "kept_fraction": kept}

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = [(0.0, False)] * len(requests)
        prompts = [(prompt, ids) for (prompt, _), ids, _ in requests]
        for cache, asked in self._compressed(prompts, disable_tqdm):
            for start in range(0, len(asked), READ_AT_ONCE):
                rows = asked[start : start + READ_AT_ONCE]
                continuations = [requests[row.place][2] for row in rows]
                for row, score in zip(rows, self._scores(cache, rows, continuations), strict=True):
                    found[row.place] = score
                    self.cache_hook.add_partial("loglikelihood", requests[row.place][0], score)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuses perplexity of whole texts, which have no context apart from what is scored.

        Raises:
            NothingEvictedError: Always.
        """
        raise NothingEvictedError(
            "expected a context that is compressed before something is asked of it, got a text to be scored as a whole "
            "(loglikelihood_rolling): nothing would be evicted. Use lm-evaluation-harness's own model, hf"
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates greedy answers, each up to a stop sequence.

        Raises:
            InvalidArgumentError: Generation options other than ``until``, ``max_gen_toks`` and ``do_sample: false``.
            NothingEvictedError: A context is too short.
        """
        found = [""] * len(requests)
        asked_for = [Generation.of(request.args[1]) for request in requests]
        prompts = [(request.args[0], self.tok_encode(request.args[0])) for request in requests]
        for cache, asked in self._compressed(prompts, disable_tqdm):
            for row in asked:
                found[row.place] = self._written(cache, row.question, asked_for[row.place])
                self.cache_hook.add_partial("generate_until", requests[row.place].args, found[row.place])
        return found

    def _compressed(
        self, prompts: Iterable[tuple[str, list[int]]], disable_tqdm: bool
    ) -> Iterator[tuple[RaggedCache, list[_Asked]]]:
        """Yields the cache of each context and the questions asked of it. Prompts are texts with their ids."""
        by_context: dict[tuple[int, ...], list[_Asked]] = {}
        for place, (prompt, ids) in enumerate(prompts):  # a token may span the context's end, hence n_equal
            n = min(n_equal(self.tok_encode(prompt[: self.split(prompt)]), ids), len(ids) - 1)
            by_context.setdefault(tuple(ids[:n]), []).append(_Asked(place, ids[n:]))
        for context, asked in tqdm(by_context.items(), desc="compressing contexts", disable=disable_tqdm):
            yield self._compress(context), asked

    def _compress(self, context: Sequence[int]) -> RaggedCache:
        if len(context) < max(1, self.min_context_tokens):
            raise NothingEvictedError(
                f"expected a context of at least {self.min_context_tokens} tokens before the question, got "
                f"{len(context)}: evicting from it would say nothing. Where a prompt's context ends is up to `split` "
                f"(one of {', '.join(SPLITS)}, or a function), the least length to `min_context_tokens`"
            )
        ids = torch.tensor([context], device=input_device(self.model))
        done = run_prefill(self.model, ids, torch.ones_like(ids, dtype=torch.bool), observers=[self.press])
        done.tokenizer = self.tokenizer
        done.evict_in_place(self.press.score(done))
        cache = RaggedCache.of(done.cache)
        (measured,) = measure(cache, done.valid)
        if measured.n_kept >= measured.n_pairs:
            raise NothingEvictedError(
                f"expected {self.press} to remove pairs of a context of {len(context)} tokens, got all "
                f"{measured.n_pairs} kept; for the full cache use lm-evaluation-harness's own model, hf"
            )
        self.measured.append(measured)
        return cache

    def _scores(
        self, cache: RaggedCache, rows: Sequence[_Asked], continuations: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether all of its tokens are the most likely ones."""
        read = [[*row.question, *ids][:-1] for row, ids in zip(rows, continuations, strict=True)]
        width = max(map(len, read))
        check_length(self.model, cache.get_seq_length() + width)
        first = min(len(row.question) for row in rows) - 1
        grown = cache.fork()
        if len(rows) > 1:
            grown.batch_repeat_interleave(len(rows))
        attach(self.model)
        # padding is on the right, where no token that counts attends to it
        padded = torch.tensor([[*ids, *ids[-1:] * (width - len(ids))] for ids in read], device=input_device(self.model))
        output = self.model(
            input_ids=padded, use_cache=True, logits_to_keep=width - first, **compat.cache_argument(self.model, grown)
        )
        scores = []
        for row, ids, logits in zip(rows, continuations, output.logits, strict=True):
            begin = len(row.question) - 1 - first
            log_probs = logits[begin : begin + len(ids)].float().log_softmax(dim=-1)
            expected = torch.tensor(ids, device=log_probs.device)
            scored = log_probs.gather(1, expected[:, None]).sum().item()
            scores.append((scored, bool((log_probs.argmax(dim=-1) == expected).all())))
        return scores

    def _written(self, cache: RaggedCache, question: list[int], asked_for: Generation) -> str:
        grown = cache.fork()
        ended = eos_ids(self.model, self.tokenizer) | asked_for.stop_ids(self.tokenizer)
        unread, written = question, list[int]()
        while len(written) < asked_for.max_new_tokens:
            n = min(WRITTEN_AT_ONCE, asked_for.max_new_tokens - len(written))
            (ids,) = generate(self.model, grown, torch.tensor([unread]), n, eos_ids=ended)
            written += ids
            if len(ids) < n or asked_for.is_over(self.tok_decode(written)):
                break
            unread = ids[-1:]
        return asked_for.cut(self.tok_decode(written))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
