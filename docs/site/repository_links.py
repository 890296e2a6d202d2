"""A hook of mkdocs: a page may link to any file of the repository, as it does where the repository itself is browsed.

What is linked outside of ``docs/`` becomes a part of the site, under ``repository/`` with its path: Markdown as a page
with links of its own, anything else as it is. A link that leads nowhere stays as it was, and mkdocs reports it.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
DOCS, SHOWN = PurePosixPath("docs"), PurePosixPath("repository")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
CODE = re.compile(r"^(```.*?^```|(?: {4}|\t).*?)$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that pages lead to, and those that these lead to."""
    unread = [(file, DOCS / file.src_uri) for file in files.documentation_pages()]
    while unread:
        file, path = unread.pop()
        for target in links_of(file.content_string, path):
            uri = shown_at(target)
            if target.is_relative_to(DOCS) or files.get_file_from_path(str(uri)) or not (ROOT / target).is_file():
                continue
            added = File.generated(
                config, str(uri), abs_src_path=str(ROOT / target), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(added)
            if target.suffix == ".md":
                unread.append((added, target))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links that lead out of ``docs/``, or back into it."""
    path = in_repository(PurePosixPath(page.file.src_uri))
    here = PurePosixPath(page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        target = resolved(path, match[0])
        return relative(shown_at(target), here) if (ROOT / target).is_file() else match[0]

    return outside_code(markdown, lambda text: LINK.sub(rewritten, text))


def links_of(markdown: str, path: PurePosixPath) -> list[PurePosixPath]:
    """Returns what a file of the repository links to, from the root of the repository."""
    found: list[PurePosixPath] = []
    outside_code(markdown, lambda text: found.extend(resolved(path, match[0]) for match in LINK.finditer(text)) or text)
    return found


def outside_code(markdown: str, change: Any) -> str:
    """Returns the text with what is not code changed."""
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def resolved(path: PurePosixPath, link: str) -> PurePosixPath:
    """Returns where a relative link in the file at ``path`` leads, from the root of the repository."""
    parts: list[str] = []
    for part in (path.parent / link).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return PurePosixPath(*parts)


def shown_at(target: PurePosixPath) -> PurePosixPath:
    """Returns where the site has a file of the repository."""
    return target.relative_to(DOCS) if target.is_relative_to(DOCS) else SHOWN / target


def in_repository(uri: PurePosixPath) -> PurePosixPath:
    """Returns the path in the repository of a file of the site."""
    return uri.relative_to(SHOWN) if uri.is_relative_to(SHOWN) else DOCS / uri


def relative(target: PurePosixPath, here: PurePosixPath) -> str:
    """Returns a link from the folder ``here`` to ``target``."""
    common = 0
    while common < len(here.parts) and here.parts[: common + 1] == target.parts[: common + 1]:
        common += 1
    return "/".join([*[".."] * (len(here.parts) - common), *target.parts[common:]])
