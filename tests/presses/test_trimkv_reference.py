"""TrimKV's own code, where the package `trimkv` is installed, gives the same gates and keeps the same pairs.

The package asks for one transformers, for flash-attn and for a GPU when it is imported. So only the classes that are
compared are taken out of its files; each is run as it stands there.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.activations import ACT2FN

from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.presses.decoding import TrimKVGates, TrimKVPress
from kvzip_press.testing import tiny_model

SPEC = importlib.util.find_spec("trimkv")
pytestmark = [
    pytest.mark.skipif(SPEC is None, reason="needs the package trimkv: pip install --no-deps trimkv"),
    pytest.mark.usefixtures("one_thread"),
]
CONFIG = SimpleNamespace(
    hidden_size=64,
    retention_gate_intermediate_size=32,
    num_key_value_heads=2,
    hidden_act="silu",
    retention_gate_bias_init=10.0,
    initializer_range=0.3,
)


def reference(file: str, name: str) -> Any:
    """A class of the package."""
    assert SPEC is not None and SPEC.origin is not None
    source = (Path(SPEC.origin).parent / file).read_text(encoding="utf-8")
    [found] = [one for one in ast.parse(source).body if isinstance(one, ast.ClassDef) and one.name == name]
    names = {**vars(typing), "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "ACT2FN": ACT2FN}
    names["DynamicCache"] = object
    exec(compile(ast.Module([found], []), file, "exec"), names)  # the installed package's own code
    return names[name]


def gate_of(kind: str) -> tuple[Any, TrimKVGates]:
    """The package's gate with random weights, and ours with the same."""
    torch.manual_seed(0)
    name = {"rg": "RetentionGate", "rg10": "RetentionGate10"}[kind]
    gate = reference("models/qwen3/modeling_trimkv_qwen3.py", name)(CONFIG)
    torch.nn.init.normal_(gate.bias, mean=3.0)
    return gate, TrimKVGates({0: {name: x.detach() for name, x in gate.state_dict().items()}})


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_gates_give_the_same_log_beta(kind) -> None:
    gate, ours = gate_of(kind)
    states = torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = gate(states).transpose(1, 2)
    torch.testing.assert_close(ours.log_beta(states, 0, torch.nn.functional.silu), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("buffer", [1, 8])
def test_its_cache_keeps_the_same_pairs(buffer) -> None:
    """Behind a prompt and behind each token; its cache looks at every layer by itself, as "head" does."""
    model = tiny_model(num_layers=1, vocab_size=256)
    ids = 3 + torch.randperm(250, generator=torch.Generator().manual_seed(0))[None, :70]
    gate, ours = gate_of("rg")
    seen: list[torch.Tensor] = []
    with watching_hidden_states(model, lambda _, states: seen.append(states)), torch.no_grad():
        model(ids)
        log_beta = gate(seen[0]).transpose(1, 2)
    theirs = reference("cache_utils.py", "TrimKVCache")(memory_size=24, buffer_size=buffer, device="cpu")
    cache = DynamicCache(config=model.config)
    with TrimKVPress(budget=24, buffer=buffer, gate=ours)(model), torch.no_grad():
        for first, last in ((0, 40), *((token, token + 1) for token in range(40, 70))):
            model(ids[:, first:last], past_key_values=cache, use_cache=True)
            none = torch.zeros(1, 2, last - first, 16)
            said = {"cache_position": torch.arange(first, last), "retention_weights": log_beta[:, :, first:last]}
            theirs.update(none, none, 0, said)
            theirs.compress()
            layer = cache.layers[0]
            assert isinstance(layer, RaggedLayer)
            tail = list(range(last - layer.tail.length, last))
            held = [layer.packed.head_positions(0, head).tolist() + tail for head in range(2)]
            assert held == theirs.kv_positions[0][0].tolist(), last
