"""Keys turned by a number of positions are those that the model makes there; models that do otherwise are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvzip_press import compat
from kvzip_press.errors import UnsupportedModelError
from kvzip_press.serving import rotation
from kvzip_press.serving.rotation import Rotation
from kvzip_press.testing import tiny_model

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
FIXED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {
        "rope_parameters": {
            **DEFAULT,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
    "linear": {"rope_parameters": {**DEFAULT, "rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_parameters": {**DEFAULT, "rope_type": "yarn", "factor": 4.0}},  # its cosines are scaled, too
}
pytestmark = pytest.mark.skipif(
    compat.Version("5") > compat.TRANSFORMERS_VERSION, reason="rope_parameters came with transformers 5"
)


@torch.no_grad()
def keys_of(model: Any, start: int, n: int = 12) -> list[torch.Tensor]:
    """The keys of each layer for the same tokens, read from a position on."""
    cache = compat.DynamicCache(config=model.config)
    model(torch.arange(n)[None] + 5, past_key_values=cache, position_ids=start + torch.arange(n)[None])
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("kind", FIXED)
def test_turned_keys_are_those_of_another_place(kind: str) -> None:
    model = tiny_model("llama", **FIXED[kind])
    found = Rotation.of(model)
    assert found.layouts == ("halves",) * 3
    there = keys_of(model, 3000)
    for layer_idx, (keys, moved) in enumerate(zip(keys_of(model, 0), there, strict=True)):
        torch.testing.assert_close(found.turned(keys, layer_idx, 3000), moved, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.turned(moved, layer_idx, -3000), keys, rtol=2e-3, atol=2e-3)
        assert (keys - moved).abs().max() > 0.1, "the distance matters"


def test_channels_that_the_model_does_not_turn_stay() -> None:
    model = tiny_model("phi3", partial_rotary_factor=0.5)
    found = Rotation.of(model)
    assert len(found.frequencies) == 4
    keys, moved = (keys_of(model, start)[0] for start in (0, 700))
    turned = found.turned(keys, 0, 700)
    torch.testing.assert_close(turned, moved, rtol=2e-3, atol=2e-3)
    assert torch.equal(turned[..., 8:], keys[..., 8:])


def test_neighbouring_channels_may_be_a_pair() -> None:
    """The layout of GPT-J and Cohere, from the formula: (x + iy) e^(i by f)."""
    frequencies = torch.tensor([1.0, 0.25], dtype=torch.float64)
    keys = torch.randn(5, 6, dtype=torch.float64)
    turned = Rotation(frequencies, ("neighbours",)).turned(keys, 0, 7)
    expected = torch.view_as_complex(keys[:, :4].reshape(5, 2, 2)) * torch.exp(7j * frequencies)
    torch.testing.assert_close(turned[:, :4], torch.view_as_real(expected).flatten(1))
    assert torch.equal(turned[:, 4:], keys[:, 4:])


def test_a_layer_may_turn_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(2, 3, 4)
    frequencies = torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert rotation._layout(frequencies, 0, keys, keys.clone(), 50) == "none"
    assert Rotation(frequencies, ("none",)).turned(keys, 0, 50) is keys


def test_rounding_that_adds_up_over_layers_is_not_taken_for_another_way_of_turning() -> None:
    """Forty layers in half precision differ by more than the tolerance, each of them by less."""
    model = tiny_model("llama", num_layers=40, dtype=torch.bfloat16)
    pairs = [rotation._probe(model, 8, start)[0] for start in (0, 4096)]
    frequencies = rotation.fixed_frequencies(model)
    errors = [
        rotation._difference(rotation._turned(keys, frequencies, "halves", 4096), moved)
        for keys, moved in zip(*pairs, strict=True)
    ]
    assert max(errors) > rotation._TOLERANCE, "or this test shows nothing"
    assert Rotation.of(model).layouts == ("halves",) * 40
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_half_precision_is_turned_in_fp32() -> None:
    frequencies = torch.tensor([1.0, 0.1], dtype=torch.float64)
    keys = torch.randn(64, 4)
    turned = Rotation(frequencies, ("halves",)).turned(keys.bfloat16(), 0, -30000)
    exact = Rotation(frequencies, ("halves",)).turned(keys.bfloat16().double(), 0, -30000)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, exact.bfloat16())


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {**DEFAULT, "rope_type": "dynamic", "factor": 2.0}},
        {
            "rope_parameters": {
                **DEFAULT,
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 4096,
            },
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_frequencies_that_change_are_refused_with_the_reason(options: dict[str, Any]) -> None:
    architecture = "llama" if options["rope_parameters"]["rope_type"] == "dynamic" else "phi3"
    with pytest.raises(UnsupportedModelError, match="frequencies change with the length that is read"):
        Rotation.of(tiny_model(architecture, **options))


def test_positions_of_several_axes_are_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "mrope_section": [2, 3, 3]}
    with pytest.raises(UnsupportedModelError, match="M-RoPE, whose positions have three"):
        Rotation.of(model)


def test_a_model_that_turns_keys_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen by reading a text at two places, not by a list of models."""
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.flip(0)
    assert Rotation.of(model).layouts == ("halves",) * 3, "whatever the frequencies are"
    monkeypatch.setattr(rotation, "fixed_frequencies", lambda _: torch.linspace(1, 0.1, 8, dtype=torch.float64))
    with pytest.raises(UnsupportedModelError, match="layer 0, whose keys 4096 positions later were turned in none"):
        Rotation.of(model)


def test_a_model_whose_queries_depend_on_the_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 scales queries by how far a text has come; keys do not show that."""
    model = tiny_model("llama")
    real = rotation._probe

    def probe(model: Any, n: int, start: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        keys, logits = real(model, n, start)
        return keys, logits * (1.0 if start == 0 else 1.3)

    monkeypatch.setattr(rotation, "_probe", probe)
    with pytest.raises(UnsupportedModelError, match="logits differ when it is read 4096 positions later"):
        Rotation.of(model)


def test_a_model_without_one_rotary_embedding_is_refused() -> None:
    model = tiny_model("llama")
    del model.model.rotary_emb.rope_type
    with pytest.raises(UnsupportedModelError, match="expected a model with one rotary embedding"):
        rotation.fixed_frequencies(model)
