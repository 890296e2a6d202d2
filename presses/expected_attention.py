"""Expected Attention (https://arxiv.org/abs/2510.00636): pairs are kept that future queries are expected to attend to.

``S_j = (mean over the group of softmax_j(s k_j . mu + s^2 / 2 k_j . C k_j) + epsilon) ||v_j||``, where ``s`` is the
model's scaling of logits, ``1 / sqrt(d)`` in most, and ``mu`` and ``C`` are mean and covariance of the context's
queries before RoPE, moved to the mean of the positions to come.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press.arguments.numbers import is_int
from kvzip_press.attention.queries import queries_watched
from kvzip_press.budget.allocators import AllocationLike
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import AttentionLayer, full_attention_layers, layer_index
from kvzip_press.model.watching import Watcher, before_forward
from kvzip_press.prefilling.query_window import being_read, token_bounds
from kvzip_press.prefilling.rotation import Rotation, Turn, mean_embeddings
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress, ObservingPress

_NUMBERS_AT_ONCE = 2**26  # of queries in fp32, 256 MB


@dataclass(frozen=True)
class ExpectedAttentionPress(AllocatingPress, ObservingPress):
    """Takes future queries as normally distributed, and scores a pair with the attention that they are expected to pay.

    Mean and covariance are those of the context's queries, summed up layer by layer while the prefill runs; no query is
    kept. The first tokens, whose queries stick out, are left out of both and protected, inside the budget. RoPE is
    undone and applied again by the model's own function, and what it does to the last token's queries is checked, so a
    model that turns them in another way raises. Logits are scaled as the model scales them (the authors' code always by
    ``1 / sqrt(d)``); a softcap is not modelled. Everything is computed in fp32. Budgets are per KV head (other code may
    count query heads).

    A later turn, or a chunk of a long context, is scored by its own queries over its own pairs, and has no sink.

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1).
        allocation: "head" (every head keeps as many), "adakv" (the paper, with this scorer), or another.
        budget: Tokens' worth of pairs to keep, instead of a ratio; this and the other fields of the policy are
            explained in :class:`kvzip_press.press.AllocatingPress`.
        n_future_positions: Number of positions after the context over which RoPE is averaged.
        n_sink: Number of first tokens of a context that are kept.
        use_covariance: Whether the covariance counts; without it only the mean query does.
        use_vnorm: Whether scores are weighted with the norm of the values.
        epsilon: Added to the expected attention before that.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    allocation: AllocationLike = "head"
    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_int(self.n_sink) or self.n_sink < 0:
            raise InvalidArgumentError(f"expected n_sink to be an int of at least 0, got {self.n_sink!r}")
        if not is_int(self.n_future_positions) or self.n_future_positions < 1:
            raise InvalidArgumentError(
                f"expected n_future_positions to be an int of at least 1, got {self.n_future_positions!r}"
            )
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, (int, float)) or not 0 <= self.epsilon < 1e9:
            raise InvalidArgumentError(f"expected epsilon to be a number of at least 0, got {self.epsilon!r}")

    def observer(self, model: nn.Module) -> QueryMoments:
        """Returns an observer that sums up the queries of one prefill."""
        return QueryMoments(self, model)

    def scores(self, prefill: Prefill, moments: QueryMoments) -> Scores:
        """Returns the scores of a prefill whose queries were summed up."""
        layers, protected = prefill.blank_scores(), prefill.first_tokens(self.n_sink)
        end = (prefill.positions.long().masked_fill(~prefill.valid, -1).amax(dim=-1) + 1).to(prefill.valid.device)
        ahead = mean_embeddings(prefill.model, end, self.n_future_positions, prefill.turned_for)
        bounds = token_bounds(prefill.valid & ~protected)
        for layer_idx, scores in layers.items():
            keys, values = prefill.pairs(layer_idx)
            means, covariances, scaling = moments.ahead(layer_idx, *ahead)
            for row, (first, last) in enumerate(bounds):
                if first < last:
                    own = keys[row, :, first:last].float()
                    paid = self._expected(own, means[row], covariances[row], scaling)
                    if self.use_vnorm:
                        paid = (paid + self.epsilon) * values[row, :, first:last].float().norm(dim=-1)
                    scores[row, :, first:last] = paid
        return Scores(layers, protected, self.policy, protected_count=True)

    def _expected(
        self, keys: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Returns expected attention ``[heads, n]``, averaged over the query heads of each KV head.

        Args:
            keys: ``[heads, n, d]``, fp32.
            mean: ``[num_attention_heads, d]``, of the future queries.
            covariance: ``[num_attention_heads, d, d]``.
            scaling: Factor of the logits.
        """
        groups = mean.shape[0] // keys.shape[0]
        paid = torch.zeros_like(keys[..., 0])
        for group in range(groups):  # one query head of each KV head at a time, so that no more is held
            mu, cov = mean[group::groups], covariance[group::groups]
            logits = (keys @ mu.unsqueeze(-1)).squeeze(-1) * scaling
            if self.use_covariance:
                logits = logits + ((keys @ cov) * keys).sum(dim=-1) * scaling**2 / 2
            paid += logits.softmax(dim=-1) / groups
        return paid


class QueryMoments(Watcher):
    """Sums up the queries of one forward, before RoPE, layer by layer.

    Args:
        press: The press.
        model: The model to watch.
    """

    def __init__(self, press: ExpectedAttentionPress, model: nn.Module) -> None:
        self._press, self._model = press, model
        self._moments: dict[int, tuple[Turn, torch.Tensor, torch.Tensor, float]] = {}
        self._entered: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}
        self._counted = torch.empty(0)

    def _watch(self, stack: ExitStack) -> None:
        self._counted = being_read(self._model).without_first(self._press.n_sink)
        stack.callback(self._entered.clear)
        for layer in full_attention_layers(self._model):
            stack.enter_context(before_forward(layer.module, self._enter))
        stack.enter_context(queries_watched(self._model, self._look))

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the scores of the prefill that was watched."""
        return self._press.scores(prefill, self)

    def ahead(self, layer_idx: int, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Returns mean ``[batch, heads, d]`` and covariance ``[batch, heads, d, d]`` of queries turned by an embedding.

        The third value is the factor of their logits.

        Args:
            layer_idx: The layer.
            cos: ``[batch, 1, rotary_dim]``, fp32, the mean cosines of the positions where they will be.
            sin: Likewise.
        """
        turn, mean, covariance, scaling = self._moments[layer_idx]
        cos, sin = cos.to(mean.device), sin.to(mean.device)

        def turned(rows: torch.Tensor) -> torch.Tensor:
            n = rows.shape[2]
            return turn(rows, cos.expand(-1, n, -1), sin.expand(-1, n, -1))

        if self._press.use_covariance:
            covariance = turned(turned(covariance).transpose(-1, -2))
        return turned(mean.unsqueeze(2)).squeeze(2), covariance, scaling

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered[layer_index(module)] = (args[0] if args else kwargs["hidden_states"])[:, -1:], kwargs

    @torch.no_grad()
    def _look(self, layer: AttentionLayer, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
        layer_idx = layer.layer_idx
        if layer_idx not in self._entered:
            return
        states, named = self._entered.pop(layer_idx)
        rotation = Rotation.of_call(layer.module, named, states, query[:, :, -1:])
        scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        at_once = max(_NUMBERS_AT_ONCE // query[:, :1].numel(), 1)
        parts = [self._summed(rotation.back(part)) for part in query.split(at_once, dim=1)]
        mean, covariance = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        self._moments[layer_idx] = rotation.turn, mean, covariance, scaling

    def _summed(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns mean and covariance of queries ``[batch, heads, n, d]`` over the tokens of each row that count."""
        counted = self._counted[:, None, :, None].to(queries.device)
        n = counted.sum(dim=2, keepdim=True).clamp(min=1)
        mean = queries.masked_fill(~counted, 0).sum(dim=2, keepdim=True) / n
        if not self._press.use_covariance:
            return mean.squeeze(2), queries.new_zeros(*queries.shape[:2], 0, 0)
        centred = (queries - mean).masked_fill(~counted, 0)
        return mean.squeeze(2), centred.transpose(-1, -2) @ centred / n
