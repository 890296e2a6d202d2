"""The search for layers that can share, from the distances of keys and values to the file that it writes."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvzip_press import share_layers
from kvzip_press.cli.main import app
from kvzip_press.compat import DynamicCache
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.sharing.search import find_shared_layers
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXTS = ["The night ferry leaves at 21:40 from pier 9. " * 2, "The quota of the third quarter is 310 tonnes of cod."]
SIZES: dict[str, Any] = {"n_tokens": 16, "n_pieces": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def pieces() -> torch.Tensor:
    """Four of the eight pieces that both texts have, every other one."""
    rows = [TOKENIZER.encode(text) for text in TEXTS]
    every = [row[i : i + 16] for row in rows for i in range(0, len(row) - 15, 16)]
    return torch.tensor(every[::2])


@torch.no_grad()
def hidden(model: Any, sources: dict[int, int]) -> torch.Tensor:
    if not sources:
        return model.model(pieces()).last_hidden_state.flatten(1)
    with share_layers(model, sources):
        return model.model(pieces()).last_hidden_state.flatten(1)


def mean_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)).mean())


@torch.no_grad()
def in_order(model: Any, sign: int) -> list[tuple[int, int]]:
    """(later layer, earlier layer) by the distance of their mean keys and values, halves of both."""
    cache = DynamicCache()
    model.model(pieces(), past_key_values=cache)
    apart = {}
    for source, layer in combinations(range(len(cache.layers)), 2):
        one, other = cache.layers[layer], cache.layers[source]
        keys, values = one.keys.mean(0) - other.keys.mean(0), one.values.mean(0) - other.values.mean(0)
        apart[layer, source] = float(keys.norm(dim=-1).mean() + values.norm(dim=-1).mean()) / 2
    return sorted(apart, key=lambda pair: sign * apart[pair])


@pytest.mark.parametrize(("order", "sign"), [("dissimilar", -1), ("similar", 1)])
def test_pairs_of_layers_are_tried_in_order_and_taken_if_the_cosine_stays(order: Any, sign: int) -> None:
    model = tiny_model(num_layers=5)
    before = hidden(model, {})
    alone = sorted(mean_cosine(before, hidden(model, {layer: source})) for layer, source in in_order(model, sign))
    least = (alone[4] + alone[5]) / 2
    expected: dict[int, int] = {}
    refused, n_tried = 0, 0
    for layer, source in in_order(model, sign):
        if layer in expected or len(expected) == 3:
            continue
        n_tried += 1
        tried = {**expected, layer: source}
        while any(one in tried for one in tried.values()):
            tried = {one: tried.get(other, other) for one, other in tried.items()}
        if mean_cosine(before, hidden(model, tried)) > least:
            expected = tried
        else:
            refused += 1
    found = find_shared_layers(model, TOKENIZER, TEXTS, n_shared=3, min_cosine=least, order=order, **SIZES)
    assert found.sources == expected
    assert found.n_tried == n_tried
    assert refused  # else the bound would not show
    assert found.cosine == pytest.approx(mean_cosine(before, hidden(model, expected)), abs=1e-5)


def test_where_no_pair_passes_no_layer_shares() -> None:
    found = find_shared_layers(tiny_model(num_layers=3), TOKENIZER, TEXTS, n_shared=2, min_cosine=1.0, **SIZES)
    assert (found.sources, found.cosine, found.n_tried) == ({}, 1.0, 3)


def test_what_cannot_be_searched_is_refused() -> None:
    model = tiny_model(num_layers=2)
    for options, match in (
        ({"n_shared": 2}, "expected 1 to 1 layers to share"),
        ({"n_shared": 1, "order": "nearest"}, "one of dissimilar, similar, got 'nearest'"),
        ({"n_shared": 1, "n_tokens": 200}, "a text of at least 200 tokens, got 90 in the longest"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            find_shared_layers(model, TOKENIZER, TEXTS, **{**SIZES, **options})


def test_the_command_writes_a_file_with_which_a_model_shares(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvzip_press.loading.by_name.load_model", lambda name, **_: (tiny_model(), TOKENIZER))
    (tmp_path / "text.txt").write_text(TEXTS[0])
    arguments = ["layers", "share", "--model", "llama", "--text", str(tmp_path / "text.txt"), "--out"]
    out = tmp_path / "shared.json"
    done = CliRunner().invoke(app, [*arguments, str(out), "--n-shared", "1", "--min-cosine", "-1"])
    assert done.exit_code == 0, done.output
    assert "1 of 3 layers share" in done.output.replace("\n", " ")
    written = json.loads(out.read_text())
    assert written["provenance"]["order"] == "dissimilar" and written["model"]["num_hidden_layers"] == "3"
    model = tiny_model()
    with share_layers(model, out):
        assert [
            str(i) for i, layer in enumerate(model.model.layers) if hasattr(layer.self_attn.k_proj, "shares_with")
        ] == [*written["sources"]]
    nothing = CliRunner().invoke(app, [*arguments, str(tmp_path / "none.json"), "--n-shared", "1", "--min-cosine", "1"])
    assert isinstance(nothing.exception, InvalidArgumentError) and "got none of 3" in str(nothing.exception)
    assert not (tmp_path / "none.json").exists()
