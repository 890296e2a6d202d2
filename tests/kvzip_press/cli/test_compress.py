"""`compress` makes the folder of contexts that sessions and servers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvzip_press import RandomPress, compress
from kvzip_press.cache.file.reading import read_record
from kvzip_press.cli.compressing import texts_of
from kvzip_press.cli.main import app
from kvzip_press.decoding.answering import answer_ids
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.loading import command_options
from kvzip_press.serving.session import Session
from kvzip_press.testing import ByteTokenizer, tiny_model


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ByteTokenizer]:
    model, tokenizer = tiny_model("llama"), ByteTokenizer()
    monkeypatch.setattr(command_options, "load", lambda *_: (model, tokenizer))
    return model, tokenizer


def test_a_text_becomes_a_context_that_a_session_answers_about(tiny: tuple[Any, ByteTokenizer], tmp_path: Path) -> None:
    texts = {"report": "Vera signed it. " * 4, "b": "Nobody signed this one."}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    options = ["--press", "random", "--compression-ratio", "0.5", "--out", str(tmp_path / "made" / "contexts")]
    named = [*options, "--name", "signed.2"]
    both = [*options, "--text", str(tmp_path / "report.txt"), "--text", str(tmp_path / "b.txt"), "--storage", "int8"]
    for arguments in (["--text", str(tmp_path / "report.txt"), *named], both):
        done = CliRunner().invoke(app, ["compress", "--model", "tiny", *arguments])
        assert done.exit_code == 0, done.output
    assert "report: " in done.output and "50" in done.output and "of pairs kept" in done.output
    folder = tmp_path / "made" / "contexts"
    assert [read_record(folder / f"{n}.safetensors").layers[0].storage for n in ("signed.2", "b")] == ["model", "int8"]
    session = Session(*tiny, folder, pool_bytes=10**6)
    assert session.names == ["b", "report", "signed.2"]
    cache = compress(*tiny, texts["report"].rstrip(), RandomPress(0.5), split_special_tokens=True)
    stream = session.submit("Who?", "signed.2", max_new_tokens=5)
    stream.text()
    assert stream.ids == answer_ids(*tiny, cache, "Who?", max_new_tokens=5)[0]


@pytest.mark.parametrize(
    ("names", "name", "message"),
    [
        (["a.txt"], "../a", "expected a name of letters, digits"),
        (["b c.txt"], None, "expected a name of letters, digits"),
        (["a.txt", "b.txt"], "a", "expected --name with one --text, got 2 texts"),
        (["a.txt", "a.md"], None, "expected files of different names, got several of a"),
    ],
    ids=["a path", "a blank", "two texts", "one name"],
)
def test_a_name_that_nobody_could_ask_for_is_refused(
    names: list[str], name: str | None, message: str, tmp_path: Path
) -> None:
    for one in names:
        (tmp_path / one).write_text("A text.")
    with pytest.raises(InvalidArgumentError, match=message):
        texts_of([tmp_path / one for one in names], name)
