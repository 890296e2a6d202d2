"""Trains gates of TrimKV for a model, by either objective; a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import digest_of, to_json
from kvzip_press.model.devices import input_device
from kvzip_press.model.identity import facts_of, num_kv_heads
from kvzip_press.model.structure import full_attention_layers, text_config
from kvzip_press.presses.decoding.trimkv.distilled import Distillation
from kvzip_press.presses.decoding.trimkv.foreseen import Foresight, Gates
from kvzip_press.presses.decoding.trimkv.gates import TrimKVGates
from kvzip_press.presses.decoding.trimkv.recipe import ATTENTION, TrimKVRecipe
from kvzip_press.training.folder import WorkFolder
from kvzip_press.training.states import read_state, write_state
from kvzip_press.version import __version__

Progress = Callable[[str, int, int, str], None]

_STATE = "state-000.safetensors"
_SECONDS_A_STATE = 60.0  # of work that a kill may cost
_OF_ADAM = ("exp_avg", "exp_avg_sq", "step")


class Objective(Protocol):
    """What gates learn from a text."""

    steps_a_text: int

    def read(self, ids: list[int], generator: torch.Generator) -> None:
        """Reads a text; what is drawn comes from the generator alone."""

    def backward(self, gates: Gates) -> float:
        """Adds the gradients of gates for the text, and returns the loss."""

    def loss(self, gates: Gates) -> float:
        """Returns the loss for the text, and computes no gradients."""


@dataclass(frozen=True)
class TrimKVAgreement:
    """How well gates foresee, on texts that they were not trained on, which pairs a full cache still looks at.

    Attributes:
        gates: Fraction of the pairs worth keeping that the gates would keep, of as many.
        newest: The same for the newest pairs.
        loss: The training's own loss on these texts, in nats: a pair for "attention", a token for "distillation", whose
            capacity term is in it.
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
    *,
    folder: WorkFolder | None = None,
) -> tuple[TrimKVGates, TrimKVAgreement]:
    """Trains gates, and compares them with what is worth keeping in held-out texts. The model is not changed.

    The same arguments give the same gates, bit by bit, also if the training was killed and begun again.

    Args:
        model: A causal language model.
        recipe: The hyper-parameters.
        texts: Token ids of texts to train on, read again and again; longer than ``memory_size`` to teach anything.
        held_out: Token ids of other texts.
        progress: Called as the training proceeds.
        folder: Where the state is kept every minute, so that a killed training goes on; None for nowhere.

    Raises:
        InvalidArgumentError: No text is longer than the memory, in either part; or the folder holds another training.
        RunDirectoryError: The folder is in use by another process, or cannot be written.
    """
    longer = [[ids for ids in some if len(ids) > recipe.memory_size + 1] for some in (texts, held_out)]
    if not all(longer):
        raise InvalidArgumentError(
            f"expected texts of more than memory_size={recipe.memory_size} tokens to train on and to hold out, got "
            f"{[max(map(len, some), default=0) for some in (texts, held_out)]} tokens at most: longer texts, or a "
            "smaller memory_size"
        )
    gates = _initial(model, recipe, input_device(model))
    if folder is None:
        _optimise(_Kept(None, ""), model, recipe, longer[0], gates, progress)
    else:
        with folder.held():
            about = _about(model, recipe, longer)
            folder.claim(about)
            _optimise(_Kept(folder, digest_of(to_json(about).encode())), model, recipe, longer[0], gates, progress)
    trained = TrimKVGates({i: {name: x.detach().cpu() for name, x in gate.items()} for i, gate in gates.items()})
    return trained, evaluate(model, trained, recipe, longer[1], progress)


def evaluate(
    model: nn.Module,
    gates: TrimKVGates,
    recipe: TrimKVRecipe,
    texts: Sequence[list[int]],
    progress: Progress | None = None,
) -> TrimKVAgreement:
    """Compares gates with what was worth keeping in texts: means over layers, heads, moments and texts."""
    foresight, device = Foresight(model, recipe), input_device(model)
    objective = foresight if recipe.objective == ATTENTION else _objective(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    placed = {i: {name: x.to(device, torch.float32) for name, x in gate.items()} for i, gate in gates.layers.items()}
    found, losses = list[tuple[float, float]](), list[float]()
    for number, ids in enumerate(texts):
        for one in dict.fromkeys((foresight, objective)):
            one.read(ids, generator)
        found += foresight.found(placed)
        losses.append(objective.loss(placed))
        if progress is not None:
            progress("evaluating", number + 1, len(texts), "")
    kept, newest = torch.tensor(found).mean(dim=0).tolist()
    return TrimKVAgreement(kept, newest, math.fsum(losses) / len(losses))


def _optimise(
    kept: _Kept,
    model: nn.Module,
    recipe: TrimKVRecipe,
    texts: Sequence[list[int]],
    gates: Gates,
    progress: Progress | None,
) -> None:
    """Takes all steps that are left, and changes the gates."""
    objective = _objective(model, recipe)
    adam = torch.optim.Adam([x for gate in gates.values() for x in gate.values()], lr=recipe.lr)
    generator = torch.Generator().manual_seed(recipe.seed)
    done = kept.restore(gates, adam, generator)
    for step in range(done, recipe.steps):
        if step % objective.steps_a_text == 0:
            if step > done:
                kept.keep(step, gates, adam, generator)
            objective.read(texts[step // objective.steps_a_text % len(texts)], generator)
        for group in adam.param_groups:
            group["lr"] = recipe.rate(step)
        adam.zero_grad(set_to_none=True)
        loss = objective.backward(gates)
        adam.step()
        if progress is not None and (step % (20 if objective.steps_a_text > 1 else 1) == 0 or step == recipe.steps - 1):
            progress("training", step + 1, recipe.steps, f"loss {loss:.3f}")


class _Kept:
    """The state of a training in its folder: gates, and what Adam remembers.

    Args:
        folder: The folder, held; None to keep nothing.
        training: The training's name, without which no state is read.
    """

    def __init__(self, folder: WorkFolder | None, training: str) -> None:
        self._folder, self._training = folder, training
        self._last = time.monotonic()

    def restore(self, gates: Gates, adam: torch.optim.Adam, generator: torch.Generator) -> int:
        """Puts back what an earlier process kept, and returns how many steps that was; 0 for none."""
        path = None if self._folder is None else self._folder.path / _STATE
        state = read_state(path, self._training) if path is not None and path.exists() else None
        if state is None:
            return 0
        parameters, remembered = state
        for name, x in _named(gates).items():
            x.data.copy_(parameters[name])
            adam.state[x] = {of: remembered[f"{name}.{of}"].to("cpu" if of == "step" else x.device) for of in _OF_ADAM}
        generator.set_state(remembered["generator"])
        return int(remembered["steps"])

    def keep(self, step: int, gates: Gates, adam: torch.optim.Adam, generator: torch.Generator) -> None:
        """Writes the state after some steps, if the last one is a minute old."""
        if self._folder is None or time.monotonic() - self._last < _SECONDS_A_STATE:
            return
        named = _named(gates)
        remembered = {f"{name}.{of}": adam.state[x][of] for name, x in named.items() for of in _OF_ADAM}
        remembered |= {"steps": torch.tensor(step), "generator": generator.get_state()}
        self._folder.check()
        write_state(self._folder.path / _STATE, self._training, named, remembered)
        self._last = time.monotonic()


def _objective(model: nn.Module, recipe: TrimKVRecipe) -> Objective:
    return Foresight(model, recipe) if recipe.objective == ATTENTION else Distillation(model, recipe)


def _named(gates: Gates) -> dict[str, torch.Tensor]:
    return {f"{layer_idx}.{name}": tensor for layer_idx, gate in gates.items() for name, tensor in gate.items()}


def _about(model: nn.Module, recipe: TrimKVRecipe, texts: Sequence[Sequence[list[int]]]) -> dict[str, str]:
    """Returns all that the trained gates depend on, in words."""
    return {
        **facts_of(model),
        "method": "trimkv",
        "recipe": json.dumps(asdict(recipe)),
        "data_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "kvzip_press": __version__,
    }


def _initial(model: nn.Module, recipe: TrimKVRecipe, device: torch.device) -> Gates:
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
