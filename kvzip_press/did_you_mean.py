"""The end of an error's message about a name that does not exist."""

import difflib
from collections.abc import Iterable


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the known name nearest to ``given``; empty where none is near."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
