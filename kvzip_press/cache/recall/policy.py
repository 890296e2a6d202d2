"""What recall does: how many pairs a step reads, and how pairs are divided into groups that a query ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch

from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class Recall(ABC):
    """Lets a decode step read ``budget`` pairs of each head's context: whole groups, best first, the last one cut.

    A subclass says how the keys of a head are divided into groups, and what is noted of a group for queries to rank it.

    Args:
        budget: Context pairs that a head reads in a step, the first tokens among them; all if it has no more.
        n_sink: First tokens of the context, which every step reads.
        full_layers: First layers of the model whose steps read everything.
        per_query_head: Whether each query head reads pairs of its own choice, as published, and so up to as many times
            the pairs as query heads share a key-value head. By default these heads choose together, by the mean of the
            attention that they expect behind the first tokens, and a step reads ``budget`` pairs of each key-value
            head.
        batch: New tokens that are attended whole until as many are there, and are then grouped too; 0 for never. Only
            :class:`kvzip_press.DecodeStep`, ``generate`` and ``answer`` group new tokens.

    Raises:
        InvalidArgumentError: A number is out of range or no integer, or ``per_query_head`` no bool.
    """

    budget: int
    n_sink: int = 16
    full_layers: int = 2
    per_query_head: bool = False
    batch: int = 320

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), bool if one.type == "bool" else int
            if type(value) is not kind:
                name = type(self).__name__
                raise InvalidArgumentError(f"{name}: expected {one.name} as {kind.__name__}, got {value!r:.80}")
        if self.n_sink < 0 or self.full_layers < 0 or self.batch < 0 or self.budget <= self.n_sink:
            raise InvalidArgumentError(
                "expected a budget of more pairs than n_sink, and n_sink, full_layers and batch of 0 or more, got "
                f"{self!r}"
            )

    @abstractmethod
    def groups(self, keys: torch.Tensor, *, are_new: bool) -> torch.Tensor:
        """Divides the pairs of a head into groups.

        Args:
            keys: ``[n, head_dim]``, n >= 1, after RoPE, by ascending position.
            are_new: Whether these tokens came after the context was grouped.

        Returns:
            int64 ``[n]``, the group of each pair. Numbers may be left out.
        """

    @abstractmethod
    def marks(self, keys: torch.Tensor, groups: torch.Tensor, n_groups: int) -> torch.Tensor:
        """Returns what is noted of each group, in the dtype of ``keys``, and what queries are taken to give with it.

        ``[n_groups, head_dim]``, a vector whose product with a query stands for those of the group's keys; or
        ``[n_groups, 2 * head_dim]``, the greatest and the least value of each channel, and the largest product within
        these bounds stands for them.

        Args:
            keys: ``[n, head_dim]``.
            groups: int64 ``[n]``, each number below ``n_groups`` at least once.
            n_groups: Number of groups.
        """
