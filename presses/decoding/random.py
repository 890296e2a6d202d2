"""The baseline of presses that evict while the model writes: pairs at random."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvzip_press.arguments.seeds import check_seed, generator_of
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.presses.decoding.decode_press import DecodePress


@dataclass(frozen=True)
class RandomDecodePress(DecodePress):
    """Keeps pairs at random, while decoding: what every other press has to beat at the same budget.

    A pair is worth a number in [0, 1) that depends on the seed, its layer, head and position only.

    Args:
        seed: Seed of the generator.

    The other arguments are those of :class:`DecodePress`.
    """

    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        super().__post_init__()

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns the numbers of the pairs' positions."""
        generator = generator_of(self.seed, pairs.layer_idx)
        drawn = torch.rand(int(pairs.ends.max()), pairs.keys.shape[1], generator=generator).T.to(pairs.keys.device)
        return drawn.expand(len(pairs.ends), -1, -1).gather(2, pairs.positions.clamp(min=0))
