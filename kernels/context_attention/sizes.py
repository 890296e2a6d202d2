"""How much room the work of a step takes, whichever way it is shared."""

from dataclasses import dataclass

from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.context_attention.tuning import Sharing
from kvzip_press.kernels.triton_support import multiprocessors

MIN_ITEM = 64  # fewest pairs that are worth a program
CHOICES = 16  # lengths of an item of which the shortest that fits is taken


@dataclass(frozen=True)
class Sizes:
    """How much room a step's work takes, which depends on shapes alone.

    Attributes:
        tokens_per_tile: tokens of a tile, at most.
        n_tiles: tiles, as many as there may be.
        n_programs: programs of a layer.
    """

    tokens_per_tile: int
    n_tiles: int
    n_programs: int

    @classmethod
    def of(cls, plan: ContextPlan, sharing: Sharing) -> "Sizes":
        """Returns the room for a plan's work."""
        n_tokens, n_heads = plan.num_tokens, plan.num_key_value_heads
        tokens_per_tile = max(1, sharing.block_m // plan.groups)
        n_tiles = min(n_tokens, n_tokens // tokens_per_tile + min(plan.begins.shape[1], n_tokens))
        n_blocks = -(-tokens_per_tile * plan.groups // sharing.block_m)
        slots = multiprocessors(plan.begins.device) * sharing.programs_per_sm
        return cls(tokens_per_tile, n_tiles, max(n_tiles * n_heads, -(-slots // n_blocks)))
