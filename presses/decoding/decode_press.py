"""The base of presses that keep a cache within a budget of tokens while the model writes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from kvzip_press.arguments.press import as_press
from kvzip_press.attention.implementation import attention_watched, softcap_of, tokens_being_read
from kvzip_press.budget.allocators import Allocation
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.decoding.eviction import DecodeEviction, Schedule
from kvzip_press.decoding.layer_pairs import LayerPairs, dense_pairs
from kvzip_press.decoding.pair_scorer import Look, PairScorer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import AttentionLayer
from kvzip_press.model.watching import Watcher
from kvzip_press.prefilling.query_window import being_read
from kvzip_press.prefilling.whole import Observer, Prefill
from kvzip_press.press import AllocatingPress, Press


@dataclass(frozen=True)
class DecodePress(AllocatingPress):
    """A press that evicts while the model reads and writes, so that the cache stays within a budget of tokens.

    ::

        with RKVPress(budget=1024)(model):
            model.generate(**inputs, max_new_tokens=16384)

    The prompt is compressed to ``budget`` tokens' worth of pairs by the same scores. What is read or written after it
    stays until there are ``buffer`` more; then the row is cut to ``budget`` again, prompt included. So a row never
    holds more than ``budget + buffer`` tokens' worth, on average over its heads, however long the answer is (and during
    a forward of several tokens, these). Another press may compress the prompt instead, and ``protect_prompt`` leaves
    the budget to what is written::

        with RKVPress(budget=1024, prompt=KVzipPress(0.7), protect_prompt=True)(model):
            model.generate(**inputs, max_new_tokens=16384)

    A subclass says what pairs are worth in :meth:`worth`, for a prompt and while the model writes alike. The queries
    that it looks at lie in the tails of the cache: the last ``n_queries`` and one more, or those of ``buffer`` tokens
    if all count, and take ``groups / 2`` times the bytes of as many tokens' pairs (``groups`` query heads share a
    KV head).

    Args:
        compression_ratio: Must be 0: these presses take a budget.
        allocation: "head" (every head keeps ``budget`` pairs, as in the papers), "layer", "global" or "adakv", or an
            :class:`kvzip_press.budget.allocators.Allocation`; the papers of these presses have the first only.
        budget: Tokens' worth of pairs that stay, at least 2.
        buffer: Tokens between two evictions (128), at least 1.
        n_sink: Number of first tokens that no eviction takes, inside the budget, if the chat-template prefix is not
            known; else that prefix.
        prompt: The press that compresses the prompt, or its name; None for this one.
        protect_prompt: Whether what is kept of the prompt stays, outside the budget. Without ``prompt`` that is all of
            it.

    Raises:
        InvalidArgumentError: A value is out of range, or no budget is given.
    """

    allocation: str | Allocation = "head"
    buffer: int = field(default=128, kw_only=True)
    n_sink: int = field(default=0, kw_only=True)
    prompt: Press | str | None = field(default=None, kw_only=True)
    protect_prompt: bool = field(default=False, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "by_layer" not in vars(cls):
            cls.by_layer = True

    def __post_init__(self) -> None:
        if self.prompt is not None:
            prompt: Any = as_press(self.prompt)
            object.__setattr__(self, "prompt", prompt)
            if self.storage == "model":
                object.__setattr__(self, "storage", prompt.storage)
        super().__post_init__()
        if self.budget is None or self.compression_ratio or self.layer_ratios is not None:
            raise InvalidArgumentError(
                f"{type(self).__name__}: expected budget=TOKENS, and neither a compression_ratio nor layer_ratios, to "
                f"evict while the model writes, got budget={self.budget}, compression_ratio={self.compression_ratio} "
                f"and layer_ratios={self.layer_ratios}"
            )
        if isinstance(self.prompt, Press) and self.prompt.evicts_while_decoding:
            raise InvalidArgumentError(
                f"{type(self).__name__}: expected prompt to be a press that compresses a prompt, got one that also "
                f"evicts while the model writes: {self.prompt}"
            )
        if not isinstance(self.n_sink, int) or self.n_sink < 0:
            raise InvalidArgumentError(f"{type(self).__name__}: expected n_sink >= 0, got {self.n_sink!r}")
        _ = self.schedule  # raises for values out of range

    # What a subclass says -------------------------------------------------------------------------------------------

    @property
    def recent(self) -> int:
        """Number of last tokens that no eviction takes, fewer than the budget."""
        return 0

    @property
    def n_queries(self) -> int | None:
        """Number of last queries that :meth:`worth` looks at; None for all since the last eviction."""
        return 0

    by_layer: ClassVar[bool] = True
    """Whether :meth:`worth` is given one layer at a time; False for one that does not ask of which layer a row is.

    A class says it of itself, and not of its subclasses, which may ask.
    """

    @abstractmethod
    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns what pairs are worth, fp32 ``[batch, num_key_value_heads, n]``, finite; higher is kept.

        Pairs that stay carry it to the next eviction, as ``pairs.scores``.
        """

    # What follows from it -------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """When pairs are evicted while the model generates."""
        assert self.budget is not None
        return Schedule(self.budget, self.buffer, self.recent, self.protect_prompt)

    @property
    def context_budget(self) -> int | None:
        """The budget of a prompt, unless another press compresses it or it stays whole."""
        return None if self.prompt is not None or self.protect_prompt else self.budget

    def decode_eviction(self, model: nn.Module) -> DecodeEviction:
        """Returns what keeps caches within the budget while ``model`` generates."""
        scorer = PairScorer(model, Look(self.worth, self.n_queries, by_layer=self.by_layer))
        return DecodeEviction(scorer, self.schedule, self.policy.allocation)

    def requires(self, model: nn.Module) -> None:
        """Raises InvalidArgumentError if something is missing that the press of the prompt needs for a model."""
        if isinstance(self.prompt, Press):
            self.prompt.requires(model)

    def observer(self, model: nn.Module) -> Observer | None:
        """Returns what watches a prompt: the observer of the press that compresses it."""
        if isinstance(self.prompt, Press):
            return self.prompt.observer(model)
        return None if self.protect_prompt else PromptObserver(self, model)

    def score(self, prefill: Prefill) -> Scores:
        """Returns the scores of a prompt.

        Raises:
            InvalidArgumentError: The prompt would have to be read once more, but is a part of a context or has no token
                ids. Read a context in parts inside ``with press(model):``, where each counts as written.
        """
        if isinstance(self.prompt, Press):
            if self in prefill.observers:
                prefill.observers[self.prompt] = prefill.observers[self]
            return self.prompt.score(prefill)
        if self.protect_prompt:
            return Scores(prefill.blank_scores(), prefill.valid.clone(), self.policy, carried=True)
        return prefill.observed(self).scores(prefill)

    def of_prompt(
        self,
        prefill: Prefill,
        layers: Mapping[int, torch.Tensor],
        carried: bool | Mapping[int, torch.Tensor] = True,
    ) -> Scores:
        """Returns scores of a prompt, whose first and last tokens stay as they do while the model writes.

        Args:
            prefill: The prompt.
            layers: What its pairs are worth, see :class:`kvzip_press.Scores`.
            carried: What they carry.

        Raises:
            InvalidArgumentError: It is not the whole of a context.
        """
        if prefill.length is not None or isinstance(prefill.cache.layers[next(iter(layers))], RaggedLayer):
            raise self.refusal_of_parts()
        first = prefill.protected(self.n_sink)
        room = self.schedule.window(int(first.sum(dim=-1).max()))
        tokens_after = prefill.valid.long().flip(-1).cumsum(dim=-1).flip(-1) - 1
        # Of a row that fits the budget nothing goes, and its last tokens are not to be taken for first ones later.
        is_cut = prefill.valid.sum(dim=-1, keepdim=True) > (self.budget or 0)
        protected = first | (prefill.valid & is_cut & (tokens_after < room))
        return Scores(layers, protected, self.policy, protected_count=True, carried=carried)

    def refusal_of_parts(self, start: int = 0) -> InvalidArgumentError:
        """Returns the error for a context that is read in parts by other means than this press.

        Args:
            start: Number of tokens that a cache held before, which is not compressed.
        """
        got = f"a dense cache of {start} tokens that was filled outside of it" if start else "a part of a context"
        behind = "; what is read behind such a cache needs prompt=PRESS or protect_prompt=True" if start else ""
        return InvalidArgumentError(
            f"{type(self).__name__}: expected a prompt that is read in one forward, or prompt=PRESS to compress it, "
            f"got {got}: read the parts inside `with press(model):`, where what follows the first counts as written"
            + behind
        )


class PromptObserver(Watcher):
    """Scores a prompt's pairs layer by layer, as each layer attends; no query is kept.

    Args:
        press: The press.
        model: The model to watch.

    Attributes:
        layers: ``layer_idx -> [batch, num_key_value_heads, n]``, fp32, of all tokens that the layers hold.
    """

    def __init__(self, press: DecodePress, model: nn.Module) -> None:
        self.layers: dict[int, torch.Tensor] = {}
        self._press, self._model = press, model

    def _watch(self, stack: ExitStack) -> None:
        if start := being_read(self._model).start:
            raise self._press.refusal_of_parts(start)
        stack.enter_context(attention_watched(self._model, self))

    @torch.no_grad()
    def __call__(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Scores the pairs of one layer; the arguments are those of the attention interface."""
        valid = tokens_being_read()
        if valid is None or valid.shape[1] != keys.shape[2]:
            valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        pairs = dense_pairs(
            layer.layer_idx,
            query,
            keys,
            valid.to(keys.device),
            n_queries=self._press.n_queries,
            scaling=kwargs.get("scaling"),
            softcap=softcap_of(layer.module, kwargs),
        )
        with torch.autocast(keys.device.type, enabled=False):
            self.layers[layer.layer_idx] = self._press.worth(pairs)

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the scores of the prompt that was watched, with 0 at padding."""
        if not self.layers:
            raise self._press.refusal_of_parts()
        valid, n = prefill.valid, prefill.valid.shape[1]
        layers = {
            layer_idx: torch.where(valid.to(scores.device).unsqueeze(1), scores[:, :, scores.shape[2] - n :], 0)
            for layer_idx, scores in ((layer_idx, self.layers[layer_idx]) for layer_idx in prefill.blank_scores())
        }
        return self._press.of_prompt(prefill, layers)
