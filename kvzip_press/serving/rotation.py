"""Turns the keys of a context back by its length, so that the tokens of a request begin at position 0.

With fixed frequencies, RoPE's logits depend on the distance of a query and a key alone: so a context need not take the
positions before a question, and an engine needs to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.decoding.forward import forward
from kvzip_press.errors import UnsupportedModelError
from kvzip_press.kernels.context_attention import Turn
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.model.devices import input_device
from kvzip_press.model.rope import depends_on_length, rotary_modules
from kvzip_press.model.structure import full_attention_layers, max_positions, text_config, text_decoder
from kvzip_press.model.watching import in_this_thread

_PROBED = 8  # tokens that are read twice, to see how a model turns keys
_SHIFT = 4096  # by how many positions at most
_TOLERANCE = 0.05  # relative; half precision errs by less in one layer, another way of turning by about 1
_LAYOUTS = ("none", "halves", "neighbours")


@dataclass(frozen=True)
class Rotation:
    """How a model turns its keys.

    Attributes:
        frequencies: fp64 ``[n]``, the angle a position, in radians, for each of n pairs of channels.
        layouts: For each layer, which channels are a pair: "halves" (i and n + i, as in Llama), "neighbours" (2 i and
            2 i + 1, as in GPT-J), or "none" for a layer that turns nothing. Channels from 2 n on stay as they are.
    """

    frequencies: torch.Tensor
    layouts: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Rotation:
        """Returns how a model turns keys, found by reading a few tokens at two places.

        Raises:
            UnsupportedModelError: Its frequencies are not fixed, positions have several axes, its keys are turned in a
                way that is not known here, or more than its keys depends on where a text stands.
        """
        frequencies = fixed_frequencies(model)
        n = min(_PROBED, max_positions(model) or _PROBED)
        shift = min(_SHIFT, (max_positions(model) or 2 * _SHIFT) - n)
        with _one_input_a_layer(model):
            (keys, logits), (moved, moved_logits) = (_probe(model, n, start) for start in (0, shift))
        layouts = tuple(
            _layout(frequencies, layer.layer_idx, before, after, shift)
            for layer, before, after in zip(full_attention_layers(model), keys, moved, strict=True)
        )
        if _difference(logits, moved_logits) > 2 * _TOLERANCE:
            raise UnsupportedModelError(
                f"expected a model that answers the same wherever a text stands, got {type(model).__name__}, whose "
                f"logits differ when it is read {shift} positions later: a context cannot be shared by position"
            )
        return cls(frequencies, layouts)

    def turned(self, keys: torch.Tensor, layer_idx: int, by: int) -> torch.Tensor:
        """Returns keys ``[..., head_dim]`` of a layer as they would be ``by`` positions later, in their own dtype."""
        return _turned(keys, self.frequencies, self.layouts[layer_idx], by)

    def turns(self, by: torch.Tensor) -> list[Turn | None]:
        """Returns, for each layer, how queries are turned that stand ``by`` positions later; None: not at all.

        Args:
            by: ``[tokens]``, integers, on the device of the queries.
        """
        angles = by.double()[:, None] * self.frequencies.to(by.device)
        cos, sin = angles.cos().float(), angles.sin().float()
        kinds = {layout: None if layout == "none" else Turn(cos, sin, layout) for layout in set(self.layouts)}
        return [kinds[layout] for layout in self.layouts]


def _turned(keys: torch.Tensor, frequencies: torch.Tensor, layout: str, by: int) -> torch.Tensor:
    if layout == "none":
        return keys
    n, dtype = len(frequencies), accumulation_dtype(keys.dtype)
    angles = by * frequencies
    cos, sin = (part.to(keys.device, dtype) for part in (angles.cos(), angles.sin()))
    one, other = (slice(0, n), slice(n, 2 * n)) if layout == "halves" else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    x, y = keys[..., one].to(dtype), keys[..., other].to(dtype)
    turned = keys.clone()
    turned[..., one] = (x * cos - y * sin).to(keys.dtype)
    turned[..., other] = (y * cos + x * sin).to(keys.dtype)
    return turned


def fixed_frequencies(model: nn.Module) -> torch.Tensor:
    """Returns the angle a position, in radians, for each pair of channels that a model turns, fp64 ``[n]``.

    Raises:
        UnsupportedModelError: They are not fixed, not the same in all layers, or positions have several axes.
    """
    decoder = text_decoder(model)
    modules = list(rotary_modules(decoder))
    kinds = sorted({str(vars(module)["rope_type"]) for module in modules})
    if depends_on_length(model):
        raise UnsupportedModelError(
            f"expected a RoPE with fixed frequencies, got {type(model).__name__} with {', '.join(kinds)}, whose "
            "frequencies change with the length that is read: keys that were turned by others cannot be moved. Answer "
            "one cache at a time instead, with kvzip_press.answer"
        )
    rope: Any = getattr(text_config(model), "rope_parameters", None) or getattr(
        text_config(model), "rope_scaling", None
    )
    if "mrope_section" in (rope or {}):
        raise UnsupportedModelError(
            f"expected positions of one axis, got {type(model).__name__} with M-RoPE, whose positions have three: a "
            "context with pictures cannot be moved by one number"
        )
    found = [frequencies for module in modules if (frequencies := getattr(module, "inv_freq", None)) is not None]
    if len(modules) != 1 or len(found) != 1:
        raise UnsupportedModelError(
            f"expected a model with one rotary embedding for all layers, got {type(model).__name__} with "
            f"{len(modules)}: {', '.join(kinds) or 'none'}"
        )
    return found[0].detach().cpu().double()


@contextmanager
def _one_input_a_layer(model: nn.Module) -> Iterator[None]:
    """Lets each attention layer read, in later forwards, what it read in the first.

    Keys then differ by how they are turned, and by one layer's rounding: in half precision that of thirty layers adds
    up to more than the tolerance.
    """
    first: dict[nn.Module, torch.Tensor] = {}
    is_mine = in_this_thread()

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_mine():
            return None
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": first.setdefault(module, kwargs["hidden_states"])}
        return (first.setdefault(module, args[0]), *args[1:]), kwargs

    with ExitStack() as stack:
        for layer in full_attention_layers(model):
            handle = layer.module.register_forward_pre_hook(given, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def _probe(model: nn.Module, n: int, start: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns the keys ``[heads, n, head_dim]`` of each layer, and the last logits, for n tokens from a position on."""
    device = input_device(model)
    cache = compat.DynamicCache(config=text_config(model))
    ids = torch.arange(n, device=device)[None] % text_config(model).vocab_size
    logits = forward(model, cache, ids, start + torch.arange(n, device=device)[None])
    layers = full_attention_layers(model)
    held: Any = cache.layers
    return [held[layer.layer_idx].keys[0] for layer in layers], logits


def _layout(frequencies: torch.Tensor, layer_idx: int, keys: torch.Tensor, moved: torch.Tensor, shift: int) -> str:
    fits = 2 * len(frequencies) <= keys.shape[-1]
    for layout in _LAYOUTS if fits else ():
        if _difference(_turned(keys, frequencies, layout, shift), moved) <= _TOLERANCE:
            return layout
    raise UnsupportedModelError(
        f"expected keys that RoPE turns in pairs of channels, got layer {layer_idx}, whose keys {shift} positions "
        "later were turned in none of the known ways"
    )


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the relative difference of two tensors, by norm."""
    return float((one.float() - other.float()).norm() / other.float().norm())
