"""Checks and dispatch of :func:`context_attention`, and the plan that it reads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from kvzip_press.kernels.checks import (
    check_device,
    check_dtype,
    check_floating,
    check_like,
    check_rank,
    check_shape,
    check_softcap,
)
from kvzip_press.kernels.context_attention import aten, reference, support
from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.context_attention.sharing import share
from kvzip_press.kernels.context_attention.turn import Turn
from kvzip_press.kernels.dense_attention.merge import merge_pair
from kvzip_press.kernels.dispatch import Impl, deferred, select
from kvzip_press.kernels.numerics import accumulation_dtype
from kvzip_press.kernels.row_codec import Codes
from kvzip_press.kernels.triton_support import reason_against_triton

Attended = tuple[Tensor, Tensor]


def _in_steps(attend: Callable[..., Attended]) -> Callable[..., Attended]:
    """Returns an implementation that turns, attends and merges one after another; Triton's does all in its kernels."""

    def run(
        query: Tensor,
        *pool: object,
        turn: Turn | None,
        tail: Attended | None,
        out: Tensor | None,
        return_lse: bool,
        **options: object,
    ) -> Attended:
        got, lse = attend(query if turn is None else turn.applied(query), *pool, **options)
        if tail is not None:
            no_pairs = lse.isneginf()[..., None]
            got, lse = merge_pair(got, lse, *tail, impl="reference")
            if out is tail[0] and not return_lse:
                got = torch.where(no_pairs, out, got)
        return (got, lse) if out is None else (out.copy_(got), lse)

    return run


_IMPLS = {
    "triton": Impl(
        deferred("kvzip_press.kernels.context_attention.triton", "context_attention"), support.reason_against_triton
    ),
    "aten": Impl(_in_steps(aten.context_attention), aten.reason_against),
    "reference": Impl(_in_steps(reference.context_attention)),
}


def plan_contexts(
    context_of_token: Tensor, begins: Tensor, lengths: Tensor, *, num_attention_heads: int
) -> ContextPlan:
    """Plans :func:`context_attention` for the tokens of one step; all layers read one plan.

    On a GPU everything is computed there, by kernels whose launches depend on shapes alone: a plan can be made inside a
    captured CUDA graph, which then follows ``context_of_token``, ``begins`` and ``lengths`` as their values change.

    Args:
        context_of_token: int32 [tokens], the row in ``begins`` of the context that each token reads, in any order.
        begins: int32 [layers, contexts, num_key_value_heads], the first pair of each segment (the pairs that one head
            kept of one context). Segments may lie anywhere, and may overlap.
        lengths: int32, as ``begins``, the number of pairs of each segment, 0 or more. Row 0 is the empty context, with
            0 pairs everywhere, for tokens that read none.
        num_attention_heads: query heads, a multiple of the key-value heads.

    Raises:
        ValueError: a shape or device is not as above; on a CPU also a value. Elsewhere values are not checked, because
            reading them would wait for the device.
        TypeError: a dtype is not as above.
    """
    # contiguous once, here: a kernel reads them while what was launched right before it, such as a copy, may still run
    plan = ContextPlan(context_of_token, begins.contiguous(), lengths.contiguous(), num_attention_heads)
    plan.check()
    return plan if reason_against_triton(begins.device) is not None else replace(plan, work=share(plan))


@overload
def context_attention(
    query: Tensor,
    keys: Tensor | Codes,
    values: Tensor | Codes,
    plan: ContextPlan,
    layer_idx: int,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    turn: Turn | None = None,
    tail: Attended | None = None,
    out: Tensor | None = None,
    return_lse: Literal[True] = True,
    impl: str | None = None,
) -> Attended: ...


@overload
def context_attention(
    query: Tensor,
    keys: Tensor | Codes,
    values: Tensor | Codes,
    plan: ContextPlan,
    layer_idx: int,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    turn: Turn | None = None,
    tail: Attended | None = None,
    out: Tensor | None = None,
    return_lse: Literal[False],
    impl: str | None = None,
) -> Tensor: ...


def context_attention(
    query: Tensor,
    keys: Tensor | Codes,
    values: Tensor | Codes,
    plan: ContextPlan,
    layer_idx: int,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    turn: Turn | None = None,
    tail: Attended | None = None,
    out: Tensor | None = None,
    return_lse: bool = True,
    impl: str | None = None,
) -> Attended | Tensor:
    """Computes exact attention of many requests' tokens to the packed contexts that they ask about.

    For engines that keep compressed contexts (KVzip, arXiv 2505.23416) beside their own cache: questions and answers
    are attended to by the engine, and both results are merged exactly by their log-sum-exp: here, with ``tail``, or
    afterwards (:func:`kvzip_press.kernels.dense_attention.merge_attention`). Tokens that read one context are query
    rows of the same segments, so a context is read once for up to 64 rows (query heads of a key-value head times
    tokens), not once a token. Every token sees all pairs of its context; RoPE is already in the keys. For inference: no
    gradient is promised.

    Args:
        query: [tokens, num_attention_heads, head_dim], any floating dtype: the tokens of all requests.
        keys: [pairs, head_dim], the pool, with all layers of all contexts, in the dtype of ``query`` or as codes
            (:mod:`kvzip_press.kernels.row_codec`), which are read as they lie, a segment or a tile decoded at a time.
        values: [pairs, value_head_dim], likewise; codes if ``keys`` are.
        plan: which token reads which pairs, from :func:`plan_contexts`.
        layer_idx: the layer of the plan.
        scaling: factor of the logits; default head_dim ** -0.5.
        softcap: when given, logits become ``softcap * tanh(logits / softcap)`` after scaling.
        turn: by which angles each query is turned before it meets the pool, for keys that stand where they were read;
            None: the keys were turned.
        tail: attention of the same queries, not turned, to other pairs, such as their own pages: out [tokens,
            num_attention_heads, value_head_dim] in the dtype of ``query`` and lse [tokens, num_attention_heads], views
            of any strides but the last of out. The result is then attention to both.
        out: where the result is written, as ``tail``'s out, which it may be; None: new memory.
        return_lse: whether to return the log-sum-exp too. Without it, and with ``out`` being ``tail``'s, tokens whose
            context has no pair in a head are not touched there.
        impl: "triton" (one launch that reads the pairs, and one that merges; CUDA; of codes it reads int8), "aten"
            (PyTorch's fused CPU kernel, a call a segment; no codes), "reference" (plain PyTorch, any input), or None:
            the first of these that can do this input. A named implementation refuses inputs that it cannot do.

    Returns:
        out [tokens, num_attention_heads, value_head_dim] in the dtype of ``query``; with ``return_lse`` also lse
        [tokens, num_attention_heads], natural logarithm, fp32 (fp64 for fp64 inputs). A token whose context has no pair
        in a head, and which has no tail (or one whose lse is -inf), gives 0 and -inf there; without ``return_lse`` and
        with ``out`` being ``tail``'s, it keeps what ``out`` holds. Sums and softmax are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape, device, ``layer_idx``, ``softcap`` or ``impl`` is not as above, or the implementation named
            cannot do this input; on a CPU also if a segment of the layer ends behind the pool.
        TypeError: a dtype is not as above.
    """
    _check(query, keys, values, plan, layer_idx)
    check_softcap(softcap)
    if turn is not None:
        turn.check(query)
    _check_results(query, values.shape[1], tail, out)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    run = select("context_attention", _IMPLS, impl, query, keys, values, softcap)
    options = {"scaling": scale, "softcap": softcap, "turn": turn, "tail": tail, "out": out, "return_lse": return_lse}
    got, lse = run(query, keys, values, plan, layer_idx, **options)
    return (got, lse) if return_lse else got


def _check_results(query: Tensor, value_head_dim: int, tail: Attended | None, out: Tensor | None) -> None:
    shape, dims = (*query.shape[:2], value_head_dim), "tokens, num_attention_heads, value_head_dim"
    for name, tensor in (("tail's out", None if tail is None else tail[0]), ("out", out)):
        if tensor is not None:
            check_shape(name, tensor, shape, dims)
            check_like(name, tensor, "query", query)
            if tensor.numel() and tensor.stride(-1) != 1:
                raise ValueError(f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}")
    if tail is not None:
        check_shape("tail's lse", tail[1], shape[:2], "tokens, num_attention_heads")
        check_device("tail's lse", tail[1], query.device)
        check_dtype("tail's lse", tail[1], accumulation_dtype(query.dtype))


def _check(query: Tensor, keys: Tensor | Codes, values: Tensor | Codes, plan: ContextPlan, layer_idx: int) -> None:
    dims = "tokens, num_attention_heads, head_dim"
    check_rank("query", query, dims)
    check_floating("query", query)
    check_shape("query", query, (plan.num_tokens, plan.num_attention_heads, query.shape[2]), dims)
    if isinstance(keys, Codes) != isinstance(values, Codes):
        raise TypeError(f"keys, values: expected both as codes or none, got {type(keys)} and {type(values)}")
    n_pairs = keys.shape[0]
    for name, pool, width in (("keys", keys, query.shape[2]), ("values", values, values.shape[-1])):
        dims = f"pairs, {'head_dim' if name == 'keys' else 'value_head_dim'}"
        if isinstance(pool, Codes):
            pool.check(name)
            check_shape(f"{name}.codes", pool.codes, (n_pairs, pool.codes.shape[-1]), dims)
            check_device(name, pool.codes, query.device)
            if pool.head_dim != width:
                raise ValueError(f"{name}: expected codes of {width} numbers, got {pool.head_dim}")
        else:
            check_rank(name, pool, dims)
            check_shape(name, pool, (n_pairs, width), dims)
            check_like(name, pool, "query", query)
    if plan.begins.device != query.device:
        raise ValueError(f"plan: expected device {query.device}, got {plan.begins.device}")
    n_layers = plan.begins.shape[0]
    if not 0 <= layer_idx < n_layers:
        raise ValueError(f"layer_idx: expected 0 .. {n_layers - 1}, got {layer_idx}")
    if query.device.type == "cpu":
        ends = plan.begins[layer_idx] + plan.lengths[layer_idx]
        if int(torch.where(plan.lengths[layer_idx] > 0, ends, 0).max()) > keys.shape[0]:
            raise ValueError(f"lengths: expected segments within the {keys.shape[0]} pairs, got one behind them")
