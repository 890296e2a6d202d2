"""Gates of TrimKV learn by the paper's loss: its value, its gradients, its memory, and how a killed run goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvzip_press.presses.decoding.trimkv import decayed, distilled
from kvzip_press.presses.decoding.trimkv.distilled import Distillation, capacity_term
from kvzip_press.presses.decoding.trimkv.recipe import DISTILLATION, TrimKVRecipe
from kvzip_press.presses.decoding.trimkv.training import _initial
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
MEMORY, LENGTH = 12, 40
RECIPE = TrimKVRecipe(memory_size=MEMORY, width=8, steps=4, objective=DISTILLATION, capacity_weight=0.7)


def ids_of(length: int = LENGTH, seed: int = 3) -> list[int]:
    return (3 + torch.randperm(120, generator=torch.Generator().manual_seed(seed))[:length]).tolist()


def gates_of(model: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Gates that differ by head and token much more than new ones do."""
    gates = _initial(model, RECIPE, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    for gate in gates.values():
        for tensor in gate.values():
            tensor.data += 0.4 * torch.randn(tensor.shape, generator=generator)
    return gates


def after(model: Any, gates: Any, **options: Any) -> tuple[float, dict[int, dict[str, torch.Tensor]]]:
    """The loss, and the gradients that it gives."""
    objective = Distillation(model, TrimKVRecipe(**{**vars(RECIPE), **options}))
    objective.read(ids_of(), torch.Generator())
    for gate in gates.values():
        for tensor in gate.values():
            tensor.grad = None
    loss = objective.backward(gates)
    return loss, {i: {name: tensor.grad.clone() for name, tensor in gate.items()} for i, gate in gates.items()}


def loss_by_the_formula(model: Any, gates: Any, ids: list[int]) -> torch.Tensor:
    """A Llama written out in plain fp64 loops over heads and queries, with the decay where the paper has it."""
    config, state = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    n, heads, kv, dim = len(ids), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * torch.cat([frequencies, frequencies])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[f"{name}.weight"]

    def turned(x: torch.Tensor) -> torch.Tensor:
        half = torch.cat([-x[:, dim // 2 :], x[:, : dim // 2]], dim=-1)
        return x * angles.cos() + half * angles.sin()

    def read(forgets: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, held = state["model.embed_tokens.weight"][torch.tensor(ids)], []
        for layer in range(config.num_hidden_layers):
            of = f"model.layers.{layer}"
            entering = norm(x, f"{of}.input_layernorm")
            q, k, v = (entering @ state[f"{of}.self_attn.{name}_proj.weight"].T for name in "qkv")
            gate = {name: tensor.double() for name, tensor in gates[layer].items()}
            inner = torch.nn.functional.silu(entering @ gate["linear1.weight"].T + gate["linear1.bias"])
            beta = torch.sigmoid(inner @ gate["linear2.weight"].T + gate["bias"])
            outputs = []
            for head in range(heads):
                pair = head // (heads // kv)
                queries, keys = (turned(x[:, one * dim : (one + 1) * dim]) for x, one in ((q, head), (k, pair)))
                rows = []
                for t in range(n):
                    weights = (queries[t] @ keys[: t + 1].T / dim**0.5).exp()
                    if forgets:
                        weights = weights * torch.stack([beta[i, pair] ** (t - i) for i in range(t + 1)])
                    rows.append(weights / weights.sum() @ v[: t + 1, pair * dim : (pair + 1) * dim])
                outputs.append(torch.stack(rows))
            held += [
                torch.stack([sum(beta[i, pair] ** (t - i) for i in range(t + 1)) for t in range(n)])
                for pair in range(kv)
            ]
            x = x + torch.cat(outputs, dim=-1) @ state[f"{of}.self_attn.o_proj.weight"].T
            entering = norm(x, f"{of}.post_attention_layernorm")
            up = entering @ state[f"{of}.mlp.up_proj.weight"].T
            x = x + torch.nn.functional.silu(entering @ state[f"{of}.mlp.gate_proj.weight"].T) * up @ (
                state[f"{of}.mlp.down_proj.weight"].T
            )
        logits = norm(x, "model.norm") @ state["lm_head.weight"].T
        return logits.log_softmax(dim=-1), held

    with torch.no_grad():
        taught, _ = read(forgets=False)
    said, held = read(forgets=True)
    divergence = (taught.exp() * (taught - said)).sum(dim=-1).mean()
    terms = [(held_[t] - MEMORY) / max(t - MEMORY, 1) for held_ in held for t in range(n) if held_[t] > MEMORY]
    return divergence + RECIPE.capacity_weight * torch.stack(terms).mean()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_layers=2)


def test_loss_and_gradients_are_those_of_the_formula(model) -> None:
    gates = gates_of(model)
    loss, gradients = after(model, gates)
    for gate in gates.values():
        for tensor in gate.values():
            tensor.grad = None
    expected = loss_by_the_formula(model, gates, ids_of())
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=2e-5)
    for layer_idx, gate in gates.items():
        for name, tensor in gate.items():
            assert tensor.grad.abs().max() > 1e-7  # nothing is left out
            torch.testing.assert_close(gradients[layer_idx][name], tensor.grad, rtol=2e-3, atol=2e-7)


def test_gradients_are_slopes_of_the_loss(model) -> None:
    gates = gates_of(model)
    objective = Distillation(model, RECIPE)
    objective.read(ids_of(), torch.Generator())
    _, gradients = after(model, gates)
    for layer_idx, name in ((0, "linear1.weight"), (0, "bias"), (1, "linear2.weight")):
        tensor, direction = gates[layer_idx][name], gradients[layer_idx][name]
        step = 1e-3 / direction.norm()
        tensor.data += step * direction
        above = objective.loss(gates)
        tensor.data -= 2 * step * direction
        below = objective.loss(gates)
        tensor.data += step * direction
        assert (above - below) / (2 * float(step)) == pytest.approx(float(direction.norm() ** 2), rel=0.03)


def test_slices_change_nothing_but_rounding(model, monkeypatch) -> None:
    """Of queries, of logits and of layers that are computed once more."""
    gates = gates_of(model)
    whole = after(model, gates)
    monkeypatch.setattr(decayed, "_QUERIES", 7)
    monkeypatch.setattr(decayed, "_REMEMBERED", 16)
    monkeypatch.setattr(distilled, "LOGITS_AT_ONCE", 3 * model.config.vocab_size)
    sliced = after(model, gates)
    assert sliced[0] == pytest.approx(whole[0], rel=1e-6)
    for layer_idx, gate in whole[1].items():
        for name, gradient in gate.items():
            torch.testing.assert_close(sliced[1][layer_idx][name], gradient, rtol=2e-3, atol=2e-7)


def test_logits_of_all_tokens_never_lie_in_memory(model, monkeypatch) -> None:
    monkeypatch.setattr(distilled, "LOGITS_AT_ONCE", 3 * model.config.vocab_size)
    shapes = []
    original = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: (shapes.append(x.shape[1]), original(x))[1])
    after(model, gates_of(model))
    assert max(shapes) == 3 and sum(shapes) >= 2 * LENGTH


def test_the_model_is_as_it_was_and_gets_no_gradients(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    names = [layer.self_attn.config._attn_implementation for layer in model.model.layers]
    after(model, gates_of(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert {name.removeprefix("ragged|") for name in names} == {"sdpa"}
    assert all(layer.self_attn.config._attn_implementation.endswith("sdpa") for layer in model.model.layers)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "qwen3", "phi3"])
def test_gates_that_forget_nothing_cost_nothing(architecture) -> None:
    """beta = 1: the same outputs, with softcaps, sliding layers and scales of their own; and all pairs are held."""
    model = tiny_model(architecture)
    objective = Distillation(model, TrimKVRecipe(**{**vars(RECIPE), "capacity_weight": 0.0}))
    objective.read(ids_of(), torch.Generator())
    gates = _initial(model, RECIPE, torch.device("cpu"))
    for gate in gates.values():
        gate["bias"].data.fill_(40.0)
    assert objective.loss(gates) < 1e-6
    _, held = objective._decayed.read(objective._ids, gates)
    torch.testing.assert_close(held, torch.arange(1.0, LENGTH + 1).expand_as(held), rtol=1e-5, atol=1e-5)


def test_the_capacity_term_is_the_mean_over_what_is_too_much() -> None:
    held = torch.tensor([[[1.0, 2.0, 3.5, 3.0], [1.0, 1.0, 1.0, 1.0]]])
    assert float(capacity_term(held, 2)) == pytest.approx((1.5 / 1 + 1.0 / 1) / 2)
    assert float(capacity_term(torch.ones(2, 2, 30), 2)) == 0.0
    far = torch.full((1, 1, 12), 4.0)
    assert float(capacity_term(far, 2)) == pytest.approx(sum(2 / max(t - 2, 1) for t in range(12)) / 12)
