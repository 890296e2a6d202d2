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
from kvzip_press.kernels.ragged_pack import merge, pack
from kvzip_press.kernels.ragged_pack.api import _MERGE, _PACK
from kvzip_press.kernels.ragged_pack.packed import Packed

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
    n_bytes = 2 * sum(tensor.numel() * tensor.element_size() for tensor in expected)  # read and written
    for impl, call in calls.items():
        try:
            check_equal(f"{case}, {impl}", call(), expected)
        except ValueError as reason:  # how the dispatch says that it cannot do this
            bench.skip(case, f"ours {impl}", reason)
            continue
        bench.add(case, f"ours {impl}", bench.eager(call), n_bytes=n_bytes, error=0.0)
    fresh = [torch.empty_like(tensor) for tensor in expected]
    bench.add(case, "memcpy", bench.eager(partial(copy_all, fresh, expected)), n_bytes=n_bytes)


def calls_of(case: PackCase, device: torch.device) -> dict[str, Call]:
    """A call of each implementation, by its name."""
    shape = (case.batch, case.num_key_value_heads, case.length)
    keys, values = (torch.randn(*shape, case.head_dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    keep = torch.rand(shape, device=device) < case.kept
    if case.op == "pack":
        return {impl: partial(pack, keys, values, keep, impl=impl) for impl in _PACK}
    evicting = case.op == "merge evicting"
    context = pack(keys, values, torch.ones_like(keep) if evicting else keep, impl="reference")
    keep_context = keep.flatten() if evicting else None
    positions = torch.arange(case.length, case.length + TAIL, dtype=torch.int32, device=device).expand(case.batch, -1)
    tail = [tensor[:, :, :TAIL].clone() for tensor in (keys, values)]
    arguments = (*context, *tail, positions, torch.ones_like(keep[:, :, :TAIL]))
    return {impl: partial(merge, *arguments, keep_context=keep_context, impl=impl) for impl in _MERGE}


def check_equal(name: str, got: Packed, expected: Packed) -> None:
    """Raises WrongResultError unless the bits are the same."""
    for one, other in zip(got, expected, strict=True):
        if not torch.equal(one, other):
            raise WrongResultError(f"{name}: expected the bits of the reference, got others")


def copy_all(targets: list[Tensor], sources: Packed) -> None:
    """A plain copy of each tensor."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


if __name__ == "__main__":
    main()
