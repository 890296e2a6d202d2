"""Times a replay's attention: many rows that see all of a long context and, causally, one another.

``python -m kvzip_press.kernels.benchmarks.replay_attention --output replay.csv [--quick]``

Ours attends to context and replay separately and merges; the others get the keys of both in one tensor, and the time to
build that tensor is not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvzip_press.kernels.benchmarks.harness import Bench, run_cases
from kvzip_press.kernels.benchmarks.timing import Call
from kvzip_press.kernels.dense_attention import attention_with_lse, merge_attention
from kvzip_press.kernels.dense_attention.api import _IMPLS

ERROR_LIMIT = 1e-2  # bf16 results and weights are off by 2 to 3e-3


@dataclass(frozen=True)
class ReplayCase:
    """A replayed chunk behind a context."""

    n_rows: int = 2100
    context: int = 65536
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        """For example ``32/8/128 rows2100 n65536``."""
        heads = f"{self.num_attention_heads}/{self.num_key_value_heads}/{self.head_dim}"
        return f"{heads} rows{self.n_rows} n{self.context}"

    def flops(self, *, hidden_too: bool = False) -> int:
        """Returns the FLOPs of both matrix products, over the pairs that a row sees, or over all pairs."""
        own = self.n_rows**2 if hidden_too else self.n_rows * (self.n_rows + 1) // 2
        return 4 * self.num_attention_heads * self.head_dim * (self.n_rows * self.context + own)


CASES = [ReplayCase()]
Inputs = tuple[Tensor, Tensor, Tensor]  # query; keys and values of the context, followed by the replay's own
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Runs the cases that the command line asks for."""
    run_cases("replay_attention", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: ReplayCase) -> None:
    """Measures all implementations on one case, whose keys alone are several times larger than the L2."""
    copies = [random_inputs(case, bench.device) for _ in range(2)]
    exact = [attention_with_lse(*(x.double() for x in c), causal=True, impl="reference")[0] for c in copies]
    for impl in _IMPLS:
        bench.measure(
            case,
            f"ours {impl}",
            partial(calls_of, partial(ours, case.context, impl), copies),
            exact=exact,
            limit=ERROR_LIMIT,
            in_graph=impl != "reference",  # thousands of launches
            may_raise=(ValueError,),  # raised by the dispatch if it cannot do this
            flops=case.flops(),
        )
    mask = torch.ones(case.n_rows, case.context + case.n_rows, dtype=torch.bool, device=bench.device)
    mask = mask.tril_(case.context)[None, None]
    peers: dict[str, Attention] = {
        "sdpa, causal_lower_right": lower_right,
        "sdpa, bool mask, keys repeated": partial(masked, mask),
    }
    for name, peer in peers.items():
        build = partial(calls_of, peer, copies)
        bench.measure(case, name, build, exact=exact, limit=ERROR_LIMIT, flops=case.flops())
    build = partial(calls_of, cudnn_unmasked, copies)
    bench.measure(case, "sdpa cudnn, no mask (other result)", build, flops=case.flops(hidden_too=True))


def random_inputs(case: ReplayCase, device: torch.device) -> Inputs:
    """Draws normal numbers in bf16."""
    rows = (case.num_attention_heads, case.n_rows, case.head_dim)
    both = (case.num_key_value_heads, case.context + case.n_rows, case.head_dim)
    query, keys, values = (torch.randn(1, *shape, dtype=torch.bfloat16, device=device) for shape in (rows, both, both))
    return query, keys, values


def ours(n_context: int, impl: str, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Merges attention to the context with causal attention to the rows' own keys."""
    context, own = (
        attention_with_lse(query, keys[:, :, part], values[:, :, part], causal=causal, impl=impl)
        for part, causal in ((slice(n_context), False), (slice(n_context, None), True))
    )
    return merge_attention(*context, *own)[0]


def lower_right(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """PyTorch's attention, with the lower-right causal rule given as a named bias instead of a mask."""
    bias = causal_lower_right(query.shape[2], keys.shape[2])
    return scaled_dot_product_attention(query, keys, values, attn_mask=bias, enable_gqa=True)


def masked(mask: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention as transformers does it with a mask: keys and values repeated for each query head, and a bool mask."""
    shape = (query.shape[0], query.shape[1], *keys.shape[2:])
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(shape) for x in (keys, values))
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def cudnn_unmasked(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The fastest dense attention to the same number of keys, as if every row saw all of them."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def calls_of(attention: Attention, copies: Sequence[Inputs]) -> list[Call]:
    """Returns a call of ``attention`` for each copy of the inputs."""
    return [partial(attention, *copy) for copy in copies]


if __name__ == "__main__":
    main()
