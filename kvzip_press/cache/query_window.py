"""The queries of the last tokens that a layer has read, for presses that look at what these attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvzip_press.cache.padding import visible_columns

BLOCK = 64  # columns that a buffer grows by at least, where all queries since an eviction are kept


def known_of(queries: torch.Tensor) -> torch.Tensor:
    """Returns which queries ``[batch, num_attention_heads, n, head_dim]`` of a window are known, ``[batch, n]``."""
    return ~queries[:, 0, :, 0].isnan()


@dataclass(frozen=True)
class QueryWindow:
    """Queries of the last tokens of a layer, column by column, the newest last.

    Where the last ``size`` are looked at, the buffer is a ring of as many rows and one more, at a fixed address: the
    query of the token that is being read goes into the row that holds none. So a window is a value, like the other
    things that a tail refers to: when a forward fails, the window from before still holds what it held. Tokens that are
    cropped again have pushed out the queries of as many others, which are then not known.

    Where all queries since the last eviction are looked at, the buffer grows until then.

    Attributes:
        buffer: ``[batch, num_attention_heads, room, head_dim]``, after RoPE, in the model's dtype.
        size: Most columns that are held; None for all since the last eviction.
        length: Number of columns that are held; the last one is that of the last token. A column is NaN where the query
            of a token is not known, or where a row has no token.
        start: The row of the buffer in which the first column lies; the others follow it, around the buffer's end.
        padding: int64 ``[batch]``, columns of padding on the left of the block that is being read; None for none.
    """

    buffer: torch.Tensor
    size: int | None
    length: int = 0
    start: int = 0
    padding: torch.Tensor | None = None

    @classmethod
    def unknown(cls, like: torch.Tensor, size: int | None, length: int) -> QueryWindow:
        """Returns the window behind ``length`` tokens whose queries nobody has seen.

        Args:
            like: ``[batch, num_attention_heads, 1, head_dim]``, of the dtype and on the device of queries.
            size: See :class:`QueryWindow`.
            length: Number of tokens.
        """
        held, room = (length, length) if size is None else (min(length, size), size + 1)
        return cls(like.new_full((*like.shape[:2], room, like.shape[3]), torch.nan), size, held)

    @classmethod
    def last_of(cls, queries: torch.Tensor, valid: torch.Tensor, size: int | None) -> QueryWindow:
        """Returns the queries of each row's last ``size`` tokens, or of all, in a buffer of their own.

        Args:
            queries: ``[batch, num_attention_heads, n, head_dim]``.
            valid: ``[batch, n]``, bool, False at padding, which is at the ends of a row.
            size: Number of tokens; of a shorter row there are fewer. None for all.
        """
        n = queries.shape[2]
        held = n if size is None else min(size, n)
        first = valid.int().argmax(dim=-1, keepdim=True)
        index = first + valid.sum(dim=-1, keepdim=True) - held + torch.arange(held, device=valid.device)
        known = (index >= first).to(queries.device)
        where = index.clamp(0, n - 1).to(queries.device)[:, None, :, None]
        taken = queries.gather(2, where.expand(-1, queries.shape[1], -1, queries.shape[3]))
        return cls(taken.masked_fill_(~known[:, None, :, None], torch.nan), None, held)

    @property
    def queries(self) -> torch.Tensor:
        """The columns that are held, ``[batch, num_attention_heads, length, head_dim]``: not to be changed."""
        parts = [self.buffer[:, :, run] for run in self._runs(0, self.length)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    @property
    def known(self) -> torch.Tensor:
        """Which of them are known, bool ``[batch, length]``."""
        return known_of(self.queries)

    @property
    def next_row(self) -> int:
        """The row of the buffer behind the last column, counted on from the first row, around the buffer's end."""
        return self.start + self.length

    def appended(self, n_tokens: int, padding: torch.Tensor | None = None) -> QueryWindow:
        """Returns the window behind ``n_tokens`` more tokens, whose queries are not known yet.

        Args:
            n_tokens: Columns that are read.
            padding: int64 ``[batch]``, how many of them are padding on the left of each row; a row's earlier columns
                move over them, as its keys do.
        """
        if padding is None and (self.size is None or n_tokens == 1):
            reserved = self.reserved(n_tokens)
            for run in reserved._runs(reserved.length, n_tokens):  # noqa: SLF001  # one of this class
                reserved.buffer[:, :, run] = torch.nan
            return reserved.wrote(n_tokens)
        total = self.length + n_tokens
        columns = torch.arange(total - self._held(total), total, device=self.buffer.device)[None]
        shifts = torch.zeros_like(columns[:, :1]) if padding is None else padding[:, None]
        return self._taken(columns - shifts * (columns < self.length + shifts), padding)

    def filled(self, queries: torch.Tensor) -> QueryWindow:
        """Returns the window with the queries of the tokens that were appended last.

        Args:
            queries: ``[batch, num_attention_heads, n_tokens, head_dim]``.
        """
        held = min(queries.shape[2], self.length)
        runs = self._runs(self.length - held, held)
        new = queries[:, :, queries.shape[2] - held :].to(self.buffer.dtype)
        if self.padding is not None:
            visible = visible_columns(self.padding, queries.shape[2])[:, None, queries.shape[2] - held :, None]
            new = torch.where(visible, new, torch.cat([self.buffer[:, :, run] for run in runs], dim=2))
        for run, part in zip(runs, new.split([run.stop - run.start for run in runs], dim=2), strict=True):
            self.buffer[:, :, run] = part
        return replace(self, padding=None)

    def reserved(self, n_tokens: int) -> QueryWindow:
        """Returns the window with room for ``n_tokens`` more columns, in memory that may be written into here."""
        room = self.buffer.shape[2]
        if self.size is None and self.length + n_tokens > room:
            return self._in_room(-(-(self.length + n_tokens) // BLOCK) * BLOCK)
        is_writable = torch.is_inference_mode_enabled() or not self.buffer.is_inference()
        return self if is_writable else self._in_room(room)

    def wrote(self, n_tokens: int) -> QueryWindow:
        """Returns the window behind tokens whose queries a static step has written into the buffer."""
        total = self.length + n_tokens
        held = self._held(total)
        return replace(self, length=held, start=(self.start + total - held) % self.buffer.shape[2], padding=None)

    def truncated(self, n_tokens: int) -> QueryWindow:
        """Returns the window without the last ``n_tokens`` columns."""
        return replace(self, length=max(self.length - n_tokens, 0))

    def ends_dropped(self, counts: torch.Tensor) -> QueryWindow:
        """Returns the window without the last ``counts`` ``[batch]`` tokens of each row."""
        columns = torch.arange(self.length, device=self.buffer.device)
        return self._taken(columns[None] - counts.to(self.buffer.device)[:, None], None)

    def after_eviction(self) -> QueryWindow:
        """Returns the window behind an eviction, at the same address: a ring goes on, else scores hold what was."""
        return self if self.size is not None else replace(self, length=0)

    def with_room_for(self, n_tokens: int) -> QueryWindow:
        """Returns the window in a buffer with room for ``n_tokens`` more columns, and not for more."""
        room = self.length + n_tokens
        return self if self.size is not None or self.buffer.shape[2] == room else self._in_room(room)

    def rows(self, index: torch.Tensor | slice) -> QueryWindow:
        """Returns the window of other batch rows, int64 ``[new_batch]``; of a slice of them, in the same memory."""
        if isinstance(index, slice):
            return replace(self, buffer=self.buffer[index])
        return replace(self, buffer=self.buffer.index_select(0, index.to(self.buffer.device)))

    def copy(self, device: torch.device | None = None) -> QueryWindow:
        """Returns an independent window, on ``device`` or where this one is."""
        return self._in_room(self.length if self.size is None else self.buffer.shape[2], device)

    def _held(self, total: int) -> int:
        return total if self.size is None else min(total, self.size)

    def _runs(self, first: int, n: int) -> list[slice]:
        """Returns the rows of the buffer in which ``n`` columns from ``first`` on lie: a run, or two around its end."""
        room = max(self.buffer.shape[2], 1)
        begin = (self.start + first) % room
        end = min(begin + n, room)
        around = n - (end - begin)
        return [slice(begin, end), *([slice(0, around)] if around else [])]

    def _taken(self, index: torch.Tensor, padding: torch.Tensor | None) -> QueryWindow:
        """Returns a window in new memory whose column i is column ``index[row, i]``; NaN where there is none."""
        batch, heads, _, dim = self.buffer.shape
        taken = QueryWindow.unknown(self.buffer, self.size, index.shape[1])
        if self.length:
            known = ((index >= 0) & (index < self.length)).expand(batch, -1)[:, None, :, None]
            where = index.clamp(0, self.length - 1).expand(batch, -1)[:, None, :, None].expand(-1, heads, -1, dim)
            taken.buffer[:, :, : index.shape[1]] = self.queries.gather(2, where).masked_fill(~known, torch.nan)
        return replace(taken, padding=padding)

    def _in_room(self, room: int, device: torch.device | None = None) -> QueryWindow:
        batch, heads, _, dim = self.buffer.shape
        buffer = torch.empty(batch, heads, room, dim, dtype=self.buffer.dtype, device=device or self.buffer.device)
        buffer[:, :, : self.length] = self.queries
        return replace(self, buffer=buffer, start=0)
