"""``kvzip-press heads``: scores of heads are made, exported and imported from the command line."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from kvzip_press import HeadScores
from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses import duo_attention, kvzip_head
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog and sleeps" * 2


@pytest.fixture
def invoke(monkeypatch):
    """Runs ``kvzip-press heads ...`` on a tiny model and returns what it printed."""
    monkeypatch.setattr("kvzip_press.loading.by_name.load_model", lambda name, **_: (tiny_model(name), TOKENIZER))

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["heads", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output.replace("\n", " ")

    return run


def test_the_command_computes_exports_and_imports(invoke, tmp_path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in texts:
        path.write_text(path.name + TEXT)
    out, again, pattern = tmp_path / "scores.safetensors", tmp_path / "again.safetensors", tmp_path / "pattern"
    said = invoke("compute", "--model", "llama", "--text", texts[0], "--text", texts[1], "--out", out)
    assert "3 layers of 2 heads" in said
    expected = kvzip_head.compute_head_scores(tiny_model(), TOKENIZER, [path.read_text() for path in texts])
    assert torch.equal(HeadScores.load(out).values, expected.values)
    invoke("export", "--format", "duo-attention", "--scores", out, "--out", pattern, "--recent-size", 64)
    assert "n_sink=128, window_size=64" in invoke("import", "--folder", pattern, "--out", again)
    assert torch.equal(HeadScores.load(again).values, expected.values)
    with pytest.raises(InvalidArgumentError, match="expected --format"):
        invoke("export", "--format", "other", "--scores", out, "--out", pattern)


def test_without_texts_the_command_reads_the_built_in_ones(invoke, monkeypatch, tmp_path) -> None:
    read = []

    def compute(model, tokenizer, texts, **options) -> HeadScores:
        read.extend(texts)
        return HeadScores(torch.rand(3, 2))

    monkeypatch.setattr(kvzip_head, "compute_head_scores", compute)
    said = invoke("compute", "--model", "llama", "--out", tmp_path / "scores.safetensors")
    assert "code, dialogue, essay, manual, prose, records, first half, second half" in said.replace("\n", " ")
    assert read == list(kvzip_head.builtin_texts().values())


def test_the_command_makes_duo_attention_scores_too(invoke, tmp_path) -> None:
    out, text = tmp_path / "scores.safetensors", tmp_path / "a.txt"
    text.write_text(TEXT * 5)
    invoke("compute", "--method", "duo-attention", "--model", "llama", "--text", text, "--out", out)
    expected = duo_attention.compute_head_scores(tiny_model(), TOKENIZER, [text.read_text()])
    assert torch.equal(HeadScores.load(out).values, expected.values)
    with pytest.raises(InvalidArgumentError, match="expected --method to be one of"):
        invoke("compute", "--method", "other", "--model", "llama", "--out", out)


def test_a_device_or_dtype_that_is_not_there_is_refused(invoke, tmp_path) -> None:
    out = tmp_path / "scores.safetensors"
    with pytest.raises(InvalidArgumentError, match=r"expected the device .* got 'cuda:99'"):
        invoke("compute", "--model", "llama", "--out", out, "--device", "cuda:99")
    with pytest.raises(InvalidArgumentError, match=r"expected a dtype among .*bf16.* got 'int8'"):
        invoke("compute", "--model", "llama", "--out", out, "--dtype", "int8")
