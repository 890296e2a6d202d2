"""Fast KVzip: the gate is the paper's formula, the press scores with it while the context is read."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kvzip_press import compress, get_press, prefill
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import full_attention_layers
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.presses.fastkvzip import FastKVzipPress, Gates, LayerGate, placed_gate
from kvzip_press.testing import ARCHITECTURES, ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
HEADS, GROUPS, HIDDEN = 2, 2, 64  # of tiny models


def random_gate(seed: int = 0, hidden: int = HIDDEN, heads: int = HEADS, groups: int = GROUPS, **options) -> LayerGate:
    gate, generator = LayerGate(hidden, heads, groups, **options), torch.Generator().manual_seed(seed)
    for parameter in gate.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return gate.requires_grad_(False)


def random_gates(model) -> Gates:
    return Gates([random_gate(layer.layer_idx) for layer in full_attention_layers(model)])


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


def prefilled(model, ids, press, valid=None):
    return run_prefill(
        model, ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid, observers=[press]
    )


def formula(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``[heads, n]``: the paper's formula in loops, fp64, from the tensors of a checkpoint."""
    state = {name: tensor.double() for name, tensor in state.items()}
    heads, _, _, dim = state["k_base"].shape
    groups = state["b"].shape[2]

    def norm(vector, weight):
        return vector / (vector.square().mean() + 1e-6).sqrt() * weight

    q = (x.double() @ state["q_proj.weight"].T + state["q_proj.bias"]).view(len(x), heads, groups, dim)
    k = (x.double() @ state["k_proj.weight"].T).view(len(x), heads, dim)
    scores = torch.zeros(heads, len(x), dtype=torch.float64)
    for h in range(heads):
        for t in range(len(x)):
            key = norm(k[t, h], state["k_norm.weight"])
            for g in range(groups):
                query = norm(q[t, h, g], state["q_norm.weight"])
                own = (key @ query / dim**0.5 + state["b"][h, 0, g]).exp()
                sinks = (state["k_base"][h, 0] @ query / dim**0.5).exp().sum()
                scores[h, t] += own / (own + sinks) / groups
    return scores


@pytest.mark.parametrize(("heads", "groups", "dim", "n_sink"), [(2, 3, 16, 16), (1, 1, 4, 1), (3, 7, 8, 5)])
def test_a_gate_computes_the_formula(heads, groups, dim, n_sink) -> None:
    gate = random_gate(1, 24, heads, groups, dim=dim, n_sink=n_sink)
    x = torch.randn(9, 24)
    torch.testing.assert_close(gate(x).double(), formula(gate.state_dict(), x), atol=1e-6, rtol=1e-5)


def test_batches_and_chunks_change_nothing_and_scores_are_fp32() -> None:
    assert random_gate(dtype=torch.bfloat16)(torch.randn(11, HIDDEN, dtype=torch.bfloat16)).dtype == torch.float32
    gate, x = random_gate(), torch.randn(3, 4, 11, HIDDEN)
    together = gate(x)
    assert together.shape == (3, 4, HEADS, 11)
    torch.testing.assert_close(together[1, 2], gate(x[1, 2]), atol=1e-5, rtol=1e-5)
    chunked = torch.cat([gate(x[..., :5, :]), gate(x[..., 5:6, :]), gate(x[..., 6:, :])], dim=-1)
    torch.testing.assert_close(together, chunked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (11,), (2, 3, 11), (2, 0), (0, 4)])
def test_gates_score_in_slices_what_a_gate_computes(shape, dtype, impl, triton_device, monkeypatch) -> None:
    """Both projections as one, then the kernel, a slice of tokens at a time, over the borders of rows."""
    monkeypatch.setattr(placed_gate, "TOKENS", 4)
    monkeypatch.setattr(placed_gate, "gate_scores", partial(placed_gate.gate_scores, impl=impl))
    gate = random_gate(2, groups=3, dim=6, n_sink=5, dtype=dtype)
    x = torch.randn(*shape, HIDDEN).to(dtype)
    scores = Gates([gate]).scores(x.to(triton_device), 0)
    assert (scores.shape, scores.dtype) == ((*shape[:-1], HEADS, shape[-1]), torch.float32)
    assert scores.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # in bf16 a sum may fall to either side of a rounding
    torch.testing.assert_close(scores.cpu(), gate(x), atol=tolerance, rtol=0)


def test_large_logits_do_not_overflow() -> None:
    gate = random_gate()
    gate.k_base.data *= 1e4
    assert bool(gate(torch.randn(50, HIDDEN)).isfinite().all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_the_gates_of_what_enters_attention(architecture) -> None:
    """Of full-attention layers only; what enters is the output of the layer's input norm."""
    implementation = "eager" if architecture == "gemma2" else "sdpa"  # transformers allows it no other
    model, entered = tiny_model(architecture, attn_implementation=implementation), {}
    for layer in full_attention_layers(model):
        norm = model.model.layers[layer.layer_idx].input_layernorm
        norm.register_forward_hook(lambda *call, i=layer.layer_idx: entered.update({i: call[2]}))
    gates = random_gates(model)
    press = FastKVzipPress(0.5, gate=gates)
    done = prefilled(model, token_ids(2, 30), press)
    scores = press.score(done)
    assert list(scores.layers) == list(entered) == [layer.layer_idx for layer in full_attention_layers(model)]
    for gate, (layer_idx, layer) in zip(gates.layers, scores.layers.items(), strict=True):
        for row in range(2):
            expected = formula(gate.state_dict(), entered[layer_idx][row])
            torch.testing.assert_close(layer[row].double(), expected, atol=1e-5, rtol=1e-4)
    told = press.scores(entered, model)
    assert all(torch.equal(told[layer_idx], layer) for layer_idx, layer in scores.layers.items())


def test_scoring_runs_no_forward_of_its_own_and_keeps_no_hidden_state() -> None:
    model, calls = tiny_model(), []
    full_attention_layers(model)[0].module.register_forward_hook(lambda *_: calls.append(1))
    press = FastKVzipPress(0.5, gate=random_gates(model))
    done = prefilled(model, token_ids(1, 200), press)
    press.score(done)
    assert len(calls) == 1
    held = [value for value in vars(done.observers[press]).values() if isinstance(value, torch.Tensor)]
    assert held == [] and {tuple(s.shape) for s in done.observers[press].layers.values()} == {(1, HEADS, 200)}
    assert not any(layer.module._forward_pre_hooks for layer in full_attention_layers(model))


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows_keep_what_they_keep_alone(left) -> None:
    model = tiny_model()
    press, ids, valid = FastKVzipPress(0.6, gate=random_gates(model)), token_ids(2, 90), torch.ones(2, 90).bool()
    valid[1, slice(30) if left else slice(60, None)] = False
    together = prefilled(model, ids, press, valid)
    alone = prefilled(model, ids[1:, valid[1]], press)
    caches = [done.evict(press.score(done)) for done in (together, alone)]
    for layer_idx, _ in caches[0].ragged_layers():
        rows = caches[0].kept_positions(layer_idx)[1], caches[1].kept_positions(layer_idx)[0]
        assert [p.tolist() for p in rows[0]] == [p.tolist() for p in rows[1]]


def test_what_stands_at_padding_does_not_matter() -> None:
    model = tiny_model()
    press, valid = FastKVzipPress(0.5, gate=random_gates(model)), torch.ones(1, 40).bool()
    valid[0, :10] = False
    done = prefilled(model, token_ids(1, 40), press, valid)
    before = press.score(done)
    for layer in done.observers[press].layers.values():
        layer[:, :, :10] = torch.nan
    after = press.score(done)
    assert all(torch.equal(before.layers[i], after.layers[i]) for i in before.layers)


@pytest.mark.any_transformers
@pytest.mark.parametrize("length", [*range(1, 65), 150, 333])
def test_the_budget_is_exact_at_every_length(length) -> None:
    """The window is inside the budget, the first tokens are outside of it, and none of either is lost."""
    model = tiny_model()
    done = prefilled(model, token_ids(1, length), press := FastKVzipPress(gate=random_gates(model)))
    scores, first = press.score(done), min(length, 4)
    n_window, free = len(window_of(length)), length - first  # of each of 6 heads
    for allocation, heads in {"global": 6, "layer": 2, "adakv": 2, "head": 1}.items():
        for ratio in (0.0, 0.3, 0.7, 0.9):
            cache = done.evict(scores, ratio, allocation)
            of_pool = min(max(round((1 - ratio) * free * heads), n_window * heads), free * heads)
            assert sum(int(cache.seqlens(i).sum()) for i in range(3)) == of_pool * 6 // heads + 6 * first
            kept = [set(head.tolist()) for i in range(3) for head in cache.kept_positions(i)[0]]
            assert all(head >= {*range(first), *window_of(length)} for head in kept)


def window_of(length: int) -> range:
    return range(max(length - length // 50, 4), length)


def test_the_window_is_the_smaller_of_its_two_sizes() -> None:
    valid = torch.ones(1, 1000).bool()
    assert int(FastKVzipPress().window(valid).sum()) == 20
    assert int(FastKVzipPress(window_size=7).window(valid).sum()) == 7
    assert int(FastKVzipPress(window_ratio=1.0).window(valid).sum()) == 1000
    assert int(FastKVzipPress().window(torch.ones(1, 300_000).bool()).sum()) == 4096


def test_of_a_cache_with_a_window_only_the_first_tokens_count_as_protected() -> None:
    """Later turns take them for the prefix that no head has lost."""
    model = tiny_model()
    press = FastKVzipPress(0.5, gate=random_gates(model), window_ratio=0.1)
    done = prefilled(model, token_ids(1, 100), press)
    assert done.evict(press.score(done)).layers[0].n_protected == (4,)


def test_under_a_context_later_turns_are_scored_too() -> None:
    model, ids = tiny_model(), token_ids(1, 120)
    press = FastKVzipPress(0.5, "head", gate=random_gates(model))
    with torch.no_grad(), press(model):
        cache = model(ids[:, :60]).past_key_values
        model(ids[:, 60:], past_key_values=cache)
    assert cache.layers[0].packed.seqlens.tolist() == [[4 + 28 + 30] * HEADS]


def test_an_error_in_the_forward_leaves_no_hook() -> None:
    model = tiny_model()
    with pytest.raises(IndexError), FastKVzipPress(0.5, gate=random_gates(model))(model):
        model(torch.tensor([[5000]]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_registry_and_compress_know_it() -> None:
    model = tiny_model("gemma3_text")
    press = get_press("fastkvzip", 0.5, gate=random_gates(model))
    cache = compress(model, TOKENIZER, "the quick brown fox jumps over the lazy dog", press)
    assert len(list(cache.ragged_layers())) == 2
    assert cache.kept_fraction < 0.8
    with pytest.raises(InvalidArgumentError, match="kvzip-press gates train"):
        prefill(model, TOKENIZER, "text", observers=[get_press("fastkvzip", 0.5)])


@pytest.mark.parametrize(
    "options",
    [{"window_size": -1}, {"n_sink": -1}, {"window_ratio": 1.5}, {"gate": 3}, {"compression_ratio": 1.0}],
)
def test_bad_options_are_refused(options) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        FastKVzipPress(**options)


def test_the_signal_needs_gates_a_layer_and_a_hidden_size() -> None:
    gates = Gates([random_gate(0), random_gate(1)])
    press = FastKVzipPress(gate=gates)
    x = torch.randn(5, HIDDEN)
    assert torch.equal(press.scores({1: x})[1], gates.scores(x, 1))
    torch.testing.assert_close(press.scores({1: x})[1], gates.layers[1](x), atol=1e-6, rtol=1e-6)
    with pytest.raises(InvalidArgumentError, match="expected a model to find its gates by"):
        FastKVzipPress().scores({0: x})
    with pytest.raises(InvalidArgumentError, match="expected a layer among"):
        press.scores({2: x})
    with pytest.raises(InvalidArgumentError, match="hidden_size=64"):
        press.scores({0: x[:, :32]})


def test_hidden_states_of_another_dtype_are_scored_in_it() -> None:
    gates, x = Gates([random_gate(0)]), torch.randn(5, HIDDEN)
    half = gates.scores(x.bfloat16(), 0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, gates.scores(x, 0), atol=0.1, rtol=0.1)
    assert gates.layers[0].q_proj.weight.dtype == torch.float32
