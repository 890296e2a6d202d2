"""Times attention of many requests' tokens to a pool of contexts, beside a read per row and beside paged attention.

``python -m kvzip_press.kernels.benchmarks.context_attention --output contexts.csv [--cases shared] [--quick]``
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.cases import uneven_lengths
from kvzip_press.kernels.benchmarks.harness import Bench, run_cases
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.context_attention import ContextPlan, Turn, context_attention, plan_contexts
from kvzip_press.kernels.context_attention.api import _IMPLS
from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.kernels.row_codec import Codes, decode_rows, encode_rows

ERROR_LIMIT = 1e-2  # bf16 results and weights are off by 2 to 3e-3
PAGE_SIZE = 16
MODEL_LAYERS = 32  # what a plan is made for


@dataclass(frozen=True)
class ContextCase:
    """A step of an engine.

    Attributes:
        name: what tokens read.
        n_contexts: contexts in the pool, the empty one aside.
        n_tokens: tokens of the step; token i reads context i modulo ``n_contexts``.
        context: tokens of each context before eviction.
        kept: mean fraction of pairs kept.
    """

    name: str
    n_contexts: int
    n_tokens: int
    context: int = 32768
    kept: float = 0.3
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        """For example ``shared c1 t64 n32768 kept0.3``."""
        return f"{self.name} c{self.n_contexts} t{self.n_tokens} n{self.context} kept{self.kept}"

    def lengths(self) -> list[int]:
        """Number of kept pairs of each segment, contexts in order."""
        return uneven_lengths(self.n_contexts * self.num_key_value_heads, self.context, self.kept, 1.0)


CASES = [
    ContextCase("distinct", 64, 64),
    ContextCase("shared", 1, 64),
    ContextCase("alone", 1, 1),
    ContextCase("mixed", 8, 64),
    ContextCase("question", 1, 512),
]


@dataclass(frozen=True)
class ContextInputs:
    """The tensors of a step in one layer: a pool, and what each token reads of it."""

    query: Tensor
    keys: Tensor
    values: Tensor
    plan: ContextPlan

    @classmethod
    def random(cls, case: ContextCase, device: torch.device) -> "ContextInputs":
        """Draws inputs for ``case`` from a normal distribution, in bf16."""
        lengths = case.lengths()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, case.head_dim, device=device, dtype=torch.bfloat16)

        empty = [0] * case.num_key_value_heads
        tables = (
            torch.tensor(numbers, dtype=torch.int32, device=device).view(1, -1, case.num_key_value_heads)
            for numbers in ([*empty, *accumulate(lengths[:-1], initial=0)], [*empty, *lengths])
        )
        tokens = torch.arange(case.n_tokens, dtype=torch.int32, device=device) % case.n_contexts + 1
        plan = plan_contexts(tokens, *tables, num_attention_heads=case.num_attention_heads)
        query = normal(case.n_tokens, case.num_attention_heads)
        return cls(query, normal(sum(lengths)), normal(sum(lengths)), plan)

    def n_bytes(self) -> int:
        """Bytes of the pairs, each read once."""
        return 2 * self.keys.numel() * self.keys.element_size()


def main() -> None:
    """Runs the cases that the command line asks for."""
    run_cases("context_attention", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: ContextCase) -> None:
    """Measures all implementations on one case."""
    first = ContextInputs.random(case, bench.device)
    n_bytes = first.n_bytes()
    copies = [first, *(ContextInputs.random(case, bench.device) for _ in range(copies_for(n_bytes) - 1))]
    exact = [attend(in_fp64(copy), "reference") for copy in (copies[0], copies[-1])]
    for impl in _IMPLS:
        bench.measure(
            case,
            f"ours {impl}",
            partial(calls_of, copies, impl),
            exact=exact,
            limit=ERROR_LIMIT,
            in_graph=impl != "reference",  # it reads the tables
            may_raise=(ValueError,),  # raised by the dispatch if it cannot do this
            n_bytes=n_bytes,
        )
    tails = [(torch.randn_like(copy.query), copy.query.new_zeros(copy.query.shape[:2]).float()) for copy in copies]
    merged = [merge_attention(attended(copy), tail) for copy, tail in ((copies[0], tails[0]), (copies[-1], tails[-1]))]
    build = partial(merging_calls, copies, tails)
    bench.measure(case, "ours, pages merged in place", build, exact=merged, limit=ERROR_LIMIT, n_bytes=n_bytes)
    bench.measure(case, f"nobody reads a context, {MODEL_LAYERS} layers", partial(idle_calls, copies, tails))
    coded = [CodedInputs.of(copy) for copy in copies]
    build, of_codes = partial(coded_calls, coded), [coded[0].exact(), coded[-1].exact()]
    n_code_bytes = coded[0].keys.nbytes + coded[0].values.nbytes
    bench.measure(case, "ours, int8, turned", build, exact=of_codes, limit=ERROR_LIMIT, n_bytes=n_code_bytes)
    del coded, merged, tails
    build = partial(row_calls, copies)
    bench.measure(case, "ours, a read per row", build, exact=exact, limit=ERROR_LIMIT, n_bytes=n_bytes)
    bench.measure(case, f"plan of {MODEL_LAYERS} layers", partial(plan_calls, copies))
    del exact
    bench.measure(case, "vllm, paged, as many pairs in each head", partial(paged_calls, case, copies), n_bytes=n_bytes)


def attend(inputs: ContextInputs, impl: str) -> Tensor:
    """Runs our op."""
    return context_attention(inputs.query, inputs.keys, inputs.values, inputs.plan, 0, impl=impl)[0]


def calls_of(copies: Sequence[ContextInputs], impl: str) -> list[Call]:
    """Returns a call of our op for each copy of the inputs."""
    return [partial(attend, copy, impl) for copy in copies]


Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CodedInputs:
    """A step whose pool holds codes, at the positions where their keys were read."""

    query: Tensor
    keys: Codes
    values: Codes
    plan: ContextPlan
    turn: Turn

    @classmethod
    def of(cls, inputs: ContextInputs) -> "CodedInputs":
        """Encodes the pairs of a step."""
        angles = torch.rand(inputs.query.shape[0], inputs.query.shape[2] // 2, device=inputs.query.device)
        keys, values = encode_rows(inputs.keys, "int8"), encode_rows(inputs.values, "int8")
        return cls(inputs.query, keys, values, inputs.plan, Turn(angles.cos(), angles.sin()))

    def run(self) -> Tensor:
        """Runs our op."""
        return context_attention(self.query, self.keys, self.values, self.plan, 0, turn=self.turn)[0]

    def exact(self) -> Tensor:
        """Runs the reference in fp64, over what the codes stand for."""
        keys, values = (decode_rows(codes, torch.float32).double() for codes in (self.keys, self.values))
        return attend(ContextInputs(self.turn.applied(self.query.double()), keys, values, self.plan), "reference")


def coded_calls(copies: Sequence[CodedInputs]) -> list[Call]:
    """Returns a call for each copy of a step over codes."""
    return [copy.run for copy in copies]


def attended(inputs: ContextInputs) -> Part:
    """Runs the reference in fp64."""
    exact = in_fp64(inputs)
    return context_attention(exact.query, exact.keys, exact.values, exact.plan, 0, impl="reference")


def merge_attention(context: Part, tail: Part) -> Tensor:
    """Returns attention to both, in fp64."""
    weights = torch.softmax(torch.stack([context[1], tail[1].double()]), 0).unsqueeze(-1)
    merged: Tensor = (weights * torch.stack([context[0], tail[0].double()])).sum(0)
    return merged


def merging_calls(copies: Sequence[ContextInputs], tails: Sequence[Part]) -> list[Call]:
    """Returns calls that merge what an engine has computed over its pages, and write where that lies, as engines do.

    So that each call gives the same, it works on a copy of the pages' result, whose time is part of it.
    """

    def call(inputs: ContextInputs, tail: Part) -> Tensor:
        out = tail[0].clone()
        pool = inputs.query, inputs.keys, inputs.values, inputs.plan, 0
        return context_attention(*pool, tail=(out, tail[1]), out=out)[0]

    return [partial(call, *one) for one in zip(copies, tails, strict=True)]


def row_calls(copies: Sequence[ContextInputs]) -> list[Call]:
    """Returns calls of ragged attention with tokens as rows of a batch, each of which reads its context by itself."""

    def call(inputs: ContextInputs, bounds: Tensor, rows: Tensor) -> Tensor:
        no_tail = inputs.query.new_empty(len(rows), inputs.plan.num_key_value_heads, 0, inputs.query.shape[2])
        query, pool = inputs.query.unsqueeze(2), (inputs.keys, inputs.values)
        out = ragged_attention(query, *pool, bounds, no_tail, no_tail, row_index=rows)
        assert isinstance(out, Tensor)
        return out.squeeze(2)

    return [
        partial(
            call,
            copy,
            torch.nn.functional.pad(copy.plan.lengths.flatten().cumsum(0, dtype=torch.int32), (1, 0)),
            copy.plan.context_of_token.long(),
        )
        for copy in copies
    ]


def plan_of_model(plan: ContextPlan, context_of_token: Tensor) -> Callable[[], ContextPlan]:
    """Returns what plans a step of a whole model, once for all its layers, which are copies of the plan's one."""
    tables = (table.expand(MODEL_LAYERS, -1, -1).contiguous() for table in (plan.begins, plan.lengths))
    return partial(plan_contexts, context_of_token, *tables, num_attention_heads=plan.num_attention_heads)


def plan_calls(copies: Sequence[ContextInputs]) -> list[Call]:
    """Returns calls that plan a step of a whole model."""

    def call(made: Callable[[], ContextPlan]) -> Tensor:
        return made().context_of_token

    return [partial(call, plan_of_model(copy.plan, copy.plan.context_of_token)) for copy in copies]


def idle_calls(copies: Sequence[ContextInputs], tails: Sequence[Part]) -> list[Call]:
    """Returns calls of all layers of a step whose tokens read no context, as an engine makes them; without the plan."""

    def call(inputs: ContextInputs, plan: ContextPlan, tail: Part) -> Tensor:
        pool = inputs.query, inputs.keys, inputs.values, plan
        for layer_idx in range(MODEL_LAYERS):
            context_attention(*pool, layer_idx, tail=tail, out=tail[0], return_lse=False)
        return tail[0]

    plans = [plan_of_model(copy.plan, torch.zeros_like(copy.plan.context_of_token))() for copy in copies]
    return [partial(call, *one) for one in zip(copies, plans, tails, strict=True)]


def paged_calls(case: ContextCase, copies: Sequence[ContextInputs]) -> list[Call]:
    """Returns calls of vLLM's paged attention, with a request a token; heads have equally many pairs, of equal bytes.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    heads = case.num_key_value_heads
    n_pages = copies[0].keys.shape[0] // (PAGE_SIZE * heads)
    bounds = [n_pages * context // case.n_contexts for context in range(case.n_contexts + 1)]
    of_context = [list(range(begin, end)) for begin, end in pairwise(bounds)]
    shortest = min(len(pages) for pages in of_context)
    device = copies[0].query.device
    rows = [of_context[token % case.n_contexts][:shortest] for token in range(case.n_tokens)]
    table = torch.tensor(rows, dtype=torch.int32, device=device)
    options = {
        "max_seqlen_q": 1,
        "cu_seqlens_q": torch.arange(case.n_tokens + 1, dtype=torch.int32, device=device),
        "max_seqlen_k": shortest * PAGE_SIZE,
        "seqused_k": torch.full((case.n_tokens,), shortest * PAGE_SIZE, dtype=torch.int32, device=device),
        "block_table": table,
        "causal": True,
    }

    def paged(pool: Tensor) -> Tensor:
        return pool[: n_pages * PAGE_SIZE * heads].view(n_pages, PAGE_SIZE, heads, case.head_dim)

    return [
        partial(flash_attn_varlen_func, copy.query, paged(copy.keys), paged(copy.values), **options) for copy in copies
    ]


def in_fp64(inputs: ContextInputs) -> ContextInputs:
    """Returns the same inputs in fp64."""
    return ContextInputs(inputs.query.double(), inputs.keys.double(), inputs.values.double(), inputs.plan)


if __name__ == "__main__":
    main()
