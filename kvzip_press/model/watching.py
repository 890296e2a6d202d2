"""What belongs to one thread of control: what a thread watches, opens or captures, no other meets.

A model is one object that several threads may run at a time. A hook is on the module, so it is called for the forwards
of all threads; the hooks made here ignore those of other threads. (While a hook is removed in one thread, torch may
call it in another with fewer arguments: such a call is foreign, and ignored before they are looked at.)
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar
from weakref import ref

from torch import nn

T = TypeVar("T")


def in_this_thread() -> Callable[[], bool]:
    """Returns a function that tells whether it is called in the thread that is running now."""
    owner = threading.get_ident()
    return lambda: threading.get_ident() == owner


@contextmanager
def before_forward(
    module: nn.Module,
    look: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    *,
    is_mine: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """While open, calls ``look(module, args, kwargs)`` before each forward of ``module``.

    Args:
        module: The module.
        look: Called with the forward's arguments; an exception that it raises ends the forward.
        is_mine: Tells whether the running forward is to be looked at; by default whether it is in the thread that
            opened this.
    """
    handle = module.register_forward_pre_hook(_of_mine(look, is_mine), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_forward(
    module: nn.Module,
    look: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None],
    *,
    is_mine: Callable[[], bool] | None = None,
    always: bool = False,
    first: bool = False,
) -> Iterator[None]:
    """While open, calls ``look(module, args, kwargs, output)`` after each forward of ``module``.

    Args:
        module: The module.
        look: Called with the forward's arguments and its output.
        is_mine: See :func:`before_forward`.
        always: Whether to call it also for a forward that raised, with None as the output.
        first: Whether to call it before those that were registered earlier.
    """
    hook = _of_mine(look, is_mine)
    handle = module.register_forward_hook(hook, prepend=first, with_kwargs=True, always_call=always)
    try:
        yield
    finally:
        handle.remove()


def _of_mine(look: Callable[..., None], is_mine: Callable[[], bool] | None) -> Callable[..., None]:
    is_mine = in_this_thread() if is_mine is None else is_mine

    def hook(module: nn.Module, *arguments: Any) -> None:
        if is_mine():
            look(module, *arguments)

    return hook


class Watcher(ABC):
    """A context manager that watches forwards while it is open; what it opens for that is said in :meth:`_watch`."""

    _watching: ExitStack

    @abstractmethod
    def _watch(self, stack: ExitStack) -> None:
        """Begins to watch: what is entered into the stack ends with this, also if something after it fails to begin."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._watch(stack)
            self._watching = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._watching.close()


@dataclass
class _Opened(Generic[T]):
    model: ref[nn.Module]
    value: T
    is_open: bool = True


class OpenFor(Generic[T]):
    """What is open for models in this thread of control (`contextvars`): other threads and tasks do not see it.

    A thread that is started inside sees it only if it runs in a copy of the context
    (``contextvars.copy_context().run``, ``asyncio.to_thread``).

    Args:
        name: Names it, for debuggers.
    """

    def __init__(self, name: str) -> None:
        self._opened: ContextVar[tuple[_Opened[T], ...]] = ContextVar(name, default=())

    @contextmanager
    def opened(self, model: nn.Module, value: T) -> Iterator[None]:
        """While open, :meth:`of` returns ``value`` for ``model``; of several values for one model, the newest."""
        entry = _Opened(ref(model), value)
        self._opened.set((*self._open(), entry))
        try:
            yield
        finally:
            entry.is_open = False  # also where this ends in another context than it began in (a generator, say)
            self._opened.set(self._open())

    def of(self, model: nn.Module) -> T | None:
        """Returns what is open for a model; None if nothing is."""
        return next((entry.value for entry in reversed(self._open()) if entry.model() is model), None)

    def __contains__(self, value: T) -> bool:
        return any(entry.value is value for entry in self._open())

    def _open(self) -> tuple[_Opened[T], ...]:
        return tuple(entry for entry in self._opened.get() if entry.is_open)


# A graph is captured alone: a capture that meets another thread's allocations or launches fails, and takes its
# work with it (seen on an H200: illegal memory accesses). So calls that compute say so, a capture is made only when no
# other thread is inside one, and a call that comes while one is made waits for it: some decode steps long.
_CHANGED = threading.Condition()
_DEPTHS: dict[int, int] = {}  # how many calls deep each thread is
_ALONE: set[int] = set()  # the thread that captures


@contextmanager
def computing() -> Iterator[None]:
    """Says that this thread computes while this is open; waits first while another thread captures."""
    me = threading.get_ident()
    with _CHANGED:
        _CHANGED.wait_for(lambda: not _ALONE - {me})
        _DEPTHS[me] = _DEPTHS.get(me, 0) + 1
    try:
        yield
    finally:
        with _CHANGED:
            _DEPTHS[me] -= 1
            if not _DEPTHS[me]:
                del _DEPTHS[me]


@contextmanager
def alone() -> Iterator[bool]:
    """Keeps other threads from computing while this is open; yields False, and does nothing, if one already is."""
    me = threading.get_ident()
    with _CHANGED:
        is_alone = not (set(_DEPTHS) - {me} or _ALONE)
        if is_alone:
            _ALONE.add(me)
    try:
        yield is_alone
    finally:
        if is_alone:
            with _CHANGED:
                _ALONE.discard(me)
                _CHANGED.notify_all()
