"""Compressed contexts side by side in memory of a fixed size, read by any number of requests."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.serving.arena import empty_rows, kind_of, write_rows
from kvzip_press.serving.context import PackedContext, PoolShape
from kvzip_press.serving.free_list import FreeList


@dataclass
class _Resident:
    """A context in the pool: its row in the tables, its run in the arenas, and who keeps it there."""

    row: int
    begin: int
    n_pairs: int
    n_tokens: int
    n_turns: int
    n_readers: int = 0
    is_pinned: bool = False
    is_current: bool = field(default=True)  # False once another context has its name


@dataclass(frozen=True)
class Held:
    """A context that a request reads, from :meth:`ContextPool.hold` until :meth:`ContextPool.release`.

    Attributes:
        row: Its row in :attr:`ContextPool.begins` and :attr:`ContextPool.lengths`; 0 is the empty context.
        n_tokens: Number of tokens that were read to make it.
        n_turns: Number of kept turns in it.
    """

    row: int
    n_tokens: int
    n_turns: int


NO_CONTEXT = Held(0, 0, 0)


class ContextPool:
    """Two arenas, keys and values of all layers, in which each context is one run of pairs.

    A context that nobody reads stays until its room is needed, and goes before those that were read later; one that is
    read, or pinned, stays. Several threads may use a pool.

    Args:
        shape: The shape of the model's cache.
        n_bytes: Bytes of both arenas, which are allocated at once.
        device: Their device.
        max_contexts: Most contexts at a time.

    Attributes:
        keys: ``[pairs, head_dim]``, in the shape's storage.
        values: ``[pairs, head_dim]``.
        n_tokens: int32 ``[max_contexts + 1]``, how many tokens were read to make each context; 0 for the empty one.
        begins: int32 ``[num_layers, max_contexts + 1, num_key_value_heads]``, the first pair of each head of each
            context; row 0 is the empty context. As :func:`kvzip_press.kernels.context_attention.plan_contexts` takes
            it.
        lengths: int32, likewise, the number of pairs.

    Raises:
        InvalidArgumentError: ``n_bytes`` is less than a pair, or more pairs than int32 counts.
    """

    def __init__(
        self, shape: PoolShape, n_bytes: int, *, device: torch.device | str = "cpu", max_contexts: int = 1024
    ) -> None:
        n_pairs = n_bytes // shape.pair_bytes
        if not 0 < n_pairs < 2**31 or max_contexts < 1:
            raise InvalidArgumentError(
                f"expected a pool of {shape.pair_bytes} to {shape.pair_bytes * (2**31 - 1)} bytes for at least one "
                f"context, got {n_bytes} bytes for {max_contexts}"
            )
        self.shape, self.n_pairs = shape, n_pairs
        self.keys, self.values = (
            empty_rows(n_pairs, shape.head_dim, shape.dtype, shape.storage, device) for _ in range(2)
        )
        self.n_tokens = torch.zeros(max_contexts + 1, dtype=torch.int32, device=device)
        size = (shape.num_layers, max_contexts + 1, shape.num_key_value_heads)
        self.begins, self.lengths = (torch.zeros(size, dtype=torch.int32, device=device) for _ in range(2))
        self._free = FreeList(n_pairs)
        self._free_rows = list(range(max_contexts, 0, -1))
        self._residents: dict[str, _Resident] = {}  # the one that was read last comes last
        self._rows: dict[int, _Resident] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        with self._lock:
            held = (self.n_pairs - self._free.n_free) * self.shape.pair_bytes
            total = self.n_pairs * self.shape.pair_bytes
            return f"ContextPool({len(self._rows)} contexts, {held / 1e6:.1f} of {total / 1e6:.1f} MB)"

    @property
    def names(self) -> list[str]:
        """The names of the contexts that are here, the one that was read last at the end."""
        with self._lock:
            return list(self._residents)

    @property
    def n_bytes_free(self) -> int:
        """Bytes of the arenas that no context takes."""
        with self._lock:
            return self._free.n_free * self.shape.pair_bytes

    def put(self, name: str, context: PackedContext) -> bool:
        """Puts a context into the pool, in place of an older one of the same name; drops others that nobody reads.

        Returns:
            False, without a change, if there is room only once contexts that are read now are released.

        Raises:
            InvalidArgumentError: It does not have the shape of the pool, or does not fit beside what is pinned.
        """
        self._check(name, context)
        n_pairs = context.room
        with self._lock:
            if not self.has_room(name, n_pairs):
                return False
            row, begin = self._make_room(n_pairs)
            write_rows(self.keys, begin, context.keys)
            write_rows(self.values, begin, context.values)
            self.n_tokens[row] = context.n_tokens
            lengths = context.lengths.to(torch.int32)
            ends = lengths.flatten().cumsum(0).view_as(lengths)
            self.lengths[:, row].copy_(lengths)
            self.begins[:, row].copy_(begin + ends - lengths)
            before = self._residents.pop(name, None)
            resident = _Resident(row, begin, n_pairs, context.n_tokens, context.n_turns)
            self._residents[name] = self._rows[row] = resident
            if before is not None:
                resident.is_pinned, before.is_current = before.is_pinned, False
                self._free_if_unread(before)
            return True

    def has_room(self, name: str, n_pairs: int) -> bool:
        """Returns whether :meth:`put` would find room for a context of so many pairs now.

        Raises:
            InvalidArgumentError: It does not fit beside what is pinned.
        """
        with self._lock:
            if self._would_fit(n_pairs, [one for one in self._residents.values() if _is_idle(one)]):
                return True
            moving = [one for one in self._rows.values() if not one.is_pinned or not one.is_current]
            if self._would_fit(n_pairs, moving):
                return False
            pinned = sum(one.n_pairs for one in self._rows.values()) - sum(one.n_pairs for one in moving)
            raise InvalidArgumentError(
                f"expected a context that fits into a pool of {self.n_pairs * self.shape.pair_bytes} bytes beside "
                f"{pinned * self.shape.pair_bytes} pinned ones, got {name!r:.80} of {n_pairs * self.shape.pair_bytes}: "
                "compress it further, or make the pool larger"
            )

    def hold(self, name: str) -> Held | None:
        """Keeps a context here for a reader until it is released; None if it is not here."""
        with self._lock:
            resident = self._residents.pop(name, None)
            if resident is None:
                return None
            self._residents[name] = resident
            resident.n_readers += 1
            return Held(resident.row, resident.n_tokens, resident.n_turns)

    def release(self, held: Held) -> None:
        """Ends what one :meth:`hold` began."""
        if held.row == 0:
            return
        with self._lock:
            resident = self._rows[held.row]
            assert resident.n_readers > 0, "a context is released once for each time that it was held"
            resident.n_readers -= 1
            self._free_if_unread(resident)

    def pin(self, name: str, *, pinned: bool = True) -> None:
        """Keeps a context here whether or not it is read, or no longer.

        Raises:
            InvalidArgumentError: It is not here.
        """
        with self._lock:
            if name not in self._residents:
                here = ", ".join(self.names) or "none yet"
                raise InvalidArgumentError(
                    f"expected a context that is in the pool ({here}), got {name!r:.80}: ask about it first, which "
                    "brings it there"
                )
            self._residents[name].is_pinned = pinned

    def drop(self, name: str) -> None:
        """Forgets a context, pinned or not; those who read it finish. Does nothing if it is not here."""
        with self._lock:
            resident = self._residents.pop(name, None)
            if resident is not None:
                resident.is_current = False
                self._free_if_unread(resident)

    def _check(self, name: str, context: PackedContext) -> None:
        shape, lengths = self.shape, context.lengths
        kind = kind_of(self.keys)
        expected = (shape.num_layers, shape.num_key_value_heads, shape.head_dim, shape.head_dim, kind)
        given = (*lengths.shape, context.keys.shape[1], context.values.shape[1], kind_of(context.keys))
        if given != expected:
            raise InvalidArgumentError(
                f"context {name!r:.80}: expected (layers, KV heads, head_dim, value_head_dim, dtype or codec) = "
                f"{expected}, got {given}"
            )
        n_pairs = int(lengths.sum())
        given_pairs = context.keys.shape[0], context.values.shape[0]
        if given_pairs != (n_pairs, n_pairs) or int(lengths.min()) < 0 or context.room < n_pairs:
            raise InvalidArgumentError(
                f"context {name!r:.80}: expected {n_pairs} keys and values, as its lengths say, got {given_pairs[0]} "
                f"and {given_pairs[1]} in room for {context.room}"
            )

    def _make_room(self, n_pairs: int) -> tuple[int, int]:
        """Returns a row and the beginning of a run, after dropping what nobody reads, if need be."""
        idle = [name for name, one in self._residents.items() if _is_idle(one)]
        begin = self._free.take(n_pairs) if self._free_rows else None
        while begin is None:
            self.drop(idle.pop(0))
            begin = self._free.take(n_pairs)
        return self._free_rows.pop(), begin

    def _would_fit(self, n_pairs: int, without: list[_Resident]) -> bool:
        free = self._free.copy()
        for resident in without:
            free.give(resident.begin, resident.n_pairs)
        return free.longest >= n_pairs and bool(self._free_rows or without)

    def _free_if_unread(self, resident: _Resident) -> None:
        """Gives the room of a context back that has lost its name, once nobody reads it."""
        if resident.is_current or resident.n_readers:
            return
        self._free.give(resident.begin, resident.n_pairs)
        self._free_rows.append(resident.row)
        self.lengths[:, resident.row] = 0
        del self._rows[resident.row]


def _is_idle(resident: _Resident) -> bool:
    """Whether a context may be dropped when room is needed."""
    return not resident.n_readers and not resident.is_pinned
