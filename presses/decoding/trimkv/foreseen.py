"""The objective that needs no way back through the model: gates foresee which pairs a full cache still looks at.

A pair that a gate gives ``log beta`` stays at time t with the probability ``beta ** (t - i)``, so to speak; the loss is
the cross entropy with whether it was worth keeping (:mod:`.attended`), the mean over pairs, heads, moments and layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvzip_press.presses.decoding.trimkv.attended import Lesson, lessons
from kvzip_press.presses.decoding.trimkv.gates import activation_of, log_beta
from kvzip_press.presses.decoding.trimkv.recipe import TrimKVRecipe

Gates = dict[int, dict[str, torch.Tensor]]
"""The tensors of each gate by name (:class:`.gates.TrimKVGates`), by layer index; in training fp32, with gradients."""


class Foresight:
    """Gives gates the gradients of what they foresee, eight steps a text: a forward pass costs most.

    Args:
        model: A causal language model.
        recipe: The hyper-parameters.
    """

    steps_a_text = 8

    def __init__(self, model: nn.Module, recipe: TrimKVRecipe) -> None:
        self._model, self._recipe = model, recipe
        self._act = activation_of(model)
        self.lessons: dict[int, Lesson] = {}

    def read(self, ids: list[int], generator: torch.Generator) -> None:
        """Reads a text, and looks at what was worth keeping at some moments of it."""
        moments = _moments(self._recipe, len(ids), generator)
        self.lessons = lessons(self._model, ids, moments, self._recipe.memory_size)

    def backward(self, gates: Gates) -> float:
        """Adds the gradients of gates for the text, and returns the loss, the mean over layers."""
        total = torch.stack([self._nats(gates[layer_idx], lesson) for layer_idx, lesson in self.lessons.items()]).sum()
        total.backward()
        return float(total.detach()) / len(self.lessons)

    @torch.no_grad()
    def loss(self, gates: Gates) -> float:
        """Returns the loss for the text."""
        nats = [self._nats(gates[layer_idx], lesson) for layer_idx, lesson in self.lessons.items()]
        return float(torch.stack(nats).mean())

    @torch.no_grad()
    def found(self, gates: Gates) -> list[tuple[float, float]]:
        """Returns for each layer which fractions of what was worth keeping gates would keep, and the newest are."""
        rows = []
        for layer_idx, lesson in self.lessons.items():
            worth = self._log_beta(gates[layer_idx], lesson)[:, None] * _ages(lesson)
            newest = -_ages(lesson).expand_as(worth)
            rows.append((_found(worth, lesson), _found(newest, lesson)))
        return rows

    def _nats(self, gate: dict[str, torch.Tensor], lesson: Lesson) -> torch.Tensor:
        device = next(iter(gate.values())).device
        return cross_entropy(self._log_beta(gate, lesson), lesson).to(device)

    def _log_beta(self, gate: dict[str, torch.Tensor], lesson: Lesson) -> torch.Tensor:
        states: Any = lesson.hidden_states[None]
        placed = {name: tensor.to(states.device) for name, tensor in gate.items()}
        return log_beta(placed, states, self._act)[0]


def cross_entropy(foreseen: torch.Tensor, lesson: Lesson) -> torch.Tensor:
    """Returns the mean over pairs, heads and moments of the cross entropy of ``beta ** (t - i)`` with what was kept.

    Args:
        foreseen: ``log beta``, fp32 ``[num_key_value_heads, n]``.
        lesson: What was kept.
    """
    stays = (foreseen[:, None] * _ages(lesson)).clamp(max=-1e-6)  # log of the probability
    goes = torch.log(-torch.expm1(stays))
    is_there = _is_there(lesson)
    nats = -torch.where(lesson.kept, stays, goes)
    return (nats * is_there).sum() / (is_there.sum() * len(foreseen))


def _ages(lesson: Lesson) -> torch.Tensor:
    """Returns ``t - i``, t being one more than the number of tokens read, fp32 ``[m, n]``; 1 at pairs to come."""
    n = lesson.kept.shape[-1]
    ages = lesson.moments[:, None] + 1 - torch.arange(n, device=lesson.moments.device)
    return ages.clamp(min=1).float()


def _is_there(lesson: Lesson) -> torch.Tensor:
    return torch.arange(lesson.kept.shape[-1], device=lesson.moments.device) < lesson.moments[:, None]


def _found(worth: torch.Tensor, lesson: Lesson) -> float:
    """Returns which fraction of what was kept is among the best by ``worth``, of as many."""
    n_kept = int(lesson.kept[0, 0].sum())
    best = worth.masked_fill(~_is_there(lesson), -torch.inf).topk(n_kept, dim=-1).indices
    return float(lesson.kept.gather(-1, best).float().mean())


def _moments(recipe: TrimKVRecipe, length: int, generator: torch.Generator) -> list[int]:
    """Draws moments at which something has to go and something is still to be read."""
    drawn = torch.randint(recipe.memory_size + 1, length, (recipe.moments,), generator=generator)
    return sorted(set(drawn.tolist()))
