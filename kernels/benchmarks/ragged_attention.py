"""Times ragged attention in a decode step, beside alternatives and beside dense attention to the full cache.

``python -m kvzip_press.kernels.benchmarks.ragged_attention --output decode.csv [--cases n4096] [--quick]``
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvzip_press.kernels.benchmarks import decode_peers
from kvzip_press.kernels.benchmarks.cases import DECODE_CASES, TAIL, DecodeCase, DecodeInputs
from kvzip_press.kernels.benchmarks.harness import PEER_ERRORS, Bench, run_cases
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.dense_attention import attention_with_lse
from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.kernels.ragged_attention.api import _IMPLS

ERROR_LIMIT = 1e-2  # bf16 results and weights are off by 2 to 3e-3
DENSE = {"sdpa flash, full cache": SDPBackend.FLASH_ATTENTION, "sdpa cudnn, full cache": SDPBackend.CUDNN_ATTENTION}


def main() -> None:
    """Runs the cases that the command line asks for."""
    run_cases("ragged_attention", DECODE_CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: DecodeCase) -> None:
    """Measures all implementations on one case."""
    first = DecodeInputs.random(case, bench.device)
    n_copies = copies_for(first.context_bytes())
    copies = [first, *(DecodeInputs.random(case, bench.device) for _ in range(n_copies - 1))]
    for tail in (0, TAIL):
        run_ours(bench, case, copies, tail)
    run_peers(bench, case, copies)
    for page_size in (1, 16):
        run_plan(bench, case, first, page_size)
    del copies, first
    run_dense(bench, case)


def run_ours(bench: Bench, case: DecodeCase, copies: Sequence[DecodeInputs], tail: int) -> None:
    """Measures every implementation of ours, with or without a tail."""
    exact = [attend(in_fp64(c), tail, "reference") for c in (copies[0], copies[-1])]
    n_bytes = copies[0].context_bytes() + (copies[0].tail_bytes() if tail else 0)
    for impl in _IMPLS:
        bench.measure(
            case,
            f"ours {impl}, tail {tail}",
            partial(calls_of, copies, tail, impl),
            exact=exact,
            limit=ERROR_LIMIT,
            in_graph=impl != "reference",  # it reads the lengths
            may_raise=(ValueError,),  # raised by the dispatch if it cannot do this
            n_bytes=n_bytes,
        )


def run_peers(bench: Bench, case: DecodeCase, copies: Sequence[DecodeInputs]) -> None:
    """Measures the other packages on the packed context, without a tail."""
    exact = [attend(in_fp64(c), 0, "reference") for c in (copies[0], copies[-1])]
    n_bytes = copies[0].context_bytes()
    for impl, peer in decode_peers.EXACT.items():
        build = partial(peer, case, copies)
        bench.measure(case, impl, build, exact=exact, limit=ERROR_LIMIT, n_bytes=n_bytes)
    for impl, peer in decode_peers.TIME_ONLY.items():
        bench.measure(case, impl, partial(peer, case, copies), n_bytes=2 * n_bytes)


def run_plan(bench: Bench, case: DecodeCase, inputs: DecodeInputs, page_size: int) -> None:
    """Measures the wall time of FlashInfer's plan, which it needs whenever a length changes."""
    impl = f"flashinfer, page {page_size}: plan alone, wall clock"
    try:
        _, plan = decode_peers.flashinfer_plan(case, inputs, page_size)
        bench.add(case, impl, bench.on_wall_clock(plan))
    except PEER_ERRORS as reason:
        bench.skip(case, impl, reason)


def run_dense(bench: Bench, case: DecodeCase) -> None:
    """Measures PyTorch's attention to the full cache: the cost of the step without eviction."""
    kv_shape = (case.batch, case.num_key_value_heads, case.context, case.head_dim)
    shapes = ((case.batch, case.num_attention_heads, 1, case.head_dim), kv_shape, kv_shape)
    n_bytes = 4 * torch.Size(kv_shape).numel()

    def random() -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.bfloat16, device=bench.device) for shape in shapes]

    copies = [random() for _ in range(copies_for(n_bytes))]
    exact = [dense_exact(*copy) for copy in (copies[0], copies[-1])]
    for impl, backend in DENSE.items():
        build = partial(dense_calls, backend, copies)
        bench.measure(case, impl, build, exact=exact, limit=ERROR_LIMIT, n_bytes=n_bytes)


def attend(inputs: DecodeInputs, tail: int, impl: str) -> Tensor:
    """Runs our op, with or without the tail."""
    tails = (inputs.tail_keys, inputs.tail_values) if tail else (None, None)
    out = ragged_attention(inputs.query, inputs.keys, inputs.values, inputs.cu_seqlens, *tails, impl=impl)
    assert isinstance(out, Tensor)
    return out


def calls_of(copies: Sequence[DecodeInputs], tail: int, impl: str) -> list[Call]:
    """Returns a call of our op for each copy of the inputs."""
    return [partial(attend, copy, tail, impl) for copy in copies]


def in_fp64(inputs: DecodeInputs) -> DecodeInputs:
    """Returns the same inputs in fp64."""
    names = ("query", "keys", "values", "tail_keys", "tail_values")
    return DecodeInputs(cu_seqlens=inputs.cu_seqlens, **{name: getattr(inputs, name).double() for name in names})


def dense_exact(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Dense attention in fp64."""
    return attention_with_lse(query.double(), keys.double(), values.double(), causal=False, impl="reference")[0]


def dense_calls(backend: SDPBackend, copies: Sequence[list[Tensor]]) -> list[Call]:
    """Returns a call of PyTorch's attention, by one backend, for each copy."""

    def call(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return [partial(call, *copy) for copy in copies]


if __name__ == "__main__":
    main()
