"""How closely a compressed cache follows the full one, token by token: a measure that needs no right answer."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.attention.implementation import attach
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.decoding.forward import read
from kvzip_press.leaderboard.rows.results import KL
from kvzip_press.model.devices import input_device


@dataclass(frozen=True)
class Agreement:
    """What two caches say to the same tokens.

    Attributes:
        kl: Kullback-Leibler divergence of each next-token distribution from the reference's, in nats.
        same: Whether the most likely token is the same, for each.
    """

    kl: tuple[float, ...]
    same: tuple[bool, ...]

    @classmethod
    def of(cls, reference: torch.Tensor, other: torch.Tensor) -> "Agreement":
        """Compares log probabilities ``[n, vocabulary]``, fp32 or fp64."""
        kl = (reference.exp() * (reference - other)).sum(dim=-1)
        return cls(tuple(kl.tolist()), tuple((reference.argmax(dim=-1) == other.argmax(dim=-1)).tolist()))

    @property
    def mean_kl(self) -> float:
        """Mean divergence of a token, in nats."""
        return statistics.mean(self.kl)

    @property
    def share(self) -> float:
        """Fraction of the tokens whose most likely one is the same."""
        return statistics.mean(self.same)

    @property
    def until_first(self) -> int:
        """Number of tokens until the first whose most likely one is not the same."""
        return self.same.index(False) if False in self.same else len(self.same)

    @property
    def tags(self) -> dict[str, float]:
        """What rows say of it besides the share."""
        return {KL: self.mean_kl, "until_first": float(self.until_first)}

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.kl + other.kl, self.same + other.same)


@torch.no_grad()
def log_probabilities(
    model: Any, cache: RaggedCache, questions: Sequence[Sequence[int]], written: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Returns what a cache expects of each token of fixed answers, given those before it; the cache stays as it is.

    Args:
        model: The model.
        cache: A compressed cache of one row.
        questions: The ids of each question (:func:`kvzip_press.question_ids`).
        written: The ids of its answer, at least one; whoever wrote it, all caches are asked about the same.

    Returns:
        Log probabilities, fp64 ``[tokens of all answers, vocabulary]``, answer by answer.
    """
    attach(model)
    device, n_rows = input_device(model), len(questions)
    width, length = max(map(len, questions)), max(map(len, written))
    padding = torch.tensor([width - len(ids) for ids in questions], device=device)
    asked = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in questions], device=device)
    said = torch.tensor([[*ids, *([0] * (length - len(ids)))] for ids in written], device=device)
    rows = cache.fork()
    rows.batch_repeat_interleave(n_rows)
    steps = [read(model, rows, asked, padding=padding if bool(padding.any()) else None)]
    steps += [read(model, rows, said[:, i : i + 1]) for i in range(length - 1)]
    logits = torch.stack(steps, dim=1).double()
    return torch.cat([logits[row, : len(ids)] for row, ids in enumerate(written)]).log_softmax(dim=-1)


@torch.no_grad()
def log_probabilities_at_once(
    model: Any, cache: RaggedCache, question: Sequence[int], written: Sequence[int]
) -> torch.Tensor:
    """Returns what `log_probabilities` does for one answer, out of one forward instead of one a token.

    Nothing leaves the cache while an answer is written, so both are the same up to rounding.

    Returns:
        Log probabilities, fp32 ``[tokens of the answer, vocabulary]``.
    """
    attach(model)
    ids = torch.tensor([[*question, *written[:-1]]], device=input_device(model))
    return read(model, cache.fork(), ids, n_last=len(written))[0].float().log_softmax(dim=-1)
