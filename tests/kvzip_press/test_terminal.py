"""Text of others on a terminal is shown and not obeyed, and is no markup of rich."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading

import pytest
from rich.console import Console
from rich.table import Column, Table

from kvzip_press.cli.main import main
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.terminal import ERROR_CHARACTERS, counted, one_line, plain, printable, progress

pytestmark = pytest.mark.any_transformers

HOSTILE = "[/b][red]x[/] :boom: \x1b[31m\x07\x08\r\n\u202eevil\u2066\ud800\x9b1m\u2028"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [b] words: é 日本 😀", "plain [b] words: é 日本 😀"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\x07b\x00c\x7f\x9b", "a\\x07b\\x00c\\x7f\\x9b"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202egpj.exe\u2069\u200f", "\\u202egpj.exe\\u2069\\u200f"),
        ("\ufeff\u200b\xad", "\\ufeff\\u200b\\xad"),
        ("\ud83d\udc00", "\\ud83d\\udc00"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),  # these join letters and pictures
        (7, "7"),
    ],
)
def test_what_a_terminal_would_obey_is_written_as_its_escape(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_an_answer_keeps_its_lines_and_nothing_else() -> None:
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
    assert one_line(" a\n\n  b \x1b\r\nc ") == "a b \\x1b c"
    assert len(one_line("x" * 10**6)) == ERROR_CHARACTERS


def test_no_character_at_all_reaches_the_terminal_that_is_not_shown() -> None:
    shown = printable("".join(map(chr, range(0x110000))))
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
    shown.encode("utf-8")


def test_rich_reads_no_markup_in_it() -> None:
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    table = Table(Column(plain(HOSTILE)), title=plain(HOSTILE, "table.title"))
    table.add_row(plain(HOSTILE))
    with console.status(plain(HOSTILE)):
        console.print(table)
        console.print(plain(HOSTILE, "yellow"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count(printable(HOSTILE)) == 4
    assert not set(printed) & set("\x1b\x07\x08\r\u202e\u2066\ud800\x9b")


def test_errors_and_warnings_of_the_command_are_one_line_whatever_they_quote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        logging.getLogger("kvzip_press.test").warning("it was %s", HOSTILE)
        raise InvalidArgumentError(f"expected a name, got {HOSTILE} and {'x' * 10**6}")

    monkeypatch.setattr("kvzip_press.cli.main.app", fail)
    monkeypatch.setattr(sys, "argv", ["kvzip-press"])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    warned, error = said.splitlines()
    assert warned.startswith("it was [/b][red]x[/] :boom: \\x1b[31m\\x07")
    assert error.startswith("error: expected a name, got [/b][red]x[/]")
    assert len(error) < 5000
    assert not set(said) & set("\x1b\x07\x08\r\u202e\u2066\ud800\x9b")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--{}"],
        ["{}"],
        ["presses", "{}"],
        ["ask", "--question", "{}", "--{}"],
        ["ask", "--question", "x", "--max-new-tokens", "{}"],
        ["heads", "compute", "--{}"],
        ["leaderboard", "table", "{}", "{}"],
        ["gates", "{}"],
    ],
)
def test_usage_errors_show_the_arguments_that_they_quote_as_text(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b[31m\x1b]0;x\x07\x9b1m\u202eevil\u2066"
    monkeypatch.setattr(sys, "argv", ["kvzip-press", *(argument.format(hostile) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = "".join(capsys.readouterr())
    assert "Usage: kvzip-press" in said
    assert not set(said) & set(hostile) - set(map(chr, range(32, 127)))


class Written(io.StringIO):
    """Standard error, and a way to wait until something was written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = threading.Event()

    def flush(self) -> None:
        self.flushed.set()

    def wait_for(self, line: str) -> None:
        """Returns once a line of this form has been written."""
        while not re.search(f"^{line}$", self.getvalue(), re.MULTILINE):
            assert self.flushed.wait(600), self.getvalue()
            self.flushed.clear()


def test_without_a_terminal_long_work_writes_plain_lines_to_standard_error(monkeypatch) -> None:
    """Also while a single step runs; each says the stage, the steps, a remark and the time; all ends with the work."""
    console, errors = Console(file=io.StringIO()), Written()
    monkeypatch.setattr(sys, "stderr", errors)
    before = set(threading.enumerate())
    with progress(console, every=0.01) as show:
        show("reading")
        errors.wait_for(r"reading \(\d:\d\d min\)")
        show("answering", 2, 3, "Who \x1b?")
        errors.wait_for(r"answering: 2 of 3, Who \\x1b\? \(\d:\d\d min\)")
        show("sampling", 7)
        errors.wait_for(r"sampling: 7 \(\d:\d\d min\)")
    assert set(threading.enumerate()) <= before
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_short_work_and_an_error_leave_no_line_and_no_thread(capsys) -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyError), progress(Console(file=io.StringIO())) as show:
        show("reading")
        raise KeyError
    assert set(threading.enumerate()) <= before and capsys.readouterr().err == ""


def test_on_a_terminal_each_stage_has_a_bar() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    with progress(console, transient=False) as show:
        show("reading", 1, 1)
        show("answering", 2, 3, "Who[b]\x1b?")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "reading" in printed and "2/3" in printed and "Who[b]\\x1b?" in printed


def test_a_number_has_its_noun() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
