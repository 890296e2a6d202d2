"""Two baselines that every table needs: nothing removed, and pairs removed at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvzip_press.arguments.seeds import check_seed, generator_of
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress


@dataclass(frozen=True)
class RandomPress(AllocatingPress):
    """Removes pairs at random.

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: "global", "layer", "head" or "adakv".
        budget: Tokens' worth of pairs to keep, instead of a ratio; this and the other fields of the policy are
            explained in :class:`kvzip_press.press.AllocatingPress`.
        seed: Seed of the generator.
        n_sink: Number of first tokens that are protected if the chat-template prefix is not known.
    """

    seed: int = 0
    n_sink: int = 4

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.n_sink < 0:
            raise InvalidArgumentError(f"expected n_sink >= 0, got {self.n_sink}")
        super().__post_init__()

    def score(self, prefill: Prefill) -> Scores:
        """Returns uniform scores in [0, 1).

        The scores of a row depend only on the seed, the layer and the row's own length, and are the same on every
        device.
        """
        layers = prefill.blank_scores()
        for layer_idx, scores in layers.items():
            for row, valid in enumerate(prefill.valid):
                generator = generator_of(self.seed, layer_idx)
                drawn = torch.rand(int(valid.sum()), scores.shape[1], generator=generator).T
                scores[row, :, valid.to(scores.device)] = drawn.to(scores.device)
        return Scores(layers, prefill.protected(self.n_sink), self.policy)


@dataclass(frozen=True)
class NonePress(RandomPress):
    """Keeps every pair, through the same code path as every other press: the reference row of a table."""

    def __post_init__(self) -> None:
        for name, value in {"compression_ratio": 0.0, "budget": None, "layer_ratios": None}.items():
            object.__setattr__(self, name, value)
        super().__post_init__()
