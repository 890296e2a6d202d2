"""Every command, given a path that is not what it needs, ends with one line and a status, and never waits."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvzip_press.cli.main import main
from kvzip_press.leaderboard import demo
from kvzip_press.loading import by_name
from kvzip_press.testing import ByteTokenizer, tiny_model

KINDS = (
    "missing",
    "folder",
    "pipe",
    "binary",
    "nulls",
    "empty",
    "unreadable",
    "under a file",
    "name too long",
    "\x1b[31m",
)
COMMANDS = (
    ("ask", "--question", "Who?", "--press", "random", "--max-new-tokens", "1", "--context", "PATH"),
    ("ask", "--question", "Who?", "--cache", "PATH"),
    ("heads", "compute", "--model", "tiny", "--out", "OUT", "--text", "PATH"),
    ("heads", "export", "--out", "OUT", "--scores", "PATH"),
    ("heads", "import", "--out", "OUT", "--folder", "PATH"),
    ("gates", "train", "--model", "tiny", "--out", "OUT", "--data", "PATH"),
    ("leaderboard", "run", "--device", "cpu", "--output", "OUT", "--grid", "PATH"),
    ("leaderboard", "table", "PATH"),
    ("leaderboard", "report", "--output", "OUT", "PATH"),
    ("leaderboard", "export", "--output", "OUT", "PATH"),
    ("leaderboard", "import", "--output", "OUT", "PATH"),
    ("leaderboard", "merge", "--output", "OUT", "PATH"),
)
INSIDE = (
    ("leaderboard", "table", "rows.jsonl"),
    ("leaderboard", "report", "rows.jsonl", "--output", "OUT"),
    ("leaderboard", "export", "rows.jsonl", "--output", "OUT"),
    ("leaderboard", "merge", "rows.jsonl", "--output", "OUT"),
    ("leaderboard", "import", "config.yaml", "--output", "OUT"),
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands' models are tiny, and a command that waits is stopped."""

    def load(*_: object, **__: object) -> tuple[Any, Any]:
        return tiny_model(num_layers=1), ByteTokenizer()

    for module in (demo, by_name):
        monkeypatch.setattr(module, "load_model", load)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the command waits"))
    signal.alarm(600)  # a pipe is waited for without end, all else takes seconds, or minutes on a busy machine
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def skip_as_root() -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")


def made(path: Path, kind: str) -> Path:
    """Makes what ``kind`` names at a path, and returns the path that a command is given."""
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "binary":
            path.write_bytes(bytes(range(256)) * 20)
        case "nulls":
            path.write_bytes(b"\0" * 1000)
        case "empty":
            path.write_bytes(b"")
        case "unreadable":
            skip_as_root()
            path.write_text("anything", encoding="utf-8")
            path.chmod(0)
        case "under a file":
            path.write_text("anything", encoding="utf-8")
            return path / "inner"
        case "name too long":
            return path.with_name("x" * 5000)
        case "\x1b[31m":
            return path.with_name("no\x1b[31msuch\n\x07file")
    return path


def check(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kvzip-press", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code == 1, said
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("error: "), said
    assert "Traceback" not in said.err and len(said.err.strip().splitlines()) == 1, said
    assert not any(character in said.out + said.err for character in ("\x1b[31msuch", "\x07")), said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[:2]) + command[-2])
def test_a_path_of_another_kind_is_one_line(
    tmp_path: Path,
    command: tuple[str, ...],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = made(tmp_path / "given", kind)
    check([{"PATH": str(path), "OUT": str(tmp_path / "out")}.get(part, part) for part in command], monkeypatch, capfd)


@pytest.mark.parametrize("kind", ["folder", "pipe", "binary", "unreadable"])
@pytest.mark.parametrize("command", INSIDE, ids=lambda command: "-".join(command[:3]))
def test_a_file_of_another_kind_inside_a_folder_is_one_line(
    tmp_path: Path,
    command: tuple[str, ...],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "given").mkdir()
    group, name, file, *options = command
    made(tmp_path / "given" / file, kind)
    for other in ("config.json", "full_attention_heads.tsv", "predictions.csv", "metrics.json"):
        if not os.path.lexists(tmp_path / "given" / other):
            (tmp_path / "given" / other).write_text("{}", encoding="utf-8")
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    check([group, name, *options, str(tmp_path / "given")], monkeypatch, capfd)


GRID = """\
model: tiny
compression_ratios: [0.5]
tasks: [{task: hidden_facts, contexts: 1, tokens: 160}]
presses: [{press: random}]
"""


@pytest.mark.parametrize("kind", ["folder", "under a file"])
@pytest.mark.parametrize(
    "command",
    [
        (
            "ask",
            "--question",
            "Who?",
            "--press",
            "random",
            "--context",
            "TEXT",
            "--max-new-tokens",
            "1",
            "--save",
            "PATH",
        ),
        ("heads", "compute", "--model", "tiny", "--text", "TEXT", "--out", "PATH"),
        ("leaderboard", "report", "RUN", "--output", "PATH"),
        ("leaderboard", "export", "RUN", "--output", "PATH"),
        ("leaderboard", "run", "--grid", "GRID", "--device", "cpu", "--output", "PATH"),
        ("demo", "--model", "tiny", "--output", "PATH"),
        ("profile", "--model", "tiny", "--device", "cpu", "--context-length", "64", "--output", "PATH"),
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path,
    command: tuple[str, ...],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if kind == "folder" and command[:2] not in {("ask", "--question"), ("heads", "compute"), ("leaderboard", "report")}:
        pytest.skip("it writes into a folder")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rows.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "text").write_text("The number of Vera is 47. " * 20, encoding="utf-8")
    (tmp_path / "grid.yaml").write_text(GRID, encoding="utf-8")
    path = made(tmp_path / "given", kind)
    places = {
        "PATH": str(path),
        "TEXT": str(tmp_path / "text"),
        "RUN": str(tmp_path / "run"),
        "GRID": str(tmp_path / "grid.yaml"),
    }
    check([places.get(part, part) for part in command], monkeypatch, capfd)


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "--question", "Who?", "--press", "random", "--context", "TEXT", "--save", "PATH"),
        ("compress", "--text", "TEXT", "--press", "random", "--out", "PATH"),
        ("heads", "compute", "--model", "tiny", "--text", "TEXT", "--out", "PATH"),
        ("layers", "share", "--model", "tiny", "--text", "TEXT", "--out", "PATH"),
        ("budgets", "profile", "--model", "tiny", "--text", "TEXT", "--out", "PATH"),
        ("queries", "calibrate", "--model", "tiny", "--text", "TEXT", "--out", "PATH"),
        ("leaderboard", "run", "--grid", "GRID", "--device", "cpu", "--output", "PATH"),
        ("demo", "--model", "tiny", "--output", "PATH"),
        ("profile", "--model", "tiny", "--device", "cpu", "--context-length", "64", "--output", "PATH"),
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    for module in (demo, by_name):
        monkeypatch.setattr(module, "load_model", load)
    (tmp_path / "text").write_text("The number of Vera is 47. " * 20, encoding="utf-8")
    (tmp_path / "grid.yaml").write_text(GRID, encoding="utf-8")
    places = {"PATH": str(made(tmp_path / "given", "under a file")), "TEXT": str(tmp_path / "text")}
    places["GRID"] = str(tmp_path / "grid.yaml")
    check([places.get(part, part) for part in command], monkeypatch, capfd)
