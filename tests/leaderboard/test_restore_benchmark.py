"""The benchmark of eviction that is undone: it compares before it times, and its second table adds up."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from kvzip_press import RandomPress, compress
from kvzip_press.leaderboard.benchmarks import restore
from kvzip_press.loading import by_name
from kvzip_press.testing import ByteTokenizer, tiny_model


def test_it_runs_on_a_small_model() -> None:
    app = typer.Typer()
    app.command()(restore.main)
    options = ["--tokens", "120", "--contexts", "1", "--keys", "1", "--length", "120", "--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_name, "load_model", lambda name, **_: (tiny_model(num_layers=2), ByteTokenizer()))
        done = CliRunner().invoke(app, [*options, "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "restore from a file" in done.output
    assert "1 contexts of 120 tokens" in done.output


def test_a_cache_that_came_back_otherwise_is_an_error() -> None:
    cache = compress(tiny_model(num_layers=2), ByteTokenizer(), "A text of some length.", RandomPress(0.5))
    other = cache.fork()
    restore._check_same(other, cache)
    _, layer = next(iter(other.ragged_layers()))
    layer.packed = layer.packed._like(layer.packed.each(torch.clone))
    layer.packed.columns["keys"][0, 0] += 1
    with pytest.raises(AssertionError, match="differs"):
        restore._check_same(other, cache)


def test_what_is_asked_again_counts_with_the_answer_and_the_bytes_of_all_pairs() -> None:
    sure = restore._Answered(margin=0.9, entropy=0.1, scores=(1.0, 1.0), sizes=(10, 100))
    doubtful = restore._Answered(margin=0.3, entropy=1.2, scores=(0.0, 1.0), sizes=(10, 100))
    table = restore._monitored([sure, sure, sure, doubtful])
    rows = dict(
        zip(table.columns[0].cells, zip(*(column.cells for column in table.columns[1:]), strict=True), strict=True)
    )
    assert rows["never"] == ("0%", "0.75", "0%", "10%")
    assert rows["always"] == ("100%", "1.00", "100%", "100%")
    assert rows["margin < 0.4"] == rows["entropy > 1.0"] == ("25%", "1.00", "100%", "32%")
    assert rows["margin < 0.2"] == rows["entropy > 1.5"] == rows["never"]
