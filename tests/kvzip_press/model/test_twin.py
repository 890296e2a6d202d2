"""A twin has the same weights in modules of its own: what is done to it, nobody else sees."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn

from kvzip_press.model.structure import text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.testing import ARCHITECTURES, tiny_model

IDS = torch.arange(5, 25)[None]


def state_of(model: nn.Module) -> list[Any]:
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_computes_the_same_with_the_same_tensors(architecture: str) -> None:
    model = tiny_model(architecture, attn_implementation="eager")  # Gemma 2 knows no other everywhere
    twin = twin_of(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    own = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    assert [tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers())] == own
    assert type(twin) is type(model)
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}


@torch.no_grad()
def test_what_is_done_to_it_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before, logits = state_of(model), model(IDS).logits
    twin = twin_of(model)
    twin.config._attn_implementation = "eager"
    twin.model.layers[0].mlp.forward = lambda x: 0 * x
    twin.model.layers[1].self_attn.masked_key_indices = (1, 2)
    twin.model.layers[1].register_forward_hook(lambda *_: None)
    twin.model.rotary_emb.register_buffer("inv_freq", torch.zeros(8), persistent=False)
    twin.model.layers[2].self_attn.q_proj = nn.Identity()
    twin.model.layers[2].input_layernorm.weight = nn.Parameter(torch.zeros(64))
    twin.model.layers.append(nn.Identity())
    assert state_of(model) == before
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS).logits, logits)


@torch.no_grad()
def test_what_was_put_over_a_forward_is_that_of_the_twin() -> None:
    """As accelerate does it (a partial of the module), with a bound method, and torch.compile."""
    model, called = tiny_model(), []

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        return module.own_forward(*args, **kwargs)

    layers = model.model.layers
    for layer in layers:
        layer.own_forward = layer.forward
    layers[0].forward = functools.partial(noted, layers[0])
    layers[1].forward = types.MethodType(noted, layers[1])
    layers[2].mlp.forward = torch.compile(layers[2].mlp.forward, backend="eager")
    model.model.compile(backend="eager")
    twin, expected = twin_of(model), model(IDS).logits
    called.clear()
    assert torch.equal(twin(IDS).logits, expected)
    assert called == [twin.model.layers[0], twin.model.layers[1]]
    assert twin.model.layers[2].mlp.forward.__self__ is twin.model.layers[2].mlp


@torch.no_grad()
def test_hooks_that_the_model_has_are_the_twin_s_too() -> None:
    model, seen = tiny_model(), []
    handle = model.model.layers[1].register_forward_hook(lambda module, *_: seen.append(module))
    twin = twin_of(model)
    handle.remove()
    model(IDS)
    assert seen == []
    twin(IDS)
    assert seen == [twin.model.layers[1]]


def test_modules_that_are_one_stay_one() -> None:
    shared = nn.Linear(2, 2)
    twin = twin_of(nn.Sequential(shared, nn.Sequential(shared)))
    assert twin[0] is twin[1][0]
    assert twin[0] is not shared


@torch.no_grad()
def test_only_some_modules_are_copied_and_those_on_the_way() -> None:
    model = tiny_model()
    decoder = text_decoder(model)
    twin = twin_of(model, only=[decoder.rotary_emb])
    assert twin is not model
    assert twin.model is not decoder
    assert twin.model.rotary_emb is not decoder.rotary_emb
    assert twin.model.layers is decoder.layers
    assert twin.lm_head is model.lm_head
    assert twin.config is model.config
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
