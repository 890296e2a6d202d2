"""Which heads of a context each process of an engine holds, and how much room that takes in every one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """The part of a process among those that share a model's heads (tensor parallelism).

    Attributes:
        rank: Which process it is.
        n_ranks: Number of processes.
    """

    rank: int = 0
    n_ranks: int = 1

    def heads(self, num_key_value_heads: int) -> slice:
        """Returns the KV heads of this process: a stretch of them, or, if there are more processes than heads, one."""
        if num_key_value_heads >= self.n_ranks:
            n = num_key_value_heads // self.n_ranks
            return slice(self.rank * n, (self.rank + 1) * n)
        head = self.rank // (self.n_ranks // num_key_value_heads)
        return slice(head, head + 1)

    def num_heads(self, num_heads: int) -> int:
        """Returns how many of a model's KV heads this process has."""
        return len(range(num_heads)[self.heads(num_heads)])

    def room(self, lengths: torch.Tensor) -> int:
        """Returns the pairs for which a context takes room in each process: those of the process that has the most.

        Heads keep different numbers of pairs, so processes do too. With equal room, all pools put and drop the same.

        Args:
            lengths: ``[num_layers, num_key_value_heads]``, of all heads.
        """
        heads = [Share(rank, self.n_ranks).heads(lengths.shape[1]) for rank in range(self.n_ranks)]
        return max(int(lengths[:, own].sum()) for own in heads)
