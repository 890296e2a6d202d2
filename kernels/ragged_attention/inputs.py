"""The tensors of one call of ragged attention, their checks and their segments."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from kvzip_press.kernels.checks import (
    check_cu_seqlens,
    check_device,
    check_dtype,
    check_floating,
    check_groups,
    check_like,
    check_mask,
    check_rank,
    check_shape,
)
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.row_codec import Codes

_Segment = TypeVar("_Segment")


@dataclass(frozen=True)
class RaggedInputs:
    """Arguments of :func:`kvzip_press.kernels.ragged_attention.ragged_attention`, documented there."""

    query: Tensor
    keys: Tensor | Codes
    values: Tensor | Codes
    cu_seqlens: Tensor
    tail_keys: Tensor | None = None
    tail_values: Tensor | None = None
    row_index: Tensor | None = None
    tail_mask: Tensor | None = None
    live_tail_length: Tensor | None = None
    part_of_storage: bool = False
    context_query: Tensor | None = None
    context_bias: Tensor | None = None
    pair_index: Tensor | None = None

    @property
    def num_key_value_heads(self) -> int:
        """Number of key-value heads: the tail's, or else the segments of each batch row."""
        if self.tail_keys is not None:
            return self.tail_keys.shape[1]
        return (self.cu_seqlens.shape[0] - 1) // max(1, self.query.shape[0])

    @property
    def tail_length(self) -> int:
        """Number of tail tokens that there is room for; without ``live_tail_length`` all of them are live."""
        return 0 if self.tail_keys is None else self.tail_keys.shape[2]

    def with_live_tail(self) -> "RaggedInputs":
        """Returns the same inputs with the tail cut to its live tokens, whose number is read from the device."""
        if self.live_tail_length is None or self.tail_keys is None or self.tail_values is None:
            return self
        length = int(self.live_tail_length)
        mask = None if self.tail_mask is None else self.tail_mask[..., :length]
        keys, values = self.tail_keys[:, :, :length], self.tail_values[:, :, :length]
        return replace(self, tail_keys=keys, tail_values=values, tail_mask=mask, live_tail_length=None)

    @property
    def n_pairs(self) -> int:
        """Number of packed pairs that there are to read: those of the storage, or those that ``pair_index`` lists."""
        return self.keys.shape[0] if self.pair_index is None else self.pair_index.shape[0]

    @property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Packed keys and values, for implementations that refuse codes."""
        assert isinstance(self.keys, Tensor)
        assert isinstance(self.values, Tensor)
        return self.keys, self.values

    @property
    def codes(self) -> tuple[Codes, Codes]:
        """Packed keys and values, for implementations that refuse all but codes."""
        assert isinstance(self.keys, Codes)
        assert isinstance(self.values, Codes)
        return self.keys, self.values

    @property
    def query_of_context(self) -> Tensor:
        """The queries as they meet the packed keys."""
        return self.query if self.context_query is None else self.context_query

    def segments(self) -> list[tuple[Tensor, Tensor]]:
        """Yields packed keys and values, views [1, 1, n, head_dim], for every (batch row, key-value head) in order."""
        bounds = self.cu_seqlens.tolist()
        seqlens, whole = [stop - start for start, stop in pairwise(bounds)], slice(bounds[0], bounds[-1])
        index = None if self.pair_index is None else self.pair_index[whole]
        read = (packed[whole] if index is None else packed.index_select(0, index) for packed in self.dense)
        split = (packed[None, None].split(seqlens, 2) for packed in read)
        return self._of_batch(list(zip(*split, strict=True)))

    def segment_codes(self) -> list[tuple[Codes, Codes]]:
        """Yields packed codes of keys and values for every (batch row, key-value head) in order."""
        keys, values = self.codes
        return [(keys[rows], values[rows]) for rows in self.segment_rows()]

    def segment_rows(self) -> list[slice]:
        """Returns where the packed pairs of every (batch row, key-value head) lie, in order."""
        return self._of_batch([slice(start, stop) for start, stop in pairwise(self.cu_seqlens.tolist())])

    def _of_batch(self, pairs: list[_Segment]) -> list[_Segment]:
        """Returns the segments that the batch rows read, of those that there are."""
        if self.row_index is None:
            return pairs
        n_heads = self.num_key_value_heads
        return [pair for row in self.row_index.tolist() for pair in pairs[row * n_heads : (row + 1) * n_heads]]

    def check(self) -> None:
        """Raises ValueError (shapes, devices, values) or TypeError (dtypes) for arguments that do not fit together."""
        check_rank("query", self.query, "batch, num_attention_heads, query_length, head_dim")
        check_floating("query", self.query)
        self._check_context()
        self._check_query_of_context()
        self._check_tail()
        self._check_rows()
        check_groups(self.query.shape[1], self.num_key_value_heads)

    def _check_context(self) -> None:
        for name, rows in (("keys", self.keys), ("values", self.values)):
            check_rank(name, rows.codes if isinstance(rows, Codes) else rows, f"total, {name[:-1]}_dim")
        total, head_dim = self.keys.shape[0], self.query.shape[3]
        if self.keys.shape[1] != head_dim:
            raise ValueError(f"keys: expected [total, head_dim] = {(total, head_dim)}, got {tuple(self.keys.shape)}")
        if self.values.shape[0] != total:
            raise ValueError(f"values: expected as many rows as keys, {total}, got shape {tuple(self.values.shape)}")
        for name, rows in (("keys", self.keys), ("values", self.values)):
            if isinstance(rows, Codes):
                rows.check(name)
                check_device(name, rows.codes, self.query.device)
            else:
                check_like(name, rows, "query", self.query)
        if isinstance(self.keys, Codes) != isinstance(self.values, Codes):
            raise TypeError("keys, values: expected codes for both or for neither, got codes for one")
        if self.pair_index is None:
            check_cu_seqlens(self.cu_seqlens, total, self.query.device, within=self.part_of_storage)
        else:
            self._check_pair_index(self.pair_index, total)

    def _check_pair_index(self, index: Tensor, total: int) -> None:
        check_rank("pair_index", index, "listed pairs")
        check_dtype("pair_index", index, torch.int32)
        check_device("pair_index", index, self.query.device)
        if isinstance(self.keys, Codes):
            raise TypeError("pair_index: expected keys and values in a dtype of the model, got codes")
        if self.row_index is not None:
            raise ValueError("pair_index: expected no row_index beside it: segments list the pairs of their own row")
        if not index.is_contiguous():
            raise ValueError(f"pair_index: expected a contiguous tensor, got strides {index.stride()}")
        check_cu_seqlens(self.cu_seqlens, len(index), self.query.device, within=True)  # there may be room for more
        if index.device.type != "cpu":
            return
        listed = index[int(self.cu_seqlens[0]) : int(self.cu_seqlens[-1])]
        if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < total:
            bounds = f"{int(listed.min())} to {int(listed.max())}"
            raise ValueError(f"pair_index: expected pairs 0 .. {total - 1} of the storage, got {bounds}")

    def _check_query_of_context(self) -> None:
        if self.context_query is not None:
            dims = "batch, num_attention_heads, query_length, head_dim"
            check_shape("context_query", self.context_query, self.query.shape, dims)
            check_like("context_query", self.context_query, "query", self.query)
        if self.context_bias is not None:
            dims = "batch, num_attention_heads, query_length"
            check_shape("context_bias", self.context_bias, self.query.shape[:3], dims)
            check_dtype("context_bias", self.context_bias, accumulation_dtype(self.query.dtype))
            check_device("context_bias", self.context_bias, self.query.device)
        if (self.context_query is not None or self.context_bias is not None) and not isinstance(self.keys, Codes):
            raise ValueError("context_query, context_bias: expected only with codes, got keys in a dtype of the model")

    def _check_tail(self) -> None:
        if self.tail_keys is None or self.tail_values is None:
            if not self.tail_keys is self.tail_values is self.tail_mask is self.live_tail_length is None:
                raise ValueError(
                    "tail_keys, tail_values: expected both, or neither and no tail_mask or tail_length; got some"
                )
            return
        batch_size, num_heads, query_length, head_dim = self.query.shape
        dims = "batch, num_key_value_heads, tail_length, head_dim"
        check_rank("tail_keys", self.tail_keys, dims)
        heads, length = self.tail_keys.shape[1:3]
        check_shape("tail_keys", self.tail_keys, (batch_size, heads, length, head_dim), dims)
        check_shape("tail_values", self.tail_values, (batch_size, heads, length, self.values.shape[1]), dims)
        check_like("tail_keys", self.tail_keys, "query", self.query)
        check_like("tail_values", self.tail_values, "query", self.query)
        if self.tail_mask is not None:
            check_mask("tail_mask", self.tail_mask, batch_size, num_heads, query_length, length)
            check_device("tail_mask", self.tail_mask, self.query.device)
        elif 0 < length < query_length:
            raise ValueError(f"tail_keys: expected at least query_length = {query_length} tokens or none, got {length}")
        self._check_live_length(length)

    def _check_live_length(self, capacity: int) -> None:
        live = self.live_tail_length
        if live is None:
            return
        check_rank("tail_length", live, "1")
        check_shape("tail_length", live, (1,), "1")
        check_dtype("tail_length", live, torch.int32)
        check_device("tail_length", live, self.query.device)
        least = 0 if self.tail_mask is not None else self.query.shape[2]
        if live.device.type == "cpu" and not least <= int(live) <= capacity:
            raise ValueError(f"tail_length: expected {least} .. {capacity} tokens, got {int(live)}")

    def _check_rows(self) -> None:
        n_segments, batch_size = self.cu_seqlens.shape[0] - 1, self.query.shape[0]
        if self.row_index is None:
            if n_segments != batch_size * self.num_key_value_heads:
                expected = f"{batch_size} rows * {self.num_key_value_heads} key-value heads + 1 elements"
                raise ValueError(f"cu_seqlens: expected {expected}, got {n_segments + 1}")
            return
        if self.tail_keys is None:
            raise ValueError("row_index: expected tail_keys with it (tail_length may be 0), got None")
        check_shape("row_index", self.row_index, (batch_size,), "batch")
        check_dtype("row_index", self.row_index, torch.int64)
        check_device("row_index", self.row_index, self.query.device)
        self._check_row_index(self.row_index, n_segments)

    def _check_row_index(self, row_index: Tensor, n_segments: int) -> None:
        n_rows, rest = divmod(n_segments, self.num_key_value_heads)
        if rest:
            raise ValueError(
                f"cu_seqlens: expected a multiple of {self.num_key_value_heads} segments, got {n_segments}"
            )
        if row_index.device.type == "cpu" and not all(0 <= row < n_rows for row in row_index.tolist()):
            raise ValueError(f"row_index: expected packed rows 0 .. {n_rows - 1}, got {row_index.tolist()}")
