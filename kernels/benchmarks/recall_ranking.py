"""Times the ranking of a step that recalls: every implementation, plain PyTorch among them, in CUDA graphs.

``python -m kvzip_press.kernels.benchmarks.recall_ranking --output recall_ranking.csv [--quick]``

Each call ranks the groups of one layer for one token and lists the pairs that it reads. Lists have to be those of the
reference in fp64, but for groups that are as good as equal: "error" is the share of listed pairs that are not in its
lists. The floor is the bytes of the marks and sizes that are read and of the lists that are written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks.harness import Bench, WrongResultError, run_cases
from kvzip_press.kernels.benchmarks.timing import copies_for
from kvzip_press.kernels.recall_ranking import recall_ranking
from kvzip_press.kernels.recall_ranking.api import _IMPLS

ERROR_LIMIT = 1e-2  # of the listed pairs: a group at the border may be its neighbour's equal in low precision
FIRST = 16


@dataclass(frozen=True)
class RankingCase:
    """The ranking of one layer, keys in bf16.

    Attributes:
        group_size: mean pairs of a group.
        has_bounds: whether groups are pages with bounds, or clusters with means.
        per_query_head: whether each query head has a list of its own.
        context: pairs of each key-value head.
        budget: pairs that a list has.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads.
        head_dim: of queries and keys.
        batch: rows, each with a context of its own.
    """

    group_size: int
    has_bounds: bool = False
    per_query_head: bool = False
    context: int = 65536
    budget: int = 2048
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    batch: int = 1

    def __str__(self) -> str:
        """For example ``clusters of 80, 32/8/128 b1 2048 of 65536``."""
        kind = f"{'pages' if self.has_bounds else 'clusters'} of {self.group_size}"
        heads = f"{self.num_attention_heads}/{self.num_key_value_heads}/{self.head_dim} b{self.batch}"
        lists = ", by query head" if self.per_query_head else ""
        return f"{kind}, {heads} {self.budget} of {self.context}{lists}"

    @property
    def n_lists(self) -> int:
        """Lists of all rows."""
        return self.batch * (self.num_attention_heads if self.per_query_head else self.num_key_value_heads)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Draws the arguments: pages are equally long, clusters are not."""
        segments, n_rest = self.batch * self.num_key_value_heads, self.context - FIRST
        n_groups = -(-n_rest // self.group_size)
        if self.has_bounds:
            of_pairs = torch.arange(n_rest, device=device).expand(segments, -1) // self.group_size
        else:
            of_pairs = torch.randint(n_groups, (segments, n_rest), device=device)
        sizes = torch.zeros(segments, n_groups, dtype=torch.int64, device=device)
        sizes.scatter_add_(1, of_pairs, torch.ones_like(of_pairs))
        order = torch.cat(
            [
                torch.arange(FIRST, device=device).expand(segments, -1),
                of_pairs.argsort(dim=1, stable=True) + FIRST,
            ],
            1,
        )
        means = torch.randn(segments, n_groups, self.head_dim, device=device)
        marks = torch.cat([means + 1, means - 1], -1) if self.has_bounds else means
        query = torch.randn(self.batch, self.num_attention_heads, self.head_dim, device=device)
        return {
            "query": query.bfloat16(),
            "marks": marks.bfloat16(),
            "sizes": torch.nn.functional.pad(sizes, (1, 0), value=FIRST).int(),
            "order": order.flatten().int(),
            "cu_seqlens": (torch.arange(segments + 1, device=device) * self.context).int(),
        }


CASES = [
    RankingCase(80),
    RankingCase(80, per_query_head=True),
    RankingCase(16, has_bounds=True),
    RankingCase(80, context=131072),
    RankingCase(16, has_bounds=True, context=131072),
    RankingCase(80, batch=8, context=16384),
]


def main() -> None:
    """Runs the cases of the command line."""
    run_cases("recall_ranking", CASES, run)


@torch.inference_mode()
def run(bench: Bench, case: RankingCase) -> None:
    """Every implementation on one case."""
    first = case.tensors(bench.device)
    n_bytes = first["marks"].nbytes + first["sizes"].nbytes + 8 * case.n_lists * case.budget  # lists: read, written
    copies = [first, *(case.tensors(bench.device) for _ in range(copies_for(n_bytes) - 1))]
    rank = partial(
        recall_ranking,
        num_key_value_heads=case.num_key_value_heads,
        budget=case.budget,
        per_query_head=case.per_query_head,
    )
    query, marks, *others = first.values()
    expected = rank(query.double(), marks.double(), *others, impl="reference")
    for impl in _IMPLS:
        calls = [partial(rank, *copy.values(), impl=impl) for copy in copies]
        try:
            error = check(f"{case}, {impl}", calls[0](), expected)
        except ValueError as reason:  # how the dispatch says that it cannot do this
            bench.skip(case, f"ours {impl}", reason)
            continue
        bench.add(case, f"ours {impl}", bench.in_graph(calls), n_bytes=n_bytes, error=error)


def check(name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the share of listed pairs that are not those expected; raises WrongResultError if it is too large."""
    if not torch.equal(got[1], expected[1]):
        raise WrongResultError(f"{name}: expected lists at {expected[1].tolist()[:9]} ..., got {got[1].tolist()[:9]}")
    n_listed, missing = int(expected[1][-1]), 0
    lengths = expected[1].diff().tolist()
    for own, right in zip(*(one[0][:n_listed].split(lengths) for one in (got, expected)), strict=True):
        missing += int((~torch.isin(own, right)).sum())
    if not missing / max(n_listed, 1) <= ERROR_LIMIT:
        raise WrongResultError(f"{name}: expected the pairs of the reference, got {missing} others of {n_listed}")
    return missing / max(n_listed, 1)


if __name__ == "__main__":
    main()
