"""One pool in two processes: the scheduler decides what is in it, the worker holds it, and does the same in order.

A pool does the same with the same contexts in the same order. So the scheduler keeps a pool without memory, notes what
it did with it, and hands that to the worker with the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kvzip_press.cache.file.reading import pair_counts, read_record
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.serving.arena import empty_rows
from kvzip_press.serving.context import PackedContext, PoolShape
from kvzip_press.serving.folder import ContextFile, ContextFolder
from kvzip_press.serving.packing import Packing, packed_pairs
from kvzip_press.serving.pool import NO_CONTEXT, ContextPool, Held
from kvzip_press.serving.rotation import Rotation
from kvzip_press.serving.shares import Share
from kvzip_press.serving.vllm.facts import ServedModel


@dataclass
class Orders:
    """What happened to the scheduler's pool since the last step, in order, and which requests have begun.

    Attributes:
        pool: ``("put", name, path, room)``, ``("hold", name, "", 0)`` and ``("release", "", "", row)``; room is counted
            in pairs.
        starts: The first block of a request's pages, and the row of the context that it reads.
        failed: Requests whose context cannot be read, each with the first block of its pages.
    """

    pool: list[tuple[str, str, str, int]] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)


class SchedulerPool:
    """Admits requests to contexts; holds lengths and places, but no pairs.

    Args:
        served: The model and its contexts.
    """

    def __init__(self, served: ServedModel) -> None:
        self._share = Share(0, served.n_ranks)
        self._shape = _shape_of(served, self._share)
        self._folder = ContextFolder(served.folder, served.check)
        self._pool = ContextPool(self._shape, served.pool_bytes, device="meta")
        self._loaded: dict[str, ContextFile] = {}
        self._outlines: dict[str, tuple[ContextFile, PackedContext]] = {}
        self._held: dict[str, Held] = {}  # by request
        self._orders = Orders()

    def admit(self, request_id: str, name: str | None) -> bool:
        """Returns whether a request may begin: its context is in the pool, and stays until it has finished.

        If there is no room for the context now, it may be asked again later.

        Raises:
            KVzipPressError: The context is unknown or cannot be read, which was checked when the request came: it has
                changed since, or the request came past that check. It must not begin.
        """
        if request_id in self._held:
            return True
        held = NO_CONTEXT if name is None else self._hold(name)
        if held is not None:
            self._held[request_id] = held
        return held is not None

    def start(self, request_id: str, first_block: int) -> None:
        """Notes where the pages of an admitted request begin: each time that it gets some, also after a preemption."""
        self._orders.starts.append((first_block, self._held[request_id].row))

    def fail(self, request_id: str, first_block: int) -> None:
        """Notes that a request was not admitted and never will be, for the worker, who can report that."""
        self._orders.failed[request_id] = first_block

    def finish(self, request_id: str) -> None:
        """Lets the context of a request go."""
        held = self._held.pop(request_id, NO_CONTEXT)
        if held.row:
            self._pool.release(held)
            self._orders.pool.append(("release", "", "", held.row))

    def take_orders(self) -> Orders:
        """Returns what the worker has to do before the next step."""
        orders, self._orders = self._orders, Orders()
        return orders

    def _hold(self, name: str) -> Held | None:
        file = self._folder.find(name)
        held = self._pool.hold(name) if self._loaded.get(name) == file else None
        if held is None:
            outline = self._outline(name, file)
            if not self._pool.put(name, outline):
                return None
            self._loaded[name] = file
            self._orders.pool.append(("put", name, str(file.path), outline.room))
            held = self._pool.hold(name)
        self._orders.pool.append(("hold", name, "", 0))
        return held

    def _outline(self, name: str, file: ContextFile) -> PackedContext:
        """Returns the first worker's part of a context, without its pairs; a file is read when it is new or changed."""
        noted = self._outlines.get(name)
        if noted is None or noted[0] != file:
            noted = self._outlines[name] = file, self._read(file)
        return noted[1]

    def _read(self, file: ContextFile) -> PackedContext:
        record = read_record(file.path)
        lengths = pair_counts(file.path) + (record.n_seen - record.n_context)
        own, shape = lengths[:, self._share.heads(lengths.shape[1])], self._shape
        pairs = empty_rows(int(own.sum()), shape.head_dim, shape.dtype, shape.storage, "meta")
        return PackedContext(pairs, pairs, own, 0, len(record.turn_starts), self._share.room(lengths))


class WorkerPool:
    """Holds the pairs of a worker's heads, and which context each block of pages reads.

    Args:
        served: The model and its contexts.
        device: The device of the pool.
        rank: Which of the processes it is that share the heads.

    Attributes:
        served: The model and its contexts.
        pool: The contexts.
        rotation: How the model turns keys; its frequencies are on the device.
        row_of_block: int32 ``[blocks]``, the row that a request reads whose first block this is. Before :meth:`begin`
            there is one block, which reads nothing.
    """

    def __init__(self, served: ServedModel, *, device: torch.device | str, rank: int = 0) -> None:
        self.served, share = served, Share(rank, served.n_ranks)
        self.pool = ContextPool(_shape_of(served, share), served.pool_bytes, device=device)
        self.rotation = Rotation(served.rotation.frequencies.to(self.pool.begins.device), served.layouts)
        self.row_of_block = torch.zeros(1, dtype=torch.int32, device=device)
        self._packing = Packing(self.rotation, self.pool.begins.device, served.storage)
        self._heads = share.heads(served.num_key_value_heads)
        self._held: dict[int, list[Held]] = {}  # by row

    def begin(self, n_blocks: int) -> None:
        """Notes how many blocks the engine's pages have, none of which reads a context yet."""
        self.row_of_block = torch.zeros(n_blocks, dtype=torch.int32, device=self.row_of_block.device)

    def obey(self, orders: Orders) -> None:
        """Does what the scheduler did, and notes which requests begin.

        Raises:
            CacheFileError: A file has changed since the scheduler looked at it.
            InvalidArgumentError: The pool is not what the scheduler's is.
        """
        for kind, name, path, number in orders.pool:
            if kind == "put":
                context = packed_pairs(Path(path), self._packing, self._heads)
                if not self.pool.put(name, replace(context, n_places=number)):
                    raise InvalidArgumentError(f"expected room for {name!r}, as the scheduler has, got none")
            elif kind == "hold":
                held = self.pool.hold(name)
                assert held is not None, "the scheduler held what it had put"
                self._held.setdefault(held.row, []).append(held)
            else:
                self.pool.release(self._held[number].pop())
        for block, row in orders.starts:
            self.row_of_block[block] = row


def _shape_of(served: ServedModel, share: Share) -> PoolShape:
    shape = served.shape
    return replace(shape, num_key_value_heads=share.num_heads(shape.num_key_value_heads))
