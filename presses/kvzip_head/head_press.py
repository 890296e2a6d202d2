"""Head-level KVzip (https://arxiv.org/abs/2505.23416): whole heads lose their context, and no context is ever scored.

``S[l, h] = max over tokens of KVzip's score of the pair (l, h, token)``, once per model; the best
``round((1 - compression_ratio) * L * H)`` heads keep every pair of the context, the others keep its protected prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.eviction import compressible_layers, heads_and_device
from kvzip_press.prefilling import Prefill
from kvzip_press.press import Press
from kvzip_press.presses.kvzip_head.head_scores import HeadScores
from kvzip_press.presses.kvzip_head.shipped_scores import shipped_scores
from kvzip_press.scores import Scores


@dataclass(frozen=True)
class KVzipHeadPress(Press):
    """Keeps the heads that KVzip finds important whole, and of the others the prefix and a window.

    Costs nothing at run time: no forward, no score of any pair. Question and answer are kept by every head. Every batch
    row keeps the same heads. A later turn has no prefix of its own, so of it the other heads keep the window only.

    The number of whole heads is exact, ties going to the lower layer, then the lower head. The paper's code keeps what
    lies strictly above a threshold, which drops every head that ties with it: of scores with many ones (a head whose
    best pair gets all attention) it can keep none at all. A window is not in the paper, it is DuoAttention's
    (https://arxiv.org/abs/2410.10819); ``window_size=0`` is the paper.

    Args:
        compression_ratio: Fraction of the heads that lose their context, in [0, 1); the paper advises 0.4.
        scores: :class:`HeadScores`, or the path of a file with them (ours, or KVzip's ``.pt``); None for those that
            come with the package for the model.
        n_sink: First tokens that every head keeps where the chat-template prefix is not known.
        window_size: Last tokens of each row's context that every head keeps.

    Raises:
        InvalidArgumentError: A value out of range, or a file that cannot be read.
    """

    scores: HeadScores | str | PathLike[str] | None = None
    n_sink: int = 4
    window_size: int = 0

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
        """The scores for a model.

        Raises:
            InvalidArgumentError: They do not fit the model, or none come with the package for it.
        """
        if self.scores is None:
            return shipped_scores(model)
        assert isinstance(self.scores, HeadScores)
        return self.scores.check(model)

    def score(self, prefill: Prefill) -> Scores:
        """Decided counts: all of the row for a head that is kept, the window for the others.

        Raises:
            InvalidArgumentError: The scores do not fit the model.
        """
        whole = self.head_scores(prefill.model).kept_heads(self.compression_ratio)
        protected = prefill.protected(self.n_sink)
        free = prefill.valid & ~protected
        n_free, n_window = free.sum(dim=-1), (free & self._window(prefill.valid)).sum(dim=-1)
        layers, counts = {}, {}
        for kept, layer_idx in zip(whole, compressible_layers(prefill.model, prefill.cache), strict=True):
            heads, device = heads_and_device(prefill.cache.layers[layer_idx])
            assert heads == len(kept), "HeadScores.check has compared them"
            later_first = torch.arange(free.shape[1], dtype=torch.float32, device=device)
            layers[layer_idx] = later_first.expand(free.shape[0], heads, -1)
            counts[layer_idx] = torch.where(kept.to(free.device), n_free[:, None], n_window[:, None]).to(device)
        return Scores(layers, protected, self.compression_ratio, "head", counts=counts)

    def _window(self, valid: torch.Tensor) -> torch.Tensor:
        """``[batch, span]``, bool: the last ``window_size`` tokens of each row, wherever its padding is."""
        tokens_after = valid.long().flip(-1).cumsum(dim=-1).flip(-1) - 1
        return valid & (tokens_after < self.window_size)
