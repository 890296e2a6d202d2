"""Scorers of other papers, watched by one prefill: the formulas in fp64, kvpress's scores, rows, turns, chunks."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import RaggedCache, compress_in_chunks, get_press
from kvzip_press.budget.allocators import SkippingLayers
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.model.structure import attention_layers
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.testing import ARCHITECTURES, ByteTokenizer, tiny_model

N, WINDOW = 60, 8
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"window_size": WINDOW},
    "expected_attention": {"n_future_positions": 40},
    "tova": {},
    "knorm": {},
    "keydiff": {},
    "streaming_llm": {},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
Seen = dict[int, dict[str, Any]]

pytestmark = pytest.mark.usefixtures("one_thread")


def ids_of(n: int = N, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


def scored(model: Any, press: Any, ids: torch.Tensor, valid: torch.Tensor | None = None) -> Any:
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    done = run_prefill(model, ids, valid, observers=[press])
    return done, press.score(done)


def attention_inputs(model: Any, ids: torch.Tensor) -> Seen:
    """What each layer's projections give for one row, fp64: queries before and after RoPE, keys, values."""
    seen: Seen = {}
    module = sys.modules[type(attention_layers(model)[0].module).__module__]
    eager, rotate = module.eager_attention_forward, module.apply_rotary_pos_emb
    before: list[torch.Tensor] = []

    def rotating(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before.append(q)
        return rotate(q, k, *args, **kwargs)

    def attending(layer: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        states = {"before": before[-1], "query": query, "key": key, "value": value}
        seen[layer.layer_idx] = {name: one[0].double() for name, one in states.items()} | {"scaling": kwargs["scaling"]}
        return eager(layer, query, key, value, mask, **kwargs)

    model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "apply_rotary_pos_emb", rotating)
        patch.setattr(module, "eager_attention_forward", attending)
        model(ids)
    return seen


def window_attention(seen: dict[str, Any], window: int) -> torch.Tensor:
    """``[query heads, window, n]``: causal attention of the last tokens, from the formula."""
    query, key = seen["query"][:, -window:], seen["key"].repeat_interleave(2, 0)
    n = key.shape[1]
    logits = query @ key.transpose(1, 2) * seen["scaling"]
    hidden = torch.arange(n)[None] > torch.arange(n - window, n)[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def snapkv(seen: dict[str, Any]) -> torch.Tensor:
    paid = window_attention(seen, WINDOW).mean(1)[:, : N - WINDOW]
    padded = torch.nn.functional.pad(paid, (2, 2))
    pooled = sum(padded[:, i : i + N - WINDOW] for i in range(5)) / 5
    return pooled.view(2, 2, -1).mean(1)


def tova(seen: dict[str, Any]) -> torch.Tensor:
    return window_attention(seen, 1)[:, 0].mean(0)[: N - 1].expand(2, -1)


def expected_attention(seen: dict[str, Any]) -> torch.Tensor:
    """With the frequencies of the tiny Llama: halves of a head are the parts of complex numbers."""
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    angles = torch.arange(N, N + 40).double()[:, None] * frequencies
    cos, sin = torch.diag(angles.cos().mean(0)), torch.diag(angles.sin().mean(0))
    turn = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
    queries, scores = seen["before"][:, 4:], []
    for head in range(4):
        key, value = seen["key"][head // 2, 4:], seen["value"][head // 2, 4:]
        mean = turn @ queries[head].mean(0)
        covariance = turn @ torch.cov(queries[head].T, correction=0) @ turn.T
        logits = key @ mean / 4 + torch.einsum("ni,ij,nj->n", key, covariance, key) / 32
        scores.append(logits.softmax(0) * value.norm(dim=-1))
    return torch.stack(scores).view(2, 2, -1).mean(1)


def knorm(seen: dict[str, Any]) -> torch.Tensor:
    return -seen["key"].square().sum(-1).sqrt()


def keydiff(seen: dict[str, Any]) -> torch.Tensor:
    unit = seen["key"] / seen["key"].norm(dim=-1, keepdim=True)
    mean = unit.mean(1, keepdim=True)
    return -(unit * mean / mean.norm(dim=-1, keepdim=True)).sum(-1)


def streaming_llm(seen: dict[str, Any]) -> torch.Tensor:
    return torch.arange(4, N).double().expand(2, -1)


ORACLES = {
    function.__name__: function for function in (snapkv, tova, expected_attention, knorm, keydiff, streaming_llm)
}
FREE = {"snapkv": slice(0, -WINDOW), "tova": slice(0, -1), "expected_attention": slice(4, None)}
FREE["streaming_llm"] = FREE["expected_attention"]


@pytest.mark.parametrize("name", ORACLES)
def test_scores_are_those_of_the_formula(name: str) -> None:
    model, ids = tiny_model(num_layers=2), ids_of()
    done, scores = scored(model, get_press(name, 0.5, **OPTIONS[name]), ids)
    seen = attention_inputs(model, ids)
    free = FREE.get(name, slice(None))
    for layer_idx, values in scores.layers.items():
        torch.testing.assert_close(values[0, :, free].double(), ORACLES[name](seen[layer_idx]), **CLOSE)
    assert scores.protected[0, free].sum() == 0 and scores.protected.sum() == N - len(range(N)[free])
    assert done.evict(scores).kept_fraction == 0.5  # what is protected is part of the budget


@pytest.mark.kvpress
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3_text"])
@pytest.mark.parametrize("name", [name for name in ORACLES if name != "streaming_llm"])
def test_scores_are_kvpress_s(name: str, architecture: str, kvpress: Any) -> None:
    """In rows of different length. kvpress scales Gemma's logits by the size of a head, and cannot turn its queries."""
    if architecture == "gemma3_text" and name not in ("knorm", "keydiff"):
        pytest.skip("kvpress has another scaling here")
    model, ids = tiny_model(architecture), ids_of(batch=2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, :17] = False
    (_, ours), (_, theirs) = (
        scored(model, get_press(prefix + name, 0.5, **OPTIONS[name]), ids, valid) for prefix in ("", "kvpress_")
    )
    free = (valid & ~ours.protected)[:, None]
    for layer_idx, values in ours.layers.items():
        torch.testing.assert_close(values * free, theirs.layers[layer_idx] * free, rtol=1e-3, atol=1e-6)


@pytest.mark.kvpress
@pytest.mark.parametrize("name", ORACLES)
def test_the_pairs_kept_are_kvpress_s(name: str, kvpress: Any) -> None:
    """At a ratio where kvpress, which cuts off what we round, keeps as many."""
    model, ids = tiny_model(), ids_of()
    ours, theirs = (
        done.evict(scores)
        for done, scores in (scored(model, get_press(p + name, 0.5, **OPTIONS[name]), ids) for p in ("", "kvpress_"))
    )
    for layer_idx, _ in ours.ragged_layers():
        kept = (cache.kept_positions(layer_idx)[0] for cache in (ours, theirs))
        assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


@pytest.mark.parametrize("name", ORACLES)
def test_a_row_of_a_batch_is_scored_as_it_is_alone(name: str) -> None:
    """Wherever its padding is; rows shorter than the window and the sink, too."""
    model, ids = tiny_model(num_layers=2), ids_of(30, batch=4)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :11] = valid[2, -9:] = valid[3, :27] = False
    press = get_press(name, 0.4, **OPTIONS[name])
    done, together = scored(model, press, ids, valid)
    cache = done.evict(together)
    for row in range(4):
        alone, scores = scored(model, press, ids[row : row + 1, valid[row]])
        for layer_idx, values in scores.layers.items():
            torch.testing.assert_close(together.layers[layer_idx][row, :, valid[row]], values[0], rtol=1e-4, atol=1e-5)
            kept = alone.evict(scores).kept_positions(layer_idx)[0]
            both = zip(cache.kept_positions(layer_idx)[row], kept, strict=True)
            assert all(torch.equal(one, other) for one, other in both)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mistral"])
def test_every_architecture_is_compressed_under_the_press(name: str, architecture: str) -> None:
    """A first turn and a later one, whose budget is its own."""
    model, ids, cache = tiny_model(architecture, attn_implementation="eager"), ids_of(), DynamicCache()
    with torch.no_grad(), get_press(name, 0.5, **OPTIONS[name])(model):
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:], past_key_values=cache)
    for _, layer in RaggedCache.of(cache).ragged_layers():
        assert layer.packed.seqlens.tolist() == [[30, 30]]


@pytest.mark.parametrize("name", ORACLES)
def test_a_later_turn_is_scored_by_itself(name: str) -> None:
    """After a context that lost nothing, a turn's keys and queries are what they are in one forward."""
    model, ids, seen = tiny_model(num_layers=2), ids_of(N + 20), {}
    press, cache = get_press(name, 0.5, **OPTIONS[name]), DynamicCache()
    with torch.no_grad(), get_press("none")(model):
        model(ids[:, :20], past_key_values=cache)
    done = run_prefill(model, ids[:, 20:], torch.ones(1, N, dtype=torch.bool), observers=[press], cache=cache)
    seen = attention_inputs(model, ids)
    for layer_idx, values in press.score(done).layers.items():
        span = {key: one[:, 20:] if isinstance(one, torch.Tensor) else one for key, one in seen[layer_idx].items()}
        if name in ("snapkv", "tova", "knorm", "keydiff"):
            free = FREE.get(name, slice(None))
            torch.testing.assert_close(values[0, :, free].double(), ORACLES[name](span), **CLOSE)
    assert not press.score(done).protected[:, :4].any()  # a later turn has no sink


@pytest.mark.parametrize("name", ORACLES)
def test_a_context_is_read_in_chunks(name: str) -> None:
    press = get_press(name, 0.5, **OPTIONS[name])
    text = "The night ferry leaves at 21:40, and the quota is 310 tonnes. " * 4
    cache = compress_in_chunks(tiny_model(num_layers=2), ByteTokenizer(), text, press, chunk_size=64, window_size=16)
    assert cache.kept_fraction == pytest.approx(0.5, abs=0.01)


def test_pyramidkv_is_snapkv_with_more_in_lower_layers() -> None:
    model, ids = tiny_model(), ids_of()
    done, scores = scored(model, get_press("pyramidkv", 0.7, beta=10, window_size=4), ids)
    plain = scored(model, get_press("snapkv", 0.7, window_size=4), ids)[1]
    assert all(torch.equal(scores.layers[i], plain.layers[i]) for i in scores.layers)
    kept = [layer.packed.seqlens[0].tolist() for _, layer in done.evict(scores).ragged_layers()]
    middle = 0.3 * N - 4  # 14 pairs besides the window: 26.6, 14 and 1.4 of them
    assert sum(map(sum, kept)) == round(6 * 0.3 * N)
    for layer, share in zip(kept, (2 - 1 / 10, 1, 1 / 10), strict=True):
        assert all(abs(n - 4 - middle * share) <= 1 for n in layer)


def test_knorm_leaves_layers_whole_within_the_budget() -> None:
    """Two of three layers stay, the third pays for them; what cannot be paid is refused."""
    model, ids = tiny_model(), ids_of()
    done, scores = scored(model, get_press("knorm", 0.2, skip_layers=[0, 2]), ids)
    kept = [layer.packed.seqlens[0].tolist() for _, layer in done.evict(scores).ragged_layers()]
    assert kept == [[N, N], [24, 24], [N, N]]
    with pytest.raises(InvalidArgumentError, match=r"holds the layers to skip, \[0, 2\], got one of 180 .* have 241"):
        done.evict(scores, 0.5)
    for options, match in (
        ({"skip_layers": [0], "allocation": "global"}, 'with allocation "head"'),
        ({"skip_layers": [-1]}, "layer indices"),
        ({"skip_layers": 1}, "layer indices"),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            get_press("knorm", 0.5, **options)
    with pytest.raises(InvalidArgumentError, match=r"among those that can be compressed, \[0, 1, 2\], got \[7\]"):
        done.evict(scores, allocation=SkippingLayers(layers=(7,)))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("snapkv", {"window_size": 0}, "window_size"),
        ("snapkv", {"kernel_size": 4}, "odd"),
        ("snapkv", {"kernel_size": True}, "kernel_size"),
        ("expected_attention", {"n_future_positions": 0}, "n_future_positions"),
        ("expected_attention", {"n_sink": -1}, "n_sink"),
        ("expected_attention", {"epsilon": math.nan}, "epsilon"),
        ("streaming_llm", {"n_sink": 1.5}, "n_sink"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"expected {match}|expected .*{match}"):
        get_press(name, 0.5, **options)


def test_options_of_expected_attention_change_the_scores() -> None:
    model, ids = tiny_model(num_layers=2), ids_of()
    plain = scored(model, get_press("expected_attention", 0.5), ids)[1].layers[0]
    for options in ({"use_covariance": False}, {"use_vnorm": False}, {"epsilon": 0.02}, {"n_future_positions": 1}):
        assert not torch.allclose(
            scored(model, get_press("expected_attention", 0.5, **options), ids)[1].layers[0], plain
        )


def test_queries_that_are_turned_in_another_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silently wrong statistics would be the alternative."""
    model, ids = tiny_model(num_layers=1), ids_of()
    module = attention_layers(model)[0].module
    press = get_press("expected_attention", 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.q_proj, "forward", lambda x: torch.ones(*x.shape[:2], 64) + x[..., :1])
        scored(model, press, ids)  # its own projection, whatever it is
    calls = iter(range(100))
    own = module.q_proj.forward
    monkeypatch.setattr(module.q_proj, "forward", lambda x: own(x) * (1 + next(calls)))
    with pytest.raises(UnsupportedModelError, match="how future queries will look cannot be told"):
        scored(model, press, ids)


def test_layers_without_rope_are_told_from_the_others() -> None:
    """Cohere 2's full-attention layers do not turn queries; its RoPE pairs neighbours, not halves."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    torch.manual_seed(0)
    config = Cohere2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, press = Cohere2ForCausalLM(config).eval(), get_press("expected_attention", 0.5, use_vnorm=False)
    ids = ids_of()
    values = scored(model, press, ids)[1].layers[1][0, :, 4:]
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states[1]
        attention = model.model.layers[1].self_attn
        inside = model.model.layers[1].input_layernorm(states)
        queries = attention.q_proj(inside).view(N, 4, 16).transpose(0, 1)[:, 4:].double()
        keys = attention.k_proj(inside).view(N, 2, 16).transpose(0, 1)[:, 4:].double()
    expected = []
    for head in range(4):
        key, covariance = keys[head // 2], torch.cov(queries[head].T, correction=0)
        expected.append((key @ queries[head].mean(0) / 4 + (key @ covariance * key).sum(1) / 32).softmax(0))
    torch.testing.assert_close(values.double(), torch.stack(expected).view(2, 2, -1).mean(1), **CLOSE)


def test_an_observer_that_no_prefill_opened_says_so() -> None:
    model = tiny_model(num_layers=1)
    for name in ("snapkv", "expected_attention"):
        with pytest.raises(InvalidArgumentError, match="opened by itself"), get_press(name, 0.5).observer(model):
            pass


@pytest.mark.any_transformers
def test_without_kvpress_the_scorers_are_there() -> None:
    """Neither is it imported where it is installed."""
    code = (
        "import sys; sys.modules['kvpress'] = None\n"
        "from kvzip_press import get_press\n"
        f"[get_press(name, 0.5) for name in {[*ORACLES, 'pyramidkv']}]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
