"""Presses that keep or drop whole heads, by scores that are made once per model: no context is ever scored."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from kvzip_press.budget.allocators import Decided
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.compressible import compressible_layers, heads_and_device
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.heads.scores import HeadScores
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import Press


@dataclass(frozen=True)
class HeadPress(Press):
    """Keeps the whole context in the best ``round((1 - compression_ratio) * L * H)`` heads, its ends in the others.

    The ends are the first ``n_sink`` and the last ``window_size`` tokens of each row, and the chat-template prefix if
    it is known. What comes after the context (question, answer) is kept by every head. The press costs nothing at run
    time: no forward, no score of any pair. All batch rows keep the same heads. Of a later turn, the other heads keep
    the window (and those of its tokens that are among the row's first ``n_sink``); what they kept before stays.

    The number of whole heads is exact; ties go to the lower layer, then the lower head.

    Args:
        compression_ratio: Fraction of the heads that lose their context, in [0, 1).
        scores: :class:`HeadScores`, or the path of a file with them (ours, or KVzip's ``.pt``); None for those that the
            package ships for the model.
        n_sink: Number of first tokens of each row that every head keeps.
        window_size: Number of last tokens of each row's context that every head keeps.

    Raises:
        InvalidArgumentError: A value is out of range, a budget is given, or a file cannot be read.
    """

    scores: HeadScores | str | PathLike[str] | None = None
    n_sink: int = 4
    window_size: int = 0

    #: Folder of the scores that the package ships; each press has its own.
    shipped: ClassVar[Path]
    is_scorer = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            raise InvalidArgumentError(f"expected a compression_ratio (of heads), got budget={self.budget!r}")
        if self.n_sink < 0 or self.window_size < 0:
            raise InvalidArgumentError(
                f"expected n_sink >= 0 and window_size >= 0, got {self.n_sink} and {self.window_size}"
            )
        if isinstance(self.scores, str | PathLike):
            object.__setattr__(self, "scores", HeadScores.load(self.scores))
        if not isinstance(self.scores, HeadScores | None):
            raise InvalidArgumentError(f"expected HeadScores or a path, got {type(self.scores).__name__}")

    def head_scores(self, model: nn.Module) -> HeadScores:
        """Returns the scores for a model.

        Raises:
            InvalidArgumentError: The scores do not fit the model, or the package ships none for it.
        """
        if self.scores is None:
            return HeadScores.shipped(self.shipped, model)
        assert isinstance(self.scores, HeadScores)
        return self.scores.check(model)

    def requires(self, model: nn.Module) -> None:
        """Raises InvalidArgumentError if there are no scores for a model, or they do not fit it."""
        self.head_scores(model)

    def score(self, prefill: Prefill) -> Scores:
        """Returns scores with decided counts: heads that are kept keep all of a row, the others its ends.

        Pairs at the ends have the score 1 and all others 0, so the ends are what the other heads keep.

        Raises:
            InvalidArgumentError: The scores do not fit the model, or the package ships none for it.
        """
        whole = self.head_scores(prefill.model).kept_heads(self.compression_ratio)
        protected = prefill.protected(self.n_sink)
        free, ends = prefill.valid & ~protected, self._ends(prefill) & ~protected
        n_free, n_ends = free.sum(dim=-1, keepdim=True), ends.sum(dim=-1, keepdim=True)
        layers, counts = {}, {}
        for kept, layer_idx in zip(whole, compressible_layers(prefill.model, prefill.cache), strict=True):
            heads, device = heads_and_device(prefill.cache.layers[layer_idx])
            assert heads == len(kept), "HeadScores.check has compared them"
            layers[layer_idx] = ends.to(device, torch.float32).unsqueeze(1).expand(-1, heads, -1)
            counts[layer_idx] = torch.where(kept.to(free.device), n_free, n_ends).to(device)
        return Scores(layers, protected, Policy(self.amount, Decided(per_head=counts)))

    def _ends(self, prefill: Prefill) -> torch.Tensor:
        """Returns ``[batch, span]``, bool: the first and the last tokens of each row, wherever its padding is."""
        tokens_after = prefill.valid.long().flip(-1).cumsum(dim=-1).flip(-1) - 1
        is_end = (prefill.positions < self.n_sink) | (tokens_after < self.window_size)
        return prefill.valid & is_end.to(prefill.valid.device)
