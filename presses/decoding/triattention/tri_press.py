"""TriAttention (Mao et al. 2026, https://arxiv.org/abs/2604.04921): where queries usually look, from a calibration.

A pair of key k at position p is worth, for the query that stands d positions behind it and for the ones to come::

    S = mean over D of sum_f |c_f| |k_f| cos(w_f (d + D) + arg c_f - arg k_f) + sum_f (m_f - |c_f|) |k_f|

with c the mean query and m the mean of its absolute value, both before RoPE and from the calibration, f a pair of
channels that RoPE turns by w_f a position, k the key before RoPE, and D = 1, 2, 4, ... 65536. The first sum is the
logit of the mean query, which is a dot product: turned to where it will stand, averaged over D, and taken with the key
as it lies in the cache, after RoPE. So no key is turned back, and of positions the end of a row is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os import PathLike

import torch
from torch import nn

from kvzip_press.arguments.numbers import is_int
from kvzip_press.cache.pair_pool.worth import STAYS
from kvzip_press.decoding.eviction import DecodeEviction
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.decoding.pair_scorer import Look, PairScorer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Observer
from kvzip_press.presses.decoding.decode_press import PromptObserver
from kvzip_press.presses.decoding.triattention.circles import frequencies_of_head, split
from kvzip_press.presses.decoding.triattention.statistics import QueryStatistics
from kvzip_press.presses.decoding.windows import RecentPress


@dataclass(frozen=True)
class TriAttentionPress(RecentPress):
    """Keeps the pairs that the model's mean queries look at, now and later in the answer, while decoding.

    The means come from a calibration, so no query of the run is looked at and none is kept. Each query head scores all
    pairs of its KV head; with ``normalize`` scores are centred and scaled to a deviation of 1 over the pairs that
    compete, then the largest of the group counts. Everything is fp32, each row by itself, angles fp64. The authors keep
    the prompt, here ``protect_prompt=True``, and let heads of several layers keep the same tokens if asked to; here
    heads are on their own, as in their variant for each layer and head.

    Args:
        queries: :class:`QueryStatistics`, or a file of `kvzip-press queries calibrate`; None for those that come with
            the package, which are SmolLM2-135M-Instruct's.
        max_offset: The largest distance ahead (65536); the means are over the powers of two up to it.
        normalize: Whether scores of query heads are made comparable before the largest counts (True).

    The other arguments are those of :class:`DecodePress` and :class:`RecentPress`.

    Raises:
        InvalidArgumentError: A value is out of range, or a file cannot be read.
    """

    queries: QueryStatistics | str | PathLike[str] | None = field(default=None, kw_only=True)
    max_offset: int = field(default=65536, kw_only=True)
    normalize: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not is_int(self.max_offset) or self.max_offset < 1:
            raise InvalidArgumentError(f"TriAttentionPress: expected max_offset >= 1, got {self.max_offset!r}")
        if not isinstance(self.queries, QueryStatistics | str | PathLike | None):
            raise InvalidArgumentError(
                f"TriAttentionPress: expected queries as QueryStatistics or a path, got {type(self.queries).__name__}"
            )
        if self.queries is not None and not isinstance(self.queries, QueryStatistics):
            object.__setattr__(self, "queries", QueryStatistics.load(self.queries))
        super().__post_init__()

    def statistics(self, model: nn.Module) -> QueryStatistics:
        """Returns the statistics of a model's queries.

        Raises:
            InvalidArgumentError: There are none, or they are not the model's.
            UnsupportedModelError: The model's RoPE has no fixed frequencies.
        """
        found = self.queries if isinstance(self.queries, QueryStatistics) else QueryStatistics.shipped(model)
        if found is None:
            raise InvalidArgumentError(
                f"TriAttentionPress: expected queries=FILE, since none come with the package for this "
                f"{type(model).__name__}: make it with `kvzip-press queries calibrate --model MODEL --out FILE`"
            )
        return found.check(model)

    def requires(self, model: nn.Module) -> None:
        """Raises InvalidArgumentError if the statistics are missing or those of another model."""
        super().requires(model)
        self.statistics(model)

    def decode_eviction(self, model: nn.Module) -> DecodeEviction:
        """Returns what keeps caches within the budget while ``model`` generates.

        Raises:
            InvalidArgumentError: The statistics are missing or those of another model.
        """
        scorer = PairScorer(model, Look(self.of(model).worth))
        return DecodeEviction(scorer, self.schedule, self.policy.allocation)

    def observer(self, model: nn.Module) -> Observer | None:
        """Returns what watches a prompt."""
        watched_by_another = self.prompt is not None or self.protect_prompt
        return super().observer(model) if watched_by_another else PromptObserver(self.of(model), model)

    def of(self, model: nn.Module) -> TriAttentionPress:
        """Returns this press with the statistics of a model, which are looked up once."""
        return replace(self, queries=self.statistics(model))

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns the largest score of a group's query heads."""
        assert isinstance(self.queries, QueryStatistics)
        scores = tri_scores(pairs, self.queries, self.max_offset)
        if self.normalize:
            competes = (pairs.valid & (pairs.scores != STAYS)).unsqueeze(2)
            scores = _standardized(scores, competes)
        return scores.amax(dim=2)


def tri_scores(pairs: LayerPairs, queries: QueryStatistics, max_offset: int) -> torch.Tensor:
    """Returns what each query head thinks of the pairs of its KV head.

    Args:
        pairs: The pairs of one layer.
        queries: Statistics of the model's queries.
        max_offset: The largest distance ahead.

    Returns:
        ``[batch, num_key_value_heads, groups, n]``, fp32.
    """
    row = queries.layer_indices.index(pairs.layer_idx)
    layout, n_turned, device = queries.layouts[row], len(queries.frequencies), pairs.keys.device
    frequencies = frequencies_of_head(queries.frequencies, layout, pairs.keys.shape[-1])
    offsets = 2.0 ** torch.arange(max_offset.bit_length(), dtype=torch.float64)
    ahead = pairs.ends.cpu().double()[:, None] + offsets  # [batch, offsets]: where queries will stand
    angles = ahead[..., None] * frequencies
    turned = torch.polar(torch.ones_like(angles), angles).mean(dim=1)[:, None]  # [batch, 1, n]
    centres = torch.view_as_complex(queries.centres[row].double().contiguous())
    mean = (centres * turned).to(device, torch.complex64)
    spread = (queries.magnitudes[row] - centres.abs()).to(device, torch.float32)
    heads = pairs.keys.shape[1]
    keys = split(pairs.keys.float(), layout, n_turned)
    flat = torch.cat([*keys, (keys[0].square() + keys[1].square()).sqrt()], dim=-1)
    asks = torch.cat([mean.real, mean.imag, spread.expand_as(mean.real)], dim=-1).unflatten(1, (heads, -1))
    return asks @ flat.transpose(-1, -2)


def _standardized(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns scores with mean 0 and deviation 1 over the last dimension, where ``counts`` says which count."""
    n = counts.sum(dim=-1, keepdim=True).clamp(min=1)
    centred = scores - scores.where(counts, 0).sum(dim=-1, keepdim=True) / n
    deviation = (centred.square().where(counts, 0).sum(dim=-1, keepdim=True) / n).sqrt()
    return centred / deviation.clamp(min=1e-6)
