"""Packing by one kernel that moves rows: each source pair knows where it goes, and only kept pairs are read.

The destinations are one int32 a source pair, -1 for a pair to drop, made by a cumulative sum; keys, values and the
position of a pair move in one pass. Nothing of the size of the keys or values is allocated but the result.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from kvzip_press.kernels.ragged_pack.indices import cumulated, spread
from kvzip_press.kernels.ragged_pack.packed import Packed

_BLOCK_BYTES = 1 << 14  # what a program holds at a time: 64 rows of 128 numbers of 16 bits
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(keys: Tensor, values: Tensor, keep: Tensor, positions: Tensor | None) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.pack`."""
    batch_size, _, length = keep.shape
    if positions is None:
        positions = torch.arange(length, dtype=torch.int32, device=keys.device).expand(batch_size, -1)
    packed = _fresh(keys, values, cumulated(keep.sum(-1).flatten()))
    _scatter(keys, values, positions, _destinations(keep, 0), packed)
    return packed


def merge(
    context: Packed,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_positions: Tensor,
    keep_tail: Tensor,
    keep_context: Tensor | None,
) -> Packed:
    """See :func:`kvzip_press.kernels.ragged_pack.merge`."""
    keys, values, positions, cu_seqlens = context
    total = keys.shape[0]
    keep = torch.ones(total, dtype=torch.bool, device=keys.device) if keep_context is None else keep_context
    old, tail = cu_seqlens.long(), cumulated(keep_tail.sum(-1).flatten())
    kept = cumulated(keep)[old]
    packed = _fresh(keys, values, kept + tail)
    # Before a segment's context lie the tails of earlier segments too, before its tail the contexts up to its own.
    to_context = _destinations(keep, spread(tail[:-1], old.diff(), total))
    to_tail = _destinations(keep_tail, kept[1:].view(*keep_tail.shape[:2], 1))
    _scatter(keys[None, None], values[None, None], positions[None], to_context, packed)
    _scatter(tail_keys, tail_values, tail_positions, to_tail, packed)
    return packed


def _fresh(keys: Tensor, values: Tensor, bounds: Tensor) -> Packed:
    """Storage for as many pairs as ``bounds`` end with; reading that number is the one wait for the device."""
    total = int(bounds[-1])
    return Packed(
        keys.new_empty(total, keys.shape[-1]),
        values.new_empty(total, values.shape[-1]),
        keys.new_empty(total, dtype=torch.int32),
        bounds.to(torch.int32),
    )


def _destinations(keep: Tensor, shift: Tensor | int) -> Tensor:
    """Int32 in the shape of ``keep``: how many kept pairs come before each kept one, plus ``shift``; -1 if dropped."""
    numbers = keep.flatten().to(torch.int32).cumsum_(0).sub_(1).view(keep.shape)
    return numbers.add_(shift).masked_fill_(~keep, -1)


def _scatter(keys: Tensor, values: Tensor, positions: Tensor, destinations: Tensor, packed: Packed) -> None:
    """Moves the pairs of [batch, heads, length, head_dim] views whose destination is not negative to that row."""
    batch_size, num_heads, length = keys.shape[:3]
    if destinations.numel() == 0 or packed.keys.shape[0] == 0:
        return
    keys, values, out_keys, out_values = (_as_bits(tensor) for tensor in (keys, values, packed.keys, packed.values))
    head_dim, value_head_dim = keys.shape[3], values.shape[3]
    block_n = block_rows(keys, values)
    n_blocks = triton.cdiv(length, block_n)
    with torch.cuda.device_of(keys):  # Triton launches on the current device
        _scatter_kernel[(batch_size * num_heads * n_blocks,)](
            keys,
            values,
            positions,
            destinations,
            out_keys,
            out_values,
            packed.positions,
            num_heads,
            length,
            n_blocks,
            *keys.stride()[:3],
            *values.stride()[:3],
            *positions.stride(),
            HEAD_DIM=head_dim,
            VALUE_HEAD_DIM=value_head_dim,
            BLOCK_N=block_n,
            BLOCK_D=_padded(head_dim),
            BLOCK_V=_padded(value_head_dim),
        )


def block_rows(keys: Tensor, values: Tensor) -> int:
    """Rows of a program: a power of two, fewer the wider the rows are."""
    widest = max(_padded(tensor.shape[-1]) * tensor.element_size() for tensor in (keys, values))
    return max(1, min(64, _BLOCK_BYTES // widest))


def _padded(head_dim: int) -> int:
    return triton.next_power_of_2(max(1, head_dim))


def _as_bits(tensor: Tensor) -> Tensor:
    """The same rows as integers: one compiled kernel for dtypes of a size, and none that Triton does not know."""
    rows = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return rows.view(_BITS[min(8, rows.element_size())])


@triton.jit
def _scatter_kernel(
    keys_ptr,
    values_ptr,
    positions_ptr,
    destinations_ptr,
    out_keys_ptr,
    out_values_ptr,
    out_positions_ptr,
    num_heads,
    length,
    n_blocks,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pb,
    stride_pn,
    HEAD_DIM: tl.constexpr,
    VALUE_HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    segment = (tl.program_id(0) // n_blocks).to(tl.int64)
    row, head = segment // num_heads, segment % num_heads
    offs_n = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    destination = tl.load(destinations_ptr + segment * length + offs_n, mask=offs_n < length, other=-1).to(tl.int64)
    mask_n = destination >= 0
    position = tl.load(positions_ptr + row * stride_pb + offs_n * stride_pn, mask=mask_n)
    tl.store(out_positions_ptr + destination, position, mask=mask_n)
    from_keys_ptr = keys_ptr + row * stride_kb + head * stride_kh
    _move_rows(from_keys_ptr, stride_kn, offs_n, out_keys_ptr, destination, mask_n, HEAD_DIM, BLOCK_D)
    from_values_ptr = values_ptr + row * stride_vb + head * stride_vh
    _move_rows(from_values_ptr, stride_vn, offs_n, out_values_ptr, destination, mask_n, VALUE_HEAD_DIM, BLOCK_V)


@triton.jit
def _move_rows(x_ptr, stride_x, offs_n, out_ptr, destination, mask_n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``offs_n`` of x to the rows ``destination`` of a contiguous output."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_n[:, None] & (offs_d[None, :] < HEAD_DIM)
    rows = tl.load(x_ptr + offs_n[:, None] * stride_x + offs_d[None, :], mask=mask)
    tl.store(out_ptr + destination[:, None] * HEAD_DIM + offs_d[None, :], rows, mask=mask)
