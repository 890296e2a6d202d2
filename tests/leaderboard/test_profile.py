"""`kvzip-press profile`: rows and table of a tiny model, the shapes' sizes, and what is said about the gain."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.profile import decode, grid, measure, run, shapes
from kvzip_press.leaderboard.profile.gains import sentences
from kvzip_press.leaderboard.profile.report import profile_tables
from kvzip_press.leaderboard.profile.rows import ProfileRow
from kvzip_press.leaderboard.rows.line_file import read_lines
from kvzip_press.model import devices

TINY = shapes.Shape(
    "llama",
    {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
)
SMALL = {"context_lengths": (40, 72), "decode_tokens": 2, "presses": ("kvzip", "random"), "kvpress": False}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def profile(directory: Path, **options: Any) -> tuple[list[ProfileRow], str]:
    console = Console(file=io.StringIO(), width=160)
    rows = run.run_profile(directory, shape="tiny", device="cpu", console=console, **{**SMALL, **options})
    return rows, console.file.getvalue()  # type: ignore[attr-defined]


def row(press: str = "kvzip", length: int = 4096, **values: Any) -> ProfileRow:
    engine = values.pop("engine", "ragged")
    defaults = {"prefill_seconds": 1.0, "compress_seconds": 0.5, "resident_bytes": 30, "dense_bytes": 100}
    ratio = 0.0 if press == "none" else 0.7
    return ProfileRow("m", press, engine, ratio, length, 32, **({} if "error" in values else defaults) | values)


def timed(ms: float, baseline_ms: float, mode: str = "eager", *, spread: float = 0.0) -> dict[str, Any]:
    """A decode time, measured in turns with a baseline; half of the turns gain by up to `spread` more or less."""
    speedup = baseline_ms / ms
    turns = {
        "low_ms": ms * (1 - spread),
        "high_ms": ms * (1 + spread),
        "baseline_ms": baseline_ms,
        "speedup_low": speedup * (1 - spread),
        "speedup": speedup,
        "speedup_high": speedup * (1 + spread),
    }
    return {f"decode_ms_{mode}": ms, "turns": {mode: turns}}


def said(*rows: ProfileRow) -> str:
    return "\n".join(sentences(rows))


def drawn(*rows: ProfileRow, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(profile_tables(rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


# The run -------------------------------------------------------------------------------------------------------------


def test_each_storage_is_a_row(tmp_path: Path) -> None:
    """Under its name, and only of our own engine; an unknown one is refused before anything is measured."""
    rows, printed = profile(tmp_path, context_lengths=(40,), presses=("random",), storages=("model", "int8"))
    ours = [(r.label, r.storage) for r in rows if r.press == "random"]
    assert ours == [("random", "model"), ("random, int8", "int8")] and "times" in printed
    assert rows[-1].error is None and rows[-1].resident_bytes < rows[-2].resident_bytes / 3
    with pytest.raises(InvalidArgumentError, match="expected a storage out of"):
        profile(tmp_path, storages=("int9",))


def test_every_case_is_a_row_on_disk_and_in_the_table(tmp_path: Path) -> None:
    rows, printed = profile(tmp_path, compression_ratios=(0.5, 0.7))
    assert [(r.context_length, r.label, r.compression_ratio) for r in rows] == [
        (length, *case)
        for length in (40, 72)
        for case in [("DynamicCache", 0), ("none", 0), *((n, r) for n in ("kvzip", "random") for r in (0.5, 0.7))]
    ]
    assert list(read_lines(tmp_path / "profile.jsonl", ProfileRow)) == rows
    for text in ("tiny, float32, CPU", "DynamicCache", "kvzip", "0.70", "72", "compress/", "profile.jsonl"):
        assert text in printed


def test_the_figures_of_a_row_are_those_of_its_cache(tmp_path: Path) -> None:
    rows, printed = profile(tmp_path)
    assert [r.error for r in rows] == [None] * len(rows)
    dense, none, kvzip = rows[0], rows[1], rows[2]
    assert dense.dense_bytes == none.dense_bytes == kvzip.dense_bytes == 2 * 2 * 40 * 2 * 16 * 4
    assert dense.resident_bytes == dense.dense_bytes
    assert none.kept_fraction == dense.kept_fraction == 1.0
    assert kvzip.kept_fraction == pytest.approx((4 + 0.3 * 36) / 40, abs=0.02)
    assert kvzip.resident_bytes < 0.5 * none.resident_bytes
    for r in rows:
        assert min(r.prefill_seconds, r.decode_ms_eager) > 0
        assert r.decode_ms_graph is None
        assert r.peak_prefill_bytes is None
    assert printed.count("No CUDA graph: the model is on cpu.") == 1


def test_rows_carry_what_they_depend_on(tmp_path: Path) -> None:
    about = profile(tmp_path, context_lengths=(40,))[0][0].provenance
    assert about["gpu"] == "CPU"
    assert {"torch", "transformers", "triton", "kvpress", "kvzip_press", "dtype", "commit", "date"} <= set(about)


def test_a_second_profile_appends(tmp_path: Path) -> None:
    for _ in range(2):
        rows, _ = profile(tmp_path, context_lengths=(40,), presses=("random",))
    assert len(list(read_lines(tmp_path / "profile.jsonl", ProfileRow))) == 2 * len(rows)


def test_a_press_that_fails_is_a_row_with_its_error_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_press = measure.get_press

    def failing(name: str, ratio: float) -> Any:
        if name == "kvzip":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")
        return get_press(name, ratio)

    monkeypatch.setattr(measure, "get_press", failing)
    rows, printed = profile(tmp_path, context_lengths=(40,))
    assert [r.press for r in rows if r.error] == ["kvzip"]
    assert rows[2].error == "OutOfMemoryError: CUDA out of memory."
    assert rows[3].press == "random"
    assert "at 40 tokens: OutOfMemoryError: CUDA out of memory." in printed


def test_more_tokens_than_positions_is_a_row_that_says_so(tmp_path: Path) -> None:
    rows, _ = profile(tmp_path, context_lengths=(508,))
    assert {r.error for r in rows} == {
        "InvalidArgumentError: expected context and decoded tokens within 512 positions, got 513"
    }


def test_a_step_that_is_captured_is_timed_in_its_graph_and_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Captured:
        def __init__(self, model: Any, cache: Any, **options: Any) -> None:
            made.append(options)
            self.captured = options.get("graph") is not False
            self.reason = None if self.captured else "graph=False"

        def __enter__(self) -> Captured:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
            assert token_ids.shape == (1,)
            return torch.zeros(1, 128)

    monkeypatch.setattr("kvzip_press.decoding.step.DecodeStep", Captured)
    rows, printed = profile(tmp_path, context_lengths=(40,), presses=("random",), compile=True)
    assert all(r.decode_ms_graph is not None and r.decode_ms_compiled is not None for r in rows[1:])
    assert {"max_new_tokens": 5, "compile": True} in made
    assert "compiled" in printed
    assert "No CUDA graph" not in printed


def test_a_step_that_cannot_be_compiled_leaves_the_other_figures(tmp_path: Path) -> None:
    rows, printed = profile(tmp_path, context_lengths=(40,), presses=("random",), compile=True)
    assert rows[1].decode_ms_compiled is None
    assert rows[1].decode_ms_eager is not None
    assert "Compiled decode step: InvalidArgumentError" in printed


@pytest.mark.kvpress
def test_kvpress_runs_its_own_way_and_leaves_nothing_behind(tmp_path: Path) -> None:
    if find_spec("kvpress") is None:
        pytest.skip("needs kvpress")
    before = dict(ALL_ATTENTION_FUNCTIONS)
    rows, printed = profile(tmp_path, context_lengths=(200,), presses=("kvzip", "snapkv", "kvzip_local"), kvpress=True)
    by_label = {r.label: r for r in rows}
    assert [r.error for r in rows] == [None] * len(rows)
    assert "kvzip_local (kvpress)" not in by_label
    kvzip, snapkv = by_label["kvzip (kvpress)"], by_label["snapkv (kvpress)"]
    assert kvzip.resident_bytes == kvzip.dense_bytes  # masks free nothing
    assert kvzip.kept_fraction == pytest.approx(0.3, abs=0.01)
    assert snapkv.resident_bytes == pytest.approx(0.3 * snapkv.dense_bytes, rel=0.02)
    after = dict(ALL_ATTENTION_FUNCTIONS)
    assert all(after[name] is function for name, function in before.items())
    assert "kvzip (kvpress), 70% removed:" in printed


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "llama3.1-80b"], "expected a shape among llama3.1-8b.*got 'llama3.1-80b'; did you mean"),
        (["--shape", "tiny", "--model", "m"], "exactly one of --model and --shape, got both 'm' and 'tiny'"),
        ([], "exactly one of --model and --shape, got neither"),
        (["--shape", "tiny", "--compression-ratio", "1.5"], r"in \[0, 1\), got 1.5"),
        (["--shape", "tiny", "--press", "kvzp"], "expected a press among.*got 'kvzp'; did you mean 'kvzip'"),
        (["--shape", "tiny", "--dtype", "int8"], "expected a dtype among fp32.*got 'int8'"),
        (["--shape", "tiny", "--device", "tpu"], "expected the device cpu.*got 'tpu'"),
        (["--shape", "tiny", "--decode-tokens", "0"], "at least 1, got .* and 0"),
    ],
)
def test_what_is_out_of_range_is_refused_before_a_model_is_made(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["profile", *options])
    assert isinstance(result.exception, InvalidArgumentError)
    with pytest.raises(InvalidArgumentError, match=message):
        raise result.exception


def test_the_command_profiles(tmp_path: Path) -> None:
    small = ["--context-length", "40", "--press", "random", "--decode-tokens", "1", "--no-kvpress", "--device", "cpu"]
    result = CliRunner().invoke(app, ["profile", "--shape", "tiny", *small, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(list(read_lines(tmp_path / "profile.jsonl", ProfileRow))) == 3


def test_without_kvpress_its_presses_are_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    get_press = grid.get_press

    def absent(name: str, ratio: float) -> Any:
        if name == "snapkv":
            raise MissingDependencyError("found no kvpress")
        return get_press(name, ratio)

    monkeypatch.setattr(grid, "get_press", absent)
    lines: list[str] = []
    made = grid.make_grid(torch.device("cpu"), kvpress=False, say=lines.append)
    assert made.presses == ("kvzip", "kvzip_local")
    assert made.context_lengths == (1024, 4096)
    assert lines == ["left out: snapkv (found no kvpress)"]
    with pytest.raises(MissingDependencyError):
        grid.make_grid(torch.device("cpu"), presses=("snapkv",), kvpress=False)


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-0.5b", 0.494),
        ("llama3.1-8b", 8.03),
        ("qwen2.5-7b", 7.62),
        ("qwen3-8b", 8.19),
        ("gemma3-12b", 11.77),
    ],
)
def test_a_shape_has_the_published_number_of_parameters(name: str, billions: float) -> None:
    model = shapes.random_model(shapes.get_shape(name), torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_layers_of_gemma_slide_but_for_every_sixth() -> None:
    kinds = shapes.get_shape("gemma3-12b").config().layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == list(range(5, 48, 6))


# What is said --------------------------------------------------------------------------------------------------------


def test_the_gain_begins_where_a_step_takes_two_per_cent_less() -> None:
    text = said(
        row("none", 4096, decode_ms_graph=8.0, decode_ms_eager=20.0),
        row("none", 16384, decode_ms_graph=8.5, decode_ms_eager=20.0),
        row("none", 65536, decode_ms_graph=12.0, decode_ms_eager=20.0),
        row("kvzip", 4096, decode_ms_eager=1.0, **timed(7.9, 8.0, "graph")),
        row("kvzip", 16384, decode_ms_eager=30.0, **timed(8.0, 8.5, "graph")),
        row("kvzip", 65536, decode_ms_eager=30.0, compress_seconds=4.0, **timed(8.0, 12.0, "graph")),
    )
    assert "decode (in a CUDA graph) gains from 16384 tokens on (8.00 ms beside 8.50 ms)" in text
    assert "at 65536 tokens it is 1.50 (1.50 to 1.50) times as fast (8.00 ms beside 12.00 ms)" in text
    assert "paid back: 1000 at 16384, 1000 at 65536" in text
    assert "no gain beyond the spread (in a CUDA graph) at 4096 tokens (7.90 ms beside 8.00 ms, 1.01 (1.01 to" in text


def test_no_gain_anywhere_is_said() -> None:
    text = said(row("none", decode_ms_eager=5.0), row("kvzip", **timed(6.0, 5.0)))
    assert text == (
        "kvzip, 70% removed: no gain beyond the spread (eager) at 4096 tokens "
        "(6.00 ms beside 5.00 ms, 0.83 (0.83 to 0.83) times as fast)."
    )


@pytest.mark.parametrize(("spread", "gains"), [(0.05, True), (0.15, False)])
def test_a_gain_is_one_that_exceeds_its_spread(spread: float, gains: bool) -> None:
    """Two caches of equal bytes were once 1.14 times as fast as each other."""
    text = said(row("none", decode_ms_eager=5.0), row("kvzip", **timed(5.0, 5.7, spread=spread)))
    assert ("gains from 4096 tokens on" in text) is gains
    assert ("no gain beyond the spread" in text) is not gains


def test_what_was_not_timed_in_turns_is_no_gain() -> None:
    """Rows of older versions: each cache was timed alone."""
    text = said(row("none", decode_ms_eager=5.0), row("kvzip", decode_ms_eager=1.0))
    assert text == "kvzip, 70% removed: nothing to compare with at 4096 tokens."


def test_kvpress_is_compared_with_a_dynamic_cache() -> None:
    text = said(
        row("none", decode_ms_eager=10.0, engine="dense"),
        row("none", decode_ms_eager=5.0, decode_ms_graph=2.0),
        row("snapkv", engine="kvpress", compress_seconds=0.0, **timed(8.0, 10.0)),
    )
    assert "snapkv (kvpress), 70% removed: decode (eager) gains from 4096 tokens on (8.00 ms beside 10.00 ms)" in text
    assert "paid back" not in text
    assert "5.00 ms eager (2.00 ms in a CUDA graph) of the ragged cache, 10.00 ms eager of a plain DynamicCache" in text


def test_a_press_of_ours_stands_beside_a_dynamic_cache_too() -> None:
    text = said(
        row("none", decode_ms_eager=4.0, engine="dense"),
        row("none", decode_ms_eager=9.0),
        row("kvzip", **timed(6.0, 9.0)),
    )
    assert "(6.00 ms beside 9.00 ms), 1.50 (1.50 to 1.50) times as fast" in text
    assert text.endswith("a plain DynamicCache (eager) takes 4.00 ms at 4096 tokens.")


def test_an_error_and_a_missing_baseline_are_said() -> None:
    text = said(
        row("none", 16384, error="OutOfMemoryError: full"),
        row("kvzip", 16384, decode_ms_eager=6.0),
        row("kvzip", 65536, error="OutOfMemoryError: full"),
    )
    assert "none at 16384 tokens: OutOfMemoryError: full." in text
    assert "nothing to compare with at 16384 tokens; at 65536 tokens: OutOfMemoryError: full." in text


def test_the_table_shows_shares_peaks_and_dashes() -> None:
    text = drawn(
        row("none", decode_ms_eager=5.0, resident_bytes=100),
        row(
            "kvzip",
            peak_prefill_bytes=7_000_000,
            peak_compress_bytes=9_000_000,
            **timed(4.25, 5.0, "graph", spread=0.05),
        ),
        row("snapkv", error="OutOfMemoryError: full"),
    )
    none, kvzip, snapkv = ([line.split() for line in text.splitlines() if name in line] for name in NAMES)
    assert none[0] == ["4096", "none", "-", "1.000", "0.500", "5.00", "-"]
    assert none[1] == ["4096", "none", "-", "0.50", "0.0", "1.00", "-"]
    assert kvzip == [
        ["kvzip", "0.70", "1.000", "0.500", "-", "4.25", "±0.21"],
        ["kvzip", "0.70", "0.50", "0.0", "3.33", "9.0"],
    ]
    assert snapkv == [["snapkv", "0.70", "error"]] * 2


NAMES = ("none", "kvzip", "snapkv")


def test_the_tables_fit_80_columns_with_large_figures() -> None:
    large = {
        "prefill_seconds": 12345.678,
        "compress_seconds": 23456.789,
        "decode_ms_compiled": 1234.56,
        "decode_ms_graph": 2345.67,
        "resident_bytes": 98_765_400_000,
        "dense_bytes": 198_765_400_000,
        "peak_prefill_bytes": 123_456_700_000,
    }
    eager = timed(3456.78, 4000.0, spread=0.1)
    turns = {mode: {"low_ms": 1000.0, "high_ms": 3000.0} for mode in ("graph", "compiled")} | eager.pop("turns")
    text = drawn(row("criticaladakv_expected_attention", 131072, **large, **eager, turns=turns), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for figure in ("131072", "0.70", "12346", "23457", "3457 ±346", "2346 ±1000", "1235 ±1000", "1.90", "98765",
                   "2.01", "123457"):  # fmt: skip
        assert figure in text, figure


def test_two_caches_are_timed_in_turns_and_compared_turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock doubles its pace halfway: one cache after the other would differ, turns do not."""
    calls: list[str] = []
    clock = {"now": 0.0, "pace": 1.0}

    def step(name: str, seconds: float) -> Any:
        def run_once() -> None:
            calls.append(name)
            clock["pace"] = 1.0 if len(calls) <= 10 else 2.0
            clock["now"] += seconds * clock["pace"]

        return run_once

    monkeypatch.setattr(devices, "now", lambda device: clock["now"])
    found = decode._in_turns([step("own", 0.004), step("baseline", 0.006)], torch.device("cpu"), 4)
    assert calls == ["own", "baseline"] * (decode.WARMUP_STEPS + 4)
    assert (found["speedup_low"], found["speedup"], found["speedup_high"]) == pytest.approx((1.5, 1.5, 1.5))
    assert (found["ms"], found["baseline_ms"], found["high_ms"]) == pytest.approx((6.0, 9.0, 8.0))


def test_a_press_is_timed_beside_what_keeps_everything(tmp_path: Path) -> None:
    rows, _ = profile(tmp_path, context_lengths=(40,), presses=("random",))
    dense, none, random = (one.turns["eager"] for one in rows)
    assert dense["speedup"] is none["speedup"] is None
    assert random["speedup_low"] <= random["speedup"] <= random["speedup_high"]
    assert random["baseline_ms"] > 0 and random["low_ms"] <= rows[2].decode_ms_eager <= random["high_ms"]


# Rows ----------------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_from_its_line_and_unknown_fields_are_left_out() -> None:
    made = row("kvzip", decode_ms_graph=1.5, notes={"compiled": "x"}, provenance={"torch": "2"})
    values = json.loads(made.to_json())
    assert ProfileRow.from_json(json.dumps({**values, "newer": 1})) == made
    with pytest.raises(InvalidArgumentError, match="expected a row of a profile in JSON"):
        ProfileRow.from_json("{}")


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.jsonl"
    path.write_text(row().to_json() + "\n" + "[]\n")
    with pytest.raises(InvalidArgumentError, match=r"profile\.jsonl:2"):
        list(read_lines(path, ProfileRow))
