"""TrimKV (Bui et al. 2025, https://arxiv.org/abs/2512.03324): gates say at writing how long a pair is worth keeping."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import nn

from kvzip_press.budget.scores import Scores
from kvzip_press.decoding.eviction import DecodeEviction
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.decoding.scorer import HiddenStateScorer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.hidden_states import FromHiddenStates
from kvzip_press.prefilling.whole import Observer, Prefill
from kvzip_press.presses.decoding.trimkv.gates import TrimKVGates, activation_of
from kvzip_press.presses.decoding.windows import RecentPress


def retention(log_beta: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Returns what pairs are worth: ``(t - i) log beta``, fp32; t is one more than the number of tokens read."""
    return log_beta * (ages + 2).float()


@dataclass(frozen=True)
class TrimKVPress(RecentPress):
    """Keeps pairs by gates that foresee how fast each loses its worth, while decoding.

    A small network of each layer gives a pair ``log beta <= 0`` for each KV head from the hidden state of its token,
    once. At time t the pair at position i is worth ``(t - i) log beta_i``, in fp32: no attention is looked at, and no
    query kept. Pairs carry ``log beta``. With allocation "head" that is TrimKV; with "global", all heads of all layers
    share a budget, as in DBTrimKV, and ``min_kept_per_head`` is its floor.

    Args:
        gate: :class:`TrimKVGates`, or a released folder (``trimkv_weights.pth`` and ``config.json``) or file.
        n_recent: Number of last tokens that no eviction takes (0).

    The other arguments are those of :class:`DecodePress`. A ``prompt`` press goes only with ``protect_prompt``: what it
    keeps has no ``log beta``.

    Raises:
        InvalidArgumentError: A value is out of range, there is no gate, or a file cannot be read.
    """

    gate: TrimKVGates | str | PathLike[str] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.protect_prompt:
            raise InvalidArgumentError(
                "TrimKVPress: expected protect_prompt=True beside prompt=PRESS, whose pairs have no gate's score"
            )
        if not isinstance(self.gate, TrimKVGates | str | PathLike | None):
            raise InvalidArgumentError(
                f"TrimKVPress: expected gate as TrimKVGates or the path of a folder, got {type(self.gate).__name__}"
            )
        if self.gate is not None and not isinstance(self.gate, TrimKVGates):
            object.__setattr__(self, "gate", TrimKVGates.load(self.gate))
        super().__post_init__()

    def worth(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns what pairs that carry ``log beta`` are worth."""
        return retention(pairs.scores, pairs.ends[:, None, None] - 1 - pairs.positions)

    def gates(self, model: nn.Module) -> TrimKVGates:
        """Returns the gates.

        Raises:
            InvalidArgumentError: There are none, or they do not fit the model.
        """
        if not isinstance(self.gate, TrimKVGates):
            raise InvalidArgumentError(
                "TrimKVPress: expected gate=FOLDER, with trimkv_weights.pth and config.json as TrimKV releases them "
                "for a model, got none"
            )
        return self.gate.check(model)

    def requires(self, model: nn.Module) -> None:
        """Raises InvalidArgumentError if gates are missing or do not fit a model."""
        super().requires(model)
        self.gates(model)

    def log_beta(self, model: nn.Module) -> Any:
        """Returns the function ``(layer_idx, hidden_states) -> log beta`` of a model."""
        gates, act = self.gates(model), activation_of(model)
        return lambda layer_idx, hidden_states: gates.log_beta(hidden_states, layer_idx, act)

    def decode_eviction(self, model: nn.Module) -> DecodeEviction:
        """Returns what keeps caches within the budget while ``model`` generates.

        Raises:
            InvalidArgumentError: Gates are missing or do not fit the model.
        """
        scorer = HiddenStateScorer(self.log_beta(model), retention)
        return DecodeEviction(scorer, self.schedule, self.policy.allocation)

    def observer(self, model: nn.Module) -> Observer | None:
        """Returns what watches a prompt."""
        watched_by_another = self.prompt is not None or self.protect_prompt
        return super().observer(model) if watched_by_another else GateObserver(self, model)


class GateObserver(FromHiddenStates):
    """Holds ``log beta`` of one forward's tokens; each layer's is computed when its attention begins.

    Args:
        press: The press.
        model: The model to watch.
    """

    def __init__(self, press: TrimKVPress, model: nn.Module) -> None:
        super().__init__(model, press.log_beta(model))
        self._press = press

    def scores(self, prefill: Prefill) -> Scores:
        """Returns what the prompt's pairs are worth at its end; they carry ``log beta``."""
        valid = prefill.valid
        ages = valid.long().flip(-1).cumsum(dim=-1).flip(-1) - 1
        carried, layers = {}, {}
        for layer_idx in prefill.blank_scores():
            mask = valid.to(self.layers[layer_idx].device)[:, None]
            carried[layer_idx] = torch.where(mask, self.layers[layer_idx], 0)
            layers[layer_idx] = retention(carried[layer_idx], ages.to(mask.device)[:, None])
        return self._press.of_prompt(prefill, layers, carried=carried)
