"""Checks and dispatch of :func:`ragged_attention`."""

from torch import Tensor

from kvzip_press.kernels.checks import check_softcap
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.ragged_attention import aten, reference, segments, support
from kvzip_press.kernels.ragged_attention.codes import support as codes_support
from kvzip_press.kernels.ragged_attention.codes import tiles
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs
from kvzip_press.kernels.row_codec import Codes

_ROWS = deferred("kvzip_press.kernels.ragged_attention.triton", "ragged_attention")
_CODES = deferred("kvzip_press.kernels.ragged_attention.codes.triton", "ragged_attention")


def _triton(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    run = _CODES if isinstance(inputs.keys, Codes) else _ROWS
    out, lse = run(inputs, scaling=scaling, softcap=softcap)
    return out, lse


def _reason_against_triton(inputs: RaggedInputs, softcap: float | None) -> str | None:
    of_kind = codes_support if isinstance(inputs.keys, Codes) else support
    return of_kind.reason_against_triton(inputs, softcap)


_IMPLS = {
    "segments": Impl(segments.ragged_attention, segments.reason_against),
    "triton": Impl(_triton, _reason_against_triton),
    "aten": Impl(aten.ragged_attention, aten.reason_against),
    "tiles": Impl(tiles.ragged_attention, tiles.reason_against),
    "reference": Impl(reference.ragged_attention),
}


def ragged_attention(
    query: Tensor,
    keys: Tensor | Codes,
    values: Tensor | Codes,
    cu_seqlens: Tensor,
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
    context_query: Tensor | None = None,
    context_bias: Tensor | None = None,
    pair_index: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes exact attention to a packed context, ragged over heads, and to a dense tail that came after it.

    This turns head-wise eviction (KVzip, arXiv 2505.23416) into real savings: only kept pairs are stored and read.
    Every query sees the whole packed context of its row and head; original RoPE positions are already in the keys. For
    inference: no gradient is promised.

    Args:
        query: [batch, num_attention_heads, query_length, head_dim], any floating dtype.
        keys: packed context [total, head_dim], ordered by (row, key-value head, position), in the dtype of ``query`` or
            as codes (:mod:`kvzip_press.kernels.row_codec`), which are read as they lie: no implementation holds more
            of them decoded than a tile of one segment ("reference": one segment).
        values: packed context [total, value_head_dim], codes if ``keys`` are; their codec may be another.
        cu_seqlens: int32 [rows * num_key_value_heads + 1], from 0 to total; segment s is cu_seqlens[s] ..
            cu_seqlens[s + 1] - 1, and may be empty.
        tail_keys: [batch, num_key_value_heads, tail_length, head_dim], a view with any strides, or None; tail_length
            may be 0.
        tail_values: [batch, num_key_value_heads, tail_length, value_head_dim]; given if ``tail_keys`` is.
        row_index: int64 [batch]: batch row r reads packed row row_index[r] (the beams of a search share a context);
            None: packed row r. With it, ``tail_keys`` is required, because it gives the number of key-value heads.
        tail_mask: bool [batch or 1, num_attention_heads or 1, query_length, tail_length], True where a row may look;
            it replaces the causal rule of the tail. Hidden keys and values must be finite. None: row i sees the tail
            keys j <= tail_length - query_length + i, which needs tail_length >= query_length where there is a tail.
        tail_length: int32 [1] on the device of ``query``: how many tail tokens are live, the last query_length of them
            the queries' own; ``tail_keys`` and ``tail_values`` (and ``tail_mask``) may then have room for more, which
            is not read. So a captured CUDA graph stays valid while its tail grows. None: all of them.
        scaling: factor of the logits; default head_dim ** -0.5.
        softcap: when given, logits become ``softcap * tanh(logits / softcap)`` after scaling.
        return_lse: whether to return the log-sum-exp too.
        part_of_storage: whether ``keys`` and ``values`` hold more segments than these; ``cu_seqlens`` is then a slice
            of a longer one, and need neither begin at 0 nor end at total.
        context_query: with codes only, [batch, num_attention_heads, query_length, head_dim], what meets the packed keys
            in place of ``query``: rotated as they were before they were encoded. None: ``query``.
        context_bias: with codes only, [batch, num_attention_heads, query_length], fp32 (fp64 for fp64 queries), added
            to each product of a query and a packed key before scaling: the query's product with the centre that was
            taken off the keys. None: 0.
        pair_index: int32 [listed], contiguous: the packed pairs that are read, in any order, each at most once in a
            segment. ``cu_seqlens`` is then about this list: segment s reads pairs pair_index[cu_seqlens[s]] ..
            pair_index[cu_seqlens[s + 1] - 1] of the storage, as if ``keys`` and ``values`` were ``keys[pair_index]``
            and ``values[pair_index]``; "triton" reads the rows where they lie, others copy them. The list may have room
            for more than cu_seqlens[-1], which is not read. Not with codes, nor with ``row_index``. None: all pairs.
        impl: "segments" (256 rows and more: PyTorch's fused dense kernels, a call a segment), "triton" (one launch that
            streams all pairs, and one that merges; CUDA; of codes it reads int8, fp8, int4, values in int2, and keys in
            groups in int4 and int2), "aten" (PyTorch's fused CPU kernel over the context; the best that can do it over
            the tail; no codes), "tiles" (plain PyTorch, codes only, any of them), "reference" (plain PyTorch, any
            input), or None: the first of these that can do this input. A named implementation refuses inputs that it
            cannot do.

    Returns:
        out [batch, num_attention_heads, query_length, value_head_dim] in the dtype of ``query``; with ``return_lse``
        also lse [batch, num_attention_heads, query_length], natural logarithm, fp32 (fp64 for fp64 inputs). A query
        that sees nothing gives 0 and -inf. Sums and softmax are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape, device, ``softcap`` or ``impl`` is not as above, or the implementation named cannot do this
            input; on a CPU also when ``cu_seqlens`` does not rise from 0 to total, ``row_index`` names no packed row,
            ``pair_index`` names no pair or ``tail_length`` is out of range. Elsewhere their content is not checked:
            reading it would wait for the device.
        TypeError: a dtype is not as above, or ``pair_index`` is given with codes.
    """
    inputs = RaggedInputs(
        query,
        keys,
        values,
        cu_seqlens,
        tail_keys,
        tail_values,
        row_index,
        tail_mask,
        tail_length,
        part_of_storage,
        context_query,
        context_bias,
        pair_index,
    )
    inputs.check()
    check_softcap(softcap)
    run = select("ragged_attention", _IMPLS, impl, inputs, softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = run(inputs, scaling=scale, softcap=softcap)
    return (out, lse) if return_lse else out
