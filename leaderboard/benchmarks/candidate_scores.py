"""Candidates for a better score than KVzip's, all of one replay: what becomes of the rows, then of the scores.

A row statistic makes a score of the attention that a pair gets from all replayed rows, and of the surprisals of what
these rows predict. A mixture makes scores of scores: of the row statistics of the whole context, over all its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from kvzip_press import get_press
from kvzip_press.budget.scores import Scores
from kvzip_press.prefilling.replay import ReplayedAttention
from kvzip_press.prefilling.whole import Prefill

Layers = Mapping[int, torch.Tensor]
RowStatistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``[heads, rows, chunk]`` and nats ``[rows]``, both fp32, to ``[heads, chunk]``."""

KVZIP, SURPRISAL = "kvzip", "surprisal"


def _weighted(weight: Callable[[torch.Tensor], torch.Tensor], shares: torch.Tensor, nats: torch.Tensor) -> torch.Tensor:
    return (shares * weight(nats)[:, None]).amax(dim=-2)


def _clamped(nats: torch.Tensor, most: float, floor: float) -> torch.Tensor:
    return floor + (1 - floor) * nats.clamp(max=most) / most


def _best(shares: torch.Tensor, _: torch.Tensor, n: int, skip: int = 0) -> torch.Tensor:
    return shares.topk(min(n, shares.shape[-2]), dim=-2).values[..., skip:, :].mean(dim=-2)


def _weighted_best(shares: torch.Tensor, nats: torch.Tensor, n: int, most: float) -> torch.Tensor:
    return _best(shares * _clamped(nats, most, _LEAST)[:, None], nats, n)


_LEAST = 0.02 / 6.02  # of the press's own weighting


def _weighing(most: float, floor: float = _LEAST) -> RowStatistic:
    return partial(_weighted, partial(_clamped, most=most, floor=floor))


ROW_STATISTICS: dict[str, RowStatistic] = {
    KVZIP: lambda shares, _: shares.amax(dim=-2),
    SURPRISAL: _weighing(6.0),
    "clamp 1": _weighing(1.0),
    "clamp 2": _weighing(2.0),
    "clamp 3": _weighing(3.0),
    "clamp 10": _weighing(10.0),
    "floor 0.1": _weighing(6.0, 0.1),
    "floor 0.3": _weighing(6.0, 0.3),
    "clamp 2, floor 0.1": _weighing(2.0, 0.1),
    "clamp 2, floor 0.3": _weighing(2.0, 0.3),
    "probability": partial(_weighted, lambda nats: (0.02 - torch.expm1(-nats)) / 1.02),
    "relative": partial(_weighted, lambda nats: _clamped(nats, float(nats.clamp(max=10.0).mean()), _LEAST)),
    "root": partial(_weighted, lambda nats: _clamped(nats, 6.0, _LEAST).sqrt()),
    "second": partial(_best, n=2, skip=1),
    "mean of 2": partial(_best, n=2),
    "mean of 4": partial(_best, n=4),
    "mean of 8": partial(_best, n=8),
    "mean of all": lambda shares, _: shares.mean(dim=-2),
    "weighted mean of 2": partial(_weighted_best, n=2, most=6.0),
    "weighted mean of 4": partial(_weighted_best, n=4, most=6.0),
    "clamp 2, mean of 4": partial(_weighted_best, n=4, most=2.0),
}


def _ranks(layers: Layers) -> dict[int, torch.Tensor]:
    """Returns the rank of each score among all, in [0, 1]; the mean rank of equal ones is not needed."""
    every = torch.cat([values.flatten() for values in layers.values()])
    ranks = torch.empty_like(every)
    ranks[every.argsort(stable=True)] = torch.linspace(0, 1, len(every), device=every.device)
    parts = ranks.split([values.numel() for values in layers.values()])
    return {i: part.view_as(values) for (i, values), part in zip(layers.items(), parts, strict=True)}


def _within(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Returns the values of each head, dealt out anew in the order of others: the largest to the largest."""
    return values.sort(dim=-1).values.gather(-1, order.argsort(dim=-1, stable=True).argsort(dim=-1))


def _position_ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort(dim=-1, stable=True).argsort(dim=-1).float() / max(values.shape[-1], 1)


def _smooth(values: torch.Tensor, window: int, pool: Callable[..., torch.Tensor]) -> torch.Tensor:
    return pool(values, window, stride=1, padding=window // 2)


def _mean_pool(values: torch.Tensor, window: int, **options: Any) -> torch.Tensor:
    return avg_pool1d(values, window, count_include_pad=False, **options)


def _each(change: Callable[..., torch.Tensor]) -> Callable[..., Layers]:
    """Returns what applies a change of one layer's scores to all layers."""
    return lambda *scores: {i: change(*(layers[i] for layers in scores)) for i in scores[0]}


def _ranked(change: Callable[..., torch.Tensor]) -> Callable[..., Layers]:
    return lambda *scores: _each(change)(*map(_ranks, scores))


@dataclass(frozen=True)
class Mixture:
    """A score of scores.

    Attributes:
        of: The row statistics that it is made of.
        mix: Makes layers of their layers.
    """

    of: tuple[str, ...]
    mix: Callable[..., Layers]


_BOTH = (KVZIP, SURPRISAL)
MIXTURES: dict[str, Mixture] = {
    "smooth 3": Mixture((KVZIP,), _each(lambda x: _smooth(x, 3, _mean_pool))),
    "smooth 5": Mixture((KVZIP,), _each(lambda x: _smooth(x, 5, _mean_pool))),
    "surprisal, smooth 3": Mixture((SURPRISAL,), _each(lambda x: _smooth(x, 3, _mean_pool))),
    "surprisal, largest of 3": Mixture((SURPRISAL,), _each(lambda x: _smooth(x, 3, max_pool1d))),
    "higher rank": Mixture(_BOTH, _ranked(torch.maximum)),
    "mean rank": Mixture(_BOTH, _ranked(torch.add)),
    "heads of kvzip": Mixture(_BOTH, _each(_within)),
    "heads of kvzip, clamp 1": Mixture((KVZIP, "clamp 1"), _each(_within)),
    "heads of kvzip, clamp 2": Mixture((KVZIP, "clamp 2"), _each(_within)),
    "heads of kvzip, mean of 4": Mixture((KVZIP, "mean of 4"), _each(_within)),
    "heads of kvzip, clamp 2, mean of 4": Mixture((KVZIP, "clamp 2, mean of 4"), _each(_within)),
    "heads of kvzip, mean rank": Mixture(
        _BOTH, _each(lambda x, y: _within(x, _position_ranks(x) + _position_ranks(y)))
    ),
    "heads of surprisal": Mixture((SURPRISAL, KVZIP), _each(_within)),
    "ties by surprisal": Mixture(_BOTH, _each(lambda x, y: (x * 32).round() / 32 + y / 64)),
}

CANDIDATES = (*ROW_STATISTICS, *MIXTURES)


@torch.no_grad()
def candidate_scores(
    prefill: Prefill, names: Sequence[str] = CANDIDATES, *, replay: str = "full", chunk_size: int = 2048
) -> dict[str, Scores]:
    """Returns the scores of candidates from one replay of a single context.

    Args:
        prefill: Of one row.
        names: Which.
        replay: "full" or "local", see :class:`kvzip_press.KVzipPress`.
        chunk_size: Tokens that are replayed at a time.
    """
    needed = {*names, *(name for mixed in names if mixed in MIXTURES for name in MIXTURES[mixed].of)}
    wanted = [name for name in ROW_STATISTICS if name in needed]
    press: Any = get_press("kvzip", replay=replay, chunk_size=chunk_size, weighting="surprisal")
    layers = {name: prefill.blank_scores() for name in wanted}

    def look(seen: Any) -> None:
        for chunk, columns in enumerate(seen.columns):
            shares = largest_shares(seen.attention, chunk)
            nats = seen.nats[chunk].to(shares.device)
            for name in wanted:
                layers[name][seen.layer_idx][seen.row, :, columns] = ROW_STATISTICS[name](shares, nats)

    press.show_replays(prefill, look)
    mixed = {
        name: mixture.mix(*(layers[one] for one in mixture.of)) for name, mixture in MIXTURES.items() if name in names
    }
    protected, found = prefill.protected(press.n_sink), {**layers, **mixed}
    return {name: Scores(found[name], protected, press.policy) for name in names}


def largest_shares(attention: ReplayedAttention, chunk: int) -> torch.Tensor:
    """Returns what each row of a replay gives to each pair of its chunk, the most of a group of query heads.

    Args:
        attention: Of one layer.
        chunk: Which of the batch.

    Returns:
        ``[heads, rows, chunk]``, fp32.
    """
    keys = torch.cat([attention.sink_keys[chunk], attention.chunk_keys[chunk], attention.keys[chunk]], dim=1).float()
    query = attention.query[chunk].float().unflatten(0, (keys.shape[0], -1))
    n_sink, n_chunk, n_rows = attention.sink_keys.shape[2], attention.chunk_keys.shape[2], query.shape[2]
    hidden = torch.ones(n_rows, n_rows, dtype=torch.bool, device=query.device).triu(1)
    largest = query.new_zeros(keys.shape[0], n_rows, n_chunk)
    for group in query.unbind(1):  # one query head of each group at a time
        logits = group @ keys.transpose(-1, -2) * (attention.scaling or query.shape[-1] ** -0.5)
        if attention.softcap is not None:
            logits = attention.softcap * torch.tanh(logits / attention.softcap)
        logits[..., -n_rows:].masked_fill_(hidden, -torch.inf)
        torch.maximum(largest, logits.softmax(-1)[..., n_sink : n_sink + n_chunk], out=largest)
    return largest
