"""What the README and docs/ show is run: Python in order, page by page, and commands as far as their options.

A comment before a block says why it is not run here: ``<!-- needs: gpu -->`` (or kvpress, hub, or a file that is not
there). Such a block must still be Python. ``<!-- prints -->`` stands between a block and what it prints, to the letter.

Pages run in a process of their own, whose program is this file: what they register stays as long as a process, and so
does what kvpress patches when it is imported as a user does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
RENDERED = ROOT / "docs" / "notebooks"  # made from the notebooks, which have a test of their own
REPRODUCE = ROOT / "leaderboard" / "REPRODUCE.md"
PAGES = [
    ROOT / "README.md",
    REPRODUCE,
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if RENDERED not in path.parents),
]
UsageError = typer.BadParameter.__base__  # of click, or of the copy of it that newer versions of typer have
FIRST = {"README.md", "docs/install.md", "docs/quickstart.md", "docs/howto/generate.md"}
MARK = re.compile(r"<!--\s*(prints|needs: [\w.-]+)\s*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line of its first line, and the mark in the comment before it."""

    language: str
    text: str
    line: int
    mark: str = ""


def blocks_of(markdown: str) -> list[Block]:
    found, mark = [], ""
    for token in MarkdownIt("commonmark").parse(markdown):
        if token.type == "fence":
            assert token.map is not None
            found.append(Block(token.info.strip(), token.content, token.map[0] + 2, mark))
        comment = MARK.fullmatch(token.content.strip()) if token.type == "html_block" else None
        mark = comment[1] if comment else ""
    return found


def run_page(name: str, blocks: list[Block], *, available: set[str]) -> None:
    """Runs the Python of a page in one namespace; a traceback has the lines of the page."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    for block in blocks:
        needed = block.mark.removeprefix("needs: ")
        if block.language == "python":
            program = compile("\n" * (block.line - 1) + block.text, name, "exec")
            if not needed or needed in available:
                with redirect_stdout(printed := io.StringIO()):
                    exec(program, namespace)
        elif block.mark == "prints":
            assert printed.getvalue() == block.text, f"{name}:{block.line}"


def available() -> set[str]:
    """What blocks may need and this machine has; the hub and files of others are never asked for."""
    found = {"gpu"} if torch.cuda.is_available() else set()
    return found | ({"kvpress"} if importlib.util.find_spec("kvpress") else set())


def run_pages(found: Path, pages: list[Path]) -> None:
    """Runs pages, and writes page -> traceback (empty if there is none) as JSON; a model of several is loaded once."""
    from kvzip_press.loading import by_name

    torch.set_num_threads(1)
    by_name.load_model = cache(by_name.load_model)
    errors = {}
    for page in pages:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            try:
                run_page(str(page), blocks_of(page.read_text(encoding="utf-8")), available=available())
                errors[str(page)] = ""
            except Exception:  # noqa: BLE001  # whatever a page raises is what is asked for
                errors[str(page)] = traceback.format_exc()
    found.write_text(json.dumps(errors), encoding="utf-8")


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The traceback of each page that is tested, empty if there is none."""
    name = test_the_python_of_a_page_runs.__name__
    tested = [str(item.callspec.params["page"]) for item in request.session.items if item.name.startswith(f"{name}[")]
    found = tmp_path_factory.mktemp("pages") / "errors.json"
    done = subprocess.run([sys.executable, __file__, found, *tested], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(found.read_text(encoding="utf-8"))


def pages(language: str) -> list[Any]:
    """The pages with blocks of a language; what the newest and the oldest transformers are tested with are not slow."""
    return [
        pytest.param(page, id=name, marks=() if language == "sh" or name in FIRST else pytest.mark.slow)
        for page in PAGES
        for name in [page.relative_to(ROOT).as_posix()]
        if any(block.language == language for block in blocks_of(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.embedded
@pytest.mark.parametrize("page", pages("python"))
def test_the_python_of_a_page_runs(page: Path, errors: dict[str, str]) -> None:
    assert not errors[str(page)], errors[str(page)]


@pytest.mark.parametrize("page", pages("sh"))
def test_the_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                check_command(shlex.split(line, comments=True))


def check_command(words: list[str]) -> None:
    """Raises unless a command line names something that exists."""
    match words:
        case ["kvzip-press", *arguments]:
            parse(commands(), arguments)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE), (
                target
            )
        case ["pip", "install", *arguments]:
            extras = re.findall(r"^\.\[([\w,-]+)\]$", arguments[-1])
            assert {extra for names in extras for extra in names.split(",")} <= set(extras_of_the_project())
        case _:
            assert words == [] or words[0] in {"git", "cd", "gunzip", "python3", "source", "."}, words


@cache
def commands() -> Any:
    """The command with the groups that it hands over to."""
    from kvzip_press.cli.gates import app as gates
    from kvzip_press.cli.main import app
    from kvzip_press.leaderboard.cli import app as leaderboard

    group: Any = typer.main.get_command(app)
    group.commands = {
        **group.commands,
        "leaderboard": typer.main.get_command(leaderboard),
        "gates": typer.main.get_command(gates),
    }
    return group


def parse(command: Any, arguments: list[str]) -> None:
    """Parses as the command would, and runs nothing."""
    if hasattr(command, "commands"):
        name, *rest = arguments
        assert name in command.commands, f"expected one of {sorted(command.commands)}, got {name}"
        parse(command.commands[name], rest)
    else:
        command.make_context(command.name, list(arguments))


def extras_of_the_project() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return list(settings["project"]["optional-dependencies"])


SHOWN = '```python\nx = "a"\nprint(x)\n```\n\n<!-- prints -->\n```text\na\n```\n'


def test_blocks_of_a_page_share_their_names_and_show_what_they_print() -> None:
    run_page("page", blocks_of(SHOWN + "\n```python\nassert x == 'a'\n```\n"), available=set())
    with pytest.raises(AssertionError, match="page:8"):
        run_page("page", blocks_of(SHOWN.replace("\na\n", "\nb\n")), available=set())


def test_an_error_in_a_block_has_the_line_of_the_page() -> None:
    with pytest.raises(NameError) as raised:
        run_page("page", blocks_of("text\n\n```python\n\nundefined\n```\n"), available=set())
    assert raised.traceback[-1].lineno == 4


def test_a_block_that_needs_what_is_absent_is_read_and_not_run() -> None:
    block = "<!-- needs: gpu -->\n```python\n{}\n```\n"
    run_page("page", blocks_of(block.format("undefined")), available=set())
    with pytest.raises(NameError):
        run_page("page", blocks_of(block.format("undefined")), available={"gpu"})
    with pytest.raises(SyntaxError):
        run_page("page", blocks_of(block.format("x =")), available=set())


@pytest.mark.parametrize(
    "line",
    [
        "kvzip-press asks",
        "kvzip-press ask --question x --contxt notes.txt",
        "kvzip-press leaderboard run --grid g",
        "python -m kvzip_press.nothing",
        "make nothing",
        "pip install '.[nothing]'",
        "kvzip-pres ask",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str) -> None:
    with pytest.raises((AssertionError, UsageError)):
        check_command(shlex.split(line))


if __name__ == "__main__":
    run_pages(Path(sys.argv[1]), [Path(page) for page in sys.argv[2:]])
