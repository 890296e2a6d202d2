"""The pairs of layers as a press looks at them to decide which go: alike for a prompt and while a model writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvzip_press.cache.codecs.held import POSITIONS, Held
from kvzip_press.cache.codecs.storage import Storage
from kvzip_press.cache.packed_pairs import SCORES
from kvzip_press.cache.pair_pool.stack import LayerStack
from kvzip_press.cache.query_window import QueryWindow, known_of
from kvzip_press.kernels.received_attention import received_attention

BLOCK_NUMBERS = 2**26  # of a block of logits: 256 MB in fp32
NEVER = torch.iinfo(torch.int64).max  # a position that no query has


@dataclass(frozen=True)
class LayerPairs:
    """The pairs of some rows of a layer, or of all rows of several, head by head in ascending position, on the right.

    Heads and rows hold different numbers of pairs, so ``valid`` says which columns are pairs; others hold anything
    finite. Nothing here is to be changed.

    Attributes:
        layer_idx: Index of the layer in the model; of several, that of the first.
        keys: ``[batch, num_key_value_heads, n, head_dim]``, after RoPE, as attention sees them.
        valid: ``[batch, num_key_value_heads, n]``, bool.
        positions: ``[batch, num_key_value_heads, n]``, int64, the position of each pair in its row.
        scores: ``[batch, num_key_value_heads, n]``, fp32, what pairs carry; 0 for those that are new.
        ends: int64 ``[batch]``, the position after each row's last token.
        queries: ``[batch, num_attention_heads, w, head_dim]``, of each row's last tokens, after RoPE; w may be 0.
        known: ``[batch, w]``, bool: the queries that are known. The last one is that of the last token.
        scaling: Factor of the logits; None means ``head_dim ** -0.5``.
        softcap: Bound of the logits; None means no bound.
        of_prompt: Whether they are those of a prompt, which is scored once.
        first_row: Index of the first of these rows in the batch.
        values: ``[batch, num_key_value_heads, n, v_head_dim]``; None unless they were asked for.
        layer_indices: Of several layers, the index of each row's; () if all rows are of one.
    """

    layer_idx: int
    keys: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    ends: torch.Tensor
    queries: torch.Tensor
    known: torch.Tensor
    scaling: float | None = None
    softcap: float | None = None
    of_prompt: bool = False
    first_row: int = 0
    values: torch.Tensor | None = None
    layer_indices: tuple[int, ...] = ()

    @property
    def query_positions(self) -> torch.Tensor:
        """The position of each query's token, int64 ``[batch, w]``."""
        n = self.queries.shape[2]
        return self.ends[:, None] - n + torch.arange(n, device=self.ends.device)

    def newest(self, count: int) -> torch.Tensor:
        """Returns ``[batch, num_key_value_heads, n]``, bool: the pairs of each row's last ``count`` tokens."""
        return self.valid & (self.positions >= (self.ends - count)[:, None, None])

    def received(self, last: int | None = None, *, squared: bool = False) -> torch.Tensor:
        """Returns what pairs get of the attention of queries, summed over these and over the query heads of a group.

        Args:
            last: Number of last queries to look at; None for all.
            squared: Whether the squares of probabilities are summed.

        Returns:
            fp32 ``[batch, num_key_value_heads, n]``; 0 of queries that are not known. No probabilities are in memory.
        """
        first = 0 if last is None else max(self.queries.shape[2] - last, 0)
        sums = received_attention(
            self.queries[:, :, first:],
            self.keys,
            self.query_positions[:, first:].where(self.known[:, first:], -1),
            self.positions.where(self.valid, NEVER),
            squared=squared,
            scaling=self.scaling,
            softcap=self.softcap,
        )
        return sums.float()  # of fp64 inputs they are fp64, which scores are not

    def attention(self, last: int | None = None, *, among: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Yields the attention that pairs get, in blocks of queries.

        Args:
            last: Number of last queries to look at; None for all.
            among: ``[batch, num_key_value_heads, n]``, bool: the pairs that softmax runs over; None for all.

        Yields:
            ``[batch, num_key_value_heads, groups, queries, n]``, fp32: probabilities; 0 at pairs that a query does not
            see, and everywhere for one that is not known.
        """
        for logits, sees in self.logits(last, among=among):
            yield logits.softmax(dim=-1).where(sees, 0)

    def logits(
        self, last: int | None = None, *, among: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the logits of attention in blocks of queries, -inf at what is not seen, and what each query sees.

        Arguments are those of :meth:`attention`.

        Yields:
            ``[batch, num_key_value_heads, groups, queries, n]``, fp32; and bool, broadcastable to that shape.
        """
        batch, heads, n, dim = self.keys.shape
        first = 0 if last is None else max(self.queries.shape[2] - last, 0)
        queries, known = self.queries[:, :, first:], self.known[:, first:]
        positions = self.query_positions[:, first:]
        grouped = queries.unflatten(1, (heads, -1))
        keys = self.keys.float().transpose(-1, -2)
        scaling = dim**-0.5 if self.scaling is None else self.scaling
        pairs = self.valid if among is None else self.valid & among
        size = max(BLOCK_NUMBERS // max(batch * queries.shape[1] * n, 1), 1)
        for start in range(0, queries.shape[2], size):
            block = slice(start, start + size)
            asked = grouped[:, :, :, block].float().nan_to_num(0.0)
            logits = (asked.flatten(2, 3) @ keys).mul_(scaling).unflatten(2, asked.shape[2:4])
            if self.softcap is not None:
                logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
            sees = pairs[:, :, None, :] & (self.positions[:, :, None, :] <= positions[:, None, block, None])
            sees = (sees & known[:, None, block, None]).unsqueeze(2)
            blind = ~sees.any(dim=-1, keepdim=True)  # softmax over nothing would be NaN
            yield logits.masked_fill_(~sees & ~blind, -torch.inf), sees


def pairs_of(
    layer_indices: Sequence[int], stack: LayerStack, rows: slice = slice(None), *, at_values: bool = False
) -> tuple[LayerPairs, torch.Tensor, torch.Tensor]:
    """Returns the pairs of some rows of a ragged layer, or of several layers, packed ones and those of their tails.

    Args:
        layer_indices: The indices of the layers.
        stack: The layers; none of their rows share pairs.
        rows: The rows; of several layers, all.
        at_values: Whether values are asked for.

    Returns:
        The pairs; the place of each packed one among them, int64 ``[total_kept]``, of a tensor without dimensions; and
        the column of each of the tail's tokens, int64 ``[batch, num_key_value_heads, t]``, negative at padding.
    """
    packed, layer, tail, n_layers = stack.packed, stack.layers[0], stack.layers[0].tail, len(stack.layers)
    columns = _Columns.of(stack, rows)
    device = packed.device
    own: Held = packed
    if columns.shape[0] != packed.num_rows:
        first, last, _ = rows.indices(packed.num_rows)
        own = packed.within(slice(first * packed.num_heads, last * packed.num_heads), whole=False)
    keys, values = _decoded(own, packed.storage)
    keys = columns.laid_out(keys, None if stack.keys is None else stack.keys[rows])
    if at_values:
        values = columns.laid_out(values, None if stack.values is None else stack.values[rows])
    ends = layer.next_positions.repeat(n_layers)[rows]
    written = (ends - tail.length)[:, None] + torch.arange(tail.length, device=device)
    scores = own.columns.get(SCORES)
    scores = torch.zeros(own.total, device=device) if scores is None else scores
    queries, known = _queries_of(stack, keys, rows)
    pairs = LayerPairs(
        layer_indices[0],
        keys,
        columns.valid,
        columns.laid_out(own.columns[POSITIONS].long(), written[:, None]),
        columns.laid_out(scores, None),
        ends,
        queries,
        known,
        *layer.logits,
        first_row=rows.indices(packed.num_rows)[0],
        values=values if at_values else None,
        layer_indices=() if n_layers == 1 else tuple(i for i in layer_indices for _ in range(layer.batch_size)),
    )
    back = torch.arange(tail.length, device=device) + (columns.shape[2] - tail.length)
    return pairs, columns.front, back.expand_as(columns.is_token).where(columns.is_token, -1)


def dense_pairs(
    layer_idx: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    valid: torch.Tensor,
    *,
    n_queries: int | None,
    scaling: float | None,
    softcap: float | None,
) -> LayerPairs:
    """Returns the pairs of a layer that has just read a prompt, in the columns of its keys.

    Args:
        layer_idx: Its index.
        query: ``[batch, num_attention_heads, n, head_dim]``, after RoPE, of the last n columns.
        keys: ``[batch, num_key_value_heads, columns, head_dim]``, after RoPE.
        valid: ``[batch, columns]``, bool, False at padding, which is at the ends of a row.
        n_queries: Number of last queries of each row to take along; None for all.
        scaling: Factor of the logits.
        softcap: Bound of the logits.
    """
    batch, heads, columns, _ = keys.shape
    ends = valid.sum(dim=-1)
    positions = (valid.long().cumsum(dim=-1) - 1).clamp(min=0)
    window = QueryWindow.last_of(query, valid[:, columns - query.shape[2] :], n_queries)
    return LayerPairs(
        layer_idx,
        keys,
        valid[:, None].expand(-1, heads, -1),
        positions[:, None].expand(-1, heads, -1),
        torch.zeros(batch, heads, columns, device=keys.device),
        ends,
        window.queries,
        window.known,
        scaling,
        softcap,
        of_prompt=True,
    )


def _queries_of(stack: LayerStack, keys: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    windows = [one.tail.window for one in stack.layers]
    if windows[0] is None:
        return keys[:, :, :0], keys.new_zeros(len(keys), 0, dtype=torch.bool)
    found = [one if rows == slice(None) else one.rows(rows) for one in windows if one is not None]
    queries = torch.cat([one.queries for one in found]) if len(found) > 1 else found[0].queries
    return queries, known_of(queries)


def _decoded(pairs: Held, storage: Storage) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values of packed pairs, ``[total_kept, width]``."""
    if pairs.total:
        return storage.decode(pairs)
    keys, values = (
        torch.empty(0, width, dtype=storage.dtype, device=pairs.cu_seqlens.device)
        for width in (storage.head_dim, storage.v_head_dim)
    )
    return keys, values


@dataclass(frozen=True)
class _Columns:
    """Where the pairs of some rows lie, head by head, on the right: packed ones and, behind them, those of the tail.

    Attributes:
        shape: Number of rows, heads and columns.
        valid: Bool, in this shape, which columns are pairs.
        front: int64 ``[total_kept]``, the place of each packed pair in the flattened shape.
        is_token: Bool ``[rows, heads, t]``, False at padding of the tail: its t columns are the last ones here.
    """

    shape: tuple[int, int, int]
    valid: torch.Tensor
    front: torch.Tensor
    is_token: torch.Tensor

    @classmethod
    def of(cls, stack: LayerStack, rows: slice) -> _Columns:
        packed, tail = stack.packed, stack.layers[0].tail
        first, last, _ = rows.indices(packed.num_rows)
        batch, heads, t, device = last - first, packed.num_heads, tail.length, packed.device
        n_packed = packed.seqlens[rows].long()
        bounds = stack.bounds[first * heads : last * heads + 1]  # on the host: nothing is waited for
        n, total = int(bounds.diff().max()) + t, int(bounds[-1] - bounds[0])
        sizes, is_token = n_packed + t, torch.ones(batch, 1, t, dtype=torch.bool, device=device)
        if tail.padding is not None:
            padding = tail.padding.repeat(len(stack.layers))[rows, None]
            sizes, is_token = sizes - padding, (torch.arange(t, device=device) >= padding)[:, None]
        begins = n * torch.arange(1, batch * heads + 1, device=device) - sizes.flatten()  # of each head, in all columns
        before = n_packed.flatten().cumsum(0) - n_packed.flatten()
        shift = (begins - before).repeat_interleave(n_packed.flatten(), output_size=total)
        valid = torch.arange(n, device=device) >= (n - sizes)[..., None]
        front = torch.arange(total, device=device) + shift
        return cls((batch, heads, n), valid, front, is_token.expand(-1, heads, -1))

    def laid_out(self, packed: torch.Tensor, tail: torch.Tensor | None) -> torch.Tensor:
        """Returns what pairs have in their columns; 0 where there is no pair.

        Args:
            packed: ``[total_kept, ...]``.
            tail: Broadcastable to ``[rows, heads, t, ...]``; None for 0.
        """
        columns = packed.new_zeros(math.prod(self.shape), *packed.shape[1:]).index_copy_(0, self.front, packed)
        columns = columns.view(*self.shape, *packed.shape[1:])
        if tail is not None:
            last = columns[:, :, self.shape[2] - self.is_token.shape[2] :]
            is_token = self.is_token.view(*self.is_token.shape, *(1 for _ in packed.shape[1:]))
            last.copy_(torch.where(is_token, tail, last))
        return columns
