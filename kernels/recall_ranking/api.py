"""Checks and dispatch of :func:`recall_ranking`."""

from torch import Tensor

from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.recall_ranking import reference
from kvzip_press.kernels.recall_ranking.inputs import RankingInputs
from kvzip_press.kernels.recall_ranking.support import reason_against

_IMPLS = {
    "triton": Impl(deferred("kvzip_press.kernels.recall_ranking.triton", "recall_ranking"), reason_against),
    "reference": Impl(reference.recall_ranking),
}


def recall_ranking(
    query: Tensor,
    marks: Tensor,
    sizes: Tensor,
    order: Tensor,
    cu_seqlens: Tensor,
    *,
    num_key_value_heads: int,
    budget: int,
    row_index: Tensor | None = None,
    per_query_head: bool = False,
    scaling: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists the pairs that one token of each row reads: whole groups, best first, until the budget is full.

    The pairs of a segment (one row and key-value head of a packed context) are divided into first tokens, which every
    list has, and groups: clusters (ClusterKV, arXiv 2412.03213) or pages (Quest, arXiv 2406.10774). What is listed is
    ready to be read by :func:`kvzip_press.kernels.ragged_attention.ragged_attention` as ``pair_index``.

    A query's product with a group is taken to be that with the group's mark, or, where marks are bounds, the largest
    that it could have within them: ``sum over channels of max(query * greatest, query * least)``. With
    ``per_query_head`` groups rank by it. Else the query heads of a group of heads choose together, by the mean of the
    attention that each expects of a pair in the group: for the scaled products l and the sizes n of all groups,
    ``mean over heads of  exp(l) / sum(n * exp(l))``. Of equal groups the first is better; NaN is better than anything,
    and -0 equals 0. The group at which the budget ends is cut behind as many of its pairs as fit.

    Args:
        query: [batch, num_attention_heads, head_dim], any floating dtype.
        marks: [rows * num_key_value_heads, groups, head_dim] in the dtype of ``query``; or [.., 2 * head_dim], bounds:
            the greatest value of each channel, then the least. Those of empty groups are not used.
        sizes: int32 [rows * num_key_value_heads, 1 + groups]: first tokens of each segment, then pairs of each group;
            0 for groups that a segment does not have. They sum to the length of the segment.
        order: int32 [total]: the pairs of each segment, counted from its beginning, first tokens first, then group by
            group.
        cu_seqlens: int32 [rows * num_key_value_heads + 1], where the segments begin, in ``order`` and in the storage.
        num_key_value_heads: key-value heads of a row.
        budget: pairs that a list has, at least 1; a shorter segment is listed whole. It should be no more than the
            longest segment has: there is room for as many in every list.
        row_index: int64 [batch]: batch row r reads packed row row_index[r]; None: packed row r.
        per_query_head: whether each query head has a list of its own, instead of one for each key-value head.
        scaling: factor of the products; default head_dim ** -0.5.
        impl: "triton" (two launches, which a CUDA graph can replay; fp32, fp16 and bf16, up to 16384 groups; CUDA
            devices, or a CPU with ``TRITON_INTERPRET=1``), "reference" (plain PyTorch, some thirty launches) or None:
            the first that can do this input. Sums, exponentials and logarithms of the two may differ in their last
            bits, so groups that are as good as equal may change places; given the same worths they list the same.

    Returns:
        pair_index int32 [lists * budget], and bounds int32 [lists + 1], where lists are those of (batch row, key-value
        head), or (batch row, query head): list i is pair_index[bounds[i]] .. pair_index[bounds[i + 1] - 1], pairs of
        the storage in the order that ``order`` has them; what is behind the last is not initialised. Bounds do not
        depend on the queries.

    Raises:
        ValueError: a shape, device, ``budget`` or ``impl`` is not as above, or ``impl`` cannot do this input; on a CPU
            also when sizes do not sum to the lengths of the segments, or ``row_index`` names no packed row.
        TypeError: a dtype is not as above.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = RankingInputs(
        query, marks, sizes, order, cu_seqlens, num_key_value_heads, budget, row_index, per_query_head, scale
    )
    inputs.check()
    run = select("recall_ranking", _IMPLS, impl, inputs)
    index, bounds = run(inputs)
    return index, bounds
