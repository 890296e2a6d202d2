"""Weights of the rows of a KVzip replay, by how surprising the tokens that they predict were: ours, not the paper's.

While a model repeats a context, a copying head looks at every token that it is about to repeat, filler included, and
the maximum over rows gives each nearly 1; at small budgets ties decide then. What the model would have written anyway
need not be looked up, so a row counts by the surprisal of what it predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

MOST_NATS, LEAST_WEIGHT = 6.0, 0.02


def by_surprisal(nats: torch.Tensor) -> torch.Tensor:
    """Returns ``(min(nats, 6) + 0.02) / 6.02``."""
    return (nats.clamp(max=MOST_NATS) + LEAST_WEIGHT) / (MOST_NATS + LEAST_WEIGHT)


def by_probability(nats: torch.Tensor) -> torch.Tensor:
    """Returns ``(1 - p + 0.02) / 1.02``."""
    return (LEAST_WEIGHT - torch.expm1(-nats)) / (1 + LEAST_WEIGHT)


WEIGHTINGS = {"surprisal": by_surprisal, "probability": by_probability}


@dataclass(frozen=True)
class RowWeights:
    """The weights of the replayed rows of one context.

    Attributes:
        predicting: fp32 ``[n + 1]``, in (0, 1], the weight of a row that predicts each of the context's tokens; the
            last is that of any other row: of one that predicts a token of the prompt, or what follows the context.
        least: The last one.
    """

    predicting: torch.Tensor
    least: float

    @classmethod
    def of(cls, weighting: str, nats: torch.Tensor) -> RowWeights:
        """Returns the weights for the surprisals ``[n]`` of a context's tokens."""
        least = float(WEIGHTINGS[weighting](torch.zeros(())))
        return cls(pad(WEIGHTINGS[weighting](nats), (0, 1), value=least), least)

    def of_replays(self, chunks: Sequence[slice], n_rows: int) -> torch.Tensor:
        """Returns the weights ``[len(chunks), n_rows]`` of replays that end with these chunks, all of one length."""
        known = torch.stack([self.predicting[chunk.start : chunk.stop + 1] for chunk in chunks])
        return pad(known, (n_rows - known.shape[1], 0), value=self.least)  # without a prompt, it drops the first
