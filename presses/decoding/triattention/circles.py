"""Channels of a head as points on RoPE's circles: complex numbers, one for each pair of channels."""

from __future__ import annotations

import torch

from kvzip_press.errors import UnsupportedModelError

LAYOUTS = ("none", "halves", "neighbours")


def frequencies_of_head(frequencies: torch.Tensor, layout: str, head_dim: int) -> torch.Tensor:
    """Returns the angle a position of each pair of channels, fp64 ``[head_dim / 2]``; 0 for those that RoPE leaves.

    Args:
        frequencies: fp64 ``[n]``, of the pairs that RoPE turns.
        layout: How these are laid out, see :class:`kvzip_press.serving.rotation.Rotation`.
        head_dim: Number of channels.

    Raises:
        UnsupportedModelError: The channels cannot be paired.
    """
    if head_dim % 2 or 2 * len(frequencies) > head_dim:
        raise UnsupportedModelError(f"expected an even head_dim of {2 * len(frequencies)} or more, got {head_dim}")
    padded = frequencies.new_zeros(head_dim // 2)
    if layout != "none":
        padded[: len(frequencies)] = frequencies
    return padded


def split(channels: torch.Tensor, layout: str, n_turned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``[..., head_dim]`` as real and imaginary parts, ``[..., head_dim / 2]`` each.

    Channels that RoPE leaves are behind those that it turns, in pairs of halves.

    Args:
        channels: Queries or keys.
        layout: "halves" or "neighbours"; another one is paired as halves.
        n_turned: Number of pairs that RoPE turns.
    """
    turned, rest = channels[..., : 2 * n_turned], channels[..., 2 * n_turned :]
    real, imaginary = (turned[..., 0::2], turned[..., 1::2]) if layout == "neighbours" else turned.chunk(2, dim=-1)
    rest_real, rest_imaginary = rest.chunk(2, dim=-1)
    return torch.cat([real, rest_real], dim=-1), torch.cat([imaginary, rest_imaginary], dim=-1)
