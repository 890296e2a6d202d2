"""Names of files that are made of names that users chose."""

import re


def file_name(text: str) -> str:
    """Returns a text as a part of a file's name: letters, digits, ``_``, ``.`` and ``-``, not hidden, never a path.

    Everything else becomes ``-``, dots at the beginning too. Different texts may have the same name.
    """
    return re.sub(r"^\.+", "-", re.sub(r"[^\w.-]+", "-", text))
