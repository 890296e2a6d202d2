"""StreamingLLM (https://arxiv.org/abs/2309.17453): the first and the last tokens are kept, what is between is not."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip_press.arguments.numbers import is_int
from kvzip_press.budget.allocators import AllocationLike
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress


@dataclass(frozen=True)
class StreamingLLMPress(AllocatingPress):
    """Keeps the first ``n_sink`` tokens, inside the budget, and the last ones with the rest of it.

    A pair's score is its position. Keys stay as RoPE turned them; the paper turns them again to positions inside the
    cache. A later turn has no sink: its last tokens are kept. Budgets are per KV head (other code may count query
    heads).

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: "head" (every head keeps as many), or another.
        budget: Tokens' worth of pairs to keep, instead of a ratio; this and the other fields of the policy are
            explained in :class:`kvzip_press.press.AllocatingPress`.
        n_sink: Number of first tokens of a context that are kept.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    allocation: AllocationLike = "head"
    n_sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.n_sink) or self.n_sink < 0:
            raise InvalidArgumentError(f"expected n_sink to be an int of at least 0, got {self.n_sink!r}")

    def score(self, prefill: Prefill) -> Scores:
        """Returns the positions of the tokens."""
        layers = {
            layer_idx: blank + prefill.positions[:, None].to(blank)
            for layer_idx, blank in prefill.blank_scores().items()
        }
        return Scores(layers, prefill.first_tokens(self.n_sink), self.policy, protected_count=True)
