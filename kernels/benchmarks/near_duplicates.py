"""Times every implementation of finding near-duplicates among keys, at the sizes of an eviction of R-KV.

``python -m kvzip_press.kernels.benchmarks.near_duplicates --output near_duplicates.csv [--quick]``

Each call compares the keys of one layer. Results have to be those of the reference in fp64, but where a cosine as good
as equals the threshold: "error" is the share of keys for which another one is found. Half of the cases are keys that
repeat themselves, of which most programs of the kernel are done early; in the others every pair of keys is compared.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.harness import Bench, WrongResultError, run_cases
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.near_duplicates import near_duplicates
from kvzip_press.kernels.near_duplicates.api import _IMPLS

ERROR_LIMIT = 1e-4  # of the keys
THRESHOLD = 0.5
DIRECTIONS = 64  # that keys which repeat themselves have


@dataclass(frozen=True)
class DuplicatesCase:
    """The keys of one layer in bf16, all of them valid."""

    batch: int
    n: int
    repeated: bool = False
    num_key_value_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        """For example ``8/128 n1152 b287, repeated``."""
        kind = "repeated" if self.repeated else "all unlike"
        return f"{self.num_key_value_heads}/{self.head_dim} n{self.n} b{self.batch}, {kind}"

    def flops(self) -> int:
        """FLOPs of the products of all pairs of keys, each pair twice."""
        return 2 * self.batch * self.num_key_value_heads * self.n**2 * self.head_dim

    def n_bytes(self) -> int:
        """Bytes of the keys, and of what is found."""
        return self.batch * self.num_key_value_heads * self.n * (2 * self.head_dim + 8)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draws keys, of chance or around some directions, and says that all are valid."""
        shape = (self.batch, self.num_key_value_heads, self.n)
        keys = torch.randn(*shape, self.head_dim, dtype=torch.bfloat16, device=device)
        if self.repeated:
            directions = torch.randn(DIRECTIONS, self.head_dim, dtype=torch.bfloat16, device=device)
            keys = directions[torch.randint(DIRECTIONS, shape, device=device)].add_(keys, alpha=0.5)
        return keys, torch.ones(shape, dtype=torch.bool, device=device)


CASES = [
    DuplicatesCase(287, 1152),
    DuplicatesCase(287, 1152, repeated=True),
    DuplicatesCase(1, 4224),
    DuplicatesCase(1, 4224, repeated=True),
]


def main() -> None:
    """Runs the cases of the command line."""
    run_cases("near_duplicates", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: DuplicatesCase) -> None:
    """Every implementation on one case."""
    copies = [case.tensors(bench.device) for _ in range(copies_for(case.n_bytes()))]
    rows = zip(*(tensor.split(1) for tensor in copies[0]), strict=True)
    expected = torch.cat([near_duplicates(keys.double(), valid, THRESHOLD, impl="reference") for keys, valid in rows])

    def calls_of(impl: str) -> list[Call]:
        return [partial(near_duplicates, *copy, THRESHOLD, impl=impl) for copy in copies]

    def error_of(named: str, got: Tensor) -> float:
        return check(named, got, expected)

    bench.compare(case, _IMPLS, calls_of, error_of, n_bytes=case.n_bytes(), flops=case.flops())


def check(name: str, got: Tensor, expected: Tensor) -> float:
    """Returns the share of keys for which another is found; raises WrongResultError if it is too large."""
    error = float((got != expected).double().mean())
    if not error <= ERROR_LIMIT:
        raise WrongResultError(f"{name}: expected what the reference finds, got something else for {error:.3g} of all")
    return error


if __name__ == "__main__":
    main()
