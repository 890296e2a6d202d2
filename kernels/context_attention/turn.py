"""Queries turned to where the keys of their contexts stand.

Keys of a pool may keep the positions at which they were read, as codes must, since turning a key changes its codes. A
request's own tokens begin at position 0 all the same: its queries are turned by the length of their context before they
meet the pool. With fixed frequencies, RoPE's products depend on distances alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_device, check_dtype, check_shape
from kvzip_press.kernels.numerics import accumulation_dtype

LAYOUTS = ("halves", "neighbours")


@dataclass(frozen=True)
class Turn:
    """By which angles each token's query is turned.

    Attributes:
        cos: fp32 [tokens, n], cosines for each of n pairs of channels.
        sin: fp32 [tokens, n].
        layout: which channels are a pair: "halves" (i and n + i, as in Llama) or "neighbours" (2 i and 2 i + 1, as in
            GPT-J). Channels from 2 n on stay as they are.
    """

    cos: Tensor
    sin: Tensor
    layout: str = "halves"

    @property
    def num_pairs(self) -> int:
        """Pairs of channels that are turned."""
        return self.cos.shape[1]

    def check(self, query: Tensor) -> None:
        """Raises ValueError or TypeError unless this fits a query [tokens, num_attention_heads, head_dim]."""
        if self.layout not in LAYOUTS:
            raise ValueError(f"turn: expected a layout out of {LAYOUTS}, got {self.layout!r}")
        for name in ("cos", "sin"):
            tensor = getattr(self, name)
            check_shape(f"turn.{name}", tensor, (query.shape[0], self.cos.shape[-1]), "tokens, pairs of channels")
            check_dtype(f"turn.{name}", tensor, torch.float32)
            check_device(f"turn.{name}", tensor, query.device)
        if 2 * self.num_pairs > query.shape[2]:
            raise ValueError(f"turn: expected at most {query.shape[2] // 2} pairs of channels, got {self.num_pairs}")

    def applied(self, query: Tensor) -> Tensor:
        """Returns the turned query, in its own dtype."""
        n, dtype = self.num_pairs, accumulation_dtype(query.dtype)
        halves = slice(0, n), slice(n, 2 * n)
        one, other = halves if self.layout == "halves" else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
        cos, sin = (part[:, None].to(dtype) for part in (self.cos, self.sin))
        x, y = query[..., one].to(dtype), query[..., other].to(dtype)
        turned = query.clone()
        turned[..., one] = (x * cos - y * sin).to(query.dtype)
        turned[..., other] = (y * cos + x * sin).to(query.dtype)
        return turned
