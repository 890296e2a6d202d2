"""Runs one training, from documents to gates, in a folder of its own, from which a killed run can continue.

A round has two parts: features of as many tokens as fit on the disk, then the round's share of optimiser steps on them.
Each part is deterministic and writes its result to a file before the next begins, so a run may be killed anywhere.
What is read back is compared with its SHA-256 first; what is damaged is made again.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press.errors import CacheFileError, DiskFullError, InvalidArgumentError
from kvzip_press.files import digest_of, to_json
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
from kvzip_press.training.folder import WorkFolder
from kvzip_press.training.states import read_state, write_state
from kvzip_press.version import __version__

State = tuple[Stacked, Stacked]  # parameters and the optimiser's momentum


class Training:
    """The training of one model's gates.

    Args:
        model: A causal language model; it is only read.
        tokenizer: Its tokenizer.
        recipe: The hyper-parameters.
        data: Pieces to train on, and pieces to evaluate with.
        source: A description of the pieces, which is stored in the gates' file.
        folder: Where features and states are kept until the end: new, empty, or of this training.
        progress: Called as the training proceeds.

    Raises:
        InvalidArgumentError: The folder holds a training of other data, another model or another recipe.
        RunDirectoryError: The folder is not a training's, damaged, in use by another process, or cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        recipe: Recipe,
        data: tuple[Sequence[Piece], Sequence[Piece]],
        source: str,
        folder: Path | WorkFolder,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.work = folder if isinstance(folder, WorkFolder) else WorkFolder(folder)
        self.train, self.held_out = data
        self.progress: Progress = progress or (lambda *_: None)
        self.layer_indices = layer_indices(model)
        config, heads = text_config(model), num_kv_heads(model)
        groups = config.num_attention_heads // heads
        self.shape = (config.hidden_size, heads, groups, recipe.dim, recipe.n_sink)
        self.provenance = self._provenance(source)
        self.name = digest_of(to_json(self.provenance).encode())
        self.rounds = self._rounds()
        with self.work.held():
            self.work.claim(self.provenance)

    def run(self) -> tuple[Gates, Agreement]:
        """Trains the gates; returns them and their agreement on held-out documents, which their provenance has too.

        Raises:
            RunDirectoryError: The folder was changed while the training used it, or cannot be used any more.
            DiskFullError: There is no room for the features.
            OSError: The features cannot be written for another reason.
        """
        with self.work.held():
            self.work.claim(self.provenance)
            parameters = self._trained()
        gates = self._gates(parameters, self.provenance)
        documents = [piece.ids for piece in self.held_out]
        press = FastKVzipPress(gate=gates, window_size=0)
        found = evaluate(press, self.model, self.tokenizer, documents, self.progress, self.recipe.weighting)
        said = {**self.provenance, "held_out": json.dumps({**found.summary, "tokens": found.tokens})}
        return self._gates(parameters, said), found

    def _trained(self) -> Stacked:
        """Returns the parameters after the last round; rounds whose state is there are not trained again."""
        last = len(self.rounds) - 1
        states = ((number, self._state(number)) for number in range(last, -1, -1))
        done, state = next((known for known in states if known[1] is not None), (-1, None))
        for number in range(done + 1, last + 1):
            self._clear_rounds(but=number)
            shards = self._features(number)
            state = self._optimise(number, shards, state)
        self._clear_rounds()
        assert state is not None
        return state[0]

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

    def _features(self, number: int) -> Shards:
        shards, pieces = self._shards(number), self.rounds[number]
        n_done = shards.recover([len(piece.ids) for piece in pieces])
        before = sum(len(one) for one in self.rounds[:number])
        for i, piece in enumerate(pieces[n_done:], start=n_done + 1):
            features = features_of(self.model, self.tokenizer, piece.ids, self.recipe.weighting)
            self.work.check()
            try:
                shards.append(*features)
            except (OSError, CacheFileError) as error:
                if _is_full(error):
                    raise self._no_room(shards, pieces) from error
                raise
            self.progress("reading and scoring", before + i, len(self.train), f"{shards.done[1]} tokens on disk")
        return shards

    def _no_room(self, shards: Shards, pieces: Sequence[Piece]) -> DiskFullError:
        """Removes the files of a round for which the disk has no room, and returns the error to raise."""
        self.work.clear(shards.folder)
        needed = sum(len(piece.ids) for piece in pieces) * shards.token_bytes
        return DiskFullError(
            f"expected {needed / 1e9:.2f} GB of room in {self.work.path} for the features of a round, got a full disk; "
            "what the round had written there is removed. Fewer disk_bytes (--disk-gb) train in more rounds of less"
        )

    def _optimise(self, number: int, shards: Shards, state: State | None) -> State:
        """Takes a round's steps from the state before it, and writes and returns the state after it."""
        device = input_device(self.model)
        features = shards.read()
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 2 * shards.token_bytes * shards.done[1]:
            features = tuple([layer.to(device) for layer in layers] for layers in features)  # type: ignore[assignment]
        parameters, momentum = state or (initial(self.shape, len(self.layer_indices), self.recipe.seed), None)
        optimiser = Optimiser(self.recipe, parameters, device, momentum)
        ends = [round(self.recipe.steps * (i + 1) / len(self.rounds)) for i in range(-1, len(self.rounds))]
        optimiser.run(*features, range(ends[number], ends[number + 1]), self.progress)
        self.work.check()
        write_state(self._state_path(number), self.name, optimiser.parameters, optimiser.state)
        return {name: tensor.detach().cpu() for name, tensor in optimiser.parameters.items()}, optimiser.state

    def _state(self, number: int) -> State | None:
        path = self._state_path(number)
        return read_state(path, self.name) if path.exists() else None

    def _clear_rounds(self, but: int | None = None) -> None:
        """Removes the features of all rounds but one: of those that are trained, and of those that come too early."""
        for folder in self.work.path.glob("round-*"):
            if but is None or folder != self._shards(but).folder:
                self.work.clear(folder)

    def _gates(self, parameters: Stacked, provenance: dict[str, str]) -> Gates:
        """Makes gates with projections and b in bf16, norms and sinks in fp32, as published."""
        exact = ("q_norm.weight", "k_norm.weight", "k_base")
        states = [
            {name: stack[i] if name in exact else stack[i].bfloat16() for name, stack in parameters.items()}
            for i in range(len(self.layer_indices))
        ]
        return Gates.of_state_dicts(states, self.layer_indices, provenance)

    def _shards(self, number: int) -> Shards:
        return Shards(self.work.path / f"round-{number:03}", self.layer_indices, *self.shape[:2], self.name)

    def _state_path(self, number: int) -> Path:
        return self.work.path / f"state-{number:03}.safetensors"

    def _provenance(self, source: str) -> dict[str, str]:
        return {
            **facts_of(self.model),
            "data": source,
            "data_sha256": digest([*self.train, *self.held_out]),
            "data_tokens": str(sum(len(piece.ids) for piece in self.train)),
            "recipe": json.dumps(asdict(self.recipe)),
            "kvzip_press": __version__,
        }


def _is_full(error: Exception) -> bool:
    cause = error.__cause__ if isinstance(error, CacheFileError) else error
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
