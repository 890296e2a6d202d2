"""The arguments of one ranking, and their checks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip_press.kernels.checks import (
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_floating,
    check_groups,
    check_like,
    check_rank,
    check_shape,
)


@dataclass(frozen=True)
class RankingInputs:
    """Arguments of :func:`kvzip_press.kernels.recall_ranking.recall_ranking`, documented there."""

    query: Tensor
    marks: Tensor
    sizes: Tensor
    order: Tensor
    cu_seqlens: Tensor
    num_key_value_heads: int
    budget: int
    row_index: Tensor | None
    per_query_head: bool
    scale: float

    @property
    def n_groups(self) -> int:
        """Groups of a segment, empty ones too."""
        return self.marks.shape[1]

    @property
    def lists_per_head(self) -> int:
        """Lists of a key-value head."""
        return self.query.shape[1] // self.num_key_value_heads if self.per_query_head else 1

    @property
    def n_lists(self) -> int:
        """Lists of all rows."""
        return self.query.shape[0] * self.num_key_value_heads * self.lists_per_head

    @property
    def has_bounds(self) -> bool:
        """Whether marks are the greatest and the least value of each channel."""
        return self.marks.shape[2] == 2 * self.query.shape[2]

    def check(self) -> None:
        """Raises ValueError (shapes, devices, values) or TypeError (dtypes) for arguments that do not fit together."""
        check_rank("query", self.query, "batch, num_attention_heads, head_dim")
        check_floating("query", self.query)
        check_groups(self.query.shape[1], self.num_key_value_heads)
        if self.budget < 1:
            raise ValueError(f"budget: expected 1 pair or more, got {self.budget}")
        self._check_groups_of_pairs()
        self._check_rows()
        if self.query.device.type == "cpu":
            lengths, held = self.cu_seqlens.diff().tolist(), self.sizes.sum(1).tolist()
            if lengths != held:
                raise ValueError(f"sizes: expected the sums {lengths}, the lengths of the segments, got {held}")

    def _check_groups_of_pairs(self) -> None:
        device, head_dim = self.query.device, self.query.shape[2]
        check_rank("marks", self.marks, "segments, groups, head_dim|2 * head_dim")
        check_like("marks", self.marks, "query", self.query)
        if self.marks.shape[2] not in (head_dim, 2 * head_dim):
            raise ValueError(
                f"marks: expected vectors of head_dim = {head_dim} numbers, or bounds of {2 * head_dim}, got shape "
                f"{tuple(self.marks.shape)}"
            )
        n_segments = self.marks.shape[0]
        check_shape("sizes", self.sizes, (n_segments, 1 + self.n_groups), "segments, 1 + groups")
        check_rank("order", self.order, "total")
        for name, tensor in (("sizes", self.sizes), ("order", self.order)):
            check_dtype(name, tensor, torch.int32)
            check_device(name, tensor, device)
        check_cu_seqlens(self.cu_seqlens, len(self.order), device)
        check_shape("cu_seqlens", self.cu_seqlens, (n_segments + 1,), "segments + 1")

    def _check_rows(self) -> None:
        batch_size, n_segments = self.query.shape[0], self.marks.shape[0]
        if self.row_index is None:
            expected = batch_size * self.num_key_value_heads
            if n_segments != expected:
                raise ValueError(
                    f"marks: expected {expected} segments, {batch_size} rows * {self.num_key_value_heads} key-value "
                    f"heads, got {n_segments}"
                )
            return
        check_shape("row_index", self.row_index, (batch_size,), "batch")
        check_dtype("row_index", self.row_index, torch.int64)
        check_device("row_index", self.row_index, self.query.device)
        n_rows, rest = divmod(n_segments, self.num_key_value_heads)
        if rest:
            raise ValueError(f"marks: expected a multiple of {self.num_key_value_heads} segments, got {n_segments}")
        on_cpu = self.row_index.device.type == "cpu"
        if on_cpu and not all(0 <= row < n_rows for row in self.row_index.tolist()):
            raise ValueError(f"row_index: expected packed rows 0 .. {n_rows - 1}, got {self.row_index.tolist()}")
