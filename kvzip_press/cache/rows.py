"""The batch rows of a compressed layer: which packed row each reads, what is known of it, and its kept turns."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvzip_press.cache.cold.span import ColdPart
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.tail import Tail
from kvzip_press.errors import InvalidArgumentError


@dataclass(frozen=True)
class Turns:
    """The tokens seen before each kept turn (a question and its answer); a value, which follows the rows of its layer.

    Attributes:
        starts: For each turn one number for all rows, or one for each batch row.
    """

    starts: tuple[int | tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, starts: Iterable[int | Iterable[int]]) -> Turns:
        """Returns the turns of a list, as :attr:`kvzip_press.RaggedCache.turn_starts` is one."""
        return cls(tuple(start if isinstance(start, int) else tuple(start) for start in starts))

    def as_list(self) -> list[int | list[int]]:
        """Returns the starts as a new list: of each turn one number, or a list with one for each batch row."""
        return [start if isinstance(start, int) else list(start) for start in self.starts]

    def of_rows(self, index: torch.Tensor) -> Turns:
        """Returns the turns of the batch rows ``index``, int64 ``[new_batch]``, in that order."""
        if all(isinstance(start, int) for start in self.starts):
            return self  # nothing is read from the device
        rows = index.tolist()
        return Turns(tuple(s if isinstance(s, int) else _one_if_equal([s[row] for row in rows]) for s in self.starts))

    def within(self, n_seen: torch.Tensor) -> Turns:
        """Returns the turns that have a token in some row, if only ``n_seen`` ``[batch]`` tokens of each are left."""
        if not self.starts:
            return self
        left = n_seen.tolist()
        rows = [[start] * len(left) if isinstance(start, int) else start for start in self.starts]
        kept = [any(row < n for row, n in zip(begin, left, strict=True)) for begin in rows]
        return Turns(tuple(start for start, stays in zip(self.starts, kept, strict=True) if stays))


def _one_if_equal(numbers: list[int]) -> int | tuple[int, ...]:
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


NO_TURNS = Turns()


class TurnLock:
    """Held while a turn is read and kept, so that no other thread keeps one in between, which would be lost.

    A deep copy of a cache has a lock of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> TurnLock:
        return TurnLock()


def batch_rows(given: Any, batch_size: int) -> torch.Tensor:
    """Returns the numbers of batch rows, int64 ``[n]``, n >= 1.

    Args:
        given: Numbers ``[n]``, negative ones from the end, or a bool mask ``[batch]``, as for a dense layer.
        batch_size: Number of batch rows. Numbers on a GPU are not compared with it: that would wait for the GPU.

    Raises:
        InvalidArgumentError: They are something else, out of range, or none.
    """
    index = torch.as_tensor(given)
    if index.dtype == torch.bool and tuple(index.shape) == (batch_size,):
        index = index.nonzero()[:, 0]
    is_whole = index.dim() == 1 and index.numel() and index.dtype in (torch.int64, torch.int32)
    if not is_whole or (not index.is_cuda and not -batch_size <= int(index.min()) <= int(index.max()) < batch_size):
        raise InvalidArgumentError(
            f"expected numbers of rows of a cache with {batch_size}, at least one, or a bool mask of its rows, got "
            f"{given!r:.80}"
        )
    return index.long() % batch_size


class LayerRows:
    """The part of a ragged layer that is about its batch rows. Whatever is known of a row follows it."""

    packed: PackedPairs
    tail: Tail
    n_context: int
    n_protected: tuple[int, ...]
    n_padding: tuple[int, ...]
    context_ends: tuple[int, ...]
    row_index: torch.Tensor | None
    turns: Turns
    cold: tuple[ColdPart, ...]
    n_rearranged: int

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders rows for beam search: batch row i continues as row ``beam_idx[i]``.

        The packed context is shared, not copied.

        Raises:
            InvalidArgumentError: ``beam_idx`` does not name batch rows.
        """
        index = self._index(beam_idx)
        self._take_rows(index, packed=self.packed, row_index=self._rows()[index])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times, at least once; the packed context stays as it is."""
        self.check_repeats(repeats)
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only the given batch rows, by index or as a bool mask, and frees the context of the others.

        Raises:
            InvalidArgumentError: ``indices`` does not name batch rows.
        """
        index = self._index(indices)
        rows = self._rows()[index].tolist()
        self._take_rows(index, packed=self.packed.select_rows(rows), row_index=None)
        self.n_protected = tuple(self.n_protected[row] for row in rows)
        self.n_padding = tuple(self.n_padding[row] for row in rows)
        self.context_ends = tuple(self.context_ends[row] for row in rows)
        self.cold = tuple(part.of_rows(rows) for part in self.cold)

    @staticmethod
    def check_repeats(repeats: int) -> None:
        """Raises InvalidArgumentError unless rows are repeated a whole number of times, at least once."""
        if not isinstance(repeats, int) or repeats < 1:
            raise InvalidArgumentError(f"expected to repeat rows 1 or more times, got {repeats!r}")

    def _take_rows(self, index: torch.Tensor, *, packed: PackedPairs, row_index: torch.Tensor | None) -> None:
        """Goes on with the batch rows ``index`` in whatever is held by batch row."""
        self.turns = self.turns.of_rows(index)
        self.tail.select_rows(index)
        self.packed, self.row_index = packed, row_index
        self.n_rearranged += 1

    def _index(self, given: torch.Tensor) -> torch.Tensor:
        return batch_rows(given, self.batch_size).to(self.packed.device)

    @property
    def batch_size(self) -> int:
        """Number of batch rows."""
        return self.packed.num_rows if self.row_index is None else self.row_index.numel()

    max_batch_size = batch_size

    @property
    def next_positions(self) -> torch.Tensor:
        """The position of each batch row's next token, int64 ``[batch]``."""
        return self._by_batch_row(self.context_ends) + self.tail.length - self._tail_padding

    @property
    def known_ends(self) -> list[int]:
        """What :attr:`next_positions` holds for packed rows, as the host knows it while no tail has padding."""
        return [end + self.tail.length for end in self.context_ends]

    @property
    def left_padding(self) -> torch.Tensor:
        """Number of the columns seen that are padding on the left of each batch row, int64 ``[batch]``.

        Raises:
            InvalidArgumentError: The context has padding elsewhere than on the left.
        """
        if min(self.n_padding, default=0) < 0:
            raise InvalidArgumentError(
                "expected a context padded on the left, got padding on the right or between turns, which the model's "
                "sliding layers hold without a note of it"
            )
        return self._by_batch_row(self.n_padding) + self._tail_padding

    @property
    def n_tail_tokens(self) -> torch.Tensor:
        """Number of tokens of each batch row since the context, int64 ``[batch]``."""
        return torch.full((self.batch_size,), self.tail.length, device=self.packed.device) - self._tail_padding

    @property
    def _tail_padding(self) -> torch.Tensor | int:
        return 0 if self.tail.padding is None else self.tail.padding

    def _by_batch_row(self, numbers: tuple[int, ...]) -> torch.Tensor:
        """Returns numbers of packed rows by batch row: int64 ``[batch]``, on the layer's device."""
        of_rows = torch.tensor(numbers, dtype=torch.int64).to(self.packed.device, non_blocking=True)
        return of_rows if self.row_index is None else of_rows[self.row_index]

    def _forget_turns(self) -> None:
        if self.turns.starts:
            self.turns = self.turns.within(self.n_context + self.n_tail_tokens)

    def _rows(self) -> torch.Tensor:
        if self.row_index is not None:
            return self.row_index
        return torch.arange(self.packed.num_rows, device=self.packed.device)
