"""Times a decode step over listed pairs of a long context, as recall reads them, beside a context of just these pairs.

``python -m kvzip_press.kernels.benchmarks.gathered_attention --output gathered.csv [--quick]``

A list names whole clusters: pairs that lie anywhere in the context, ascending within a cluster, the last cluster cut.
Each call has a list of its own, so that what it reads is not in the L2 cache. Beside it are the same kernel over a
contiguous copy of these pairs (the goal is at most 1.3 times its time), copying the pairs first, and a list for every
query head (as ClusterKV reads) instead of one for each key-value head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.harness import Bench, run_cases
from kvzip_press.kernels.benchmarks.timing import Call, copies_for
from kvzip_press.kernels.ragged_attention import ragged_attention

ERROR_LIMIT = 1e-2  # as for ragged attention


@dataclass(frozen=True)
class RecallCase:
    """A decode step that reads ``listed`` of ``context`` pairs in each head.

    Attributes:
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads.
        head_dim: of keys and values.
        context: pairs of each key-value head.
        listed: pairs that a head reads.
        cluster: pairs of a cluster.
        tail: dense tokens behind the context.
    """

    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    context: int = 131072
    listed: int = 2048
    cluster: int = 80
    tail: int = 0

    def __str__(self) -> str:
        """For example ``32/8/128 2048 of 131072 tail0``."""
        heads = f"{self.num_attention_heads}/{self.num_key_value_heads}/{self.head_dim}"
        return f"{heads} {self.listed} of {self.context} tail{self.tail}"

    def listed_bytes(self) -> int:
        """Bytes of the pairs that a call reads, with one list for each key-value head."""
        return self.num_key_value_heads * self.listed * self.head_dim * 4

    def lists(self, n_lists: int, n_heads: int, device: torch.device) -> Tensor:
        """Returns ``n_lists`` lists, int32 [n_lists, n_heads * listed]; head h lists pairs of its key-value head.

        The lists of a head are parts of one division of its pairs into clusters, as far as there are enough pairs.
        """
        group = n_heads // self.num_key_value_heads
        found = []
        for head in range(n_heads):
            shuffled = torch.randperm(self.context, device=device)
            whole = shuffled[: self.context // self.cluster * self.cluster].view(-1, self.cluster).sort().values
            taken = torch.arange(n_lists * self.listed, device=device).view(n_lists, -1) % whole.numel()
            found.append(whole.flatten()[taken] + head // group * self.context)
        return torch.cat(found, 1).int()


CASES = [RecallCase(), RecallCase(tail=64), RecallCase(listed=512), RecallCase(context=32768)]


def main() -> None:
    """Runs the cases that the command line asks for."""
    run_cases("gathered_attention", CASES, run)


@dataclass(frozen=True)
class Step:
    """The tensors of a step, and where the equally long lists of its segments begin."""

    query: Tensor
    keys: Tensor
    values: Tensor
    bounds: Tensor
    tail: tuple[Tensor, ...] = ()

    @classmethod
    def random(cls, case: RecallCase, device: torch.device) -> "Step":
        """Draws inputs for ``case`` from a normal distribution."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, case.head_dim, device=device, dtype=torch.bfloat16)

        heads = case.num_key_value_heads
        query, keys, values = normal(1, case.num_attention_heads, 1), *(normal(heads * case.context) for _ in range(2))
        tail = tuple(normal(1, heads, case.tail) for _ in range(2)) if case.tail else ()
        bounds = torch.arange(heads + 1, dtype=torch.int32, device=device) * case.listed
        return cls(query, keys, values, bounds, tail)

    def in_fp64(self) -> "Step":
        """Returns the same in fp64."""
        tail = tuple(one.double() for one in self.tail)
        return replace(self, query=self.query.double(), keys=self.keys.double(), values=self.values.double(), tail=tail)

    def alone(self, index: Tensor) -> "Step":
        """Returns the step with nothing but the listed pairs, one after another."""
        rows = index.long()
        return replace(self, keys=self.keys[rows], values=self.values[rows])

    def by_query_head(self) -> "Step":
        """Returns the step with a segment for each query head: a group is a row, and its members share the tail."""
        heads, group = len(self.bounds) - 1, self.query.shape[1] // (len(self.bounds) - 1)
        listed = int(self.bounds[1])
        bounds = torch.arange(heads * group + 1, dtype=torch.int32, device=self.bounds.device) * listed
        tail = tuple(one.transpose(0, 1).expand(-1, group, -1, -1) for one in self.tail)
        return replace(self, query=self.query.view(heads, group, 1, -1), bounds=bounds, tail=tail)

    def attend(self, index: Tensor | None = None, impl: str | None = None) -> Tensor:
        """Attends to the listed pairs where they lie; to all pairs without a list."""
        out = ragged_attention(self.query, self.keys, self.values, self.bounds, *self.tail, pair_index=index, impl=impl)
        assert isinstance(out, Tensor)
        return out

    def attend_to_copy(self, index: Tensor) -> Tensor:
        """Copies the listed pairs, and attends to the copy."""
        return self.alone(index).attend()


@torch.inference_mode()
def run(bench: Bench, case: RecallCase) -> None:
    """Measures one case."""
    n_lists = copies_for(case.listed_bytes())
    step = Step.random(case, bench.device)
    lists = case.lists(n_lists, case.num_key_value_heads, bench.device)
    exact = [step.alone(one).in_fp64().attend(impl="reference") for one in (lists[0], lists[-1])]
    ways: dict[str, Callable[[], Sequence[Call]]] = {
        "contiguous": lambda: [step.alone(one).attend for one in lists],
        "listed": lambda: [partial(step.attend, one) for one in lists],
        "copied first": lambda: [partial(step.attend_to_copy, one) for one in lists],
    }
    for impl, build in ways.items():
        bench.measure(case, impl, build, exact=exact, limit=ERROR_LIMIT, n_bytes=case.listed_bytes())
    of_queries, step = case.lists(n_lists, case.num_attention_heads, bench.device), step.by_query_head()
    bench.measure(
        case,
        "a list for each query head",
        lambda: [partial(step.attend, one) for one in of_queries],
        exact=[step.alone(one).in_fp64().attend(impl="reference") for one in (of_queries[0], of_queries[-1])],
        limit=ERROR_LIMIT,
        n_bytes=case.listed_bytes() * case.num_attention_heads // case.num_key_value_heads,
    )


if __name__ == "__main__":
    main()
