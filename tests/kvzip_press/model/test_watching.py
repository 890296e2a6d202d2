"""Hooks and settings of one thread of control."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
from torch import nn

from kvzip_press.model.watching import OpenFor, after_forward, before_forward


def in_a_thread(function: Any) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_hooks_see_the_forwards_of_their_thread_only() -> None:
    module, seen = nn.Identity(), []
    with (
        before_forward(module, lambda _, args, kwargs: seen.append(("before", args, kwargs))),
        after_forward(module, lambda _, args, kwargs, output: seen.append(("after", output))),
    ):
        in_a_thread(lambda: module(1))
        assert seen == []
        module(2)
        assert seen == [("before", (2,), {}), ("after", 2)]
    module(3)
    assert len(seen) == 2
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_forward_that_raises_is_shown_if_that_is_asked_for() -> None:
    module, seen = nn.Linear(2, 2), []
    with (
        after_forward(module, lambda *arguments: seen.append(arguments[-1]), always=True),
        after_forward(module, lambda *arguments: seen.append("not reached")),
        pytest.raises(TypeError),
    ):
        module("no tensor")
    assert seen == [None]


def test_what_is_open_is_seen_by_its_thread_and_by_copies_of_its_context() -> None:
    models, found = [nn.Identity(), nn.Identity()], []
    things: OpenFor[str] = OpenFor("things")
    with things.opened(models[0], "first"), things.opened(models[0], "newest"):
        assert [things.of(model) for model in models] == ["newest", None]
        here = contextvars.copy_context()
        in_a_thread(lambda: found.append(things.of(models[0])))
        in_a_thread(lambda: found.append(here.run(things.of, models[0])))
    assert found == [None, "newest"]
    assert things.of(models[0]) is None
    assert here.run(things.of, models[0]) is None  # it has ended everywhere


def test_it_ends_although_another_context_ends_it() -> None:
    model, things = nn.Identity(), OpenFor[str]("things")
    manager = things.opened(model, "one")
    manager.__enter__()
    contextvars.copy_context().run(manager.__exit__, None, None, None)
    assert things.of(model) is None
