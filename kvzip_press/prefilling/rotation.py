"""What RoPE did to the queries of a layer, and what it does at other positions, without knowing a model's layout.

A rotation is linear in its cosines and sines. So a model's own function, given the mean cosine and sine of some
positions, gives the mean over these positions; and with the sine's sign changed, it turns back.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import UnsupportedModelError
from kvzip_press.model.rope import pinned
from kvzip_press.model.structure import text_decoder

_NEAR = 0.05  # relative; half precision rounds to 0.01, and another rotation is off by about 1


@dataclass(frozen=True)
class Turn:
    """How one attention module turns vectors of a head.

    Attributes:
        module: The attention module.
        turns: Whether it turns its queries at all; some layers of some models do not.
    """

    module: nn.Module
    turns: bool = True

    def __call__(self, vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Returns vectors ``[batch, heads, n, head_dim]`` turned by ``[batch, n, rotary_dim]``.

        Raises:
            UnsupportedModelError: The model has no function of its own for that.
        """
        if not self.turns:
            return vectors
        rotate: Any = getattr(sys.modules[type(self.module).__module__], "apply_rotary_pos_emb", None)
        if rotate is None:
            raise _not_understood(self.module, "a model without `apply_rotary_pos_emb`")
        part, rest = vectors[..., : cos.shape[-1]], vectors[..., cos.shape[-1] :]
        return torch.cat([rotate(part, part, cos, sin)[0], rest], dim=-1)


@dataclass(frozen=True)
class Rotation:
    """How one forward of an attention module has turned its queries.

    Attributes:
        turn: How the module turns.
        cos: ``[batch, n, rotary_dim]``, of the tokens that are read.
        sin: Likewise.
    """

    turn: Turn
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of_call(cls, module: nn.Module, kwargs: dict[str, Any], states: torch.Tensor, query: torch.Tensor) -> Rotation:
        """Returns how a module has turned its queries, found by turning those of the last token again.

        Args:
            module: The attention module.
            kwargs: The named arguments of its forward.
            states: ``[batch, 1, hidden_size]``, what the last token enters it with.
            query: ``[batch, num_attention_heads, 1, head_dim]``, the last token's queries as attention gets them.

        Raises:
            UnsupportedModelError: It is not understood.
        """
        cos, sin = kwargs.get("position_embeddings") or (None, None)
        if not isinstance(cos, torch.Tensor) or not isinstance(sin, torch.Tensor) or cos.dim() != 3:
            raise _not_understood(module, "no cosines and sines of positions")
        before = _before_rope(module, states, query)
        for turn in (Turn(module), Turn(module, turns=False)):
            after = turn(before, cos[:, -1:], sin[:, -1:])
            if bool((after - query).float().norm() <= _NEAR * query.float().norm()):
                return cls(turn, cos, sin)
        raise _not_understood(module, "queries that are not those of its projection, turned")

    def back(self, query: torch.Tensor) -> torch.Tensor:
        """Returns queries ``[batch, heads, n, head_dim]`` as they were before RoPE, fp32."""
        cos, sin = self.cos.float(), self.sin.float()
        size = cos.square() + sin.square()  # 1, unless RoPE also scales
        return self.turn(query.float(), cos / size, -sin / size)


@torch.no_grad()
def mean_embeddings(
    model: nn.Module, first: torch.Tensor, n_positions: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean cosines and sines of the positions that follow each row: twice ``[batch, 1, rotary_dim]``, fp32.

    Args:
        model: The model.
        first: ``[batch]``, int64, the first of these positions.
        n_positions: Their number.
        length: Number of tokens that a forward reads, where RoPE's frequencies depend on that.

    Raises:
        UnsupportedModelError: The decoder has no rotary embedding that can be asked.
    """
    decoder = pinned(text_decoder(model), length)
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise _not_understood(decoder, "a decoder without `rotary_emb`")
    takes_kind = "layer_type" in inspect.signature(type(rotary).forward).parameters
    kind = {"layer_type": "full_attention"} if takes_kind else {}
    positions = first[:, None] + torch.arange(n_positions, device=first.device)
    like = torch.empty(1, 1, 1, dtype=torch.float32, device=first.device)
    cos, sin = rotary(like, positions, **kind)
    return cos.float().mean(dim=1, keepdim=True), sin.float().mean(dim=1, keepdim=True)


def _before_rope(module: nn.Module, states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Returns what the last token's queries were before RoPE, if the module projects and normalises as most do."""
    heads, head_dim = query.shape[1], query.shape[3]
    project: Any = getattr(module, "q_proj", None) or getattr(module, "qkv_proj", None)
    if project is None:
        raise _not_understood(module, "a module without `q_proj`")
    flat = project(states)[..., : heads * head_dim]
    norm: Any = getattr(module, "q_norm", None)
    if norm is not None and norm.weight.shape[-1] != head_dim:  # over all heads at once
        flat, norm = norm(flat), None
    split = flat.unflatten(-1, (heads, head_dim))
    return (split if norm is None else norm(split)).transpose(1, 2)


def _not_understood(module: nn.Module, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"expected a model that turns queries by RoPE with its own `apply_rotary_pos_emb`, as Llama does, got {got} in "
        f"{type(module).__name__}: how future queries will look cannot be told"
    )
