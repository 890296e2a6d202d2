"""An extension of griffe: docstrings are written for readers of the source; here their roles become links of the site.

``:class:`Press``` is a link to where the reference has that name, or the name alone where it has not; ``budget::``
before an example loses one colon.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|attr|mod|exc):`~?([\w.]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)


class DocstringRoles(griffe.Extension):
    """Rewrites the docstring of every object that is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = LITERAL.sub(":", ROLE.sub(lambda role: link(obj, role[1]), obj.docstring.value))


def link(obj: griffe.Object, name: str) -> str:
    """Returns a link that may lead nowhere; the name is seen from ``obj``, or begins with a package."""
    path = name
    if not name.startswith("kvzip_press"):
        try:
            path = obj.resolve(name)
        except griffe.NameResolutionError:
            path = f"{obj.path if obj.is_class else obj.parent.path if obj.parent else ''}.{name}"
    shown = name.rpartition(".")[2] if name.startswith("kvzip_press") else name
    return f'<autoref identifier="{path}" optional hover><code>{shown}</code></autoref>'
