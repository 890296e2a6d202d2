"""Lines of JSON with a seal: a checksum of their values, by which a line that was changed is found out.

The seal is the last name of the object. It is made of values and not of bytes, so that a program may lay the JSON out
anew. It guards against accidents: whoever changes a line on purpose can make a new seal.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import digest_of, to_json
from kvzip_press.untrusted import parse_json

SEAL = "seal"
_SHOWN = 3  # lacking fields that a message names
_SEAL_DIGITS = 16  # of the SHA-256 in hexadecimal
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")  # a surrogate, which UTF-8 cannot hold


class SealedLine:
    """Base of the frozen dataclasses that are stored as a JSON object with a seal.

    Their fields are texts, numbers, booleans, tuples and mappings of these. A value of another type, NaN or an infinity
    raises InvalidArgumentError where the object is made. What else is out of range is neither read nor written.

    Attributes:
        kind: What an object of the class is called in messages, with its article.
    """

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for name, hint in _hints_of(type(self)).items():
            if not _fits(value := getattr(self, name), hint):
                raise InvalidArgumentError(
                    f"expected {self.kind} in which {name} is of the type {_words(hint)}, got {value!r:.80}"
                )

    def check(self) -> None:
        """Raises InvalidArgumentError for values out of range: whenever the object is read or written."""

    def _values(self) -> dict[str, Any]:
        """Returns what is stored."""
        return asdict(self)  # type: ignore[call-overload]  # whoever derives from this is a dataclass

    def to_json(self) -> str:
        """Returns the object as one line of JSON, without a seal and without the newline."""
        return _text(self._values())

    def to_line(self, *, indent: int | None = None) -> str:
        """Returns the object with its seal, for a file: one line without the newline, unless ``indent`` is given.

        Raises:
            InvalidArgumentError: A value is out of range.
        """
        self.check()
        return _text(sealed(self._values()), indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads an object with or without a seal; names that a newer version may have added are ignored.

        Raises:
            InvalidArgumentError: Not a JSON object (bytes must be UTF-8); fields are missing, of another type or out of
                range; the seal is not that of the values.
        """
        return cls._parsed(text, of_a_file=False)[0]

    @classmethod
    def from_line(cls, text: str | bytes) -> tuple[Self, bool]:
        """Reads what `to_line` returned, or what an older version stored, which made no seals.

        Names that are not known are ignored beside a seal, as those of a newer version. Without a seal they are the
        traces of a change.

        Returns:
            The object, and whether it has a seal.

        Raises:
            InvalidArgumentError: As in `from_json`; and for unknown names without a seal.
        """
        return cls._parsed(text, of_a_file=True)

    @classmethod
    def _parsed(cls, text: str | bytes, *, of_a_file: bool) -> tuple[Self, bool]:
        try:
            values, has_seal = unsealed(parse_json(text))
            hints = _hints_of(cls)
            if of_a_file and not has_seal:
                _refuse_unknown(values, hints)
            _refuse_lacking(values, cls)
            found = cls(**{name: _as(hint, values[name]) for name, hint in hints.items() if name in values})
            found.check()
        except (ValueError, TypeError) as error:
            start = text[:80].decode(errors="replace") if isinstance(text, bytes) else text[:80]
            raise InvalidArgumentError(f"expected {cls.kind} in JSON, got {start!r} ({error})") from error
        return found, has_seal


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if unknown := values.keys() - known.keys():
        raise ValueError(f"the field {min(unknown)!r:.80} is not known, and there is no {SEAL!r}")


def _refuse_lacking(values: Mapping[str, Any], kind: Any) -> None:
    if lacking := [name for name in _needed(kind) if name not in values]:
        shown = ", ".join(map(repr, lacking[:_SHOWN]))
        raise ValueError(f"it lacks {shown}" + (f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""))


@cache
def _needed_names(kind: Any) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING)


def _needed(kind: Any) -> tuple[str, ...]:
    """Returns the fields of a dataclass that have no default."""
    return _needed_names(kind)  # kind is Any since mypy takes a class for something that has no hash


def _text(values: dict[str, Any], indent: int | None = None) -> str:
    text = json.dumps(values, ensure_ascii=False, indent=indent)
    return json.dumps(values, indent=indent) if _HALF_A_PAIR.search(text) else text


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a JSON object, and behind them their seal."""
    return {**values, SEAL: _seal_of(values)}


def unsealed(values: Any) -> tuple[dict[str, Any], bool]:
    """Returns the values of a JSON object without their seal, and whether they had one.

    Raises:
        ValueError: No JSON object, or its seal is not that of its values.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it is no object but of the type {type(values).__name__}")  # noqa: TRY004  # of JSON
    rest = {name: value for name, value in values.items() if name != SEAL}
    if SEAL in values and values[SEAL] != _seal_of(rest):
        raise ValueError(f"its {SEAL!r}, a checksum, is not that of its values: it was changed after it was written")
    return rest, SEAL in values


def check_fractions(kind: str, **values: float) -> None:
    """Raises InvalidArgumentError for the first value outside [0, 1]; ``kind`` says what the values are of."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InvalidArgumentError(f"expected {kind} with {name} in 0..1, got {value:.20g}")


def _seal_of(values: Mapping[str, Any]) -> str:
    return digest_of(to_json(values).encode())[:_SEAL_DIGITS]


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns what a type is made of, such as ``(tuple, (str, ...))``; ``(None, ())`` for a plain one."""
    origin = get_origin(hint)
    return UnionType if origin is Union else origin, get_args(hint)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _hints_of(kind: Any) -> dict[str, Any]:
    """Returns the types of a dataclass's fields by name."""
    return _hints(kind)  # kind is Any since mypy takes a class for something that has no hash


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type; numbers must be finite, and a list may stand for a tuple."""
    kind = type(value)
    if kind is hint:  # most values
        return kind is not float or abs(value) <= sys.float_info.max
    origin, inner = _parts(hint)
    if origin is UnionType:
        return _fits(value, kind) if kind in inner else any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(item, inner[0]) for item in value)
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            return False
        kinds = set(map(type, value.values()))
        return kinds <= {inner[1]} - {float} or all(_fits(item, inner[1]) for item in value.values())
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max
    return hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool)))


def _as(hint: Any, value: Any) -> Any:
    """Returns a value of JSON in which the lists that stand for tuples are tuples."""
    if isinstance(value, list):
        origin, inner = _parts(hint)
        return tuple(_as(inner[0], item) for item in value) if origin is tuple else value
    return value


def _words(hint: Any) -> str:
    origin, inner = _parts(hint)
    if origin is UnionType:
        return " or ".join(_words(one) for one in inner)
    if hint is NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
