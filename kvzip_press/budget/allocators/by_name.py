"""The allocations that have a short name, and objects from whatever a caller hands in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvzip_press.budget.allocators.base import SAFEGUARD, Allocation
from kvzip_press.budget.allocators.competing import AdaKV, Global, PerHead, PerLayer
from kvzip_press.budget.allocators.decided import Decided
from kvzip_press.budget.allocators.outcome import AboveUniform, Threshold, Tolerance
from kvzip_press.budget.allocators.pages import Pages
from kvzip_press.budget.allocators.pyramid import Pyramid
from kvzip_press.budget.allocators.table import Table
from kvzip_press.errors import InvalidArgumentError, did_you_mean

#: The allocations that have a short name.
ALLOCATIONS: dict[str, type[Allocation]] = {
    cls.name: cls
    for cls in (Global, PerLayer, PerHead, AdaKV, Pyramid, Table, Pages, Tolerance, Threshold, AboveUniform)
}

#: What a caller may hand in: a name, an object, or (in files) a mapping with the name and the object's arguments.
AllocationLike = str | Allocation | Mapping[str, Any]


def mapping_of(allocation: Allocation) -> dict[str, Any]:
    """Returns the name and arguments of an allocation, as JSON has them; :func:`allocation_of` makes it again.

    Raises:
        InvalidArgumentError: It has no short name: a class of a user's own.
    """
    if ALLOCATIONS.get(allocation.name) is not type(allocation):
        raise InvalidArgumentError(f"expected an allocation out of {', '.join(ALLOCATIONS)}, got {allocation!r:.80}")
    return {"name": allocation.name, **{one.name: getattr(allocation, one.name) for one in fields(allocation)}}


def allocation_of(given: AllocationLike, *, min_kept_per_head: int = 0, safeguard: float = SAFEGUARD) -> Allocation:
    """Returns the allocation with this short name and these floors, or ``given`` itself, which has floors of its own.

    Raises:
        InvalidArgumentError: The name or an argument is unknown, a value is out of range, or floors are given beside an
            allocation object.
    """
    floors: dict[str, Any] = {"min_kept_per_head": min_kept_per_head, "safeguard": safeguard}
    if isinstance(given, Decided):
        raise InvalidArgumentError("expected an allocation that spends a budget, got Decided, which a press hands over")
    if isinstance(given, Allocation):
        if floors != {"min_kept_per_head": 0, "safeguard": SAFEGUARD}:
            raise InvalidArgumentError(f"expected floors as arguments of {given!r}, got {floors} beside it")
        return given
    arguments = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in ALLOCATIONS:
        raise InvalidArgumentError(
            f"expected allocation to be one of {tuple(ALLOCATIONS)}, or an Allocation object, got {given!r:.80}"
        )
    known = sorted(one.name for one in fields(ALLOCATIONS[name]))
    for argument in arguments:
        if argument not in known:
            raise InvalidArgumentError(
                f"expected arguments of allocation {name!r} among {', '.join(known)}, got {argument!r:.80}"
                f"{did_you_mean(argument, known)}"
            )
    return ALLOCATIONS[name](**{**floors, **arguments})
