"""Dense attention by PyTorch's own fused kernels, which already compute the log-sum-exp.

These kernels support neither softcap nor unequal head sizes, give a wrong log-sum-exp for a masked row that sees
nothing, need the last dimension contiguous without checking it, and kill the process on empty inputs;
:func:`reason_against` guards against all that. On a CPU the causal rule is aligned to the upper left, so the keys
before the square at the lower right get a separate call.
"""

import torch
from torch import Tensor

from kvzip_press.kernels.dense_attention.merge import merge_pair

_FLASH_OPS = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "cuda": "_scaled_dot_product_flash_attention",
}
_CUDNN_OP = "_scaled_dot_product_cudnn_attention"
_CUDNN_MAX_HEAD_DIM, _CUDNN_MIN_ROWS, _CUDNN_MIN_KEYS = 128, 256, 1024
_CUDA_DTYPES = (torch.float16, torch.bfloat16)


def reason_against(
    query: Tensor, keys: Tensor, values: Tensor, causal: bool, mask: Tensor | None, softcap: float | None
) -> str | None:
    """Returns why the fused kernel cannot do this input, or None if it can."""
    if mask is not None or softcap is not None:
        return "a mask or a softcap is given"
    if causal and query.shape[2] > keys.shape[2]:
        return f"causal rows see no key: {query.shape[2]} rows, {keys.shape[2]} keys"
    return reason_against_flash(query, keys, values)


def reason_against_flash(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Returns why :func:`flash` cannot run on these tensors (of any rank), or None if it can."""
    device = query.device.type
    if device not in _FLASH_OPS or not hasattr(torch.ops.aten, _FLASH_OPS[device]):
        return f"this PyTorch has no such kernel for {device}"
    if query.numel() == 0 or keys.numel() == 0:
        return "an input is empty"
    if keys.shape[-1] != values.shape[-1]:
        return f"head_dim {keys.shape[-1]} and value_head_dim {values.shape[-1]} differ"
    if not query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1:
        return "the last dimension is not contiguous"
    return None if device == "cpu" else _reason_against_cuda(query)


def _reason_against_cuda(query: Tensor) -> str | None:
    head_dim = query.shape[-1]
    if query.dtype not in _CUDA_DTYPES or head_dim % 8 or head_dim > 256:
        return f"on CUDA it takes fp16 or bf16 and a head_dim of 8, 16 ... 256, not {query.dtype} and {head_dim}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    return None


def _cudnn_pays(query: Tensor, keys: Tensor) -> bool:
    """Returns whether cuDNN's kernel is available and faster: on Hopper, for many query rows without a causal rule.

    Measured on an H200, 2100 queries against 65536 keys, 32/8 heads: cuDNN 4.6 ms, the flash kernel 7.6 ms.
    """
    return (
        query.device.type == "cuda"
        and query.shape[-1] <= _CUDNN_MAX_HEAD_DIM
        and query.shape[-2] >= _CUDNN_MIN_ROWS
        and keys.shape[-2] >= _CUDNN_MIN_KEYS
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.cuda.get_device_capability(query.device)[0] == 9
    )


def _cudnn(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention, on [batch, heads, rows, head_dim]; out and lse [batch, heads, rows]."""
    no_bias, with_lse, no_dropout, not_causal, no_debug_mask = None, True, 0.0, False, False
    attention = getattr(torch.ops.aten, _CUDNN_OP)
    options = (no_bias, with_lse, no_dropout, not_causal, no_debug_mask)
    out, lse = attention(query, keys, values, *options, scale=scaling)[:2]
    return out, lse.reshape(query.shape[:-1])


def flash(query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Calls the fused kernel on [batch, heads, rows, head_dim]; no dimension may be 0.

    On a CPU there must be as many key-value heads as query heads, and with ``causal`` as many rows as keys. Returns out
    in the dtype of ``query`` and lse [batch, heads, rows].
    """
    device = query.device.type
    no_dropout = 0.0
    options = (no_dropout, causal) if device == "cpu" else (no_dropout, causal, False)  # no debug mask
    out, lse = getattr(torch.ops.aten, _FLASH_OPS[device])(query, keys, values, *options, scale=scaling)[:2]
    return out, lse


def attention_with_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kvzip_press.kernels.dense_attention.attention_with_lse`; for supported inputs only."""
    assert mask is None, "see reason_against"
    assert softcap is None, "see reason_against"
    if query.device.type == "cuda":
        return _on_cuda(query, keys, values, scaling, causal and query.shape[2] > 1)
    query_length, key_length = query.shape[2], keys.shape[2]
    if not causal or query_length == 1:
        return uncovered(query, keys, values, scaling)
    n_prefix = key_length - query_length
    square = _square(query, keys[:, :, n_prefix:], values[:, :, n_prefix:], scaling)
    if n_prefix == 0:
        return square
    prefix = uncovered(query, keys[:, :, :n_prefix], values[:, :, :n_prefix], scaling)
    return merge_pair(*prefix, *square)


def _on_cuda(query: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Needs a single call: the CUDA kernels support groups, and align their causal rule to the lower right.

    If there are few rows, groups are still folded: as rows of one head, a group's members read the keys only once.
    """
    if not causal and query.shape[2] < _CUDNN_MIN_ROWS:
        return uncovered(query, keys, values, scaling)
    if not causal and _cudnn_pays(query, keys):
        return _cudnn(query, keys, values, scaling)
    return flash(query, keys, values, scaling, causal)


def uncovered(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Runs the fused kernel without a causal rule: all rows see all keys, so a group's heads are just more rows."""
    batch_size, num_heads, query_length, head_dim = query.shape
    folded = query.reshape(batch_size, keys.shape[1], -1, head_dim)
    out, lse = flash(folded, keys, values, scaling)
    return out.reshape(query.shape), lse.reshape(batch_size, num_heads, query_length)


def _square(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention of as many rows as keys, on a CPU: one call per member of a group, so no keys are repeated."""
    members = query.unflatten(1, (keys.shape[1], -1)).unbind(2)
    results = [flash(member, keys, values, scaling, causal=True) for member in members]
    out, lse = (torch.stack(tensors, 2).flatten(1, 2) for tensors in zip(*results, strict=True))
    return out, lse
