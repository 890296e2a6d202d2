"""Key norms (Devoto et al. 2024, https://arxiv.org/abs/2406.11430): keys of small L2 norm are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvzip_press.arguments.numbers import is_int
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.decoding.decode_press import DecodePress


@dataclass(frozen=True)
class KnormDecodePress(DecodePress):
    """Keeps the keys of smallest norm while decoding; the attention that a key gets falls with its norm, mostly.

    A pair of key k is worth ``-||k||_2``, in fp32, after RoPE (which leaves norms as they are). The paper's experiments
    leave layers 0 and 1 whole, where this does not hold. A layer that is left whole outgrows any budget, so these keep
    their newest pairs instead, ``budget`` tokens' worth like every other layer. The authors' code returns pairs sorted
    by norm; here they stay in order. Models that normalise keys before RoPE (Qwen3, Gemma 3) have keys of one norm, but
    for learned scales and rounding: those decide then.

    Args:
        skip_layers: Indices of the layers that keep their newest pairs (0 and 1); () for none. Under the allocation
            "global" these come before all others, so use it with ``skip_layers=()``.

    The other arguments are those of :class:`DecodePress`.

    Raises:
        InvalidArgumentError: An index of a layer is negative or no int.
    """

    by_layer: ClassVar[bool] = False

    skip_layers: Sequence[int] = field(default=(0, 1), kw_only=True)

    def __post_init__(self) -> None:
        given = self.skip_layers
        if not isinstance(given, Sequence) or not all(is_int(layer_idx) and layer_idx >= 0 for layer_idx in given):
            raise InvalidArgumentError(
                f"KnormDecodePress: expected skip_layers as a sequence of indices of layers, got {given!r:.80}"
            )
        object.__setattr__(self, "skip_layers", tuple(given))
        super().__post_init__()

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns negative norms; positions in the layers that are skipped."""
        norms = -pairs.keys.float().norm(dim=-1)
        layer_indices = pairs.layer_indices or (pairs.layer_idx,)
        if not set(layer_indices) & set(self.skip_layers):
            return norms
        skipped = torch.tensor([layer_idx in self.skip_layers for layer_idx in layer_indices])
        skipped = skipped.to(norms.device, non_blocking=True)
        return torch.where(skipped[:, None, None], pairs.positions.float(), norms)
