"""The one press that wraps any press of kvpress."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from kvzip_press.budget.amount import Amount, Ratio, check_compression_ratio
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Observer, Prefill, run_prefill
from kvzip_press.press import Press
from kvzip_press.presses.kvpress_adapter.copies import fresh_copy
from kvzip_press.presses.kvpress_adapter.importing import kvpress
from kvzip_press.presses.kvpress_adapter.kvpress_scores import keep_scores, ratio_scores
from kvzip_press.presses.kvpress_adapter.observing import KvpressObserver
from kvzip_press.presses.kvpress_adapter.own_context import run_native
from kvzip_press.presses.kvpress_adapter.refused import (
    REFUSALS,
    as_ours,
    check_supported,
    decoding_press_in,
    later_turn,
    prefilling_press_in,
    scores_any_span,
)
from kvzip_press.presses.kvpress_adapter.while_decoding import eviction_of, schedule_of

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.decoding.eviction import DecodeEviction, Schedule


class RaggedPress(Press):
    """A press of kvpress with real eviction, including head-wise eviction.

    Presses that only score (SnapKV, ExpectedAttention, Knorm ...) watch one dense forward, and their scores serve every
    ratio, unless they depend on it. Those that gather or mask pairs layer by layer act on copies in that same forward;
    those that act in a context of their own (KVzip, FastKVzip, KVCompose) run a forward of their own. What these two
    kinds decided becomes a keep mask, valid at their own ratio only. A batch is processed row by row, a padded row in a
    forward of its own without padding. Nothing of a run stays on the model or on the press. The pairs that kvpress
    keeps are kept; only among pairs of exactly equal score may kvpress keep any, and the core those at lower positions.

    ``DecodingPress`` and ``CompressionRatioDecodingPress`` evict while the model writes, every ``compression_interval``
    tokens, down to their target in each head; the prompt is left whole, or compressed by the prefilling press of a
    ``PrefillDecodingPress``. They count tokens where kvpress counts forwards, and no graph is captured with them.

    Args:
        press: Any kvpress press that evicts pairs. It is copied here: later changes to it have no effect, and it is
            never changed.
        storage: How kept pairs are stored: see :class:`kvzip_press.press.Press`.

    Raises:
        MissingDependencyError: kvpress is missing, or a version is outside the range that works.
        InvalidArgumentError: The object is not a kvpress press, or does more than evict (the message says what).
    """

    press: Any
    is_scorer: bool  # it only scores, and kvpress's own top-k does the rest
    is_native: bool  # it acts in a context of its own instead of layer by layer

    def __init__(self, press: Any, *, storage: str = "model") -> None:
        storage_named(storage)
        object.__setattr__(self, "storage", storage)  # a field of the frozen base
        base, scorer = kvpress().BasePress, kvpress().ScorerPress
        if not isinstance(press, base):
            raise InvalidArgumentError(f"expected a press of kvpress, got {_described(press)}")
        check_supported(press, base)
        self.press = fresh_copy(press)
        self._decoding, prefilling = decoding_press_in(press), prefilling_press_in(press)
        self._of_prompt = None if prefilling in (None, press) else RaggedPress(prefilling, storage=storage)
        self._leaves_prompt = prefilling is None
        self.is_native = not _inherits(press, "__call__", base)
        self.is_scorer = _inherits(press, "compress", scorer) and all(
            _inherits(press, name, base) for name in ("forward_hook", "__call__")
        )
        self._by_model: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        ratio = _nominal_ratio(press)
        if ratio is not None:
            check_compression_ratio(ratio)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"RaggedPress({self.press!r}{'' if self.storage == 'model' else f', storage={self.storage!r}'})"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(RaggedPress, storage=self.storage), (self.press,)

    @property
    def compression_ratio(self) -> float:
        """The ratio that the press was made with; NaN for one that knows only after a run what it removed.

        For DuoAttention it is the fraction of heads that stream.
        """
        ratio = _nominal_ratio(self.press)
        return math.nan if ratio is None else ratio

    @property
    def amount(self) -> Amount:
        """The ratio above; 0.0 if it is not known yet."""
        return Ratio(_nominal_ratio(self.press) or 0.0)

    def with_ratio(self, compression_ratio: float, *, storage: str | None = None) -> RaggedPress:
        """Returns a wrapper of a copy of the press with another ratio: see :meth:`kvzip_press.Press.with_ratio`."""
        if not self.is_scorer:
            raise InvalidArgumentError(f"expected a press with a compression_ratio of its own to change, got {self}")
        press = fresh_copy(self.press)
        press.compression_ratio = check_compression_ratio(compression_ratio)
        return RaggedPress(press, storage=self.storage if storage is None else storage)

    @property
    def schedule(self) -> Schedule | None:
        """When pairs are evicted while the model writes; None for a press that does that to a prompt only."""
        return None if self._decoding is None else schedule_of(self._decoding)

    def decode_eviction(self, model: nn.Module) -> DecodeEviction | None:
        """Returns what evicts while the model writes, as kvpress's DecodingPress says; None for any other press."""
        if self._decoding is None:
            return None
        return eviction_of(decoding_press_in(self.prepared(model)), repr(self), model)

    @property
    def scores_any_span(self) -> bool:
        """Whether the press can score tokens after a context: a later turn, or a chunk of a long context."""
        return scores_any_span(self.press)

    def observer(self, model: nn.Module) -> Observer | None:
        """Returns an observer that runs the press during a prefill; None if it leaves a prompt whole."""
        if self._of_prompt is not None:
            return self._of_prompt.observer(model)
        return None if self._leaves_prompt else KvpressObserver(self, model)

    def score(self, prefill: Prefill) -> Scores:
        """Returns the press's scores, or the pairs that it kept, of a context that was read in one forward.

        Raises:
            InvalidArgumentError: The press needs the whole context and is given a later turn (or chunk), a forward has
                to be run again without token ids, or the press refuses the input (too short a context, no weights for
                the model).
        """
        if self._of_prompt is not None:
            if self in prefill.observers:
                prefill.observers[self._of_prompt] = prefill.observers[self]
            return replace(self._of_prompt.score(prefill), carried=True)
        if self._leaves_prompt:
            none = torch.zeros_like(prefill.valid)
            return Scores(prefill.blank_scores(), none, Policy(Ratio(0.0)), carried=True)
        if prefill.start and not self.scores_any_span:
            raise InvalidArgumentError(later_turn(repr(self), prefill.start))
        if self.is_native:
            alone = [run_native(self, prefill.model, ids, prefill.tokenizer) for ids in self._ids_of_rows(prefill)]
            return keep_scores(prefill, _joined(alone), self.compression_ratio)
        if bool(prefill.valid.all()):
            observers = [cast("KvpressObserver", prefill.observed(self))]
        else:
            observers = [self._watched(prefill.model, ids) for ids in self._ids_of_rows(prefill)]
        rows = _joined([observer.rows() for observer in observers])
        if self.is_scorer:
            any_ratio = all(observer.any_ratio for observer in observers)
            return ratio_scores(prefill, rows, self.compression_ratio, any_ratio=any_ratio)
        return keep_scores(prefill, rows, self.compression_ratio)

    def prepared(self, model: nn.Module) -> Any:
        """Returns a copy of the wrapped press for one run on a model, with the weights that it loads for that model.

        Raises:
            InvalidArgumentError: The press refuses the model, for instance because it has no weights for it.
        """
        press = fresh_copy(self._by_model.get(model, self.press))
        try:
            press.post_init_from_model(model)
        except REFUSALS as error:
            raise as_ours(repr(self), error) from error
        self._by_model[model] = fresh_copy(press)  # so that weights are loaded once
        return press

    def _watched(self, model: nn.Module, input_ids: torch.Tensor) -> KvpressObserver:
        done = run_prefill(model, input_ids, torch.ones_like(input_ids, dtype=torch.bool), observers=[self])
        return cast("KvpressObserver", done.observers[self])

    def _ids_of_rows(self, prefill: Prefill) -> list[torch.Tensor]:
        """Returns the ids ``[1, n]`` of each row, without its padding."""
        if prefill.input_ids is None:
            raise InvalidArgumentError(f"expected input_ids: {self!r} reads the context again, got inputs_embeds only")
        return [ids[valid][None] for ids, valid in zip(prefill.input_ids, prefill.valid, strict=True)]


def _inherits(press: Any, method: str, owner: Any) -> bool:
    return getattr(type(press), method) is getattr(owner, method)


def _nominal_ratio(press: Any) -> float | None:
    inner = getattr(press, "presses", None)
    if inner is not None:  # kvpress's ComposedPress knows its own only after a run
        kept = [1 - ratio for one in inner if (ratio := _nominal_ratio(one)) is not None]
        return 1 - math.prod(kept) if len(kept) == len(inner) else None
    name = "head_compression_ratio" if hasattr(press, "head_compression_ratio") else "compression_ratio"
    try:
        return float(getattr(press, name))
    except (AssertionError, ValueError, TypeError, AttributeError):
        return None


def _joined(rows: list[dict[int, list[torch.Tensor]]]) -> dict[int, list[torch.Tensor]]:
    """Joins rows that were run separately, by layer."""
    return {layer_idx: [row for part in rows for row in part[layer_idx]] for layer_idx in rows[0]}


def _described(given: object) -> str:
    """Says what was given instead of a press of kvpress, and what to do."""
    if isinstance(given, type):
        return f"the class {given.__name__}: make one, {given.__name__}(0.7)"
    if isinstance(given, str):
        return f"the text {given!r:.80}: get_press(name, 0.7) wraps a press that has a name"
    if isinstance(given, Press):
        return f"{type(given).__name__}, which needs no wrapper: pass it as it is"
    return type(given).__name__
