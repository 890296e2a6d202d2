"""TrimKV's gates: how long a pair is worth keeping, from the hidden state of its token; and the files they come in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, logsigmoid

from kvzip_press import torch_file, untrusted
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import FLOATS, replacing
from kvzip_press.model.identity import num_kv_heads
from kvzip_press.model.structure import full_attention_layers, text_config

WEIGHTS = "trimkv_weights.pth"
_KEY = re.compile(r"(?:model\.)*layers\.(\d+)\.self_attn\.retention_gate\.([\w.]+)")
_NAMES = {
    "rg": ("linear1.weight", "linear1.bias", "linear2.weight", "bias"),
    "rg10": ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "linear3.weight", "bias"),
}


@dataclass(frozen=True, eq=False, repr=False)
class TrimKVGates:
    """The retention gates of one model, as TrimKV ("rg") and DBTrimKV ("rg10", one more layer) released them.

    ``log beta = logsigmoid(W2 act(W1 x + b1) + b)``; rg10: ``logsigmoid(W3 act(W2 act(W1 x + b1) + b2) + b)``, with x
    the hidden state that enters attention. In fp32: the bias begins at 10, where ``log beta`` is -4.5e-5, which fp16
    cannot hold.

    Args:
        layers: ``layer_idx -> tensors by name``, those of one kind.

    Raises:
        InvalidArgumentError: There is no layer, or tensors are missing, of other shapes or not finite.
    """

    layers: Mapping[int, Mapping[str, torch.Tensor]]
    _placed: dict[Any, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidArgumentError("expected gates of one layer or more, got none")
        for layer_idx, tensors in self.layers.items():
            _check(layer_idx, tensors)
        shapes = {(self.kind, *self.shape(layer_idx)) for layer_idx in self.layers}
        if len(shapes) != 1:
            raise InvalidArgumentError(f"expected gates of one kind and shape, got {sorted(shapes)}")

    def __repr__(self) -> str:
        return f"TrimKVGates({len(self.layers)} layers of {self.shape(next(iter(self.layers)))}, {self.kind})"

    @property
    def kind(self) -> str:
        """Which gates they are: "rg" or "rg10"."""
        return "rg10" if "linear3.weight" in next(iter(self.layers.values())) else "rg"

    def shape(self, layer_idx: int) -> tuple[int, int]:
        """Returns hidden size and number of KV heads."""
        tensors = self.layers[layer_idx]
        return tensors["linear1.weight"].shape[1], tensors["bias"].shape[0]

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TrimKVGates:
        """Reads a released folder (``trimkv_weights.pth`` and ``config.json``), or that file alone; no code runs.

        Raises:
            InvalidArgumentError: There is no such file, or it holds something else.
        """
        folder = Path(path)
        file = folder / WEIGHTS if folder.is_dir() else folder
        try:
            loaded = torch_file.read(file)
            config = _config_beside(file)
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                f"expected gates as TrimKV releases them ({WEIGHTS}, a state dict, and config.json) at {path}, got "
                f"{type(error).__name__}: {error}"
            ) from error
        gates = cls(_by_layer(loaded, file))
        said = config.get("retention_gate", gates.kind)
        if said != gates.kind:
            raise InvalidArgumentError(f"expected the tensors of {said!r}, as config.json says, got those of {gates!r}")
        return gates

    def save(self, folder: str | PathLike[str], **said: Any) -> None:
        """Writes a folder as gates are released: `trimkv_weights.pth`, a state dict, and `config.json`.

        Args:
            folder: Made if it does not exist; each file is written whole or not at all.
            said: What `config.json` says besides: ``base_model``, ``memory_size``.

        Raises:
            CacheFileError: A file cannot be written.
        """
        state = {
            f"model.layers.{layer_idx}.self_attn.retention_gate.{name}": tensor.detach().cpu().contiguous()
            for layer_idx, tensors in self.layers.items()
            for name, tensor in tensors.items()
        }
        first = next(iter(self.layers.values()))
        config = {
            "trainable_params": "retention_gate",
            "retention_gate": self.kind,
            "retention_gate_intermediate_size": first["linear1.weight"].shape[0],
            "global_capacity": False,
            "tie_retention_gate_layers": False,
            **said,
        }
        with replacing(Path(folder) / WEIGHTS, parents=True) as temporary:
            torch.save(state, temporary)
        with replacing(Path(folder) / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def check(self, model: Any) -> TrimKVGates:
        """Returns these gates, if they fit a model's full-attention layers, its hidden size and its heads.

        Raises:
            InvalidArgumentError: They do not.
        """
        expected = {layer.layer_idx for layer in full_attention_layers(model)}
        shape = (text_config(model).hidden_size, num_kv_heads(model))
        if set(self.layers) != expected or self.shape(min(self.layers)) != shape:
            raise InvalidArgumentError(
                f"expected gates of layers {sorted(expected)} for (hidden_size, KV heads) = {shape}, got {self!r} of "
                f"layers {sorted(self.layers)}"
            )
        return self

    @torch.no_grad()
    def log_beta(self, hidden_states: torch.Tensor, layer_idx: int, act: Any) -> torch.Tensor:
        """Returns ``log beta``, fp32 ``[batch, num_key_value_heads, n]``, of states ``[batch, n, hidden_size]``."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return log_beta(self._on(layer_idx, hidden_states.device), hidden_states, act)

    def _on(self, layer_idx: int, device: torch.device) -> dict[str, torch.Tensor]:
        key = (layer_idx, device)
        if key not in self._placed:
            self._placed[key] = {name: x.to(device, torch.float32) for name, x in self.layers[layer_idx].items()}
        return self._placed[key]


def log_beta(gate: Mapping[str, torch.Tensor], hidden_states: torch.Tensor, act: Any) -> torch.Tensor:
    """Returns ``log beta``, fp32 ``[batch, num_key_value_heads, n]``, of states ``[batch, n, hidden_size]``.

    Args:
        gate: Tensors of one layer, by name, in fp32 on the states' device.
        hidden_states: As they enter attention.
        act: The model's activation.
    """
    hidden = act(linear(hidden_states.float(), gate["linear1.weight"], gate["linear1.bias"]))
    if "linear3.weight" in gate:
        hidden = act(linear(hidden, gate["linear2.weight"], gate["linear2.bias"]))
    last = gate.get("linear3.weight", gate["linear2.weight"])
    return logsigmoid(linear(hidden, last, gate["bias"])).transpose(1, 2).contiguous()


def check_is_for_gates(folder: Path) -> None:
    """Raises InvalidArgumentError for a folder whose ``config.json`` is of something else, such as a model.

    Raises:
        InvalidArgumentError: Gates saved there would replace it.
    """
    try:
        config = _config_beside(folder / WEIGHTS)
    except (OSError, ValueError):
        config = {"": "not to be read"}
    if config and "retention_gate" not in config:
        raise InvalidArgumentError(
            f"expected a folder of TrimKV's gates, or one without config.json, got {folder}, whose config.json is of "
            "something else and would be replaced: name another folder"
        )


def activation_of(model: Any) -> Any:
    """Returns a model's activation, which is that of its gates."""
    from transformers.activations import ACT2FN

    config: Any = text_config(model)
    return ACT2FN[getattr(config, "hidden_act", None) or config.hidden_activation]


def _config_beside(file: Path) -> dict[str, Any]:
    path = file.with_name("config.json")
    config = untrusted.parse_json(untrusted.read_text(path)) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"config.json holds a {type(config).__name__}")  # noqa: TRY004  # what is wrong is the file
    return config


def _by_layer(loaded: Any, file: Path) -> dict[int, dict[str, torch.Tensor]]:
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in loaded.items() if isinstance(loaded, Mapping) else ():
        found = _KEY.fullmatch(name) if isinstance(name, str) else None
        if found is None or not isinstance(tensor, torch.Tensor):
            raise InvalidArgumentError(
                f"expected tensors model.layers.N.self_attn.retention_gate.* in {file.name}, got {name!r:.80}"
            )
        layers.setdefault(int(found[1]), {})[found[2]] = tensor
    return dict(sorted(layers.items()))


def _check(layer_idx: int, tensors: Mapping[str, torch.Tensor]) -> None:
    wanted = _NAMES["rg10" if "linear3.weight" in tensors else "rg"]
    if set(tensors) != set(wanted):
        raise InvalidArgumentError(f"expected the tensors {wanted} for layer {layer_idx}, got {sorted(tensors)}")
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width = got["linear1.weight"][:1]
    hidden, heads = got["linear1.weight"][1:], got["bias"]
    expected = {
        "linear1.weight": (*width, *hidden),
        "linear1.bias": width,
        "linear2.weight": (*width, *width) if "linear3.weight" in tensors else (*heads, *width),
        "linear2.bias": width,
        "linear3.weight": (*heads, *width),
        "bias": heads,
    }
    fit = len(width) == len(hidden) == len(heads) == 1 and all(got[name] == expected[name] for name in wanted)
    if not fit or not all(x.dtype in FLOATS and bool(x.isfinite().all()) for x in tensors.values()):
        raise InvalidArgumentError(
            f"expected finite floats linear1 [width, hidden_size], linear2 (and linear3) to [KV heads, width] and bias "
            f"[KV heads] for layer {layer_idx}, got {got}"
        )
