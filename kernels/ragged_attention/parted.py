"""Attention to packed pairs of which some are stored in another form than others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvzip_press.kernels.checks import check_softcap
from kvzip_press.kernels.dense_attention import merge_attention
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.ragged_attention import support
from kvzip_press.kernels.ragged_attention.api import ragged_attention
from kvzip_press.kernels.ragged_attention.codes import support as codes_support
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.row_codec import Codes

MOST_CODED = 2
"""Parts of codes that the Triton kernel is compiled for."""
MOST_ROWS = 64
"""Query rows of a head above which each part is better off with what is best for it alone."""


@dataclass(frozen=True)
class Part:
    """Packed pairs of one form, those of all segments.

    Attributes:
        keys: as in :func:`kvzip_press.kernels.ragged_attention.ragged_attention`.
        values: likewise.
        cu_seqlens: likewise; a segment may be empty in any part.
        context_query: likewise, what meets the keys of this part.
        context_bias: likewise.
    """

    keys: Tensor | Codes
    values: Tensor | Codes
    cu_seqlens: Tensor
    context_query: Tensor | None = None
    context_bias: Tensor | None = None


def parted_attention(
    query: Tensor,
    parts: Sequence[Part],
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    *,
    row_index: Tensor | None = None,
    tail_mask: Tensor | None = None,
    tail_length: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    part_of_storage: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes exact attention to a packed context whose pairs lie in several forms, and to a dense tail.

    A head's first tokens may be exact and the others codes, or important pairs codes of more bits than others (as in
    LeanKV, arXiv 2412.03131).

    Args:
        query: [batch, num_attention_heads, query_length, head_dim], any floating dtype.
        parts: one or more, each of the same segments; pairs of the model's dtype in the first alone.
        tail_keys: as in :func:`kvzip_press.kernels.ragged_attention.ragged_attention`; so are all others.
        tail_values: likewise.
        row_index: likewise.
        tail_mask: likewise.
        tail_length: likewise.
        scaling: likewise.
        softcap: likewise.
        return_lse: likewise.
        part_of_storage: likewise, of every part.
        impl: "triton" (all parts and the tail in one launch, and one that merges; CUDA; at most two parts of codes, of
            those that the kernel reads, and
            64 query rows of a head), "merged" (ragged attention to each part, merged by the log-sum-exp; any input)
            or None: the first of these that can do this input.

    Returns:
        As :func:`kvzip_press.kernels.ragged_attention.ragged_attention` does, over the pairs of all parts.

    Raises:
        ValueError: as there; or there is no part, or ``impl`` is none of these or cannot do this input.
        TypeError: as there; or a part behind the first is of the model's dtype.
    """
    if not parts:
        raise ValueError("parts: expected one or more, got none")
    if any(isinstance(part.keys, Tensor) for part in parts[1:]):
        raise TypeError("parts: expected codes behind the first part, got keys in a dtype of the model")
    inputs: list[RaggedInputs] = []
    for part in parts:
        of_tail = tail_keys, tail_values, row_index, tail_mask, tail_length
        if inputs:  # a tail of no tokens says how many heads there are
            none = [None if x is None else x[:, :, :0] for x in (tail_keys, tail_values)]
            of_tail = none[0], none[1], row_index, None, None
        of_part = part_of_storage, part.context_query, part.context_bias
        inputs.append(RaggedInputs(query, part.keys, part.values, part.cu_seqlens, *of_tail, *of_part))
        inputs[-1].check()
    check_softcap(softcap)
    run = select("parted_attention", _IMPLS, impl, inputs, softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = run(inputs, scaling=scale, softcap=softcap)
    return (out, lse) if return_lse else out


def _reason_against_triton(parts: Sequence[RaggedInputs], softcap: float | None) -> str | None:
    n_coded = sum(isinstance(part.keys, Codes) for part in parts)
    if not 1 <= n_coded <= MOST_CODED:
        return f"there are {n_coded} parts of codes, not 1 to {MOST_CODED}"
    query = parts[0].query
    n_rows = query.shape[1] // parts[0].num_key_value_heads * query.shape[2]
    if n_rows > MOST_ROWS:
        return f"there are {n_rows} query rows, not up to {MOST_ROWS}"
    for part in parts:
        of_kind = codes_support if isinstance(part.keys, Codes) else support
        reason = of_kind.reason_against_triton(part, softcap)
        if reason is not None:
            return reason
    return None


def _merged(parts: Sequence[RaggedInputs], *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    attended = None
    for part in parts:
        one = ragged_attention(
            part.query,
            part.keys,
            part.values,
            part.cu_seqlens,
            part.tail_keys,
            part.tail_values,
            row_index=part.row_index,
            tail_mask=part.tail_mask,
            tail_length=part.live_tail_length,
            scaling=scaling,
            softcap=softcap,
            return_lse=True,
            part_of_storage=part.part_of_storage,
            context_query=part.context_query,
            context_bias=part.context_bias,
        )
        assert isinstance(one, tuple)
        attended = one if attended is None else merge_attention(*attended, *one)
    assert attended is not None
    return attended


_IMPLS = {
    "triton": Impl(
        deferred("kvzip_press.kernels.ragged_attention.codes.triton", "parted_attention"), _reason_against_triton
    ),
    "merged": Impl(_merged),
}
