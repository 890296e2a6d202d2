"""Times every implementation of what attention keys get, at the sizes of an eviction of an 8B model's 32 layers.

``python -m kvzip_press.kernels.benchmarks.received_attention --output received_attention.csv [--quick]``

Each call sums the attention of some last queries to the keys of all layers, as an eviction of one row does that has
4096 tokens and 128 newer ones: of one query (TOVA), 32 (SnapKV) or 128 (H2O). Results have to be those of the reference
in fp64: "error" is the largest relative difference of a sum.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.harness import Bench, WrongResultError, run_cases
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.received_attention import received_attention
from kvzip_press.kernels.received_attention.api import _IMPLS

ERROR_LIMIT = 1e-4


@dataclass(frozen=True)
class ReceivedCase:
    """Queries and keys of all layers in bf16, the queries at the end."""

    n_rows: int
    squared: bool = False
    batch: int = 32
    n: int = 4224
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        """For example ``32/8/128 q128 n4224 b32, squares``."""
        heads = f"{self.num_attention_heads}/{self.num_key_value_heads}/{self.head_dim}"
        return f"{heads} q{self.n_rows} n{self.n} b{self.batch}{', squares' if self.squared else ''}"

    def flops(self) -> int:
        """FLOPs of all products of a query and a key, once."""
        return 2 * self.batch * self.num_attention_heads * self.n_rows * self.n * self.head_dim

    def n_bytes(self) -> int:
        """Bytes of the queries and keys in bf16, of the numbers of keys and of their sums."""
        keys = self.batch * self.num_key_value_heads * self.n
        return 2 * self.batch * self.num_attention_heads * self.n_rows * self.head_dim + keys * (2 * self.head_dim + 12)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws queries and keys, and says at what positions they are."""
        query, keys = (
            torch.randn(self.batch, heads, length, self.head_dim, dtype=torch.bfloat16, device=device)
            for heads, length in ((self.num_attention_heads, self.n_rows), (self.num_key_value_heads, self.n))
        )
        positions = torch.arange(self.n, device=device)
        seen_from = positions.expand(self.batch, self.num_key_value_heads, -1)
        return query, keys, positions[self.n - self.n_rows :].expand(self.batch, -1), seen_from


CASES = [ReceivedCase(1), ReceivedCase(32), ReceivedCase(128), ReceivedCase(128, squared=True)]


def main() -> None:
    """Runs the cases of the command line."""
    run_cases("received_attention", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: ReceivedCase) -> None:
    """Every implementation on one case."""
    copies = [case.tensors(bench.device) for _ in range(copies_for(case.n_bytes()))]
    query, keys, *positions = copies[0]
    exact = [query.double(), keys.double(), *positions]
    rows = zip(*(tensor.split(1) for tensor in exact), strict=True)
    expected = torch.cat([received_attention(*row, squared=case.squared, impl="reference") for row in rows])

    def calls_of(impl: str) -> list[Call]:
        return [partial(received_attention, *copy, squared=case.squared, impl=impl) for copy in copies]

    def error_of(named: str, got: Tensor) -> float:
        return check(named, got, expected)

    bench.compare(case, _IMPLS, calls_of, error_of, n_bytes=case.n_bytes(), flops=case.flops())


def check(name: str, got: Tensor, expected: Tensor) -> float:
    """Returns the largest relative difference of a sum; raises WrongResultError if it is too large."""
    error = float(((got - expected).abs() / expected).max())
    if not error <= ERROR_LIMIT:
        raise WrongResultError(f"{name}: expected sums of the reference, got some that differ by {error:.3g} of them")
    return error


if __name__ == "__main__":
    main()
