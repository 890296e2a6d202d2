"""Numerics that the reference implementations share.

Logits, softmax and sums are fp32, or fp64 for fp64 inputs, so that a reference run in fp64 is an oracle for the rest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOGITS = 1 << 20
"""Most logits (elements) that a reference holds at a time, unless one query row alone has more: 4 MiB of fp32."""


class Part(NamedTuple):
    """A stretch of keys that a block of query rows attends to.

    Attributes:
        keys: [..., k, head_dim] in the accumulation dtype.
        values: [..., k, value_head_dim] in the accumulation dtype.
        hidden: bool, broadcast to [..., groups, rows, k], True where a row must not look; None hides nothing.
        query: [..., groups, rows, head_dim], what meets these keys in place of the query that all parts share.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None = None
    query: Tensor | None = None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of logits, softmax and sums: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Returns ``softcap * tanh(logits / softcap)``, in place, or ``logits`` unchanged if ``softcap`` is None."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def finite_peak(values: Tensor, dim: int) -> Tensor:
    """Returns the maximum along ``dim`` (kept), with 0 for -inf: ``exp(values - peak)`` is then 0 there and not NaN."""
    peak = values.amax(dim, keepdim=True)
    return peak.masked_fill(peak == -torch.inf, 0.0)


def causal_hidden(start: int, stop: int, query_length: int, key_length: int, device: torch.device) -> Tensor:
    """Returns bool [stop - start, key_length], True where the causal rule, aligned to the lower right, hides a key.

    Query row i sees key j if and only if j <= key_length - query_length + i; the rows are start .. stop - 1.
    """
    last_seen = torch.arange(start, stop, device=device) + (key_length - query_length)
    return torch.arange(key_length, device=device) > last_seen.unsqueeze(-1)


def attend(query: Tensor, parts: Sequence[Part], softcap: float | None) -> tuple[Tensor, Tensor]:
    """Computes attention of a block of query rows to several stretches of keys under one softmax.

    Nothing long is concatenated.

    Args:
        query: [..., groups, rows, head_dim], already scaled, in the accumulation dtype.
        parts: the stretches that the rows attend to, at least one; they may be empty.
        softcap: cap of the logits, or None.

    Returns:
        out [..., groups, rows, value_head_dim] and lse [..., groups, rows]; a row that sees nothing gives 0 and -inf.
    """
    shape = query.shape[:-1]
    logits = [_logits(query if part.query is None else part.query, part, shape, softcap) for part in parts]
    joined = logits[0] if len(logits) == 1 else torch.cat(logits, -1)
    if joined.shape[-1] == 0:
        return query.new_zeros(*shape, parts[0].values.shape[-1]), query.new_full(shape, -torch.inf)
    peak = finite_peak(joined, -1)
    weights = joined.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = _weighted_sum(weights, parts)
    # A row that sees a key has a total of at least 1 (the term of its peak), a row that sees none has 0.
    out = out.div_(total.clamp_min(1.0)).unflatten(-2, shape[-2:])
    return out, (total.log() + peak).squeeze(-1).unflatten(-1, shape[-2:])


def _logits(query: Tensor, part: Part, shape: torch.Size, softcap: float | None) -> Tensor:
    logits = softcapped(query.flatten(-3, -2) @ part.keys.transpose(-1, -2), softcap)
    if part.hidden is not None:
        logits.unflatten(-2, shape[-2:]).masked_fill_(part.hidden, -torch.inf)
    return logits


def _weighted_sum(weights: Tensor, parts: Sequence[Part]) -> Tensor:
    split = weights.split([part.keys.shape[-2] for part in parts], -1)
    out = split[0] @ parts[0].values
    for weight, part in zip(split[1:], parts[1:], strict=True):
        out += weight @ part.values
    return out
