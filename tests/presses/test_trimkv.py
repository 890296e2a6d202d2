"""TrimKV's gates: their files, their formula, and what they keep while the model writes."""

from __future__ import annotations

import json
from typing import Any

import decode_oracles as oracles
import pytest
import torch
from transformers import DynamicCache

from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.presses.decoding import TrimKVPress
from kvzip_press.presses.decoding.trimkv.gates import TrimKVGates
from kvzip_press.presses.kvzip import KVzipPress
from kvzip_press.testing import tiny_model

HIDDEN, HEADS, WIDTH = 64, 2, 32
pytestmark = pytest.mark.usefixtures("one_thread")


def state_dict(kind: str, layers: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict as it is released; the bias is 10 as before training."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    state = {}
    for layer in range(layers):
        tensors = {"linear1.weight": drawn(WIDTH, HIDDEN), "linear1.bias": drawn(WIDTH)}
        if kind == "rg10":
            tensors |= {"linear2.weight": drawn(WIDTH, WIDTH), "linear2.bias": drawn(WIDTH)}
        tensors["linear3.weight" if kind == "rg10" else "linear2.weight"] = 8 * drawn(HEADS, WIDTH)
        tensors["bias"] = torch.full((HEADS,), 10.0)
        state |= {f"model.layers.{layer}.self_attn.retention_gate.{name}": x for name, x in tensors.items()}
    return state


def released(folder: Any, kind: str, **changes: Any) -> Any:
    torch.save(state_dict(kind, changes.pop("layers", 1)), folder / "trimkv_weights.pth")
    (folder / "config.json").write_text(json.dumps({"base_model": "some/model", "retention_gate": kind} | changes))
    return folder


@torch.no_grad()
def step(model: Any, cache: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, past_key_values=cache, use_cache=True)


def held_by(cache: Any, layer_idx: int = 0) -> list[list[int]]:
    layer = cache.layers[layer_idx]
    assert isinstance(layer, RaggedLayer)
    end, n = int(layer.next_positions[0]), int(layer.n_tail_tokens[0])
    return [layer.packed.head_positions(0, head).tolist() + list(range(end - n, end)) for head in range(HEADS)]


def distinct_ids(length: int) -> torch.Tensor:
    return 3 + torch.randperm(250, generator=torch.Generator().manual_seed(0))[None, :length]


def formula(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """log beta in fp64, ``[heads, n]``, of hidden states ``[n, hidden]``; SiLU is the models' activation."""
    gate = {name.split("retention_gate.")[1]: tensor.double() for name, tensor in state.items()}
    y = gate["linear1.weight"] @ x.T + gate["linear1.bias"][:, None]
    y = y * torch.sigmoid(y)
    if "linear3.weight" in gate:
        y = gate["linear2.weight"] @ y + gate["linear2.bias"][:, None]
        y = gate["linear3.weight"] @ (y * torch.sigmoid(y))
    else:
        y = gate["linear2.weight"] @ y
    return -torch.log1p(torch.exp(-(y + gate["bias"][:, None])))


@pytest.mark.parametrize("kind", ["rg", "rg10"])
@pytest.mark.parametrize("buffer", [1, 10])
def test_what_is_kept_is_what_the_formula_keeps(kind, buffer, tmp_path) -> None:
    """By the age that pairs have at each eviction: a score that is given once would keep others."""
    model, ids, seen = tiny_model(num_layers=1, vocab_size=256), distinct_ids(90), []
    with watching_hidden_states(model, lambda _, states: seen.append(states[0].double())):
        text = oracles.Text.read_by(model, ids)
    log_beta = formula(state_dict(kind), seen[0])

    def worth(oracle: Any, head: int, alive: list[int], queries: range) -> list[float]:
        return [(alive[-1] + 2 - p) * float(log_beta[head, p]) for p in alive]

    expected = oracles.Oracle(text, worth, budget=24, buffer=buffer).keep(prompt=40, length=70)
    cache = DynamicCache(config=model.config)
    with TrimKVPress(budget=24, buffer=buffer, gate=released(tmp_path, kind))(model):
        step(model, cache, ids[:, :40])
        assert held_by(cache) == expected[0]
        for token, kept in enumerate(expected[1:], start=40):
            step(model, cache, ids[:, token : token + 1])
            assert held_by(cache) == kept, token


def test_a_log_beta_that_fp16_cannot_hold_is_kept_apart() -> None:
    """Near the initial bias of 10, halves would all be the same number, or 0."""
    state = {
        name.split("retention_gate.")[1]: x * (0 if "linear2" in name else 1) for name, x in state_dict("rg").items()
    }
    gates = TrimKVGates({0: state | {"bias": torch.tensor([10.0, 10.001])}})
    one, two = gates.log_beta(torch.zeros(1, 1, HIDDEN), 0, torch.nn.functional.silu)[0, :, 0].tolist()
    assert one == pytest.approx(-4.5398e-5, rel=1e-3) and two == pytest.approx(one * 0.999, rel=1e-4) and one != two


def test_a_prompt_of_another_press_stays(tmp_path) -> None:
    """Its pairs have no log beta; without protection that is refused beforehand."""
    model, ids, cache = tiny_model(num_layers=1, vocab_size=256), distinct_ids(90), None
    gates, kvzip = TrimKVGates.load(released(tmp_path, "rg")), KVzipPress(0.5, n_sink=2)
    cache = DynamicCache(config=model.config)
    with TrimKVPress(budget=16, buffer=4, gate=gates, prompt=kvzip, protect_prompt=True)(model):
        step(model, cache, ids[:, :40])
        before = held_by(cache)
        for token in range(40, 70):
            step(model, cache, ids[:, token : token + 1])
    assert [[p for p in positions if p < 40] for positions in held_by(cache)] == before
    assert sum(map(len, held_by(cache))) < sum(map(len, before)) + 2 * (16 + 4)
    with pytest.raises(InvalidArgumentError, match="protect_prompt=True beside"):
        TrimKVPress(budget=16, buffer=4, gate=gates, prompt=kvzip)


def test_gates_that_do_not_fit_are_refused(tmp_path) -> None:
    """Another kind than config.json says, another model, other tensors, no file, no gate."""
    with pytest.raises(InvalidArgumentError, match=r"config\.json says"):
        TrimKVGates.load(released(tmp_path, "rg", retention_gate="rg10"))
    press = TrimKVPress(budget=16, buffer=4, gate=released(tmp_path, "rg", layers=2))
    with pytest.raises(InvalidArgumentError, match="expected gates of layers"):
        press.requires(tiny_model(num_layers=1))
    torch.save({"model.layers.0.mlp.weight": torch.zeros(1)}, tmp_path / "trimkv_weights.pth")
    with pytest.raises(InvalidArgumentError, match="retention_gate"):
        TrimKVGates.load(tmp_path)
    with pytest.raises(InvalidArgumentError, match="as TrimKV releases them"):
        TrimKVGates.load(tmp_path / "nothing.pth")
    with pytest.raises(InvalidArgumentError, match="gate=FOLDER"):
        TrimKVPress(budget=16, buffer=4).requires(tiny_model(num_layers=1))
    state = {name.split("retention_gate.")[1]: x for name, x in state_dict("rg").items()}
    for wrong in (
        {"bias": torch.zeros(3)},
        {"linear1.bias": torch.full((WIDTH,), torch.nan)},
        {"more": torch.zeros(1)},
    ):
        with pytest.raises(InvalidArgumentError, match="for layer 0"):
            TrimKVGates({0: state | wrong})
