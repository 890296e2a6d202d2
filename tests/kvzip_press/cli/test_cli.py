"""The command answers from a full and a compressed cache side by side, and its errors are one line."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from kvzip_press import RandomPress
from kvzip_press.cli.asking import Asking
from kvzip_press.cli.main import app, main
from kvzip_press.loading import by_name as loading
from kvzip_press.registry import press_names, presses_table
from kvzip_press.testing import ByteTokenizer, tiny_model

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
    """`presses` prints a line about each press of the registry: name, what it keeps, paper, what it needs."""
    lines = run(app, ["presses"]).output.splitlines()[1:]
    names = [line.split()[0] for line in lines]
    assert names == press_names()
    by_name = dict(zip(names, lines, strict=True))
    for info in presses_table():
        for shown in (info.summary, info.paper, info.needs, "kvpress" if info.needs_kvpress else ""):
            assert shown in by_name[info.name]


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


@pytest.fixture
def tiny(monkeypatch) -> None:
    """The command's model is a tiny one with random weights."""
    monkeypatch.setattr(loading, "load_model", lambda name: (tiny_model(), ByteTokenizer()))


def answers_in(output: str) -> list[str]:
    """The last column of the rows of the first table that begin with a question."""
    return [line.split("\u2502")[-2].strip() for line in output.splitlines() if "Who?" in line]


def test_a_saved_cache_answers_as_the_one_that_was_made(tiny, tmp_path, monkeypatch) -> None:
    """`--save` keeps the compressed cache; `--cache` answers from it, without the context and the full cache."""
    monkeypatch.setenv("COLUMNS", "200")
    context, saved = tmp_path / "notes.txt", tmp_path / "cache.safetensors"
    context.write_text("The phone number of Vera is 47. The baker opens early.\n")
    asked = ["--question", "Who?", "--max-new-tokens", "6"]
    made = run(app, ["ask", "--context", str(context), "--press", "random", "--save", str(saved), *asked])
    assert made.exit_code == 0, made.output
    context.unlink()
    loaded = run(app, ["ask", "--cache", str(saved), *asked])
    assert loaded.exit_code == 0, loaded.output
    assert answers_in(loaded.output) == answers_in(made.output) != []
    assert "full cache" in made.output and "full cache" not in loaded.output
    for shown in ("cache.safetensors", "RandomPress", "resident MB"):
        assert shown in loaded.output


def test_ask_stores_in_few_bits(tiny, tmp_path) -> None:
    """`--storage` names how; an unknown one is refused before the model is loaded."""
    context = tmp_path / "notes.txt"
    context.write_text("The phone number of Vera is 47. The baker opens early.\n")
    asked = ["ask", "--context", str(context), "--press", "random", "--question", "Who?", "--max-new-tokens", "1"]
    made = run(app, [*asked, "--storage", "int8"])
    assert made.exit_code == 0, made.output
    assert "random, 70% removed, int8" in made.output.replace("\n", " ") and "times smaller" in made.output
    refused = run(app, [*asked, "--storage", "int9"])
    assert "expected a storage out of" in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of --context FILE and --cache FILE"),
        (["--context", "notes.txt", "--cache", "c.safetensors"], "one of --context FILE and --cache FILE"),
        (["--cache", "c.safetensors", "--save", "d.safetensors"], "--save with --context"),
        (["--cache", "c.safetensors", "--compression-ratio", "0.5"], "--compression-ratio with --context"),
        (["--cache", "c.safetensors", "--press", "snapkv"], "--press with --context"),
        (["--cache", "c.safetensors"], "c.safetensors: expected a file"),
    ],
)
def test_ask_says_which_file_it_needs(tiny, tmp_path, monkeypatch, capsys, options, message) -> None:
    """Neither or both, a cache to copy, a cache that is not there: one line each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("anything")
    monkeypatch.setattr(sys, "argv", ["kvzip-press", "ask", "--question", "Who?", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


class Controlled(ByteTokenizer):
    """Bytes, and a control token that a text may spell out."""

    all_special_ids, all_special_tokens = (2,), ("<end>",)

    def encode(self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False) -> list[int]:
        pieces = [text] if split_special_tokens else text.split("<end>")
        ids = super().encode(pieces[0])
        for piece in pieces[1:]:
            ids += [2, *super().encode(piece)]
        return ids


@pytest.mark.parametrize(("option", "n_control"), [([], 0), (["--no-split-special-tokens"], 5)])
def test_ask_reads_control_tokens_of_a_file_and_a_question_as_letters(option, n_control, tmp_path, monkeypatch) -> None:
    """Unless it is told otherwise; from a saved cache, too."""
    model, read = tiny_model(), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: read.extend(args[0].flatten().tolist()))
    model.generation_config.eos_token_id = 0
    monkeypatch.setattr(loading, "load_model", lambda name: (model, Controlled()))
    context, saved = tmp_path / "notes.txt", tmp_path / "cache.safetensors"
    context.write_text("Vera has 47.<end> The baker opens early.<end>")
    asked = ["--question", "Who<end>?", "--max-new-tokens", "1", *option]
    made = run(app, ["ask", "--context", str(context), "--press", "random", "--save", str(saved), *asked])
    loaded = run(app, ["ask", "--cache", str(saved), *asked])
    assert made.exit_code == loaded.exit_code == 0, made.output + loaded.output
    assert read.count(2) == n_control  # two in the file, one in each of three questions


def test_on_a_terminal_answers_appear_as_they_are_written(tiny, tmp_path, monkeypatch) -> None:
    """A table is drawn anew with each word; what stays is the table that a file gets, too."""
    context, model = tmp_path / "notes.txt", tiny_model()
    context.write_text("The phone number of Vera is 47. The baker opens early.")
    drawn: list[list[str]] = []
    monkeypatch.setattr("rich.live.Live.update", lambda _, table, **__: drawn.append([str(c) for c in cells_of(table)]))
    finals, numbers = [], []
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), width=120, force_terminal=is_terminal, color_system=None)
        asking = Asking(model, ByteTokenizer(), ["Who?"], "", 6, split_special_tokens=False, console=console)
        asking.of_text(context.read_text(), RandomPress(0.5), "random", None)
        finals.append([line for line in console.file.getvalue().splitlines() if "Who?" in line][-1])
        numbers.append(len(drawn))
    assert finals[0] == finals[1]
    assert numbers[0] == numbers[1], "drawn where nobody watches"
    assert len({cells[0] for cells in drawn}) > 3, "the answer of the full cache grew"


def cells_of(table: Table) -> list[object]:
    """What stands in the last row under each cache."""
    return [list(column.cells)[-1] for column in table.columns[1:]]
