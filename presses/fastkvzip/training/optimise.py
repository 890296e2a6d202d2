"""Trains gates on features: all layers at once, each on its own features, on the same random tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call, vmap
from torch.nn.functional import binary_cross_entropy

from kvzip_press.presses.fastkvzip.gate import LayerGate
from kvzip_press.presses.fastkvzip.training.recipe import Progress, Recipe

NOTABLE = 0.05  # scores from here up are the few that matter; "agreement" compares which are
Stacked = dict[str, torch.Tensor]  # a gate's parameters, with an extra dimension for the layers


def initial(shape: tuple[int, int, int, int, int], n_layers: int, seed: int) -> Stacked:
    """Returns the parameters of new gates, in fp32 on the CPU.

    The sinks are drawn at random, each different: if all are zero, as published, they get the same gradient and remain
    a single sink.
    """
    hidden_size, heads, groups, dim, n_sink = shape
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return (torch.rand(n_layers, *size, generator=generator) * 2 - 1) / math.sqrt(hidden_size)

    return {
        "q_proj.weight": uniform(heads * groups * dim, hidden_size),
        "q_proj.bias": uniform(heads * groups * dim),
        "k_proj.weight": uniform(heads * dim, hidden_size),
        "q_norm.weight": torch.ones(n_layers, dim),
        "k_norm.weight": torch.ones(n_layers, dim),
        "b": torch.zeros(n_layers, heads, 1, groups),
        "k_base": torch.randn(n_layers, heads, 1, n_sink, dim, generator=generator) * 0.3,
    }


class Optimiser:
    """Trains gates of one shape in one loop; layers do not influence each other.

    Args:
        recipe: The recipe.
        parameters: The gates' parameters.
        device: Where to train.
        state: The value of :attr:`state` after an earlier round; None at the start.
    """

    def __init__(self, recipe: Recipe, parameters: Stacked, device: torch.device, state: Stacked | None = None) -> None:
        self.recipe = recipe
        heads, groups = parameters["b"].shape[1], parameters["b"].shape[3]
        with torch.device("meta"):
            self._gate = LayerGate(
                parameters["q_proj.weight"].shape[2], heads, groups, dim=recipe.dim, n_sink=recipe.n_sink
            )
        self.parameters = {name: tensor.to(device).requires_grad_() for name, tensor in parameters.items()}
        self._sgd = torch.optim.SGD(self.parameters.values(), lr=recipe.lr, momentum=0.9)
        for name, buffer in (state or {}).items():
            self._sgd.state[self.parameters[name]]["momentum_buffer"] = buffer.to(device)

    @property
    def state(self) -> Stacked:
        """The optimiser's momentum, by parameter."""
        return {name: self._sgd.state[parameter]["momentum_buffer"] for name, parameter in self.parameters.items()}

    def run(
        self,
        hidden: Sequence[torch.Tensor],
        scores: Sequence[torch.Tensor],
        steps: range,
        progress: Progress | None = None,
    ) -> None:
        """Takes optimiser steps on one round's features.

        Args:
            hidden: For each layer ``[tokens, hidden_size]``.
            scores: For each layer ``[tokens, num_key_value_heads]``.
            steps: Numbers of the steps; a step's tokens depend only on the seed and its number.
            progress: Called every 20 steps and after the last.
        """
        for step in steps:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
            chosen = torch.randint(len(hidden[0]), (self.recipe.batch_size,), generator=generator)
            losses, predicted, wanted = self._losses(hidden, scores, chosen)
            for group in self._sgd.param_groups:
                group["lr"] = self.recipe.rate(step)
            self._sgd.zero_grad(set_to_none=True)
            losses.sum().backward()
            self._sgd.step()
            if progress is not None and (step % 20 == 0 or step == steps[-1]):
                progress("training", step + 1, self.recipe.steps, _remark(losses, predicted, wanted))

    def _losses(
        self, hidden: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = self.parameters["b"].device
        inputs, wanted = (
            torch.stack([layer[chosen.to(layer.device)] for layer in layers]).to(device, torch.float32)
            for layers in (hidden, scores)
        )
        predicted = vmap(lambda parameters, x: functional_call(self._gate, parameters, (x,)))(self.parameters, inputs)
        wanted = wanted.transpose(1, 2)
        return soft_bce(predicted, wanted), predicted.detach(), wanted


def soft_bce(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns the loss of each layer: cross entropy with the teacher's scores, mean over tokens, sum over heads.

    Args:
        predicted: ``[layers, heads, n]``, in (0, 1).
        wanted: The same shape, in [0, 1].
    """
    return binary_cross_entropy(predicted, wanted.clamp(0, 1), reduction="none").mean(dim=2).sum(dim=1)


def agreement(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns, per layer of ``[layers, heads, n]``, the fraction of scores on the same side of :data:`NOTABLE`."""
    return ((predicted >= NOTABLE) == (wanted >= NOTABLE)).float().mean(dim=(1, 2))


def _remark(losses: torch.Tensor, predicted: torch.Tensor, wanted: torch.Tensor) -> str:
    by_layer, agreed = losses.detach(), agreement(predicted, wanted)
    numbers: list[Any] = torch.stack([t for v in (by_layer, agreed) for t in (v.mean(), v.min(), v.max())]).tolist()
    return "loss {:.3f} (layers {:.3f} to {:.3f}), agreement {:.3f} ({:.3f} to {:.3f})".format(*numbers)
