"""Rows of data sets, whose values are taken by their kind: what is of another kind is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from kvzip_press.errors import InvalidArgumentError

_MAX_NUMBER = 2**31


@dataclass(frozen=True)
class Record:
    """One row of a data set.

    Attributes:
        place: Where it stands, for errors: "rows.jsonl, row 3".
        values: Its values by column.
    """

    place: str
    values: Mapping[str, Any]

    def text(self, field: str) -> str:
        """Returns a text.

        Raises:
            InvalidArgumentError: The value is missing or no text. So it is for all methods, each with its kind.
        """
        return self._text(field, self._value(field))

    def number(self, field: str) -> int:
        """Returns a whole number in 0..2**31, which may be written as a float."""
        value = self._value(field)
        whole = _is_integer(value) or (isinstance(value, float) and value.is_integer())
        if not whole or not 0 <= value <= _MAX_NUMBER:
            raise self._refusal(field, f"a whole number in 0..{_MAX_NUMBER}", value)
        return int(value)

    def texts(self, field: str) -> tuple[str, ...]:
        """Returns the texts of a list."""
        return tuple(self._text(f"{field}[{place}]", value) for place, value in enumerate(self.items(field)))

    def references(self, field: str, *, numbers: bool = False) -> tuple[str, ...]:
        """Returns accepted answers: those of a list of texts; a text is one answer, and never a list of characters.

        With ``numbers``, integers are answers too, as they are written.
        """
        return self._references(field, self._value(field), numbers=numbers)

    def list_of_references(self, field: str, *, numbers: bool = False) -> tuple[tuple[str, ...], ...]:
        """Returns the accepted answers to several questions: a list whose items are as in `references`."""
        return tuple(
            self._references(f"{field}[{place}]", value, numbers=numbers)
            for place, value in enumerate(self.items(field))
        )

    def items(self, field: str) -> Sequence[Any]:
        """Returns the items of a list, of any kind."""
        value = self._value(field)
        if not isinstance(value, list | tuple):
            raise self._refusal(field, "a list", value)
        return value

    def record(self, field: str) -> Record:
        """Returns a mapping as a record of its own."""
        value = self._value(field)
        if not isinstance(value, Mapping):
            raise self._refusal(field, "a mapping", value)
        return Record(f"{self.place}, {field}", value)

    def _value(self, field: str) -> Any:
        if field not in self.values:
            raise InvalidArgumentError(f"{self.place}: expected {field!r}, got only {sorted(map(str, self.values))}")
        return self.values[field]

    def _references(self, field: str, value: Any, *, numbers: bool) -> tuple[str, ...]:
        if numbers and _is_integer(value):
            return (str(value),)
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list | tuple):
            raise self._refusal(field, f"a text{', a whole number' * numbers} or a list of them", value)
        return tuple(
            str(item) if numbers and _is_integer(item) else self._text(f"{field}[{place}]", item)
            for place, item in enumerate(value)
        )

    def _text(self, field: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self._refusal(field, "a text", value)
        return value

    def _refusal(self, field: str, expected: str, value: Any) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{self.place}: expected {field!r} to be {expected}, got {value!r:.80} ({type(value).__name__})"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Records(Sequence[Record]):
    """Rows as records, each read only when it is asked for: rows of long-context data sets take megabytes.

    Attributes:
        name: Where the rows are from.
        rows: The rows.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        return (Record(f"{self.name}, row {place}", row) for place, row in enumerate(self.rows, start=1))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """Returns one record, by its place from 0 on, or a list of them."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        return Record(f"{self.name}, row {place + 1}", self.rows[place])
