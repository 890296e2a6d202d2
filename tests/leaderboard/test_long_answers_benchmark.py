"""Long answers with and without eviction: caches are of their size, times add up, and the most rows are found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.benchmarks import eviction_cost, eviction_parts, long_answers, periods
from kvzip_press.leaderboard.benchmarks.made_caches import bytes_of_a_token, dynamic_cache, ragged_cache
from kvzip_press.leaderboard.benchmarks.periods import Period
from kvzip_press.registry import get_press
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=2)


def test_made_caches_hold_what_they_are_asked_to(model: Any) -> None:
    ragged, dense = ragged_cache(model, 3, 20), dynamic_cache(model, 3, 20)
    assert ragged.dense_bytes == 3 * 20 * bytes_of_a_token(model)
    assert [layer.packed.seqlens.unique().tolist() for _, layer in ragged.ragged_layers()] == [[20], [20]]
    assert dense.get_seq_length() == 20 and dense.layers[0].keys.shape[0] == 3
    with torch.no_grad():
        assert model(torch.tensor([[5], [6], [7]]), past_key_values=dense).logits.shape[:2] == (3, 1)


def test_a_period_begins_and_ends_with_an_eviction_that_is_not_the_first(model: Any) -> None:
    held = []
    made = periods.ragged_cache

    def noted(*size: Any) -> Any:
        held.append(made(*size))
        return held[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(periods, "ragged_cache", noted)
        result = long_answers._evicting(model, get_press("h2o", budget=16, buffer=6), 16, 6, 3, 100)
    (cache,) = held
    assert cache.get_seq_length() == 16 + 6 - 4 + 4 + 2 * 6
    assert [layer.packed.seqlens.unique().tolist() for _, layer in cache.ragged_layers()] == [[16], [16]]
    assert [layer.tail.length for _, layer in cache.ragged_layers()] == [0, 0]
    assert result.rows == 3 and result.tokens_a_second == pytest.approx(3e3 / result.ms[19])


@pytest.mark.parametrize(("room", "expected"), [(1000, 98), (700, 70), (1300, 127)])
def test_the_most_rows_are_found_from_below_and_from_above(
    monkeypatch: pytest.MonkeyPatch, room: int, expected: int
) -> None:
    """Two small caches foretell 98 rows of 10 bytes each."""
    monkeypatch.setattr(long_answers, "_free_bytes", lambda device: 1000)

    def run(rows: int) -> Any:
        if rows > 24 and rows * 10 > room:
            raise torch.OutOfMemoryError
        return Period(1.0, 2.0, rows * 10)

    tried: list[int] = []
    rows, _ = long_answers._most_that_run(SimpleNamespace(device=torch.device("cpu")), run, tried)
    assert rows == expected and min(tried) > rows


def test_times_between_lengths_lie_on_a_line(model: Any) -> None:
    """Ten steps a length from 10 to 20 ms, twenty from 20 to 40 ms; a size that does not fit is left for a smaller."""
    ms = {10: 10.0, 20: 20.0, 40: 40.0}

    def timed(model: Any, rows: int, length: int, steps: int) -> float:
        if rows > 95:
            raise torch.OutOfMemoryError
        return ms[length]

    result = long_answers._written(model, 100, [10, 20, 40], 1, timed, shrinks=True)
    assert (result.rows, result.seconds, result.ms) == (94, pytest.approx(0.15 + 0.6), ms)
    assert result.tokens_a_second == pytest.approx(94 * 30 / 0.75) and "with 100 rows" in result.notes[0]
    with pytest.raises(torch.OutOfMemoryError):
        long_answers._written(model, 100, [10, 40], 1, timed, shrinks=False)


def test_the_cost_of_evicting_is_beside_steps_over_as_many_tokens(model: Any, capsys: Any) -> None:
    """On average, as near as whole tokens come: 16 to 20, and 16 to 17."""
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction_cost, "measured_model", lambda *place: model)
        patch.setattr(eviction_cost, "period", lambda *args, **options: Period(2.0, 5.0, None))
        patch.setattr(eviction_cost, "steps_ms", lambda *args: begun.append(args[2:]) or 1.6)
        eviction_cost.main(model="tiny", press=["h2o"], budget=16, buffer=[4, 1], turns=1, steps=4, device="cpu")
    assert begun == [(16, 4), (14, 4)]
    assert "+25.0 %" in capsys.readouterr().out


def test_a_profile_says_what_evictions_spend_their_time_with(model: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction_cost, "measured_model", lambda *place: model)
        eviction_cost.main(
            model="tiny", press=["snapkv_decode", "h2o"], budget=40, buffer=[3], turns=1, steps=3, device="cpu",
            profile=tmp_path / "parts",
        )  # fmt: skip
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == ["h2o-3.txt", "snapkv_decode-3.txt"]
    text = (tmp_path / "parts" / "h2o-3.txt").read_text()
    assert "tiny, 1 rows of 40 tokens, cpu: h2o, every 3" in text and "aten::index_copy_" in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith(("launches", "busy"))] == ["0.000"] * 2


def test_what_a_device_did_is_told_by_kernel_with_the_time_between() -> None:
    """Of runs that overlap, the device was busy once."""

    def event(name: str, start: float, end: float, kind: str = "CUDA") -> Any:
        times = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(
            name=name, device_type=SimpleNamespace(name=kind), time_range=times, self_cpu_time_total=end - start
        )

    taken = eviction_parts.Spent(seconds=[0.002, 0.004])
    for _ in range(eviction_parts.N_EVICTIONS):
        taken.add([event("sort", 0, 3000), event("copy", 2000, 4000), event("copy", 9000, 10000)])
        taken.add([event("cudaStreamSynchronize", 0, 500, "CPU")])
    lines = [line.split(None, 1) for line in taken.text().splitlines() if line]
    assert [value for value, _ in lines[:5]] == ["3.000", "3.000", "1.000", "5.000", "5.000"]
    assert ["3.000", "1.0  sort"] in lines and ["3.000", "2.0  copy"] in lines
    assert ["0.500", "1.0  cudaStreamSynchronize"] in lines


def test_what_cannot_be_measured_is_refused_before_a_model_is_made() -> None:
    with pytest.raises(InvalidArgumentError, match="exactly one of --shape and --model"):
        long_answers.main(device="cpu")
    with pytest.raises(InvalidArgumentError, match="--rows and --full-rows on a CPU"):
        long_answers.main(shape="llama3.1-8b", device="cpu")
