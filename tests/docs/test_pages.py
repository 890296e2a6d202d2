"""The pages say what the code says: no press, option, name or message is missing from them, and none is invented."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kvzip_press
from kvzip_press.presses.kvpress_adapter.refused import REFUSED
from kvzip_press.registry import get_press, presses_table

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
METHODS = DOCS / "methods"
MAX_README_LINES = 150


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def headings_of(text: str) -> list[str]:
    """The headings of a page below its title."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^##+ (.+)$", without_code, flags=re.MULTILINE)


def anchor_of(heading: str) -> str:
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables, without heads and rules."""
    lines = re.findall(r"^\|(.+)\|$", text, flags=re.MULTILINE)
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines if not re.match(r"[\s|:-]+$", line)
    ]


# --------------------------------------------------------------------------------------------------- README and links


def test_the_readme_is_one_page() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MAX_README_LINES


def test_figures_of_the_readme_are_those_of_the_performance_page() -> None:
    readme, page = text_of(ROOT / "README.md"), text_of(DOCS / "performance.md")
    table = re.findall(r"^\| .*$", readme[readme.index("## On a GPU") : readme.index("## Which press")], re.MULTILINE)
    assert len(table) == 8 and [line for line in table if line not in page] == []


def test_figures_of_many_users_in_the_readme_are_those_of_the_serving_page() -> None:
    readme, page = text_of(ROOT / "README.md"), text_of(DOCS / "howto" / "serving.md")
    section = readme[readme.index("## Many users") : readme.index("## Models")]
    claims = {int(number) for number in re.findall(r"\d+", section)} - {8, 64, 200, 32768, 0, 7}  # of the setting
    rows = [{int(n) for n in re.findall(r"\d+", line)} for line in re.findall(r"^\| .*$", page, re.MULTILINE)]
    pairs = [claims & row for row in rows if len(claims & row) > 1]
    assert len(pairs) == 3 and set().union(*pairs) == claims


PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_between_files_lead_somewhere(page: Path) -> None:
    """Also to headings; `make docs` looks at the rest."""
    broken = []
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text_of(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in map(anchor_of, headings_of(text_of(target)))):
            broken.append(link)
    assert broken == []


# ------------------------------------------------------------------------------------------------------------ methods


def test_every_registered_press_has_a_method() -> None:
    rows = [row for row in rows_of(text_of(METHODS / "index.md")) if re.fullmatch(r"`\w+`", row[0])]
    assert {row[0].strip("`"): row[2] == "yes" for row in rows} == {
        info.name: info.needs_kvpress for info in presses_table()
    }


def test_every_press_of_kvpress_with_a_name_has_its_formula_and_source() -> None:
    page = text_of(METHODS / "from-kvpress.md")
    sections = dict(zip(headings_of(page), re.split(r"^## .+$", page, flags=re.MULTILINE)[1:], strict=True))
    papers = {info.name: info.paper for info in presses_table() if info.needs_kvpress}
    assert set(sections) == set(papers)
    unnamed = [name for name, paper in papers.items() if paper not in sections[name] and ".md)" not in sections[name]]
    assert unnamed == []


@pytest.mark.parametrize(
    "page", ["kvzip", "fastkvzip", "kvzip-head", "duo-attention", "decoding", "kvsharer", "composed", "baselines"]
)
def test_a_method_of_ours_has_a_formula_and_an_example(page: str) -> None:
    text = text_of(METHODS / f"{page}.md")
    assert "```text\n" in text and "```python\n" in text
    assert page in {"composed", "baselines"} or "arxiv.org" in text


@pytest.mark.parametrize(
    ("page", "name"),
    [("kvzip", "kvzip"), ("fastkvzip", "fastkvzip"), ("kvzip-head", "kvzip_head"), ("duo-attention", "duo_attention")],
)
def test_the_defaults_of_a_method_are_those_of_its_press(page: str, name: str) -> None:
    text = text_of(METHODS / f"{page}.md")
    table = text[text.index("## Defaults") :]
    said = {}
    for names, values, *_ in rows_of(table[: table.index("\n\n", table.index("|---"))])[1:]:
        said |= dict(
            zip(
                re.findall(r"`(\w+)`", names), (ast.literal_eval(v) for v in values.strip("`").split(", ")), strict=True
            )
        )
    fields: Any = {field.name: field.default for field in dataclasses.fields(type(get_press(name)))}
    assert {key: fields[key] for key in said} == said
    unsaid = {"budget", "layer_ratios", "safeguard", "min_kept_per_head", "storage"}  # of every press: concepts.md
    assert set(fields) - set(said) - unsaid == set()


def test_the_defaults_of_presses_that_evict_while_the_model_writes_are_on_their_page() -> None:
    """Those of all in the table, those of each press in its section, or where it differs."""
    text = text_of(METHODS / "decoding.md")
    rows = [row for row in rows_of(text[text.index("## Defaults") : text.index("## Memory")]) if row[0]]
    shared = {row[0].strip("`"): ast.literal_eval(row[1].strip("`")) for row in rows}
    base = {field.name: field.default for field in dataclasses.fields(kvzip_press.DecodePress)}
    assert {name: base[name] for name in shared} == shared
    of_every_press = {"compression_ratio", "budget", "layer_ratios", "safeguard", "min_kept_per_head", "storage"}
    assert set(base) - set(shared) == of_every_press
    kinds = [getattr(kvzip_press, name) for name in kvzip_press.__all__ if name != "DecodePress"]
    for kind in [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, kvzip_press.DecodePress)]:
        own = [field for field in dataclasses.fields(kind) if field.name not in base]
        assert [field.name for field in own if f"`{field.name}={field.default!r}`" not in text] == []


# ------------------------------------------------------------------------------------------------------------ kvpress


def kvpress_rows() -> dict[str, str]:
    rows = rows_of(text_of(DOCS / "howto" / "kvpress.md"))
    return {row[0].strip("`"): " ".join(row[1:]) for row in rows if re.fullmatch(r"`\w+Press`", row[0])}


@pytest.mark.kvpress
def test_every_press_of_kvpress_is_in_the_table_of_those_who_come_from_there(kvpress: Any) -> None:
    assert set(kvpress_rows()) == {name for name in kvpress.__all__ if name.endswith("Press")}


@pytest.mark.kvpress
def test_the_table_refuses_what_is_refused(kvpress: Any) -> None:
    refused = {
        name for name in kvpress_rows() if any(base.__name__ in REFUSED for base in getattr(kvpress, name).__mro__)
    }
    assert {name for name, words in kvpress_rows().items() if words.startswith("refused")} == refused


def test_the_names_in_that_table_are_registered() -> None:
    named = [name for words in kvpress_rows().values() for name in re.findall(r"name `(\w+)`", words)]
    assert len(named) > 20 and set(named) <= {info.name for info in presses_table() if info.needs_kvpress}


# ---------------------------------------------------------------------------------------------------------- reference


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(text_of(page) for page in sorted((DOCS / "reference").glob("*.md")))
    shown = set(re.findall(r"^::: kvzip_press\.(\w+)$", pages, flags=re.MULTILINE))
    assert set(kvzip_press.__all__) - shown == set()


@pytest.mark.parametrize(
    "name", re.findall(r"^::: (\S+)$", text_of(DOCS / "reference" / "building-blocks.md"), re.MULTILINE)
)
def test_what_the_reference_shows_exists(name: str) -> None:
    if name.endswith("PressLM"):
        pytest.importorskip("lm_eval")
    module, _, attribute = name.rpartition(".")
    found: Any = importlib.import_module(module)
    assert hasattr(found, attribute) or importlib.import_module(name)


def test_every_command_is_in_the_reference_with_its_options() -> None:
    page = text_of(DOCS / "reference" / "command.md")
    sections = dict(zip(headings_of(page), re.split(r"^## .+$", page, flags=re.MULTILINE)[1:], strict=True))
    said = {name: set(re.findall(r"`(--[\w-]+)`", _first_cells(section))) for name, section in sections.items()}
    known = json.loads(text_of(ROOT / "tests" / "public_interface.json"))["commands"]
    assert said == {name: {option for option in options if option.startswith("--")} for name, options in known.items()}


def _first_cells(section: str) -> str:
    return "\n".join(row[0] for row in rows_of(section))


# ----------------------------------------------------------------------------------------------------------- messages


@cache
def messages_in_the_source() -> tuple[str, ...]:
    """Every text of the package, with … for what it is filled with."""
    files = [path for folder in ("kvzip_press", "presses", "leaderboard") for path in (ROOT / folder).rglob("*.py")]
    return tuple(text for path in files for node in ast.walk(ast.parse(text_of(path))) for text in _texts(node))


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[srd]", "…", node.value)


def is_in_the_source(message: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    return any(pattern.search(text) for text in messages_in_the_source())


def quoted_messages() -> list[str]:
    headings = headings_of(text_of(DOCS / "troubleshooting.md"))
    return [heading.strip("`") for heading in headings if heading.startswith("`")]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_that_is_explained_is_one_that_is_raised(message: str) -> None:
    assert len(message.replace("…", "")) > 20 and is_in_the_source(message)


def test_an_invented_message_is_seen() -> None:
    assert not is_in_the_source("expected compression_ratio (the fraction kept) in [0, 1), got …")
