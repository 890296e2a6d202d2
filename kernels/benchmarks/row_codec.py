"""Encoding a layer's rows and decoding them: every implementation, beside a plain copy of as many bytes.

``python -m kvzip_press.kernels.benchmarks.row_codec --output row_codec.csv [--cases int4] [--quick]``

An implementation has to give the codes, or the numbers, of the reference bit for bit; only where rows are rotated may
sums differ, and the decoded rows are compared.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.harness import Bench, WrongResultError, run_cases
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.row_codec import CODECS, Codes, decode_rows, encode_rows
from kvzip_press.kernels.row_codec.api import _DECODE, _ENCODE

ROTATED_LIMIT = 1e-2  # of the decoded rows: a code in a thousand may be its neighbour


@dataclass(frozen=True)
class CodecCase:
    """Keys, or values, of one layer in bf16, as a model lays them out: tokens before heads."""

    op: str
    codec: str
    rotated: bool = False
    num_key_value_heads: int = 8
    length: int = 65536
    head_dim: int = 128

    def __str__(self) -> str:
        """For example ``encode int4 rotated 8x65536x128``."""
        shape = f"{self.num_key_value_heads}x{self.length}x{self.head_dim}"
        return f"{self.op} {self.codec}{' rotated' if self.rotated else ''} {shape}"

    def rows(self, device: torch.device) -> Tensor:
        """Rows [1, heads, length, head_dim]."""
        shape = (1, self.length, self.num_key_value_heads, self.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(1, 2)

    def call(self, rows: Tensor, impl: str) -> Call:
        """A call of an implementation; what it decodes was encoded by the reference."""
        if self.op == "encode":
            centres = rows[:, :, 0].contiguous() if self.rotated else None
            return partial(encode_rows, rows, self.codec, rotated=self.rotated, centres=centres, impl=impl)
        return partial(decode_rows, encode_rows(rows, self.codec), torch.bfloat16, impl=impl)


CASES = [
    *(CodecCase("encode", codec) for codec in CODECS),
    CodecCase("encode", "int4", rotated=True),
    *(CodecCase("decode", codec) for codec in CODECS),
    CodecCase("encode", "int8", length=1024),
    CodecCase("decode", "int8", length=8192),
]


def main() -> None:
    """Runs the cases of the command line."""
    run_cases("row_codec", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: CodecCase) -> None:
    """Every implementation on one case."""
    rows = case.rows(bench.device)
    n_bytes = rows.nbytes + encode_rows(rows, case.codec).nbytes  # read and written, or the other way round
    copies = [rows, *(case.rows(bench.device) for _ in range(copies_for(n_bytes) - 1))]
    expected = case.call(rows, "reference")()
    for impl in _ENCODE if case.op == "encode" else _DECODE:
        calls = [case.call(copy, impl) for copy in copies]
        try:
            error = check(f"{case}, {impl}", case, calls[0](), expected)
        except ValueError as reason:  # how the dispatch says that it cannot do this
            bench.skip(case, f"ours {impl}", reason)
            continue
        bench.add(case, f"ours {impl}", bench.in_graph(calls), n_bytes=n_bytes, error=error)
    copied = [torch.empty(2, n_bytes // 2, dtype=torch.uint8, device=bench.device) for _ in copies]
    bench.add(case, "memcpy", bench.in_graph([partial(pair[0].copy_, pair[1]) for pair in copied]), n_bytes=n_bytes)


def check(name: str, case: CodecCase, got: Codes | Tensor, expected: Codes | Tensor) -> float:
    """Returns the relative error of decoded rows, 0 for equal bits; raises WrongResultError if it is too large."""
    if isinstance(got, Codes) and isinstance(expected, Codes):
        if case.rotated:
            return _error(name, decode_rows(got), decode_rows(expected))
        pairs = [(got.codes, expected.codes), (got.scales, expected.scales)]
    else:
        assert isinstance(got, Tensor)
        assert isinstance(expected, Tensor)
        pairs = [(got, expected)]
    if not all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs):
        raise WrongResultError(f"{name}: expected the bits of the reference, got others")
    return 0.0


def _error(name: str, got: Tensor, expected: Tensor) -> float:
    error = float((got - expected).norm() / expected.norm())
    if not error <= ROTATED_LIMIT:
        raise WrongResultError(f"{name}: expected a relative error of at most {ROTATED_LIMIT}, got {error:.3g}")
    return error


if __name__ == "__main__":
    main()
