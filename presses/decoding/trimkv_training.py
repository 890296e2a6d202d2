"""Trains gates of TrimKV for a model, layer by layer, with nothing but forward passes of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.devices import input_device
from kvzip_press.model.identity import num_kv_heads
from kvzip_press.model.structure import full_attention_layers, text_config
from kvzip_press.presses.decoding.trimkv_gates import TrimKVGates, activation_of, log_beta
from kvzip_press.presses.decoding.trimkv_teacher import Lesson, lessons

Progress = Callable[[str, int, int, str], None]
_STEPS_A_TEXT = 8  # optimiser steps on what one forward pass showed


@dataclass(frozen=True)
class TrimKVRecipe:
    """The hyper-parameters of a training.

    The optimiser is Adam; its rate falls to 0 along a half cosine.

    Args:
        memory_size: Pairs of a head that are worth keeping; best about the budget that the gates will be used with.
        width: Width of a gate's hidden layer; 512 in the released ones.
        steps: Optimiser steps; eight of them follow each forward pass.
        lr: Learning rate.
        moments: Moments of a text at which a step looks at the pairs.
        seed: Seed of everything that is drawn.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    memory_size: int = 512
    width: int = 512
    steps: int = 5000
    lr: float = 1e-3
    moments: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        least = min(self.memory_size, self.width, self.steps, self.moments)
        if least < 1 or self.seed < 0 or not self.lr > 0:
            raise InvalidArgumentError(
                f"expected memory_size, width, steps and moments of 1 or more, seed >= 0 and lr > 0, got {self}"
            )

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class TrimKVAgreement:
    """How well gates foresee, on texts that they were not trained on, which pairs a full cache still looks at.

    Attributes:
        gates: Fraction of the pairs worth keeping that the gates would keep, of as many.
        newest: The same for the newest pairs.
        loss: The training's loss, in nats a pair.
    """

    gates: float
    newest: float
    loss: float


def train(
    model: nn.Module,
    recipe: TrimKVRecipe,
    texts: Sequence[list[int]],
    held_out: Sequence[list[int]],
    progress: Progress | None = None,
) -> tuple[TrimKVGates, TrimKVAgreement]:
    """Trains gates, and compares them with what is worth keeping in held-out texts. The model is not changed.

    A pair that a gate gives ``log beta`` stays at time t with the probability ``beta ** (t - i)``, so to speak; the
    loss is the cross entropy with whether it was worth keeping (``trimkv_teacher``), the mean over pairs.

    Args:
        model: A causal language model.
        recipe: The hyper-parameters.
        texts: Token ids of texts to train on, read again and again; longer than ``memory_size`` to teach anything.
        held_out: Token ids of other texts.
        progress: Called as the training proceeds.

    Raises:
        InvalidArgumentError: No text is longer than the memory, in either part.
    """
    longer = [[ids for ids in some if len(ids) > recipe.memory_size + 1] for some in (texts, held_out)]
    if not all(longer):
        raise InvalidArgumentError(
            f"expected texts of more than memory_size={recipe.memory_size} tokens to train on and to hold out, got "
            f"{[max(map(len, some), default=0) for some in (texts, held_out)]} tokens at most"
        )
    act, device = activation_of(model), input_device(model)
    parameters = _initial(model, recipe, device)
    adam = torch.optim.Adam([x for gate in parameters.values() for x in gate.values()], lr=recipe.lr)
    generator = torch.Generator().manual_seed(recipe.seed)
    shown: dict[int, Lesson] = {}
    for step in range(recipe.steps):
        if step % _STEPS_A_TEXT == 0:
            ids = longer[0][step // _STEPS_A_TEXT % len(longer[0])]
            shown = lessons(model, ids, _moments(recipe, len(ids), generator), recipe.memory_size)
        for group in adam.param_groups:
            group["lr"] = recipe.rate(step)
        adam.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for layer_idx, lesson in shown.items():
            states = lesson.hidden_states.to(device)[None]
            total = total + cross_entropy(log_beta(parameters[layer_idx], states, act)[0], lesson)
        total.backward()
        adam.step()
        if progress is not None and (step % 20 == 0 or step == recipe.steps - 1):
            progress("training", step + 1, recipe.steps, f"loss {float(total.detach()) / len(shown):.3f}")
    gates = TrimKVGates({i: {name: x.detach().cpu() for name, x in gate.items()} for i, gate in parameters.items()})
    return gates, evaluate(model, gates, recipe, longer[1], progress)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    gates: TrimKVGates,
    recipe: TrimKVRecipe,
    texts: Sequence[list[int]],
    progress: Progress | None = None,
) -> TrimKVAgreement:
    """Compares gates with what was worth keeping in texts: means over layers, heads, moments and texts."""
    act = activation_of(model)
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    rows = []
    for number, ids in enumerate(texts):
        for layer_idx, lesson in lessons(model, ids, _moments(recipe, len(ids), generator), recipe.memory_size).items():
            foreseen = gates.log_beta(lesson.hidden_states[None], layer_idx, act)[0]
            worth = foreseen[:, None] * _ages(lesson)
            newest = -_ages(lesson).expand_as(worth)
            rows.append([*(_found(one, lesson) for one in (worth, newest)), float(cross_entropy(foreseen, lesson))])
        if progress is not None:
            progress("evaluating", number + 1, len(texts), "")
    return TrimKVAgreement(*torch.tensor(rows).mean(dim=0).tolist())


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


def _initial(model: nn.Module, recipe: TrimKVRecipe, device: torch.device) -> dict[int, dict[str, torch.Tensor]]:
    """Returns new gates, at whose age ``memory_size`` a pair stays with the probability 1 / e.

    The published bias of 10 forgets within 22026 tokens; from there, short texts would first have to move the bias.
    """
    config: Any = text_config(model)
    heads, generator = num_kv_heads(model), torch.Generator().manual_seed(recipe.seed)

    def drawn(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).to(device).requires_grad_()

    def filled(size: int, value: float) -> torch.Tensor:
        return torch.full((size,), value, device=device, requires_grad=True)

    return {
        layer.layer_idx: {
            "linear1.weight": drawn(recipe.width, config.hidden_size),
            "linear1.bias": filled(recipe.width, 0.0),
            "linear2.weight": drawn(heads, recipe.width),
            "bias": filled(heads, math.log(recipe.memory_size)),
        }
        for layer in full_attention_layers(model)
    }
