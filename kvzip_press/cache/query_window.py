"""The queries of the last tokens of a tail, for presses that evict by what these attend to while the model writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvzip_press.cache.padding import visible_columns

BLOCK = 64  # columns that a buffer grows by at least
SPARE = (
    512  # columns besides those that outlive an eviction, for crops, of a cache that nothing is evicted from any more
)


@dataclass(frozen=True)
class QueryWindow:
    """Queries of the last tokens that a layer has read, column by column like the keys in its tail.

    A value: every operation returns another one, which may go on in the same memory behind the columns that are there.
    So a window is restored, when a forward fails, by what the tail referred to.

    Attributes:
        buffer: ``[batch, num_attention_heads, room, head_dim]``, after RoPE, in the model's dtype.
        size: Columns that outlive an eviction; None if there are none, because scores then hold what queries say.
        length: Number of columns that are held; the last one is the tail's last one. A column is NaN where the query of
            a token is not known, or where a row has no token.
        padding: int64 ``[batch]``, columns of padding on the left of the block that is being read; None for none.
    """

    buffer: torch.Tensor
    size: int | None
    length: int = 0
    padding: torch.Tensor | None = None

    @property
    def queries(self) -> torch.Tensor:
        """A view of the columns that are held, ``[batch, num_attention_heads, length, head_dim]``."""
        return self.buffer[:, :, : self.length]

    def appended(self, n_tokens: int, padding: torch.Tensor | None = None) -> QueryWindow:
        """Returns the window behind ``n_tokens`` more tokens, whose queries are not known yet.

        Args:
            n_tokens: Columns that are read.
            padding: int64 ``[batch]``, how many of them are padding on the left of each row; a row's earlier columns
                move over them, as its keys do.
        """
        total = self.length + n_tokens
        kept = total
        if self.size is not None and total > self.size + (SPARE if n_tokens == 1 else 0):
            kept = max(self.size, 1)
        if padding is None and kept == total:
            grown = self.reserved(n_tokens)
            grown.buffer[:, :, self.length : total] = torch.nan
            return replace(grown, length=total, padding=None)
        columns = torch.arange(total - kept, total, device=self.buffer.device)[None]
        shifts = torch.zeros_like(columns[:, :1]) if padding is None else padding[:, None]
        return self._taken(columns - shifts * (columns < self.length + shifts), padding)

    def filled(self, queries: torch.Tensor) -> QueryWindow:
        """Returns the window with the queries of the tokens that were appended last.

        Args:
            queries: ``[batch, num_attention_heads, n_tokens, head_dim]``.
        """
        held = min(queries.shape[2], self.length)
        new = queries[:, :, queries.shape[2] - held :].to(self.buffer.dtype)
        place = self.buffer[:, :, self.length - held : self.length]
        if self.padding is not None:
            visible = visible_columns(self.padding, queries.shape[2])[:, None, queries.shape[2] - held :, None]
            new = torch.where(visible, new, place)
        place.copy_(new)
        return replace(self, padding=None)

    def reserved(self, n_tokens: int) -> QueryWindow:
        """Returns the window with room for ``n_tokens`` more columns, in memory that may be written into here."""
        needed = self.length + n_tokens
        is_writable = torch.is_inference_mode_enabled() or not self.buffer.is_inference()
        if needed <= self.buffer.shape[2] and is_writable:
            return self
        return self._in_room(-(-needed // BLOCK) * BLOCK)

    def wrote(self, n_tokens: int) -> QueryWindow:
        """Returns the window behind tokens whose queries a static step has written into the buffer."""
        return replace(self, length=self.length + n_tokens)

    def truncated(self, n_tokens: int) -> QueryWindow:
        """Returns the window without the last ``n_tokens`` columns."""
        return replace(self, length=max(self.length - n_tokens, 0))

    def ends_dropped(self, counts: torch.Tensor) -> QueryWindow:
        """Returns the window without the last ``counts`` ``[batch]`` tokens of each row."""
        columns = torch.arange(self.length, device=self.buffer.device)
        return self._taken(columns[None] - counts.to(self.buffer.device)[:, None], None)

    def after_eviction(self) -> QueryWindow:
        """Returns the window behind an eviction, at the same address: its last ``size`` columns."""
        kept = min(self.size or 0, self.length)
        if not kept or kept == self.length:
            return replace(self, length=kept)
        moved = self.reserved(0)
        moved.buffer[:, :, :kept] = self.queries[:, :, self.length - kept :].clone()
        return replace(moved, length=kept)

    def with_room_for(self, n_tokens: int) -> QueryWindow:
        """Returns the window in a buffer with room for ``n_tokens`` columns behind those that outlive an eviction."""
        room = max(self.size or 0, self.length) + n_tokens
        return self if self.buffer.shape[2] == room else self._in_room(room)

    def rows(self, index: torch.Tensor) -> QueryWindow:
        """Returns the window of other batch rows, int64 ``[new_batch]``."""
        return replace(self, buffer=self.buffer.index_select(0, index.to(self.buffer.device)))

    def copy(self, device: torch.device | None = None) -> QueryWindow:
        """Returns an independent window, on ``device`` or where this one is."""
        return replace(self, buffer=self.queries.to(device, copy=True))

    def _taken(self, index: torch.Tensor, padding: torch.Tensor | None) -> QueryWindow:
        """Returns a window in new memory whose column i is column ``index[row, i]``; NaN where there is none."""
        batch, heads, _, dim = self.buffer.shape
        known = (index >= 0) & (index < self.length)
        if self.length:
            where = index.clamp(0, self.length - 1).expand(batch, -1)
            taken = self.queries.gather(2, where[:, None, :, None].expand(-1, heads, -1, dim))
        else:
            taken = self.buffer.new_empty(batch, heads, index.shape[1], dim)
        taken = taken.masked_fill(~known[:, None, :, None], torch.nan)
        return replace(self, buffer=taken, length=index.shape[1], padding=padding)

    def _in_room(self, room: int) -> QueryWindow:
        buffer = self.buffer.new_empty(*self.buffer.shape[:2], room, self.buffer.shape[3])
        buffer[:, :, : self.length] = self.queries
        return replace(self, buffer=buffer)
