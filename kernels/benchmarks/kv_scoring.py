"""Times every implementation of scoring a chunk's keys, at the sizes of a KVzip replay.

``python -m kvzip_press.kernels.benchmarks.kv_scoring --output scoring.csv [--quick]``
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.harness import Bench, run_cases
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.kv_scoring import kv_scoring
from kvzip_press.kernels.kv_scoring.api import _IMPLS

ERROR_LIMIT = 1e-3  # logits of bf16 inputs are exact, apart from fp32 sums


@dataclass(frozen=True)
class ScoringCase:
    """A replayed chunk."""

    batch: int
    n_rows: int = 2100
    n_chunk: int = 2048
    n_sink: int = 4
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        """For example ``32/8/128 rows2100 chunk2048 sink4 b1``."""
        heads = f"{self.num_attention_heads}/{self.num_key_value_heads}/{self.head_dim}"
        return f"{heads} rows{self.n_rows} chunk{self.n_chunk} sink{self.n_sink} b{self.batch}"

    def flops(self) -> int:
        """FLOPs of the logits in the definition, each counted once: row i sees sink, chunk and i + 1 replay keys."""
        logits = self.n_rows * (self.n_sink + self.n_chunk) + self.n_rows * (self.n_rows + 1) // 2
        return 2 * self.batch * self.num_attention_heads * self.head_dim * logits

    def n_bytes(self) -> int:
        """Bytes of queries and keys in bf16."""
        n_keys = self.n_sink + self.n_chunk + self.n_rows
        rows = self.num_attention_heads * self.n_rows + self.num_key_value_heads * n_keys
        return 2 * self.batch * self.head_dim * rows


class ScoringInputs(NamedTuple):
    """The op's inputs, in the order of its arguments."""

    query: Tensor
    sink_keys: Tensor
    chunk_keys: Tensor
    replay_keys: Tensor

    @classmethod
    def random(cls, case: ScoringCase, device: torch.device) -> "ScoringInputs":
        """Draws normal numbers in bf16."""
        heads = (case.num_attention_heads, *[case.num_key_value_heads] * 3)
        lengths = (case.n_rows, case.n_sink, case.n_chunk, case.n_rows)
        shapes = [(case.batch, n, length, case.head_dim) for n, length in zip(heads, lengths, strict=True)]
        return cls(*(torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes))


CASES = [ScoringCase(batch=1), ScoringCase(batch=4)]


def main() -> None:
    """Runs the cases that the command line asks for."""
    run_cases("kv_scoring", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: ScoringCase) -> None:
    """Measures every implementation on one case."""
    copies = [ScoringInputs.random(case, bench.device) for _ in range(copies_for(case.n_bytes()))]
    exact = [kv_scoring(*(tensor.double() for tensor in c), impl="reference") for c in (copies[0], copies[-1])]
    for impl in _IMPLS:
        bench.measure(
            case,
            f"ours {impl}",
            partial(calls_of, copies, impl),
            exact=exact,
            limit=ERROR_LIMIT,
            in_graph=impl != "reference",  # thousands of launches
            may_raise=(ValueError,),  # raised by the dispatch if it cannot do this
            n_bytes=case.n_bytes(),
            flops=case.flops(),
        )


def calls_of(copies: Sequence[ScoringInputs], impl: str) -> list[Call]:
    """Returns a call of our op for each copy of the inputs."""
    return [partial(kv_scoring, *copy, impl=impl) for copy in copies]


if __name__ == "__main__":
    main()
