"""Checks and dispatch of :func:`ragged_attention`."""

from torch import Tensor

from kvzip_press.kernels.checks import check_softcap
from kvzip_press.kernels.dispatch import Impl, select
from kvzip_press.kernels.ragged_attention import aten, reference
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs

_IMPLS = {
    "aten": Impl(aten.ragged_attention, aten.reason_against),
    "reference": Impl(reference.ragged_attention),
}


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    tail_keys: Tensor | None = None,
    tail_values: Tensor | None = None,
    *,
    row_index: Tensor | None = None,
    tail_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention to a packed context, ragged over heads, and to a dense tail that came after it.

    This is what makes head-wise eviction (KVzip, arXiv 2505.23416) real: only kept pairs are stored and read. Every
    query sees the whole packed context of its row and head; original RoPE positions are already in the keys. For
    inference: no gradient is promised.

    Args:
        query: [batch, num_attention_heads, query_length, head_dim], any floating dtype.
        keys: packed context [total, head_dim], ordered by (row, key-value head, position).
        values: packed context [total, value_head_dim].
        cu_seqlens: int32 [rows * num_key_value_heads + 1], from 0 to total; segment s is cu_seqlens[s] ..
            cu_seqlens[s + 1] - 1, and may be empty.
        tail_keys: [batch, num_key_value_heads, tail_length, head_dim], a view with any strides, or None; tail_length
            may be 0.
        tail_values: [batch, num_key_value_heads, tail_length, value_head_dim]; given if ``tail_keys`` is.
        row_index: int64 [batch]: batch row r reads packed row row_index[r] (the beams of a search share a context);
            None: packed row r. With it, ``tail_keys`` is needed, which tells the number of key-value heads.
        tail_mask: bool [batch or 1, num_attention_heads or 1, query_length, tail_length], True where a row may look;
            it replaces the causal rule of the tail. Hidden keys and values must be finite. None: row i sees the tail
            keys j <= tail_length - query_length + i, which needs tail_length >= query_length where there is a tail.
        scaling: factor of the logits; default head_dim ** -0.5.
        softcap: when given, logits become ``softcap * tanh(logits / softcap)`` after scaling.
        return_lse: whether to return the log-sum-exp too.
        impl: "reference" (plain PyTorch, any input), "aten" (PyTorch's fused CPU kernel over the context, which refuses
            what it cannot do; the best that can do it over the tail) or None: "aten" where it can, else
            "reference".

    Returns:
        out [batch, num_attention_heads, query_length, value_head_dim] in the dtype of ``query``; with ``return_lse``
        also lse [batch, num_attention_heads, query_length], natural logarithm, fp32 (fp64 for fp64 inputs). A query
        that sees nothing gives 0 and -inf. Sums and softmax are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape, device, ``softcap`` or ``impl`` is not as above, or "aten" cannot do this input; on a CPU
            also when ``cu_seqlens`` does not rise from 0 to total or ``row_index`` names no packed row. Elsewhere
            their content is not checked, since reading it would wait for the device.
        TypeError: a dtype is not as above.
    """
    inputs = RaggedInputs(query, keys, values, cu_seqlens, tail_keys, tail_values, row_index, tail_mask)
    inputs.check()
    check_softcap(softcap)
    run = select("ragged_attention", _IMPLS, impl, inputs, softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = run(inputs, scaling=scale, softcap=softcap)
    return (out, lse) if return_lse else out
