"""Reads YAML that someone else may have written: plain values only, bounded, and strict.

PyYAML's loader in Python is used and not the one in C: that recurses as deep as the text nests, and cannot be bounded.
"""

import math
import os
from typing import Any

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError, install_command
from kvzip_press.untrusted import MAX_DIGITS, read_text

try:
    import yaml
except ImportError as error:
    raise MissingDependencyError(f"YAML files need pyyaml: {install_command('leaderboard')}") from error

YAML_BYTES = 2**17  # of one file
MAX_DEPTH = 50  # of nested lists and mappings, aliases expanded
MAX_EXPANDED = 2**20  # values and characters, aliases expanded
_INT64 = 2**63
_TAG = "tag:yaml.org,2002:"


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Returns the value of a YAML file.

    Raises:
        InvalidArgumentError: The file cannot be read, is no regular file, is longer than `YAML_BYTES`, or `parse_yaml`
            refuses it. The message names the path.
    """
    try:
        return parse_yaml(read_text(path, max_bytes=YAML_BYTES))
    except OSError as error:
        raise InvalidArgumentError(f"{path}: expected a file that can be read, got {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path}: {error}") from error


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text, made of mappings, lists, texts, numbers, booleans and None.

    Raises:
        ValueError: Not YAML; nested more than `MAX_DEPTH` deep, or larger than `MAX_EXPANDED`, once each alias is
            replaced by what it stands for; a key twice in one mapping, or one that is no text or number; a date or
            another type; an integer of more than 64 bits, NaN or an infinity; a text that UTF-8 cannot hold.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(_in_words(error)) from error
    except (ValueError, AttributeError, LookupError, OverflowError) as error:  # PyYAML's own, for escapes and tags
        raise ValueError(f"expected YAML, got {type(error).__name__}: {error}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds, and with plain types only. What it refuses is raised as a bare YAMLError."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._measures: dict[yaml.Node, tuple[int, int]] = {}  # size and height of the finished nodes

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes a node, unless it stands too deep, is too large, holds itself or has a key twice."""
        event = self.peek_event()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(f"values nested at most {MAX_DEPTH} deep", "more", event)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._measures:
                raise _refusal("values that end", f"*{event.anchor} inside itself", event)
            return node
        if isinstance(node, yaml.MappingNode):
            self._check_keys([key for key, _ in node.value])
        size, height = self._measures[node] = self._measure(node)
        if size > MAX_EXPANDED:
            raise _refusal(f"at most {MAX_EXPANDED} values and characters with all aliases expanded", "more", event)
        if height > MAX_DEPTH:
            raise _refusal(f"values nested at most {MAX_DEPTH} deep", "more, with all aliases expanded", event)
        return node

    def _measure(self, node: Any) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value), 1
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes, heights = zip((0, 0), *(self._measures[part] for part in parts), strict=True)
        return 1 + sum(sizes), 1 + max(heights)

    def _check_keys(self, keys: list[Any]) -> None:
        """Compares keys as values, before those of a merged mapping (``<<``) are added: these may be given anew."""
        seen = set()
        for node in keys:
            if not isinstance(node, yaml.ScalarNode):
                raise _refusal("a text or number before the colon", "a list or a mapping", node)
            key = node.tag if node.tag == f"{_TAG}merge" else self.construct_object(node)
            if key in seen:
                raise _refusal("each key once in a mapping", f"{key!r:.80} twice", node)
            seen.add(key)

    def construct_text(self, node: Any) -> str:
        """Makes a text."""
        text = str(self.construct_scalar(node))
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _refusal("text in Unicode", "half of a surrogate pair", node)
        return text

    def construct_integer(self, node: Any) -> int:
        """Makes an integer of at most 64 bits."""
        value: int = self._number(node, self.construct_yaml_int)
        if not -_INT64 <= value < _INT64:
            raise _refusal("integers of at most 64 bits", f"{node.value:.40}", node)
        return value

    def construct_finite(self, node: Any) -> float:
        """Makes a finite number."""
        value: float = self._number(node, self.construct_yaml_float)
        if not math.isfinite(value):
            raise _refusal("finite numbers", f"{node.value:.40}", node)
        return value

    def _number(self, node: Any, make: Any) -> Any:
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise _refusal(f"numbers of at most {MAX_DIGITS} characters", f"one of {len(text)}", node)
        try:
            return make(node)
        except (ValueError, LookupError, OverflowError) as error:
            raise _refusal("a number", f"{text!r:.80}", node) from error

    def construct_other(self, node: Any) -> Any:
        """Refuses dates, bytes, sets and objects."""
        kind = node.tag.removeprefix(_TAG)
        raise _refusal(
            "texts, numbers, true, false, null, lists and mappings",
            f"a value of the type {kind[:80]!r} (in quotes it is a text)",
            node,
        )


_Loader.yaml_constructors = {
    **{_TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind] for kind in ("null", "bool", "map", "seq")},
    f"{_TAG}str": _Loader.construct_text,
    f"{_TAG}int": _Loader.construct_integer,
    f"{_TAG}float": _Loader.construct_finite,
    None: _Loader.construct_other,
}


def _refusal(expected: str, got: str, at: Any) -> yaml.YAMLError:
    return yaml.YAMLError(f"expected {expected}, got {got}{_place(at.start_mark)}")


def _place(mark: Any) -> str:
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"


def _in_words(error: yaml.YAMLError) -> str:
    """Returns what is wrong, in one line and without the text around it."""
    if type(error) is yaml.YAMLError:
        return str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        said = ", ".join(part for part in (error.context, error.problem) if part)
        return f"expected YAML, got an error {said}{_place(error.problem_mark)}"
    return f"expected YAML, got {' '.join(str(error).split())}"
