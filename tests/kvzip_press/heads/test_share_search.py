"""Importance of heads and shares of the budget, from the command to the file that the allocation "table" reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvzip_press import RandomPress, get_press
from kvzip_press.budget.allocators import Table, Threshold
from kvzip_press.cli import budgets
from kvzip_press.cli.main import app
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.heads import share_search
from kvzip_press.heads.importance import head_importance
from kvzip_press.heads.share_search import find_shares
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXTS = [
    "The night ferry leaves at 21:40 from pier 9. " * 2,
    "The quota of the third quarter is 310 tonnes of cod. " * 2,
]

pytestmark = pytest.mark.usefixtures("one_thread")


def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_importance_is_that_of_the_definition(architecture: str) -> None:
    """From the attention weights and the residual stream of an eager model; texts count by their tokens."""
    model, rows = tiny_model(architecture), [TOKENIZER.encode(text) for text in (TEXTS[0], TEXTS[1][:40])]
    got = head_importance(model, rows)
    model.set_attn_implementation("eager")
    heads, layers, n = {}, {}, sum(map(len, rows))
    for row in rows:
        with torch.no_grad():
            out = model.model(torch.tensor([row]), output_attentions=True, output_hidden_states=True)
            last: list[torch.Tensor] = []
            hook = model.model.norm.register_forward_pre_hook(lambda _, args, last=last: last.append(args[0]))
            model.model(torch.tensor([row]))
            hook.remove()
        streams = [*out.hidden_states[:-1], last[0]]
        for i, weights in enumerate(out.attentions):
            layer = model.model.layers[i]
            value = layer.self_attn.v_proj(layer.input_layernorm(streams[i])).view(1, -1, 2, 16).transpose(1, 2)
            value = value.repeat_interleave(2, 1)
            changed = (1 - cosine(value, weights @ value)).sum(-1)[0].view(2, 2).mean(1)
            heads[i] = heads.get(i, 0) + changed.detach()
            layers[i] = layers.get(i, 0) + float((1 - cosine(streams[i], streams[i + 1])).sum())
    full = [i for i in heads if architecture == "llama" or i % 2]
    expected = torch.stack([heads[i] / n * layers[i] / n for i in full])
    torch.testing.assert_close(got, expected.double(), rtol=1e-3, atol=1e-6)


def test_the_search_takes_what_predicts_best_and_equal_shares_where_nothing_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, press = tiny_model(num_layers=2), get_press("streaming_llm", 0.8)
    tried: list[tuple[int, torch.Tensor]] = []
    own = share_search._perplexity

    def noted(model: Any, texts: Any, shares: torch.Tensor) -> float:
        tried.append((len(texts), shares))
        return own(model, texts, shares)

    monkeypatch.setattr(share_search, "_perplexity", noted)
    steps: list[tuple[int, int]] = []
    found = find_shares(model, TOKENIZER, TEXTS, press, n_held_out=1, progress=lambda *step: steps.append(step))
    assert steps[-1] == (25, 25) and len(tried) == 8 + 2 and bool((tried[0][1] == 1).all())
    assert found.perplexity == min(own(model, [_halves(model, press)], shares) for _, shares in tried[:8])
    assert found.perplexity <= found.equal_perplexity and found.held_out is not None
    assert all(float(shares.mean()) == pytest.approx(1) for _, shares in tried)
    assert all(float(shares.max() / shares.min()) <= 4 / 0.1 + 1e-9 for _, shares in tried)
    monkeypatch.setattr(share_search, "_perplexity", lambda *_: 5.0)
    equal = find_shares(model, TOKENIZER, TEXTS, press)
    assert equal.settings is None and bool((equal.shares == 1).all()) and equal.held_out is None


def _halves(model: Any, press: Any) -> Any:
    return share_search._read(model, TOKENIZER, TOKENIZER.encode(TEXTS[0]), press)


def test_shares_that_no_limit_reaches_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.Tensor] = []
    own = share_search._perplexity

    def noted(model: Any, texts: Any, shares: torch.Tensor) -> float:
        tried.append(shares)
        return own(model, texts, shares)

    monkeypatch.setattr(share_search, "_perplexity", noted)
    monkeypatch.setattr(share_search, "head_importance", lambda *_: torch.tensor([[0.9, 1.1]] * 3))
    steps: list[tuple[int, int]] = []
    find_shares(tiny_model(), TOKENIZER, TEXTS, RandomPress(0.5), progress=lambda *done: steps.append(done))
    assert len(tried) == 1 + len(share_search.EXPONENTS)
    assert steps == [(n, 25) for n in range(1, 26)], "each is told"


def test_perplexity_is_that_of_the_model_with_the_rest_masked() -> None:
    """With nothing removed, of the dense model."""
    model, press = tiny_model(num_layers=2), RandomPress(0.0)
    halves = _halves(model, press)
    assert halves.done.input_ids is not None
    middle, row = halves.done.input_ids.shape[1], torch.cat([halves.done.input_ids, halves.rest], dim=1)
    got = share_search._perplexity(model, [halves], torch.ones(2, 2))
    with torch.no_grad():
        logits = model(row).logits[0, middle:-1]
    expected = torch.nn.functional.cross_entropy(logits, row[0, middle + 1 :]).exp()
    assert got == pytest.approx(float(expected), rel=1e-4)


def test_what_cannot_be_searched_is_refused() -> None:
    model, press = tiny_model(num_layers=1), RandomPress(0.5)
    for texts, options, match in (
        (TEXTS, {"n_held_out": 2}, "more texts than the 2 held out"),
        ([*TEXTS, "short"], {}, "at least 32 tokens, got one of 5"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            find_shares(model, TOKENIZER, texts, press, **options)
    for wrong, match in (
        (RandomPress(0.0), "removes pairs"),
        (RandomPress(allocation=Threshold(threshold=0.5)), "the core spends a budget"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            find_shares(model, TOKENIZER, TEXTS, wrong)


def test_the_command_writes_a_table_that_a_press_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kvzip_press.loading.by_name.load_model", lambda name, **_: (tiny_model(), TOKENIZER))
    for i, text in enumerate([*TEXTS, TEXTS[0]]):
        (tmp_path / f"{i}.txt").write_text(text)
    texts = [argument for i in range(3) for argument in ("--text", str(tmp_path / f"{i}.txt"))]
    out = tmp_path / "shares.json"
    done = CliRunner().invoke(
        app, ["budgets", "profile", "--model", "llama", "--out", str(out), *texts], catch_exceptions=False
    )
    assert done.exit_code == 0 and "3 layers of 2 heads" in done.output.replace("\n", " ")
    written = json.loads(out.read_text())
    assert written["provenance"]["model"] == "llama" and "StreamingLLMPress" in written["provenance"]["press"]
    press = RandomPress(0.5, allocation={"name": "table", "shares": str(out)})
    assert press.allocation == Table(shares=written["shares"])


def test_the_sentence_says_what_the_shares_are_worth() -> None:
    found = share_search.FoundShares(torch.ones(2, 2), (0.5, 0.1, 2.0), 5.0, 6.0, 8.0, 7.0)
    assert "importance ** 0.5 within 0.1 to 2 times the mean" in budgets._sentence(found)
    assert "held out 8.00 and 7.00, so no better there" in budgets._sentence(found)
