"""Chooses an op's implementation from a table, best first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Generic, TypeVar

_Run = TypeVar("_Run", bound=Callable[..., object])


def _nothing(*_: object) -> None:
    """Returns None: no input is refused."""


@dataclass(frozen=True)
class Impl(Generic[_Run]):
    """One implementation of an op.

    Attributes:
        run: the implementation, called by the op after its checks.
        reason_against: given the arguments of :func:`select`, returns why it cannot do this input, or None if it can.
    """

    run: _Run
    reason_against: Callable[..., str | None] = _nothing


def deferred(module: str, function: str) -> Callable[..., Any]:
    """Returns a function that is imported on its first call, so that ``import kvzip_press`` does not import Triton."""

    @cache
    def load() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(import_module(module), function)
        return loaded

    def run(*args: Any, **kwargs: Any) -> Any:
        return load()(*args, **kwargs)

    return run


def select(op: str, impls: Mapping[str, Impl[_Run]], impl: str | None, *arguments: object) -> _Run:
    """Returns the implementation of ``op`` to run.

    Args:
        op: name of the op, for the error.
        impls: the implementations by name, best first; at least one can do every input.
        impl: name of the one wanted, with no fallback to another; None takes the first that can do this input.
        *arguments: passed to each ``reason_against``.

    Raises:
        ValueError: there is no implementation of that name, or it cannot do this input.
    """
    if impl is None:
        return next(candidate.run for candidate in impls.values() if candidate.reason_against(*arguments) is None)
    if impl not in impls:
        raise ValueError(f"{op}: expected impl to be None or one of {sorted(impls)}, got {impl!r}")
    reason = impls[impl].reason_against(*arguments)
    if reason is not None:
        raise ValueError(f"{op}: expected an input that impl {impl!r} can do, got one that it cannot: {reason}")
    return impls[impl].run
