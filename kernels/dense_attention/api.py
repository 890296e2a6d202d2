"""Checks and dispatch of :func:`attention_with_lse`."""

from torch import Tensor

from kvzip_press.kernels.checks import check_floating, check_groups, check_like, check_mask, check_rank, check_softcap
from kvzip_press.kernels.dense_attention import aten, reference
from kvzip_press.kernels.dispatch import Impl, select

_IMPLS = {
    "aten": Impl(aten.attention_with_lse, aten.reason_against),
    "reference": Impl(reference.attention_with_lse),
}


def attention_with_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention to dense keys, with the log-sum-exp of its logits.

    The log-sum-exp lets a caller merge this result with attention to other keys (:func:`merge_attention`), as the KVzip
    replay does with an evicted context and its own tail (KVzip, arXiv 2505.23416). For inference: no gradient is
    promised.

    Args:
        query: [batch, num_attention_heads, query_length, head_dim], any floating dtype.
        keys: [batch, num_key_value_heads, key_length, head_dim], a view with any strides; key_length may be 0.
        values: [batch, num_key_value_heads, key_length, value_head_dim], likewise. Query head h reads key-value head
            h // (num_attention_heads / num_key_value_heads); keys are never repeated.
        causal: whether row i sees only the keys j <= key_length - query_length + i (aligned to the lower right).
        mask: bool [batch or 1, num_attention_heads or 1, query_length, key_length], True where a row may look; it
            narrows the causal rule when both are given. Hidden keys and values must be finite.
        scaling: factor of the logits; default head_dim ** -0.5.
        softcap: when given, logits become ``softcap * tanh(logits / softcap)`` after scaling.
        impl: "reference" (plain PyTorch, any input, query rows in blocks so that logits stay small), "aten" (PyTorch's
            own fused kernel, which refuses what it cannot do) or None: "aten" where it can, else "reference".

    Returns:
        out [batch, num_attention_heads, query_length, value_head_dim] in the dtype of ``query``, and
        lse [batch, num_attention_heads, query_length], natural logarithm, fp32 (fp64 for fp64 inputs).
        A row that sees no key gives 0 and -inf. Sums and softmax are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape, device, ``softcap`` or ``impl`` is not as above, or "aten" cannot do this input.
        TypeError: a dtype is not as above.
    """
    _check(query, keys, values, mask)
    check_softcap(softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return unchecked(query, keys, values, causal=causal, mask=mask, scaling=scale, softcap=softcap, impl=impl)


def unchecked(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention_with_lse` without its checks, for ops that have already made them."""
    run = select("attention_with_lse", _IMPLS, impl, query, keys, values, causal, mask, softcap)
    return run(query, keys, values, causal=causal, mask=mask, scaling=scaling, softcap=softcap)


def _check(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    check_rank("query", query, "batch, num_attention_heads, query_length, head_dim")
    check_floating("query", query)
    for name, tensor in (("keys", keys), ("values", values)):
        check_rank(name, tensor, "batch, num_key_value_heads, key_length, head_dim")
        check_like(name, tensor, "query", query)
    batch_size, num_heads, query_length, head_dim = query.shape
    if keys.shape[0] != batch_size or keys.shape[3] != head_dim:
        raise ValueError(f"keys: expected batch {batch_size}, head_dim {head_dim}, got shape {tuple(keys.shape)}")
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"values: expected {tuple(keys.shape[:3])} as keys have, got shape {tuple(values.shape)}")
    check_groups(num_heads, keys.shape[1])
    if mask is not None:
        check_mask("mask", mask, batch_size, num_heads, query_length, keys.shape[2])
        if mask.device != query.device:
            raise ValueError(f"mask: expected device {query.device}, got {mask.device}")
