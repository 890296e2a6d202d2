"""Runs one training, from documents to gates, in a folder of its own, from which a killed run can continue.

A round has two parts: features of as many tokens as fit on the disk, then the round's share of optimiser steps on them.
Each part is deterministic and writes its result to a file before the next begins, so a run may be killed anywhere.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from kvzip_press.errors import DiskFullError, InvalidArgumentError
from kvzip_press.files import replacing, write_tensors
from kvzip_press.model.devices import input_device
from kvzip_press.model.identity import facts_of, num_kv_heads
from kvzip_press.model.structure import text_config
from kvzip_press.presses.fastkvzip.fast_press import FastKVzipPress
from kvzip_press.presses.fastkvzip.gates import Gates
from kvzip_press.presses.fastkvzip.training.documents import Piece, digest
from kvzip_press.presses.fastkvzip.training.evaluation import Agreement, evaluate
from kvzip_press.presses.fastkvzip.training.features import features_of, layer_indices
from kvzip_press.presses.fastkvzip.training.optimise import Optimiser, Stacked, initial
from kvzip_press.presses.fastkvzip.training.recipe import Progress, Recipe
from kvzip_press.presses.fastkvzip.training.shards import Shards
from kvzip_press.version import __version__


class Training:
    """The training of one model's gates.

    Args:
        model: A causal language model; it is only read.
        tokenizer: Its tokenizer.
        recipe: The hyper-parameters.
        data: Pieces to train on, and pieces to evaluate with.
        source: A description of the pieces, which is stored in the gates' file.
        folder: Where features and states are kept until the end.
        progress: Called as the training proceeds.

    Raises:
        InvalidArgumentError: The folder holds a different training.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        recipe: Recipe,
        data: tuple[Sequence[Piece], Sequence[Piece]],
        source: str,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer, self.recipe, self.folder = model, tokenizer, recipe, folder
        self.train, self.held_out = data
        self.progress: Progress = progress or (lambda *_: None)
        self.layer_indices = layer_indices(model)
        config, heads = text_config(model), num_kv_heads(model)
        groups = config.num_attention_heads // heads
        self.shape = (config.hidden_size, heads, groups, recipe.dim, recipe.n_sink)
        self.rounds = self._rounds()
        self.provenance = self._provenance(source)
        self._claim_folder()

    def run(self) -> tuple[Gates, Agreement]:
        """Trains the gates; returns them and their agreement on held-out documents, which their provenance has too."""
        for number, pieces in enumerate(self.rounds):
            if not self._state_path(number).exists():
                shards = self._features(number, pieces)
                self._optimise(number, shards)
                shutil.rmtree(shards.folder)
        parameters, _ = self._state(len(self.rounds) - 1)
        gates = self._gates(parameters, self.provenance)
        documents = [piece.ids for piece in self.held_out]
        press = FastKVzipPress(gate=gates, window_size=0)
        found = evaluate(press, self.model, self.tokenizer, documents, self.progress)
        said = {**self.provenance, "held_out": json.dumps({**found.summary, "tokens": found.tokens})}
        return self._gates(parameters, said), found

    def _rounds(self) -> list[list[Piece]]:
        """Returns the pieces of each round, with about the same number of tokens, and no more than the disk takes."""
        total = sum(len(piece.ids) for piece in self.train)
        longest = max(len(piece.ids) for piece in self.train)
        room = self.recipe.disk_bytes // self._shards(0).token_bytes - longest
        if room < 1:
            raise InvalidArgumentError(
                f"expected disk_bytes for two pieces of {longest} tokens, {2 * longest * self._shards(0).token_bytes} "
                f"or more, got {self.recipe.disk_bytes}"
            )
        share = total / -(-total // room)
        rounds: list[list[Piece]] = [[]]
        begun = 0
        for piece in self.train:
            if begun >= share * len(rounds):
                rounds.append([])
            rounds[-1].append(piece)
            begun += len(piece.ids)
        return rounds

    def _features(self, number: int, pieces: Sequence[Piece]) -> Shards:
        shards = self._shards(number)
        n_done, _ = shards.done
        before = sum(len(one) for one in self.rounds[:number])
        for i, piece in enumerate(pieces[n_done:], start=n_done + 1):
            features = features_of(self.model, self.tokenizer, piece.ids)
            try:
                shards.append(*features)
            except OSError as error:
                raise self._no_room(shards, pieces, error) from error
            self.progress("reading and scoring", before + i, len(self.train), f"{shards.done[1]} tokens on disk")
        return shards

    def _no_room(self, shards: Shards, pieces: Sequence[Piece], error: OSError) -> OSError:
        """Returns the error to raise for a failed write; if the disk is full, the round's files are removed."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        shutil.rmtree(shards.folder)
        needed = sum(len(piece.ids) for piece in pieces) * shards.token_bytes
        return DiskFullError(
            f"expected {needed / 1e9:.2f} GB of room in {self.folder} for the features of a round, got a full disk; "
            "what the round had written there is removed. Fewer disk_bytes (--disk-gb) train in more rounds of less"
        )

    def _optimise(self, number: int, shards: Shards) -> None:
        device = input_device(self.model)
        features = shards.read()
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 2 * shards.token_bytes * shards.done[1]:
            features = tuple([layer.to(device) for layer in layers] for layers in features)  # type: ignore[assignment]
        optimiser = Optimiser(self.recipe, *self._start(number, device))
        ends = [round(self.recipe.steps * (i + 1) / len(self.rounds)) for i in range(-1, len(self.rounds))]
        optimiser.run(*features, range(ends[number], ends[number + 1]), self.progress)
        tensors = {
            **{f"parameter.{name}": tensor.detach() for name, tensor in optimiser.parameters.items()},
            **{f"state.{name}": tensor for name, tensor in optimiser.state.items()},
        }
        write_tensors(self._state_path(number), tensors, {})

    def _start(self, number: int, device: torch.device) -> tuple[Stacked, torch.device, Stacked | None]:
        if number == 0:
            return initial(self.shape, len(self.layer_indices), self.recipe.seed), device, None
        parameters, state = self._state(number - 1)
        return parameters, device, state

    def _state(self, number: int) -> tuple[Stacked, Stacked]:
        tensors = load_file(self._state_path(number))
        return tuple(  # type: ignore[return-value]
            {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in ("parameter.", "state.")
        )

    def _gates(self, parameters: Stacked, provenance: dict[str, str]) -> Gates:
        """Makes gates with projections and b in bf16, norms and sinks in fp32, as published."""
        exact = ("q_norm.weight", "k_norm.weight", "k_base")
        states = [
            {name: stack[i] if name in exact else stack[i].bfloat16() for name, stack in parameters.items()}
            for i in range(len(self.layer_indices))
        ]
        return Gates.of_state_dicts(states, self.layer_indices, provenance)

    def _shards(self, number: int) -> Shards:
        return Shards(self.folder / f"round-{number:03}", self.layer_indices, *self.shape[:2])

    def _state_path(self, number: int) -> Path:
        return self.folder / f"state-{number:03}.safetensors"

    def _provenance(self, source: str) -> dict[str, str]:
        return {
            **facts_of(self.model),
            "data": source,
            "data_sha256": digest([*self.train, *self.held_out]),
            "data_tokens": str(sum(len(piece.ids) for piece in self.train)),
            "recipe": json.dumps(asdict(self.recipe)),
            "kvzip_press": __version__,
        }

    def _claim_folder(self) -> None:
        """Records which training the folder holds, or checks that the existing record is the same."""
        path = self.folder / "training.json"
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(key for key, value in self.provenance.items() if known.get(key) != value)
            if differing:
                raise InvalidArgumentError(
                    f"expected {self.folder} to be new or to hold this training, got one of other {differing}: "
                    "name another folder, or remove it"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.provenance, indent=1), encoding="utf-8")
