"""The growing part of a ragged layer: what the model has read or written since the context was packed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvzip_press.cache.padding import ends_dropped, moved_over_padding
from kvzip_press.cache.query_window import QueryWindow
from kvzip_press.errors import InvalidArgumentError

BLOCK = 256  # tokens that a buffer grows by at least; between two growths a decode step allocates and moves nothing


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be written into here: one that was made in inference mode only may in that mode."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that may be written into here: itself, or a copy."""
    return tensor if is_writable(tensor) else tensor.clone()


def _in_new_buffer(columns: torch.Tensor, capacity: int) -> torch.Tensor:
    """Returns a new buffer that begins with these columns, ``[batch, num_heads, capacity, dim]``."""
    buffer = columns.new_empty(*columns.shape[:2], capacity, columns.shape[3])
    buffer[:, :, : columns.shape[2]] = columns
    return buffer


class Tail:
    """Dense keys and values ``[batch, num_heads, length, head_dim]`` in a preallocated buffer, appended in place.

    If pairs are evicted while the model generates, each has a score, too, and queries may be kept beside them.

    Args:
        scored: Whether to keep scores.

    Attributes:
        length: Number of columns: the tokens of the longest row.
        padding: int64 ``[batch]``, the number of columns on the left of each row that are padding; None if there are
            none. It is replaced, never written into.
        settle: Called before the tail is copied: gives tokens their scores that still wait for them; None if none do.
        unscored: The score of a token until it is set: NaN if an eviction has to know it, 0 if it is the one to set it.
        has_scores: Whether a token has got another score than that since the tail was empty.
        window: The queries of its last tokens; None if they are not kept.
        block: Tokens that a buffer grows by at least.
        most: Number of columns at which the tail will be emptied, for which there is room then and for no more, unless
            several tokens come at once; None if it may grow for long.
    """

    def __init__(self, *, scored: bool = False) -> None:
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._scores: torch.Tensor | None = None
        self.scored = scored
        self.length = 0
        self.padding: torch.Tensor | None = None
        self.settle: Callable[[], None] | None = None
        self.unscored: float = torch.nan
        self.has_scores = False
        self.window: QueryWindow | None = None
        self.block = BLOCK
        self.most: int | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        """A view of the live keys; None before the first append."""
        return None if self._keys is None else self._keys[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor | None:
        """A view of the live values; None before the first append."""
        return None if self._values is None else self._values[:, :, : self.length]

    @property
    def scores(self) -> torch.Tensor | None:
        """A view of the live scores, fp32 ``[batch, num_heads, length]``; None if there are none (yet)."""
        return None if self._scores is None else self._scores[:, :, : self.length, 0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The buffers held in memory."""
        queries = None if self.window is None else self.window.buffer
        return tuple(buffer for buffer in (self._keys, self._values, self._scores, queries) if buffer is not None)

    def append(self, keys: torch.Tensor, values: torch.Tensor, padding: torch.Tensor | None = None) -> None:
        """Appends ``[batch, num_heads, t, head_dim]`` after what is there.

        Args:
            keys: New keys.
            values: New values.
            padding: int64 ``[batch]``, the number of columns on the left of the new ones that are padding; each row's
                earlier tokens move over them. None for none.

        Raises:
            InvalidArgumentError: Batch size, number of heads, head_dim, dtype or device differ from before.
        """
        self._make_room(keys, values)
        assert self._keys is not None and self._values is not None
        end = self.length + keys.shape[2]
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        if self._scores is not None:
            self._scores[:, :, self.length : end] = self.unscored
        if padding is not None:
            padding = padding.to(keys.device)
            if self.length:
                n_before = self.length
                self._replace(lambda buffer: moved_over_padding(buffer[:, :, :end], n_before, padding))
            self.padding = padding if self.padding is None else self.padding + padding
        if self.window is not None:
            self.window = self.window.appended(keys.shape[2], padding)
        self.length = end

    def put_queries(self, queries: torch.Tensor) -> None:
        """Keeps the queries ``[batch, num_attention_heads, n, head_dim]`` of the tokens that were appended last."""
        if self.window is not None:
            self.window = self.window.filled(queries)

    def begin_scores(self, *, unscored: float) -> None:
        """Keeps scores from now on; tokens that have none get ``unscored``, and so do those that are read later."""
        self.scored, self.unscored = True, unscored
        if self._scores is not None:
            self._scores = writable(self._scores).nan_to_num_(nan=unscored)
        elif self._keys is not None:
            self._scores = self._keys.new_full((*self._keys.shape[:3], 1), unscored, dtype=torch.float32)

    def put_scores(self, scores: torch.Tensor, first: int, where: torch.Tensor | None = None) -> None:
        """Sets the scores of tokens.

        Args:
            scores: fp32 ``[batch, num_heads, n]``.
            first: The column of the first of these tokens.
            where: Bool, broadcastable to the shape of ``scores``, False where the present score stays; None sets all.
        """
        assert self._scores is not None
        self._scores, self.has_scores = writable(self._scores), True
        place = self._scores[:, :, : self.length, 0][:, :, first : first + scores.shape[2]]
        place.copy_(scores if where is None else torch.where(where, scores, place))

    def reserve(self, n_tokens: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes room for ``n_tokens`` more tokens at once, so that nothing moves while they are written.

        Args:
            n_tokens: Number of tokens to make room for.
            keys: Any tensor ``[batch, num_heads, 1, head_dim]`` of the right dtype and device.
            values: The same for the values.

        Returns:
            The whole buffers of keys and values, ``[batch, num_heads, room, head_dim]``.
        """
        self._make_room(keys.expand(-1, -1, n_tokens, -1), values.expand(-1, -1, n_tokens, -1))
        assert self._keys is not None and self._values is not None
        self.truncate(self.length)  # what is written behind them has no scores
        if self.window is not None:
            self.window = self.window.reserved(n_tokens)
        return self._keys, self._values

    def _replace(self, columns: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces each buffer by a new one with other columns: the old one still holds what was there.

        So a tail is restored, when a forward fails, by what it referred to.
        """
        self._keys, self._values, self._scores = (
            None if buffer is None else _in_new_buffer(columns(buffer), buffer.shape[2])
            for buffer in (self._keys, self._values, self._scores)
        )

    def _make_room(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys = self._room_for(self._keys, keys)
        self._values = self._room_for(self._values, values)
        if self.scored:
            score = keys.new_empty(1, dtype=torch.float32)
            self._scores = self._room_for(self._scores, score.expand(*keys.shape[:3], 1))

    def _room_for(self, buffer: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        batch, heads, t, dim = new.shape
        if buffer is not None:
            expected = (buffer.shape[0], buffer.shape[1], buffer.shape[3], buffer.dtype, buffer.device)
            if expected != (batch, heads, dim, new.dtype, new.device):
                raise InvalidArgumentError(
                    "expected (batch, heads, head_dim, dtype, device) = "
                    f"{expected}, got {(batch, heads, dim, new.dtype, new.device)}"
                )
            if self.length + t <= buffer.shape[2] and is_writable(buffer):
                return buffer
        capacity = -(-(self.length + t + self.length // 2) // self.block) * self.block
        if self.most is not None:
            capacity = max(min(capacity, self.most), self.length + t)
        return _in_new_buffer(new[:, :, :0] if buffer is None else buffer[:, :, : self.length], capacity)

    def wrote(self, n_tokens: int) -> None:
        """Counts tokens that other code has written after those that are there: see :meth:`reserve`."""
        self.length += n_tokens
        if self.window is not None:
            self.window = self.window.wrote(n_tokens)

    def give_back_room(self, n_tokens: int) -> None:
        """Frees the buffers of an empty tail if they are larger than ``n_tokens`` need; queries get room for these."""
        if not self.length and self._keys is not None and self._keys.shape[2] > n_tokens:
            self._keys = self._values = self._scores = None
        if self.window is not None and not self.length:
            self.window = self.window.with_room_for(n_tokens)

    def emptied(self) -> Tail:
        """Returns an empty tail over the same buffers, at their addresses; its tokens have no scores."""
        tail = Tail(scored=self.scored)
        window = None if self.window is None else self.window.after_eviction()
        vars(tail).update(vars(self), length=0, padding=None, window=window, has_scores=False)
        if self.has_scores:
            tail.truncate(0)
        return tail

    def truncate(self, length: int) -> None:
        """Forgets every column from ``length`` on; the buffer stays."""
        if self.window is not None:
            self.window = self.window.truncated(max(self.length - length, 0))
        self.length = min(self.length, length)
        if self._scores is not None:
            self._scores = writable(self._scores)
            self._scores[:, :, self.length :] = self.unscored  # a captured step writes pairs there, but no scores
        if self.padding is not None:
            self.padding = self.padding.clamp(max=self.length) if self.length else None

    def drop_ends(self, counts: torch.Tensor) -> None:
        """Forgets the last ``counts`` ``[batch]`` tokens of each row, and columns that are padding in every row.

        Raises:
            InvalidArgumentError: A row has fewer tokens than are to be dropped.
        """
        counts = counts.to(self.tensors[0].device if self.tensors else counts.device)
        padding = torch.zeros_like(counts) if self.padding is None else self.padding
        n_left = self.length - padding - counts
        if bool((n_left < 0).any()):
            have = (self.length - padding).tolist()
            raise InvalidArgumentError(f"expected to drop at most {have} tokens of the rows, got {counts.tolist()}")
        n_columns = int(n_left.max())
        if n_columns:
            n_before = self.length
            self._replace(lambda buffer: ends_dropped(buffer[:, :, :n_before], counts, n_columns))
        if self.window is not None:
            self.window = self.window.ends_dropped(counts)
        self.length = n_columns
        self.padding = n_columns - n_left if bool((n_left < n_columns).any()) else None

    def select_rows(self, index: torch.Tensor) -> None:
        """Reorders, drops or repeats batch rows; ``index`` is int64 ``[new_batch]``."""
        self._keys, self._values, self._scores = (
            None if buffer is None else buffer.index_select(0, index.to(buffer.device))
            for buffer in (self._keys, self._values, self._scores)
        )
        if self.window is not None:
            self.window = self.window.rows(index)
        if self.padding is not None:
            padding = self.padding[index.to(self.padding.device)]
            self.padding = padding if bool(padding.any()) else None

    def copy(self, device: torch.device | None = None) -> Tail:
        """Returns an independent tail with the same tokens, without spare room, on ``device`` or where this one is."""
        if self.settle is not None:
            self.settle()
        tail = Tail(scored=self.scored)
        tail.unscored, tail.block = self.unscored, self.block
        if self.keys is not None and self.values is not None and self.length:
            tail.append(self.keys.to(device), self.values.to(device))
            if tail.scores is not None and self.scores is not None:
                tail.scores.copy_(self.scores)
                tail.has_scores = True
        tail.padding = self.padding if self.padding is None else self.padding.to(device)
        tail.window = None if self.window is None else self.window.copy(device)
        return tail
