"""Reads runs from YAML files. Anything not understood is an error that names the key's path."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from kvzip_press.arguments.named import check_options
from kvzip_press.budget.amount import check_compression_ratio
from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.cache.codecs.model_dtype import ModelDtype
from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, did_you_mean
from kvzip_press.leaderboard.running.made_files import MadeFile
from kvzip_press.leaderboard.running.plan import ANSWER, PressSpec, Run, TaskSpec
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.leaderboard.yaml_files import read_yaml

T = TypeVar("T")

GRIDS = Path(__file__).parent / "grids"

_NAMES = {int: "an integer", str: "a text", bool: "true or false", list: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        name: The file's name, without the suffix.
        description: A sentence that says what the grid is for.
        run: The run that the file describes.
    """

    name: str
    description: str
    run: Run


def grid_names() -> list[str]:
    """Returns the names of the grids that come with the package, sorted."""
    return sorted(path.stem for path in GRIDS.glob("*.yaml"))


def load_grid(name: str) -> Grid:
    """Loads a grid by its name, or from a file.

    Args:
        name: One of `grid_names`, or the path of a YAML file.

    Raises:
        InvalidArgumentError: No such grid (the message suggests the nearest one), not a YAML file, an unknown key, task
            or press, or a value of the wrong kind or out of range. The message has the file and the key's path.
    """
    path = GRIDS / f"{name}.yaml" if name in grid_names() else Path(name)
    if not os.path.exists(path):  # noqa: PTH110  # Path.exists raises for a name that is too long
        hint = did_you_mean(name, grid_names())
        raise InvalidArgumentError(f"expected a grid out of {', '.join(grid_names())}, or a file, got {name!r}{hint}")
    values = read_yaml(path)
    try:
        return _grid(path.stem, values)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from error


def _grid(name: str, values: Any) -> Grid:
    node = _Node("", values)
    run = Run(
        model_name=node.take("model", str),
        seed=node.take("seed", int, 0),
        dtype=node.take("dtype", str, "auto"),
        query_aware=node.take("query_aware", bool, False),
        truncate=node.take("truncate", bool, False),
        batch_size=node.take("batch_size", int, 1),
        compression_ratios=_ratios(node),
        tasks=tuple(map(_task, node.items("tasks"))),
        presses=tuple(chain.from_iterable(map(_presses, node.items("presses")))),
    )
    description = node.take("description", str, "")
    node.finish()
    return Grid(name, description, run)


def _task(node: "_Node") -> TaskSpec:
    name, options = node.take("task", str), node.options("name")
    task: Any = node.checked("options" if options else "task", lambda: get_task(name, **options))
    measure = node.take("measure", str, ANSWER)
    named = task.name if measure == ANSWER else f"{task.name}, {measure}"  # a task may be there with both
    task = replace(task, name=node.take("name", str, named))
    n_contexts, length_tokens = node.take("contexts", int), node.take("tokens", int, 0)
    spec: TaskSpec = node.checked("measure", lambda: TaskSpec(task, n_contexts, length_tokens, measure))
    node.finish()
    return spec


def _presses(node: "_Node") -> list[PressSpec]:
    """Returns a press, or one for each of its ``storages`` and ``budgets``."""
    storages, budgets, spec = node.take("storages", list, []), node.take("budgets", list, []), _press(node)
    specs = [spec]
    if "storages" in node.values:
        specs = node.checked("storages", lambda: _stored(spec, storages))
    if "budgets" in node.values:
        specs = node.checked("budgets", lambda: [one for given in specs for one in _budgeted(given, budgets)])
    return specs


def _budgeted(spec: PressSpec, budgets: Sequence[Any]) -> list[PressSpec]:
    """Returns a press with each budget of tokens, which is part of its label, at no ratio."""
    if not budgets or not all(isinstance(one, int) and not isinstance(one, bool) for one in budgets):
        raise InvalidArgumentError(f"expected numbers of tokens, at least one, got {budgets!r:.80}")
    found = [
        replace(
            spec,
            label=f"{spec.label}, {one} tokens",
            options={**spec.options, "budget": one},
            compression_ratios=(0.0,),
        )
        for one in budgets
    ]
    for one in found:
        _make(one)
    return found


def _stored(spec: PressSpec, storages: Sequence[str]) -> list[PressSpec]:
    """Returns a press with each storage, whose name is part of its label, but for "model"."""
    if not storages or "storage" in spec.options:
        raise InvalidArgumentError(f"expected at least one, and no storage among the options, got {storages!r}")
    return [
        replace(
            spec,
            label=spec.label if storage_named(storage) is ModelDtype else f"{spec.label}, {storage}",
            options={**spec.options, "storage": storage},
        )
        for storage in storages
    ]


def _press(node: "_Node") -> PressSpec:
    name, options = node.take("press", str), node.options("name", "compression_ratio")
    spec = PressSpec(
        name,
        label=node.take("label", str, name),
        options=options,
        compression_ratios=_ratios(node) if "compression_ratios" in node.values else None,
        files=_files(node, options),
    )

    if "budgets" not in node.values:  # each is made with its budget, without which it may not be one
        node.checked("options" if options else "press", lambda: _make(spec))
    node.finish()
    return spec


def _files(node: "_Node", options: Mapping[str, Any]) -> dict[str, MadeFile]:
    """Returns the files that a press needs, by the name of its option, as they are now."""
    found = {}
    for given in node.mappings("files"):
        name = given.path.rpartition(".")[2]
        if name in (*options, "name", "compression_ratio"):
            raise InvalidArgumentError(
                f"{given.path}: expected an option that is not given elsewhere, got {name!r:.80}"
            )
        file = MadeFile(given.take("path", str), given.take("command", str))
        given.finish()
        found[name] = given.checked("path", file.looked_at)
    return found


def _make(spec: PressSpec) -> None:
    """Makes a press, so that what is wrong with its options is said now; but for files, which a run asks for."""
    try:
        replace(spec, files={}).press()
        check_options(spec.name, spec.files)
    except MissingDependencyError:  # the run reports this, or leaves the press out
        pass
    except TypeError as error:
        raise InvalidArgumentError(str(error)) from error


def _ratios(node: "_Node") -> tuple[float, ...]:
    values = node.take("compression_ratios", list)
    return tuple(
        node.checked(f"compression_ratios[{index}]", lambda value=value: check_compression_ratio(value))
        for index, value in enumerate(values)
    )


class _Node:
    """A mapping in the file: its keys are taken one by one, and `finish` reports any that nobody took.

    Args:
        path: The mapping's place in the file, for errors.
        values: The parsed YAML.
    """

    def __init__(self, path: str, values: Any) -> None:
        self.path = path
        self.values: Mapping[str, Any] = self._of_kind(path, values, dict)
        self.taken: list[str] = []

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Returns the value of a key, which must be of that kind; a missing key gives the default, if there is one."""
        self.taken.append(key)
        if key in self.values:
            return self._of_kind(self._at(key), self.values[key], kind)
        if default is None:
            raise InvalidArgumentError(f"{self._at(key)}: expected {_NAMES[kind]}, got nothing{self._misspelt(key)}")
        return default

    def items(self, key: str) -> "list[_Node]":
        """Returns the mappings in a list, which must have at least one."""
        values: Sequence[Any] = self.take(key, list)
        if not values:
            raise InvalidArgumentError(f"{self._at(key)}: expected at least one, got none")
        return [_Node(f"{self._at(key)}[{index}]", value) for index, value in enumerate(values)]

    def mappings(self, key: str) -> "list[_Node]":
        """Returns the mappings in a mapping, by names; none if there is no such key."""
        values: Mapping[Any, Any] = self.take(key, dict, {})
        for name in values:
            if not isinstance(name, str) or not name.isidentifier():
                raise InvalidArgumentError(f"{self._at(key)}: expected the names of options, got {name!r:.80}")
        return [_Node(f"{self._at(key)}.{name}", value) for name, value in values.items()]

    def options(self, *elsewhere: str) -> Mapping[str, Any]:
        """Returns the mapping of further arguments, none of which may be one that is given ``elsewhere``."""
        found: Mapping[Any, Any] = self.take("options", dict, {})
        for key in found:
            if not isinstance(key, str) or key in elsewhere:
                raise InvalidArgumentError(f"{self._at('options')}: expected the names of options, got {key!r:.80}")
        return found

    def checked(self, key: str, make: Any) -> Any:
        """Returns ``make()``; if that raises, the error gets the key's path."""
        try:
            return make()
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{self._at(key)}: {error}") from error

    def finish(self) -> None:
        """Raises InvalidArgumentError for a key that was not taken."""
        for key in self.values:
            if key not in self.taken:
                raise InvalidArgumentError(
                    f"{self._at(key)}: expected a key out of {', '.join(self.taken)}{did_you_mean(key, self.taken)}"
                )

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _misspelt(self, key: str) -> str:
        near = difflib.get_close_matches(key, [str(other) for other in self.values if other not in self.taken], n=1)
        return f"; is {near[0]!r} meant to be it?" if near else ""

    @staticmethod
    def _of_kind(path: str, value: Any, kind: type[T]) -> T:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InvalidArgumentError(f"{path or 'the file'}: expected {_NAMES[kind]}, got {value!r:.80}")
        return value
