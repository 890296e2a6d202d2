"""SnapKV (https://arxiv.org/abs/2404.14469): pairs are kept that the last tokens of the context attend to.

``S_j = mean over the group of (pool of (mean over the window's queries i of softmax_j(q_i . k_j / sqrt(d))))``.
PyramidKV (https://arxiv.org/abs/2406.02069) is the same scorer with the allocation "pyramid". LeanKV
(https://arxiv.org/abs/2412.03131, in later versions DiffKV) takes no pool, and the largest of the group: with n tokens
read, a pair of ``high / n`` or more is stored with keys in 8 bits and values in 4, one of ``low / n`` or more in 4 and
2, and the others are dropped.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import functional

from kvzip_press.arguments.numbers import is_int
from kvzip_press.budget.allocators import AboveUniform, AllocationLike, Pyramid
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.watching import Watcher
from kvzip_press.prefilling.query_window import LastQueries, being_read
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress, ObservingPress


@dataclass(frozen=True)
class SnapKVPress(AllocatingPress, ObservingPress):
    """Scores a pair with the mean attention of the last tokens of the context, smoothed over neighbouring pairs.

    These last tokens, the observation window, are protected, inside the budget. Attention is the model's own, scaling
    and softcap included, from the queries of the prefill itself; it is averaged over the window, pooled along the
    context with zeros beyond its ends, and averaged over the query heads of a KV head. Budgets are per KV head (other
    code may count query heads, and then keeps more).

    A later turn, or a chunk of a long context, is scored by its own window over its own pairs. The window of an earlier
    chunk is no longer protected, but has the score 1, the most that there is.

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: "head" (the paper: every head keeps as many), or another.
        budget: Tokens' worth of pairs to keep, instead of a ratio; this and the other fields of the policy are
            explained in :class:`kvzip_press.press.AllocatingPress`.
        window_size: Number of last tokens whose attention counts; a shorter context is not compressed.
        kernel_size: Number of neighbours that attention is averaged over, an odd number; 1 for no pooling.
        group: What the query heads of a KV head are reduced by: "mean", or "max" (LeanKV).

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    allocation: AllocationLike = "head"
    window_size: int = 64
    kernel_size: int = 5
    group: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window_size", "kernel_size"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise InvalidArgumentError(f"expected {name} to be an int of at least 1, got {getattr(self, name)!r}")
        if self.kernel_size % 2 == 0:
            raise InvalidArgumentError(f"expected kernel_size to be odd, got {self.kernel_size}")
        if self.group not in ("mean", "max"):
            raise InvalidArgumentError(f'expected group to be "mean" or "max", got {self.group!r:.80}')

    def observer(self, model: nn.Module) -> WindowObserver:
        """Returns an observer that keeps the window's queries of one prefill."""
        return WindowObserver(self, model)

    def scores(self, prefill: Prefill, window: LastQueries) -> Scores:
        """Returns the scores of a prefill whose window was kept."""
        layers, protected = prefill.blank_scores(), prefill.last_tokens(self.window_size)
        for layer_idx, scores in layers.items():
            for row, heads, attention in window.attention(layer_idx, prefill.pairs(layer_idx)[0]):
                first, end = window.bounds[row]
                end -= window.lengths[row]
                if first < end:
                    paid = attention.mean(dim=2)[..., : end - first]
                    pooled = functional.avg_pool1d(paid, self.kernel_size, stride=1, padding=self.kernel_size // 2)
                    scores[row, heads, first:end] = pooled.amax(dim=1) if self.group == "max" else pooled.mean(dim=1)
            scores.masked_fill_(protected[:, None].to(scores.device), 1)
        uniform = prefill.uniform_attention()
        return Scores(layers, protected, self.policy, protected_count=True, uniform=uniform)


def pyramidkv_press(
    compression_ratio: float = 0.0, allocation: AllocationLike | None = None, *, beta: float = 20, **options: Any
) -> SnapKVPress:
    """Returns PyramidKV: SnapKV's scores, and larger budgets for lower layers.

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: By default :class:`kvzip_press.budget.allocators.Pyramid`.
        beta: How steep the line over the layers is.
        options: Further arguments of :class:`SnapKVPress`.

    Raises:
        InvalidArgumentError: An option is unknown, or a value is out of range.
    """
    return SnapKVPress(compression_ratio, Pyramid(beta=beta) if allocation is None else allocation, **options)


def leankv_press(
    compression_ratio: float = 0.0, *, low: float = 0.02, high: float = 1.0, window_size: int = 64, **options: Any
) -> SnapKVPress:
    """Returns LeanKV: SnapKV's window without pooling, both borders by uniform attention.

    Storage "tiers" and allocation "above_uniform" are the two borders, and both work with every press whose scores are
    weights of attention (TOVA, KVzip). The authors calibrate the borders for each model: 0.02 and 1 for Llama 3 8B,
    0.04 and 0.04 for Qwen 2.5 7B (no low tier), 0 and 1 for Llama 3 70B, 0 and 3 for Qwen 2.5 32B. What differs: the
    first four tokens stay exact, keys of the low tier are centred and rotated, and what the model writes stays as it
    is; theirs goes on to judge pairs at every step.

    Args:
        compression_ratio: Nothing but 0: how much goes is an outcome.
        low: What a pair has at least that stays, in units of uniform attention; 0 or more.
        high: What a pair has at least that is stored in more bits; 0 or more.
        window_size: Number of last tokens whose attention counts; they are always high.
        options: Further arguments of :class:`kvzip_press.presses.snapkv.SnapKVPress`.

    Raises:
        InvalidArgumentError: An option is unknown, or a value is out of range.
    """
    chosen = {"kernel_size": 1, "group": "max", "storage": f"tiers:{high:g}/n", **options}
    return SnapKVPress(compression_ratio, AboveUniform(factor=low), window_size=window_size, **chosen)


class WindowObserver(Watcher):
    """Keeps the queries of the observation window of one forward.

    Args:
        press: The press.
        model: The model to watch.
    """

    def __init__(self, press: SnapKVPress, model: nn.Module) -> None:
        self._press, self._model = press, model
        self._window: LastQueries | None = None

    def _watch(self, stack: ExitStack) -> None:
        window = LastQueries(self._model, being_read(self._model).valid, self._press.window_size)
        self._window = stack.enter_context(window)

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the scores of the prefill that was watched."""
        assert self._window is not None, "a prefill enters its observers"
        return self._press.scores(prefill, self._window)
