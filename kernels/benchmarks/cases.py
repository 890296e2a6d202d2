"""The cases on which decode steps are measured: model shapes, context lengths, and how unevenly heads keep pairs."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

TAIL = 64


@dataclass(frozen=True)
class DecodeCase:
    """A decode step after eviction.

    Attributes:
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads.
        head_dim: of keys and values.
        context: tokens before eviction.
        batch: rows.
        kept: mean fraction of pairs kept.
        skew: standard deviation of the logarithm of a head's fraction.
        exactly: the length of each head; if empty, lengths are drawn from ``kept`` and ``skew``.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    context: int
    batch: int = 1
    kept: float = 0.3
    skew: float = 1.0
    exactly: tuple[int, ...] = ()

    def __str__(self) -> str:
        """For example ``32/8/128 n131072 b1 kept0.3``."""
        kept = "uneven" if self.exactly else f"kept{self.kept}"
        heads = f"{self.num_attention_heads}/{self.num_key_value_heads}/{self.head_dim}"
        return f"{heads} n{self.context} b{self.batch} {kept}"

    @property
    def n_segments(self) -> int:
        """Number of segments: rows times key-value heads."""
        return self.batch * self.num_key_value_heads

    @property
    def groups(self) -> int:
        """Number of query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def lengths(self) -> list[int]:
        """Number of kept pairs of each segment."""
        if self.exactly:
            return list(self.exactly)
        return uneven_lengths(self.n_segments, self.context, self.kept, self.skew)


DECODE_CASES = [
    *(DecodeCase(32, 8, 128, context) for context in (131072, 65536, 32768, 4096)),
    DecodeCase(28, 4, 128, 131072),
    DecodeCase(4, 1, 256, 131072),
    DecodeCase(32, 8, 128, 16384, batch=8),
    DecodeCase(32, 8, 128, 32768, exactly=(32768, *[1024] * 7)),
]


def uneven_lengths(n_segments: int, context: int, kept: float, skew: float) -> list[int]:
    """Draws log-normal lengths with a fixed seed, between 2 % and all of the context, whose mean is near ``kept``."""
    generator = torch.Generator().manual_seed(1)
    ratios = torch.exp(skew * torch.randn(n_segments, generator=generator))
    ratios = ratios * kept / ratios.mean()
    for _ in range(50):
        ratios = ratios.clamp(0.02, 1)
        ratios = ratios * kept / ratios.mean()
    return [max(1, int(ratio * context)) for ratio in ratios.clamp(0.02, 1).tolist()]


@dataclass(frozen=True)
class DecodeInputs:
    """A query of one token, the packed context that it attends to, and a dense tail of 64 tokens."""

    query: Tensor
    keys: Tensor
    values: Tensor
    cu_seqlens: Tensor
    tail_keys: Tensor
    tail_values: Tensor

    @classmethod
    def random(cls, case: DecodeCase, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> "DecodeInputs":
        """Draws inputs for ``case`` from a normal distribution."""
        lengths = case.lengths()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, case.head_dim, device=device, dtype=dtype)

        return cls(
            normal(case.batch, case.num_attention_heads, 1),
            normal(sum(lengths)),
            normal(sum(lengths)),
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            normal(case.batch, case.num_key_value_heads, TAIL),
            normal(case.batch, case.num_key_value_heads, TAIL),
        )

    def context_bytes(self) -> int:
        """Bytes of the packed keys and values."""
        return _bytes(self.keys, self.values)

    def tail_bytes(self) -> int:
        """Bytes of the keys and values of the tail."""
        return _bytes(self.tail_keys, self.tail_values)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
