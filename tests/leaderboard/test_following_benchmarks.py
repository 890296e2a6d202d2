"""Benchmarks that ask how caches follow the full one: what is the same by construction is so in their tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from kvzip_press.leaderboard.benchmarks import allocations, following, shares, sharing
from kvzip_press.leaderboard.benchmarks.following import Followed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import loaded_by_benchmarks  # as other processes do

    def run(module: Any, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(module, "load_on", loaded_by_benchmarks.tiny)
        out = tmp_path / "figures.json"
        module.main(model="tiny", device="cpu", output=out, **options)
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures

    return run


ALLOCATIONS: dict[str, Any] = {
    "contexts": 2,
    "tokens": 210,
    "task": ["hidden_facts"],
    "scorer": ["kvzip"],
    "removed": [0.6],
    "tolerance": [0.05],
    "others": 2,
    "answer_tokens": 2,
    "seed": 3,
}
SHARING: dict[str, Any] = {
    "contexts": 1,
    "tokens": 120,
    "keys": 2,
    "answer_tokens": 2,
    "shared": [1, 2],
    "removed": [0.0, 0.5],
    "pieces": 2,
    "min_cosine": -1.0,
    "press": "random",
    "seed": 1,
}


def test_allocations_are_compared_at_equal_bytes(run: Callable[..., dict[str, Any]]) -> None:
    figures = run(allocations, **ALLOCATIONS)
    cells = {(cell["scorer"], cell["allocation"]): cell for cell in figures["cells"]}
    full = cells["full cache", ""]
    assert (full["kl"], full["same"], full["unchanged"], full["kept"], full["questions"]) == (0, 1, 1, 1, 12)
    of_budget = ("global", "layer", "head", "adakv", "pyramid", "table")
    kept = {label: cells["kvzip", label]["kept"] for label in of_budget}
    assert max(kept.values()) - min(kept.values()) < 0.005
    assert cells["kvzip", "global"]["kl"] > 0
    for size in (16, 64):
        pages = cells["kvzip", f"pages of {size}"]
        assert kept["global"] - 2 * 3 * size / (6 * 120) < pages["kept"] <= kept["global"]
        assert pages[f"in_pages_of_{size}"] <= cells["kvzip", "global"][f"in_pages_of_{size}"]
    for label in ("tolerance a head", "tolerance a layer", "threshold"):
        assert cells["kvzip", f"{label}, kept about 0.4"]["kept"] == pytest.approx(kept["global"], abs=0.1)
    assert cells["kvzip", "tolerance 0.05 a head"]["kept_least"] < cells["kvzip", "tolerance 0.05 a head"]["kept_most"]


def test_shared_layers_are_compared_with_the_model_as_it_is(run: Callable[..., dict[str, Any]]) -> None:
    figures = run(sharing, **SHARING)
    cells = {(cell["layers"], cell["removed"]): cell for cell in figures["cells"]}
    assert len(cells) == 10
    assert cells["none", 0.0]["kl"] == 0 < cells["1, similar first", 0.0]["kl"]
    for ratio in (0.0, 0.5):
        whole = cells["none", ratio]["size"]
        assert cells["1, dissimilar first", ratio]["size"] == pytest.approx(whole * 2 / 3)
        assert cells["2, similar first", ratio]["size"] == pytest.approx(whole / 3)
    assert set(cells["2, dissimilar first", 0.0]["sources"]) == {"1", "2"}


@pytest.mark.any_transformers
@pytest.mark.parametrize(("module", "options"), [(allocations, ALLOCATIONS), (sharing, SHARING)])
def test_figures_are_the_same_for_any_number_of_processes(
    run: Callable[..., dict[str, Any]], module: Any, options: dict[str, Any]
) -> None:
    asked = {**options, "contexts": 3, "tokens": 200}
    assert run(module, **asked, workers=2) == run(module, **asked)


def test_caches_that_share_a_batch_are_followed_as_each_alone(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run(allocations, **ALLOCATIONS)
    monkeypatch.setattr(following, "FULL_CACHES", 0)
    alone = run(allocations, **ALLOCATIONS)
    for one, other in zip(together["cells"], alone["cells"], strict=True):
        assert one == {**other, **{name: pytest.approx(other[name], abs=1e-5) for name in ("kl", "kl_error")}}


def test_a_table_is_tried_on_pieces_that_it_was_not_searched_on(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The night ferry leaves at 21:40 from pier 9. " * 12)
    options = {"length": 64, "pieces": 6, "press": ["streaming_llm"], "removed": [0.8]}
    (cell,) = run(shares, text=[text], **options)["cells"]
    assert cell["pieces"] == 3
    assert cell["difference"] == pytest.approx(cell["table"] - cell["equal"])
    text.write_text("Too short.")
    with pytest.raises(typer.BadParameter, match="at least 4 pieces of 64 tokens, got 0"):
        run(shares, text=[text], **options)


def test_errors_are_those_of_means() -> None:
    followed = Followed((0.1, 0.3), (True, False), (True, True), (0.0, 1.0), (0.5,), (0.4,))
    assert followed.cells() == ["0.500", "0.400", "0.2000 ± 0.1000", "0.500", "1.000 ± 0.000", "0.500 ± 0.500"]
    assert (followed + followed).figures()["kl_error"] == pytest.approx(0.0577, abs=1e-4)
