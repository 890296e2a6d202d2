"""Alternatives for a decode step on pairs that are ragged over heads, each from the package that publishes it.

Every function returns calls, one for each copy of a case's inputs, or raises if its package is missing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.cases import DecodeCase, DecodeInputs
from kvzip_press.kernels.benchmarks.timing import Call
from kvzip_press.kernels.ragged_pack.indices import cumulated, spread

WORKSPACE_BYTES = 256 << 20


class Pages(NamedTuple):
    """A page table in which every head is a separate request: int32 indptr, indices and last_page_len."""

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


def pages_of(cu_seqlens: Tensor, page_size: int) -> Pages:
    """Returns a page table whose pages are in the order of the heads."""
    lengths = cu_seqlens.diff()
    indptr = cumulated((lengths + page_size - 1) // page_size).to(torch.int32)
    indices = torch.arange(int(indptr[-1]), dtype=torch.int32, device=cu_seqlens.device)
    return Pages(indptr, indices, (lengths - 1) % page_size + 1)


def paged(inputs: DecodeInputs, page_size: int) -> Tensor:
    """Copies the packed context into pages, [pages, 2, page_size, 1, head_dim]."""
    cu_seqlens = inputs.cu_seqlens.long()
    pages = pages_of(inputs.cu_seqlens, page_size)
    total, head_dim = inputs.keys.shape
    shift = pages.indptr[:-1].long() * page_size - cu_seqlens[:-1]
    slots = torch.arange(total, device=cu_seqlens.device) + spread(shift, cu_seqlens.diff(), total)
    kv = inputs.keys.new_zeros(2, pages.indices.numel() * page_size, head_dim)
    for one, packed in zip(kv, (inputs.keys, inputs.values), strict=True):
        one[slots] = packed
    return kv.view(2, -1, page_size, 1, head_dim).transpose(0, 1).contiguous()


def by_head(query: Tensor, groups: int) -> Tensor:
    """Reshapes queries [batch, num_attention_heads, 1, head_dim] to [segments, groups, head_dim]."""
    return query.reshape(-1, groups, query.shape[-1])


def flashinfer_plan(case: DecodeCase, inputs: DecodeInputs, page_size: int) -> tuple[Any, Call]:
    """Returns FlashInfer's wrapper and a call that plans it for these lengths, which all copies share."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    device, dtype = inputs.keys.device, inputs.keys.dtype
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    pages = pages_of(inputs.cu_seqlens, page_size)
    shape = (case.groups, 1, case.head_dim, page_size)
    return wrapper, partial(wrapper.plan, *pages, *shape, q_data_type=dtype, kv_data_type=dtype)


def flashinfer(case: DecodeCase, copies: Sequence[DecodeInputs], page_size: int) -> list[Call]:
    """FlashInfer's batched decode over a paged cache, with each head as a request, planned once."""
    wrapper, plan = flashinfer_plan(case, copies[0], page_size)
    plan()

    def run(query: Tensor, kv: Tensor, shape: torch.Size) -> Tensor:
        return wrapper.run(query, kv).view(shape)

    return [partial(run, by_head(c.query, case.groups), paged(c, page_size), c.query.shape) for c in copies]


def torch_varlen(case: DecodeCase, copies: Sequence[DecodeInputs], as_rows: bool) -> list[Call]:
    """PyTorch's variable-length attention, each head as a sequence; a group's query heads are heads or rows."""
    from torch.nn.attention.varlen import varlen_attn

    longest, rows = max(case.lengths()), case.groups if as_rows else 1
    heads = 1 if as_rows else case.groups
    cu_query = torch.arange(case.n_segments + 1, dtype=torch.int32, device=copies[0].query.device) * rows

    def run(c: DecodeInputs) -> Tensor:
        keys, values = (packed.unsqueeze(1).expand(-1, heads, -1) for packed in (c.keys, c.values))
        query = c.query.reshape(-1, heads, case.head_dim)
        out = varlen_attn(query, keys, values, cu_query, c.cu_seqlens, rows, longest)
        assert isinstance(out, Tensor)
        return out.view(c.query.shape)

    return [partial(run, c) for c in copies]


def flash_attn_varlen(case: DecodeCase, copies: Sequence[DecodeInputs]) -> list[Call]:
    """flash-attn's variable-length attention, with each head as a sequence."""
    from flash_attn import flash_attn_varlen_func

    longest = max(case.lengths())
    cu_query = torch.arange(case.n_segments + 1, dtype=torch.int32, device=copies[0].query.device)

    def run(c: DecodeInputs) -> Tensor:
        keys, values, query = c.keys.unsqueeze(1), c.values.unsqueeze(1), by_head(c.query, case.groups)
        return flash_attn_varlen_func(query, keys, values, cu_query, c.cu_seqlens, 1, longest).view(c.query.shape)

    return [partial(run, c) for c in copies]


def flash_attn_kvcache(case: DecodeCase, copies: Sequence[DecodeInputs]) -> list[Call]:
    """flash-attn's decode, with each head as a batch row, padded to the longest head."""
    from flash_attn import flash_attn_with_kvcache

    longest = max(case.lengths())

    def run(query: Tensor, kv: Tensor, lengths: Tensor, shape: torch.Size) -> Tensor:
        return flash_attn_with_kvcache(query, kv[:, 0], kv[:, 1], cache_seqlens=lengths).view(shape)

    def one(c: DecodeInputs) -> Call:
        query, padded = by_head(c.query, case.groups).unsqueeze(1), paged(c, longest)  # one page per head
        return partial(run, query, padded, c.cu_seqlens.diff(), c.query.shape)

    return [one(c) for c in copies]


def copying_append(case: DecodeCase, copies: Sequence[DecodeInputs]) -> list[Call]:
    """The cost of a token in a packed cache without a tail: copies all keys and values, adding a row to each head."""
    bounds = list(pairwise(copies[0].cu_seqlens.tolist()))

    def pieces(packed: Tensor, tail: Tensor) -> list[Tensor]:
        rows = tail[:, :, :1].reshape(case.n_segments, 1, case.head_dim)
        return [piece for (begin, end), row in zip(bounds, rows, strict=True) for piece in (packed[begin:end], row)]

    def run(*both: list[Tensor]) -> list[Tensor]:
        return [torch.cat(one) for one in both]

    return [partial(run, pieces(c.keys, c.tail_keys), pieces(c.values, c.tail_values)) for c in copies]


def memcpy(case: DecodeCase, copies: Sequence[DecodeInputs]) -> list[Call]:
    """A plain copy of the packed keys and values."""
    del case

    def run(targets: list[Tensor], sources: tuple[Tensor, Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return [partial(run, [torch.empty_like(x) for x in (c.keys, c.values)], (c.keys, c.values)) for c in copies]


Peer = Callable[[DecodeCase, Sequence[DecodeInputs]], list[Call]]

EXACT: dict[str, Peer] = {
    "flashinfer, page 1": partial(flashinfer, page_size=1),
    "flashinfer, page 16": partial(flashinfer, page_size=16),
    "torch varlen, group as heads": partial(torch_varlen, as_rows=False),
    "torch varlen, group as rows": partial(torch_varlen, as_rows=True),
    "flash-attn varlen": flash_attn_varlen,
    "flash-attn kvcache, padded": flash_attn_kvcache,
}
TIME_ONLY: dict[str, Peer] = {"copying append": copying_append, "memcpy": memcpy}
"""These read and write all bytes."""
