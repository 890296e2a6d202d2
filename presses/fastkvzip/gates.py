"""The gates of a model: one for each full-attention layer, with a record of where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import FLOATS
from kvzip_press.model.identity import check_facts, num_kv_heads
from kvzip_press.model.structure import full_attention_layers, text_config
from kvzip_press.presses.fastkvzip import gate_file, published
from kvzip_press.presses.fastkvzip.gate import LayerGate
from kvzip_press.presses.fastkvzip.placed_gate import PlacedGate

_SHAPE = ("hidden_size", "num_key_value_heads", "num_key_value_groups")


@dataclass(frozen=True, eq=False, repr=False)
class Gates:
    """The gates of one model.

    Attributes:
        layers: One gate per full-attention layer, in order.
        layer_indices: Each layer's index in the cache; empty if a published file does not give them: then they are the
            model's full-attention layers in order.
        provenance: Where they come from: model and its shape, training data by SHA-256 and tokens, recipe, version.

    Raises:
        InvalidArgumentError: No gates, gates of different shapes, or a number of indices that is not that of the gates.
    """

    layers: Sequence[LayerGate]
    layer_indices: tuple[int, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    placed: dict[Any, PlacedGate] = field(default_factory=dict)  # copies by device and dtype of hidden states

    def __post_init__(self) -> None:
        shapes = {gate.shape for gate in self.layers}
        if len(shapes) != 1:
            raise InvalidArgumentError(f"expected gates of one shape, one gate or more, got shapes {sorted(shapes)}")
        if self.layer_indices and len(self.layer_indices) != len(self.layers):
            raise InvalidArgumentError(
                f"expected a layer index for each of {len(self.layers)} gates, got {len(self.layer_indices)}"
            )

    def __repr__(self) -> str:
        return f"Gates({len(self.layers)} layers of {self.shape}, model={self.provenance.get('model', 'not named')!r})"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """hidden_size, num_key_value_heads, num_key_value_groups, dim, n_sink."""
        return self.layers[0].shape

    @classmethod
    def of_state_dicts(
        cls,
        states: Sequence[Mapping[str, torch.Tensor]],
        layer_indices: tuple[int, ...] = (),
        provenance: Mapping[str, str] | None = None,
    ) -> Gates:
        """Makes gates from the layers' state dicts; dimensions are inferred from the shapes.

        Raises:
            InvalidArgumentError: Keys or shapes are not those of a gate; the message says what was expected.
        """
        return cls([gate_of(state, row) for row, state in enumerate(states)], layer_indices, provenance or {})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Gates:
        """Reads a file that :meth:`save` wrote or (``.pt``) that Fast KVzip published. Reading either runs no code.

        Raises:
            InvalidArgumentError: The file does not exist, or is of another kind.
        """
        path = Path(path)
        if path.suffix == ".pt":
            return cls.of_state_dicts(published.read(path), (), {"source": published.source_of(path)})
        return cls.of_state_dicts(*gate_file.read(path))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; its folder is created if it does not exist."""
        gate_file.write(Path(path), [gate.state_dict() for gate in self.layers], self.layer_indices, self.provenance)

    def check(self, model: nn.Module) -> Gates:
        """Returns these gates with a model's layer indices, if they fit its layers, heads, groups and hidden size.

        If the gates record the model that they were made with, it must have the same weights. To use them with others
        all the same, leave the record out: ``Gates(gates.layers, gates.layer_indices)``.

        Raises:
            InvalidArgumentError: They do not fit, or were made with other weights.
        """
        indices = tuple(layer.layer_idx for layer in full_attention_layers(model))
        config, heads = text_config(model), num_kv_heads(model)
        expected = (len(indices), config.hidden_size, heads, config.num_attention_heads // heads)
        got = (len(self.layers), *self.shape[:3])
        if got != expected:
            names = ", ".join(("full-attention layers", *_SHAPE))
            raise InvalidArgumentError(
                f"expected gates for {type(model).__name__} of {expected} ({names}), got {self!r} of {got}"
            )
        if self.layer_indices and self.layer_indices != indices:
            raise InvalidArgumentError(f"expected gates of the layers {indices}, got those of {self.layer_indices}")
        check_facts(self.provenance, model, "gates", "Gates(gates.layers, gates.layer_indices)")
        return self if self.layer_indices else replace(self, layer_indices=indices)

    @torch.no_grad()
    def scores(self, hidden_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Scores one layer's pairs.

        Args:
            hidden_states: ``[..., n, hidden_size]``, any floating dtype, any device: the input of the attention module,
                after the layer's input norm.
            layer_idx: The layer's index in the model (its place in order, if the gates do not have indices).

        Returns:
            ``[..., num_key_value_heads, n]``, fp32, in (0, 1), on the device of ``hidden_states``.

        Raises:
            InvalidArgumentError: There is no gate for this layer, or the hidden size differs.
        """
        indices = self.layer_indices or tuple(range(len(self.layers)))
        if layer_idx not in indices:
            raise InvalidArgumentError(f"expected a layer among {indices}, got {layer_idx}")
        if hidden_states.dim() < 2 or hidden_states.shape[-1] != self.shape[0]:
            raise InvalidArgumentError(
                f"expected hidden states [..., n, hidden_size={self.shape[0]}], got {tuple(hidden_states.shape)}"
            )
        return self._placed(indices.index(layer_idx), hidden_states).scores(hidden_states)

    def _placed(self, row: int, like: torch.Tensor) -> PlacedGate:
        """Returns a layer's gate with the device and dtype of the hidden states; the first use makes that copy."""
        key = (row, like.device, like.dtype)
        if key not in self.placed:
            self.placed[key] = PlacedGate(self.layers[row], like.device, like.dtype)
        return self.placed[key]


def gate_of(state: Mapping[str, torch.Tensor], row: int = 0) -> LayerGate:
    """Makes the gate of one state dict.

    Raises:
        InvalidArgumentError: Its keys or shapes are not those of a gate.
    """
    wanted = _empty_gate((1, 1, 1, 1, 1), None, torch.device("meta")).state_dict()
    if set(state) != set(wanted):
        raise InvalidArgumentError(f"expected the tensors {sorted(wanted)} for gate {row}, got {sorted(state)}")
    # What the tensors claim is compared before memory is taken for it.
    base, b, weight = state["k_base"], state["b"], state["q_proj.weight"]
    dims = (base.dim(), b.dim(), weight.dim()) == (4, 3, 2) and min(*base.shape, *b.shape, *weight.shape) > 0
    if not dims or weight.shape[0] != base.shape[0] * b.shape[2] * base.shape[3]:
        shapes = {name: tuple(state[name].shape) for name in ("k_base", "b", "q_proj.weight")}
        raise InvalidArgumentError(
            f"expected k_base [heads, 1, n_sink, dim], b [heads, 1, groups] and q_proj.weight [heads * groups * dim, "
            f"hidden_size] for gate {row}, got {shapes}"
        )
    shape = (weight.shape[1], base.shape[0], b.shape[2], base.shape[3], base.shape[2])
    described = _empty_gate(shape, weight.dtype, torch.device("meta")).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in described.items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if got != expected or not all(
        tensor.dtype in FLOATS and bool(tensor.isfinite().all()) for tensor in state.values()
    ):
        raise InvalidArgumentError(f"expected finite floats of shapes {expected} for gate {row}, got shapes {got}")
    gate = _empty_gate(shape, weight.dtype, torch.device("cpu"))
    gate.load_state_dict(dict(state))
    return gate.requires_grad_(False)


def _empty_gate(shape: tuple[int, int, int, int, int], dtype: torch.dtype | None, device: torch.device) -> LayerGate:
    hidden_size, heads, groups, dim, n_sink = shape
    with torch.device("meta"):
        gate = LayerGate(hidden_size, heads, groups, dim=dim, n_sink=n_sink, dtype=dtype)
    return gate.to_empty(device=device).requires_grad_(False)
