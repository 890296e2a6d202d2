"""The paper's objective: a model that forgets as gates say should say what it says otherwise, and hold few pairs.

For a text of n tokens, with p the model's next-token probabilities and q those of its twin whose attention decays::

    loss = mean over t of KL(p_t || q_t)
         + capacity_weight * mean over what is above 0 of max(0, sum_{i <= t} beta_i ** (t - i) - M) / max(t - M, 1)

The second mean is over layers, KV heads and tokens t = 0, 1, ..., and M is ``memory_size``. The model is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import text_decoder
from kvzip_press.prefilling.surprisal import LOGITS_AT_ONCE, head_of
from kvzip_press.presses.decoding.trimkv.decayed import DecayedModel, Gates
from kvzip_press.presses.decoding.trimkv.recipe import TrimKVRecipe


class Distillation:
    """Gives gates the gradients of the paper's loss, a text a step.

    Logits are made for some tokens at a time, and their gradient is taken back to the hidden states at once: there is
    never a tensor of all tokens by the vocabulary. The way back through the layers begins from those.

    Args:
        model: A causal language model.
        recipe: The hyper-parameters.
    """

    steps_a_text = 1

    def __init__(self, model: nn.Module, recipe: TrimKVRecipe) -> None:
        self._model, self._recipe = model, recipe
        self._decayed = DecayedModel(model)
        self._head = head_of(self._decayed.twin)
        self._ids = torch.empty(1, 0, dtype=torch.long)
        self._taught = torch.empty(0)

    @torch.no_grad()
    def read(self, ids: list[int], generator: torch.Generator) -> None:  # nothing is drawn here
        """Reads a text with the model as it is."""
        self._ids = torch.tensor([ids], device=input_device(self._model))
        decoder: Any = text_decoder(self._model)
        self._taught = decoder(input_ids=self._ids, use_cache=False, return_dict=True)[0]

    def backward(self, gates: Gates) -> float:
        """Adds the gradients of gates for the text, and returns the loss."""
        states, held = self._decayed.read(self._ids, gates)
        capacity = capacity_term(held, self._recipe.memory_size)
        backwards, divergence = torch.empty_like(states), 0.0
        for part in self._parts(states):
            leaf = states[:, part].detach().requires_grad_()
            nats = self._nats(leaf, part)
            (backwards[:, part],) = torch.autograd.grad(nats, leaf)
            divergence += float(nats.detach())
        weighted = self._recipe.capacity_weight * capacity
        torch.autograd.backward([states, weighted], [backwards, torch.ones_like(weighted)])
        return divergence + float(weighted.detach())

    @torch.no_grad()
    def loss(self, gates: Gates) -> float:
        """Returns the loss for the text."""
        states, held = self._decayed.read(self._ids, gates)
        divergence = sum(float(self._nats(states[:, part], part)) for part in self._parts(states))
        return divergence + self._recipe.capacity_weight * float(capacity_term(held, self._recipe.memory_size))

    def _nats(self, states: torch.Tensor, part: slice) -> torch.Tensor:
        """Returns what some tokens add to the mean divergence."""
        ids = self._ids[:, part]
        with torch.no_grad():
            taught = self._head(self._taught[:, part], ids).log_softmax(dim=-1, dtype=torch.float32)
        said = self._head(states, ids).log_softmax(dim=-1, dtype=torch.float32)
        return (taught.exp() * (taught - said)).sum() / self._ids.shape[1]

    @torch.no_grad()
    def _parts(self, states: torch.Tensor) -> list[slice]:
        """Returns slices of tokens whose logits are few."""
        n, vocabulary = states.shape[1], self._head(states[:, :1], self._ids[:, :1]).shape[-1]
        at_once = max(LOGITS_AT_ONCE // vocabulary, 1)
        return [slice(start, min(start + at_once, n)) for start in range(0, n, at_once)]


def capacity_term(held: torch.Tensor, memory_size: int) -> torch.Tensor:
    """Returns by how much more than ``memory_size`` pairs are held, as a part of what could be: 0 if nowhere.

    Args:
        held: Sums over i of ``beta_i ** (t - i)``, fp32 ``[layers, num_key_value_heads, n]``.
        memory_size: How many are no loss.
    """
    tokens = torch.arange(held.shape[-1], device=held.device)
    excess = (held - memory_size).clamp(min=0) / (tokens - memory_size).clamp(min=1)
    return excess.sum() / (excess > 0).sum().clamp(min=1)
