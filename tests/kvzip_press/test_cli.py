"""The command answers from a full and a compressed cache side by side, and its errors are one line."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from kvzip_press.cli import app, main

run = CliRunner().invoke


@pytest.mark.embedded
def test_ask_shows_both_caches_and_the_figures(tmp_path) -> None:
    """`ask` prints each question with both answers, and what each cache holds."""
    context = tmp_path / "notes.txt"
    context.write_text("The phone number of Vera is 47. The baker opens early. A dog sleeps by the stone bridge.\n")
    asked = ["--question", "What is the phone number of Vera?", "--question", "How can one call Vera?"]
    prefix = ["--answer-prefix", "The phone number of Vera is", "--max-new-tokens", "3"]
    result = run(app, ["ask", "--context", str(context), *asked, *prefix])
    assert result.exit_code == 0, result.output
    for shown in ("How can one call Vera?", "full cache", "kvzip, 70% removed", " 47", "kept pairs", "resident MB"):
        assert shown in result.output


def test_presses_are_listed() -> None:
    """`presses` prints the names of the registry."""
    names = run(app, ["presses"]).output.split()
    assert {"none", "random", "kvzip", "kvzip_local"} <= set(names) and names == sorted(names)


def test_an_unknown_press_is_one_line_with_a_suggestion(tmp_path, monkeypatch, capsys) -> None:
    """Errors of ours end the command with status 1 and a message, without a traceback."""
    context = tmp_path / "notes.txt"
    context.write_text("anything")
    argv = ["kvzip-press", "ask", "--context", str(context), "--question", "Who?", "--press", "kvzp"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "did you mean 'kvzip'?" in capsys.readouterr().err
