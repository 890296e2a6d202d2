"""Finds shares of the budget for a model's heads, from their importance, by the perplexity of what follows a context.

BaKlaVa (https://arxiv.org/abs/2502.13176) searches so; exponents and limits of the grid are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.nn import functional

from kvzip_press import compat
from kvzip_press.budget.allocators import Table
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.heads.importance import head_importance
from kvzip_press.model.chat import encode
from kvzip_press.model.watching import computing
from kvzip_press.prefilling.contexts import prefill
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import Press

EXPONENTS, AT_LEAST, AT_MOST = (0.25, 0.5, 1.0, 2.0), (0.1, 0.25, 0.5), (2.0, 4.0)
_FEWEST = 32  # tokens of a text, of which half are read and half are predicted


@dataclass(frozen=True)
class FoundShares:
    """What a search found.

    Attributes:
        shares: ``[layers, heads]``, float64, with a mean of 1: all 1 if nothing was better than equal shares.
        settings: The exponent, the least and the most share of the grid that made them; None for equal shares.
        perplexity: Of the texts that were searched on, with these shares.
        equal_perplexity: With equal shares.
        held_out: Of the texts that were not, with these shares; None if there was none.
        equal_held_out: With equal shares.
    """

    shares: torch.Tensor
    settings: tuple[float, float, float] | None
    perplexity: float
    equal_perplexity: float
    held_out: float | None
    equal_held_out: float | None


@dataclass(frozen=True)
class _Halves:
    """A text whose first half was read and scored, and the second."""

    done: Prefill
    scores: Scores
    rest: torch.Tensor


def find_shares(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    press: Press,
    *,
    n_held_out: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FoundShares:
    """Searches the shares under which the second halves of texts are the least surprising after a press on the first.

    Shares are ``importance ** exponent``, within limits around their mean. Equal shares are among the candidates, so
    nothing worse is found, on these texts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: What it reads.
        press: Scores the first halves; its amount is what is kept of them.
        n_held_out: Number of texts, from the end, that are not searched on and tell what the shares are worth.
        progress: Called with the number of candidates that were tried, and of all.

    Raises:
        InvalidArgumentError: A text is too short, none is left to search on, or the press removes nothing or decides
            its own counts.
    """
    if not press.is_scorer or press.policy.allocation.is_outcome:
        raise InvalidArgumentError(f"expected a press whose scores the core spends a budget on, got {press}")
    if press.compression_ratio == 0 and press.budget is None:
        raise InvalidArgumentError(f"expected a press that removes pairs, got {press}: give a ratio or a budget")
    rows = [encode(tokenizer, text) for text in texts]
    if not 0 <= n_held_out < len(rows):
        raise InvalidArgumentError(f"expected more texts than the {n_held_out} held out, got {len(rows)}")
    if (shortest := min(map(len, rows))) < _FEWEST:
        raise InvalidArgumentError(f"expected texts of at least {_FEWEST} tokens, got one of {shortest}")
    halves = [_read(model, tokenizer, row, press) for row in rows]
    searched, held_out = halves[: len(rows) - n_held_out], halves[len(rows) - n_held_out :]
    importance = head_importance(model, rows[: len(searched)])
    grid: list[tuple[float, float, float] | None] = [None, *product(EXPONENTS, AT_LEAST, AT_MOST)]
    tried: list[tuple[float, tuple[float, float, float] | None, torch.Tensor]] = []
    for settings in grid:
        shares = torch.ones_like(importance) if settings is None else _within(importance, *settings)
        same = next((known for known, _, other in tried if torch.equal(shares, other)), None)  # no limit was reached
        tried.append((_perplexity(model, searched, shares) if same is None else same, settings, shares))
        if progress is not None:
            progress(len(tried), len(grid))
    perplexity, settings, shares = min(tried, key=lambda one: one[0])  # the first of equals, so equal shares
    equal = tried[0]
    others = (_perplexity(model, held_out, one) if held_out else None for one in (shares, equal[2]))
    return FoundShares(shares, settings, perplexity, equal[0], *others)


def _within(importance: torch.Tensor, exponent: float, least: float, most: float) -> torch.Tensor:
    """Returns shares with a mean of 1, limited to parts and multiples of the mean before that."""
    powers = importance**exponent
    limited = (powers / powers.mean()).clamp(least, most)
    return limited / limited.mean()


def _read(model: Any, tokenizer: Any, row: Sequence[int], press: Press) -> _Halves:
    middle = len(row) // 2
    done = prefill(model, tokenizer, list(row[:middle]), observers=[press])
    rest = torch.tensor([row[middle:]], device=done.valid.device)
    return _Halves(done, press.score(done), rest)


def nats_per_token(model: Any, tokenizer: Any, text: str, press: Press, tables: Sequence[torch.Tensor]) -> list[float]:
    """Returns how surprising the second half of a text is after a press on the first, under each table of shares.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        text: The text.
        press: Scores the first half; its amount is what is kept of it.
        tables: Shares, each ``[layers, heads]``.
    """
    halves = _read(model, tokenizer, encode(tokenizer, text), press)
    return [_nats(model, halves, shares) / (halves.rest.shape[1] - 1) for shares in tables]


def _perplexity(model: Any, texts: Sequence[_Halves], shares: torch.Tensor) -> float:
    """Returns the perplexity of the second halves after the first ones, compressed."""
    nats = sum(_nats(model, text, shares) for text in texts)
    return math.exp(nats / sum(text.rest.shape[1] - 1 for text in texts))


@computing()
@torch.no_grad()
def _nats(model: Any, text: _Halves, shares: torch.Tensor) -> float:
    """Returns how surprising all tokens of a second half but its first are together."""
    cache = text.done.evict(text.scores, allocation=Table(shares=shares.tolist()))
    logits = model(input_ids=text.rest, use_cache=True, **compat.cache_argument(model, cache)).logits
    return float(functional.cross_entropy(logits[0, :-1].float(), text.rest[0, 1:], reduction="sum"))
