"""Packing a layer and merging a tail into it: every implementation, beside a plain copy of the same bytes.

``python -m kvzip_press.kernels.benchmarks.ragged_pack --output pack.csv [--quick]``

The ops read from the device how large the result is, so all times here are of calls from Python, that wait included.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.harness import Bench, WrongResultError, run_cases
from kvzip_press.kernels.benchmarks.timing import Call
from kvzip_press.kernels.ragged_pack import Packed, merge, pack
from kvzip_press.kernels.ragged_pack.api import _MERGE, _PACK

TAIL = 64


@dataclass(frozen=True)
class PackCase:
    """A layer, of which each pair is kept with the same probability."""

    op: str
    num_key_value_heads: int = 8
    length: int = 65536
    head_dim: int = 128
    kept: float = 0.3
    batch: int = 1

    def __str__(self) -> str:
        """For example ``pack 8x65536x128 b1 kept0.3``."""
        shape = f"{self.num_key_value_heads}x{self.length}x{self.head_dim}"
        return f"{self.op} {shape} b{self.batch} kept{self.kept}"


CASES = [PackCase("pack"), PackCase("merge"), PackCase("merge evicting")]


def main() -> None:
    """Runs the cases of the command line."""
    run_cases("ragged_pack", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: PackCase) -> None:
    """Every implementation on one case."""
    calls = calls_of(case, bench.device)
    expected: Packed = calls["reference"]()
    tensors = tensors_of(expected)
    n_bytes = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # read and written
    for impl, call in calls.items():
        try:
            check_equal(f"{case}, {impl}", call(), expected)
        except ValueError as reason:  # how the dispatch says that it cannot do this
            bench.skip(case, f"ours {impl}", reason)
            continue
        bench.add(case, f"ours {impl}", bench.eager(call), n_bytes=n_bytes, error=0.0)
    fresh = [torch.empty_like(tensor) for tensor in tensors]
    bench.add(case, "memcpy", bench.eager(partial(copy_all, fresh, tensors)), n_bytes=n_bytes)


def calls_of(case: PackCase, device: torch.device) -> dict[str, Call]:
    """A call of each implementation, by its name."""
    shape = (case.batch, case.num_key_value_heads, case.length)
    keep = torch.rand(shape, device=device) < case.kept
    columns = columns_of(case, 0, case.length, device)
    if case.op == "pack":
        return {impl: partial(pack, columns, keep, impl=impl) for impl in _PACK}
    evicting = case.op == "merge evicting"
    context = pack(columns, torch.ones_like(keep) if evicting else keep, impl="reference")
    keep_context = keep.flatten() if evicting else None
    tail = columns_of(case, case.length, TAIL, device)
    arguments = (context, tail, torch.ones_like(keep[:, :, :TAIL]))
    return {impl: partial(merge, *arguments, keep_context=keep_context, impl=impl) for impl in _MERGE}


def columns_of(case: PackCase, start: int, length: int, device: torch.device) -> list[Tensor]:
    """Keys, values and positions from ``start`` on, as a cache hands them in: all heads share the positions."""
    shape = (case.batch, case.num_key_value_heads, length)
    pairs = [torch.randn(*shape, case.head_dim, dtype=torch.bfloat16, device=device) for _ in range(2)]
    return [*pairs, torch.arange(start, start + length, dtype=torch.int32, device=device).expand(shape)]


def tensors_of(packed: Packed) -> tuple[Tensor, ...]:
    """All that a packed layer holds."""
    return (*packed.columns, packed.cu_seqlens)


def check_equal(name: str, got: Packed, expected: Packed) -> None:
    """Raises WrongResultError unless the bits are the same."""
    for one, other in zip(tensors_of(got), tensors_of(expected), strict=True):
        if not torch.equal(one, other):
            raise WrongResultError(f"{name}: expected the bits of the reference, got others")


def copy_all(targets: list[Tensor], sources: tuple[Tensor, ...]) -> None:
    """A plain copy of each tensor."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


if __name__ == "__main__":
    main()
