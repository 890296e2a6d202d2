"""Measures how well gates predict KVzip's scores, on documents that they were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.budget.selection import select
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.press import Press
from kvzip_press.presses.fastkvzip.training.features import layer_indices, teacher
from kvzip_press.presses.fastkvzip.training.optimise import agreement, soft_bce
from kvzip_press.presses.fastkvzip.training.recipe import Progress

KEPT = (0.3, 0.5)


@dataclass(frozen=True)
class Agreement:
    """How well gates agree with KVzip: means over documents, weighted by their tokens.

    Attributes:
        layer_indices: The layers to which ``loss``, ``agreement`` and ``rank_correlation`` refer.
        loss: The training's loss.
        agreement: Fraction of the scores on the same side of 0.05.
        rank_correlation: Spearman's, over the pairs of a layer.
        overlap: Kept fraction -> pairs that both keep, over the pairs that one keeps, with one budget for all layers.
        tokens: Number of tokens that were scored.
    """

    layer_indices: tuple[int, ...]
    loss: tuple[float, ...]
    agreement: tuple[float, ...]
    rank_correlation: tuple[float, ...]
    overlap: dict[float, float]
    tokens: int

    @property
    def summary(self) -> dict[str, float]:
        """Returns the means over layers, and the overlaps."""

        def mean(values: Sequence[float]) -> float:
            return round(sum(values) / len(values), 4)

        means = {name: mean(getattr(self, name)) for name in ("loss", "agreement", "rank_correlation")}
        return {**means, **{f"overlap at {kept}": round(value, 4) for kept, value in self.overlap.items()}}


@torch.no_grad()
def evaluate(
    press: Press,
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[list[int]],
    progress: Progress | None = None,
    weighting: str | None = None,
) -> Agreement:
    """Reads documents, scores each with the press and with KVzip, and compares the scores.

    Args:
        press: A press with gates and without a window.
        model: The model.
        tokenizer: Its tokenizer.
        documents: Token ids, at least one document.
        progress: Called after each document.
        weighting: How KVzip weighs its rows; see :class:`kvzip_press.KVzipPress`.
    """
    taught_by = teacher(weighting)
    rows, overlaps, weights = [], [], torch.tensor([len(ids) for ids in documents], dtype=torch.float64)
    for number, ids in enumerate(documents):
        done = prefill(model, tokenizer, ids, observers=[press, taught_by])
        scores = press.score(done)
        target = Scores(taught_by.score(done).layers, scores.protected, Policy())
        free = ~scores.protected[0]
        ours, theirs = (
            torch.stack([layer[0, :, free.to(layer.device)].cpu() for layer in one.layers.values()])
            for one in (scores, target)
        )
        measures = (soft_bce(ours, theirs), agreement(ours, theirs), _spearman(ours, theirs))
        rows.append(torch.stack([measure.double() for measure in measures]))
        overlaps.append([_overlap(scores, target, done.valid, kept) for kept in KEPT])
        if progress is not None:
            progress("evaluating", number + 1, len(documents), "")
    weights = weights / weights.sum()
    loss, agreed, ranks = (torch.stack(rows) * weights[:, None, None]).sum(dim=0).tolist()
    common = (torch.tensor(overlaps, dtype=torch.float64) * weights[:, None]).sum(dim=0).tolist()
    overlap, tokens = dict(zip(KEPT, common, strict=True)), sum(map(len, documents))
    return Agreement(layer_indices(model), tuple(loss), tuple(agreed), tuple(ranks), overlap, tokens)


def _overlap(a: Scores, b: Scores, valid: torch.Tensor, kept: float) -> float:
    """Returns the number of unprotected pairs that both keep, divided by the number that each keeps."""
    masks = [select(scores.asked_for(1 - kept, "global"), valid) for scores in (a, b)]
    free = ~a.protected.unsqueeze(1)
    both = sum(int((masks[0][i] & masks[1][i] & free.to(masks[0][i].device)).sum()) for i in masks[0])
    return both / max(sum(int((mask & free.to(mask.device)).sum()) for mask in masks[0].values()), 1)


def _spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns each layer's rank correlation over its pairs, for scores ``[layers, heads, n]``."""
    ranks = [one.flatten(1).argsort(dim=1).argsort(dim=1).double() for one in (a, b)]
    centred = [one - one.mean(dim=1, keepdim=True) for one in ranks]
    norms = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return (centred[0] * centred[1]).sum(dim=1) / norms.clamp(min=1e-12)
