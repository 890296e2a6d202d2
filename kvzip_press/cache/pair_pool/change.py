"""How a pool is changed: at once or some layers at a time, and to its end, whatever interrupts it."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.cache.pair_pool.merging import Merges
from kvzip_press.cache.pair_pool.pool import PairPool


def change(pool: PairPool, merges: Merges) -> None:
    """Makes of a pool, and of its layers, what becomes of them, or makes later uses of the layers raise."""
    made = InParts(pool, merges) if pool.may_be_written(merges.lengths) else AtOnce(pool, merges, merges.of_all())
    try:
        _finish(made)
    except BaseException:  # an interrupt: the old pairs are written over in part, so what has begun is finished
        try:
            _finish(made)
        except BaseException:
            for layer in merges.layers:
                layer.give_up("an eviction failed after it had begun to write")
            raise
        raise


def _finish(made: AtOnce | InParts) -> None:
    """Changes the pairs of a pool and of its layers; done again after an interrupt, it has the same result."""
    made.make()
    made.pool.hand_out(made.merges.layers)


@dataclass(frozen=True)
class AtOnce:
    """The change of a pool to pairs that lie in memory of their own.

    Attributes:
        pool: The pool.
        merges: What becomes of its layers.
        new: The pairs of all layers after it.
    """

    pool: PairPool
    merges: Merges
    new: PackedPairs

    def make(self) -> None:
        """Makes the change, as often as it is called."""
        self.pool.put(self.new, self.merges.lengths)


class InParts:
    """The change of a pool whose heads keep as many pairs as they had: made some layers at a time, in place.

    So no second pool is needed beside the first, which would be most of what an evicting cache takes.

    Args:
        pool: The pool, of which the layers are views.
        merges: What becomes of them.
    """

    def __init__(self, pool: PairPool, merges: Merges) -> None:
        self.pool, self.merges = pool, merges

        def size(part: slice) -> int:
            return sum(len(staying) for staying in merges.staying[part])

        # The largest first: if there is memory for it, there is for the others, which must not fail any more.
        self.left = tuple(sorted(merges.parts(), key=size, reverse=True))
        self.new: tuple[slice, PackedPairs] | None = None  # that of the first of them, once it is there

    def make(self) -> None:
        """Makes what is left of the change. After an interrupt it goes on where it was."""
        while self.left:
            part = self.left[0]
            if self.new is None or self.new[0] != part:
                self.new = part, self.merges.of_layers(part)
            self._write(*self.new)
            self.left = self.left[1:]

    def _write(self, part: slice, new: PackedPairs) -> None:
        for column, tensor in zip(self.pool.of_layers(part.start, part.stop).tensors, new.tensors, strict=True):
            column.copy_(tensor)
