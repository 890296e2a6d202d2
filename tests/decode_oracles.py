"""What presses that evict while the model writes would keep, pair by pair in fp64, from the papers' formulas.

Queries and keys of a model with one layer depend on nothing but tokens and positions. So those of a dense forward over
the whole text are the ones that any cache holds, whatever was evicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvzip_press.attention.implementation import attach, attention_watched


@dataclass
class Text:
    """Queries and keys of all tokens of a text, ``[heads, n, head_dim]`` in fp64, after RoPE."""

    queries: torch.Tensor
    keys: torch.Tensor

    @classmethod
    @torch.no_grad()
    def read_by(cls, model: Any, ids: torch.Tensor) -> Text:
        seen: list[torch.Tensor] = []

        def watch(module: Any, query: torch.Tensor, keys: torch.Tensor, *_: Any) -> None:
            seen[:] = query[0].double(), keys[0].double()

        attach(model)
        with attention_watched(model, watch):
            model(input_ids=ids)
        return cls(*seen)

    @property
    def groups(self) -> int:
        return self.queries.shape[0] // self.keys.shape[0]

    def logits(self, head: int, query: int, alive: list[int]) -> torch.Tensor:
        """``[groups, alive]``, -inf at what comes after the query."""
        queries = self.queries[head * self.groups : (head + 1) * self.groups, query]
        logits = queries @ self.keys[head, alive].T / self.keys.shape[-1] ** 0.5
        return logits.masked_fill(torch.tensor(alive) > query, -torch.inf)

    def attention(self, head: int, query: int, alive: list[int]) -> torch.Tensor:
        return self.logits(head, query, alive).softmax(dim=-1)


Worth = Callable[["Oracle", int, list[int], range], list[float]]
"""``(oracle, head, alive positions, positions of the queries it may look at) -> what each is worth``."""


@dataclass
class Oracle:
    """Keeps ``budget`` pairs a head of a text that is read in one piece up to ``prompt``, then token by token."""

    text: Text
    worth: Worth
    budget: int
    buffer: int
    n_sink: int = 0
    recent: int = 0
    adds_up: bool = False  # whether each query counts once, in sums that pairs carry
    sums: dict[tuple[int, int], float] = field(default_factory=dict)

    def keep(self, prompt: int, length: int) -> list[list[list[int]]]:
        """After the prompt and after each further token: the positions that each head holds."""
        heads = range(self.text.keys.shape[0])
        alive = [self._cut(head, list(range(prompt)), range(prompt)) for head in heads]
        held, first = [[list(one) for one in alive]], prompt  # the first token whose query is not settled
        for token in range(prompt, length):
            alive = [[*one, token] for one in alive]
            if len(alive[0]) >= self.budget + self.buffer:
                alive = [
                    self._cut(head, alive[head], range(prompt, token + 1), range(first, token + 1)) for head in heads
                ]
                first = token + 1
            held.append([list(one) for one in alive])
        return held

    def _cut(self, head: int, alive: list[int], queries: range, unsettled: range | None = None) -> list[int]:
        if self.adds_up:
            queries = queries if unsettled is None else unsettled
        worth = self.worth(self, head, alive, queries)
        end = alive[-1] + 1
        safe = [p for p in alive if p < self.n_sink or p >= end - self.recent]
        rest = sorted((p for p in alive if p not in safe), key=lambda p: (-worth[alive.index(p)], p))
        return sorted(safe + rest[: max(self.budget - len(safe), 0)])


def streaming_llm(oracle: Oracle, head: int, alive: list[int], queries: range) -> list[float]:
    return [float(p) for p in alive]


def knorm(oracle: Oracle, head: int, alive: list[int], queries: range) -> list[float]:
    return [-float(sum(x * x for x in oracle.text.keys[head, p].tolist()) ** 0.5) for p in alive]


def tova(oracle: Oracle, head: int, alive: list[int], queries: range) -> list[float]:
    of_heads = [oracle.text.attention(h, queries[-1], alive) for h in range(oracle.text.keys.shape[0])]
    return torch.cat(of_heads).mean(dim=0).tolist()


def h2o(oracle: Oracle, head: int, alive: list[int], queries: range) -> list[float]:
    for query in queries:
        for p, got in zip(alive, oracle.text.attention(head, query, alive).sum(dim=0).tolist(), strict=True):
            oracle.sums[head, p] = oracle.sums.get((head, p), 0.0) + got
    return [oracle.sums[head, p] for p in alive]


def kv_compress(kernel: int) -> Worth:
    def worth(oracle: Oracle, head: int, alive: list[int], queries: range) -> list[float]:
        of_prompt = not any(key[0] == head for key in oracle.sums)
        groups, half = torch.zeros(oracle.text.groups, len(alive), dtype=torch.float64), kernel // 2
        for query in list(queries)[-32:] if of_prompt else queries:
            groups += oracle.text.attention(head, query, alive) ** 2
        for i, p in enumerate(alive):
            part = groups[:, max(i - half, 0) : i + half + 1].amax(dim=1) if of_prompt else groups[:, i]
            oracle.sums[head, p] = oracle.sums.get((head, p), 0.0) + float(part.sum())
        return [oracle.sums[head, p] for p in alive]

    return worth


def snapkv(window: int, kernel: int) -> Worth:
    def worth(oracle: Oracle, head: int, alive: list[int], queries: range) -> list[float]:
        last = list(queries)[-window:]
        mean = torch.stack([oracle.text.attention(head, query, alive) for query in last]).mean(dim=(0, 1)).tolist()
        older = [x if p <= alive[-1] - window else 0.0 for p, x in zip(alive, mean, strict=True)]
        half = kernel // 2
        return [sum(older[max(i - half, 0) : i + half + 1]) / kernel for i in range(len(older))]

    return worth


def rkv(lam: float, window: int, kernel: int, threshold: float) -> Worth:
    def worth(oracle: Oracle, head: int, alive: list[int], queries: range) -> list[float]:
        text, last = oracle.text, list(queries)[-window:]
        older = [p for p in alive if p <= alive[-1] - window]
        probabilities = [text.logits(head, query, older).amax(dim=0).softmax(dim=-1) for query in last]
        mean = torch.stack(probabilities).mean(dim=0).tolist() + [0.0] * (len(alive) - len(older))
        half = kernel // 2
        importance = [max(mean[max(i - half, 0) : i + half + 1]) for i in range(len(mean))]
        keys = text.keys[head, alive]
        keys = keys / keys.norm(dim=-1, keepdim=True)
        cosines = (keys @ keys.T).tolist()
        for i, row in enumerate(cosines):
            row[i] = 0.0
            similar = [j for j, cosine in enumerate(row) if cosine > threshold]
            if similar:
                row[similar[-1]] = 0.0
        means = torch.tensor(cosines, dtype=torch.float64).mean(dim=0)
        redundancy = means.softmax(dim=-1).tolist()
        return [lam * i - (1 - lam) * r for i, r in zip(importance, redundancy, strict=True)]

    return worth
