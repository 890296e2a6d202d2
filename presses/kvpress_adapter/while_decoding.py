"""kvpress's DecodingPress with real eviction: its schedule, and its base press, which scores what is in the cache.

Every ``compression_interval`` tokens its base press scores all pairs, given the hidden states of the last tokens and
what the attention module was called with in the last step, as kvpress gives them to it; the best ``target_size`` of
each head stay. kvpress leaves pairs in the order of their scores; here they stay in order of positions, so a press
whose scores depend on the order keeps others from the second eviction on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kvzip_press.budget.allocators import PerHead
from kvzip_press.decoding.eviction import DecodeEviction, Schedule
from kvzip_press.decoding.layer_pairs import LayerPairs
from kvzip_press.decoding.pair_scorer import Look, PairScorer
from kvzip_press.decoding.scorer import Layers
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import full_attention_layers, layer_index, text_decoder
from kvzip_press.model.watching import before_forward
from kvzip_press.presses.kvpress_adapter.layer_rows import LayerRow, row_of
from kvzip_press.presses.kvpress_adapter.refused import as_ours

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.cache.pair_pool.worth import Worth
    from kvzip_press.cache.ragged_layer import RaggedLayer

_BOUND = 1e38  # of scores: some presses protect by infinity, and the largest number marks pairs that stay


@dataclass(frozen=True)
class KvpressSchedule(Schedule):
    """Cuts all rows every ``buffer`` tokens, however much they hold.

    Args:
        ratio: Fraction of all tokens seen that is removed, instead of a budget; None for the budget.
    """

    ratio: float | None = None

    def tokens_left(self, layers: Sequence[RaggedLayer]) -> int:
        """Returns how many tokens can be read until rows are cut: an eviction empties the tails."""
        return self.buffer - layers[0].tail.length

    def due(self, layers: Sequence[RaggedLayer]) -> torch.Tensor:
        """Returns True for every row."""
        return torch.ones(layers[0].batch_size, dtype=torch.bool, device=layers[0].packed.device)

    def budgets(self, layers: Sequence[RaggedLayer]) -> list[int]:
        """Returns the budget, or the part of the tokens that each row has seen."""
        if self.ratio is None:
            return super().budgets(layers)
        return [max(1, int(seen * (1 - self.ratio))) for seen in layers[0].next_positions.tolist()]


def schedule_of(press: Any) -> KvpressSchedule:
    """Returns when a DecodingPress of kvpress cuts, and to how much."""
    ratio = getattr(press, "target_compression_ratio", None)
    return KvpressSchedule(press.target_size, press.compression_interval, recent=0, ratio=ratio)


def eviction_of(press: Any, name: str, model: nn.Module) -> DecodeEviction:
    """Returns what evicts as a DecodingPress of kvpress does.

    Args:
        press: A copy of the DecodingPress for one run on a model.
        name: What it is called in errors.
        model: The model.
    """
    schedule = schedule_of(press)
    return DecodeEviction(BasePressScorer(model, press, schedule, name), schedule, PerHead())


class BasePressScorer(PairScorer):
    """Scores pairs by a press of kvpress that only scores.

    The hidden states of the last tokens are here and not in the cache. A fork, or rows that were reordered, have none:
    an eviction then refuses to go on, unless the press was made with ``hidden_states_buffer_size=0``.

    Args:
        model: The model.
        press: The DecodingPress; its state changes as its base press scores.
        schedule: Its schedule.
        name: What it is called in errors.
    """

    can_be_captured: ClassVar[bool] = False

    def __init__(self, model: nn.Module, press: Any, schedule: KvpressSchedule, name: str) -> None:
        super().__init__(model, Look(self._scored, at_values=True))
        self._press, self._schedule, self._name = press, schedule, name
        self._buffer_size = int(press.hidden_states_buffer_size)  # most tokens before the last one that it is shown
        self._targets: list[int] = []  # pairs of a head that each row is cut to
        self._rotary_emb = getattr(text_decoder(model), "rotary_emb", None)
        self._calls: dict[int, tuple[nn.Module, dict[str, Any]]] = {}  # of each module, the last one
        self._states: dict[int, torch.Tensor] = {}  # [batch, n, hidden_size] of each layer's last tokens
        self._n_columns, self._n_rearranged = 0, 0  # of the tails that they belong to
        self._is_reading = False  # a forward over the cache that is followed, and not another one

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While open, the scorer sees what attention is called with."""
        with ExitStack() as stack:
            for layer in full_attention_layers(model):
                stack.enter_context(before_forward(layer.module, self._look))
            stack.callback(self._forget)
            yield

    def adopt(self, layers: Layers, *, stays: bool) -> None:
        """Prepares layers for evictions.

        Raises:
            InvalidArgumentError: Heads of a row hold different numbers of pairs, which a press of kvpress cannot score.
        """
        for layer in layers.values():
            sizes = layer.packed.seqlens
            if bool((sizes != sizes[:, :1]).any()):
                raise InvalidArgumentError(
                    f"{self._name}: expected a prompt of which all heads of a layer hold as many pairs, since "
                    "kvpress's presses score them as one tensor while the model writes, got heads of different length: "
                    'compress the prompt per head (allocation="head")'
                )
        super().adopt(layers, stays=stays)
        self._forget()

    def begin(self, layers: Layers, n_tokens: int) -> None:
        """Forgets hidden states of tokens that left the tails (evicted from or cut off), or of rows that are others."""
        layer = next(iter(layers.values()))
        n_gone = self._n_columns - layer.tail.length
        if n_gone < 0 or layer.n_rearranged != self._n_rearranged:
            self._states = {}
        elif n_gone:
            self._states = {i: states[:, : max(states.shape[1] - n_gone, 0)] for i, states in self._states.items()}
        self._n_rearranged, self._is_reading = layer.n_rearranged, True

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_reading:
            return
        layer_idx = layer_index(module)
        states = (args[0] if args else kwargs["hidden_states"]).detach()
        self._calls[layer_idx] = (module, {**kwargs, "past_key_values": None, "hidden_states": states})
        known = self._states.get(layer_idx)
        if known is not None and known.shape[0] == states.shape[0]:
            states = torch.cat([known, states], dim=1)
        self._states[layer_idx] = states[:, -(self._buffer_size + 1) :]  # the last token's are always there

    def seen(self) -> None:
        """Ends a forward over one token."""
        self._is_reading = False

    def written(self, layers: Layers) -> None:
        """Notes how far the tails reach."""
        self._n_columns = next(iter(layers.values())).tail.length

    def read(self, layers: Layers, n_tokens: int, padding: torch.Tensor | None) -> None:
        """Notes how far the tails reach.

        Raises:
            InvalidArgumentError: Some rows were padded, whose hidden states would be those of padding.
        """
        if padding is not None and bool(padding.any()):
            raise InvalidArgumentError(
                f"{self._name}: expected rows that read as many tokens, since kvpress's presses look at hidden states "
                "without a mask, got padding: read these rows one by one"
            )
        self._is_reading = False
        self._n_columns = next(iter(layers.values())).tail.length

    def worth(self, layers: Layers) -> Mapping[int, Worth]:
        """Returns what the base press thinks of the pairs of all layers now.

        Raises:
            InvalidArgumentError: Hidden states are missing that kvpress would have, or the press refuses.
        """
        length = next(iter(layers.values())).tail.length
        held = min((states.shape[1] for states in self._states.values()), default=0)
        needed = min(length, self._buffer_size + 1)
        if held < needed:
            raise InvalidArgumentError(
                f"{self._name}: expected the hidden states of the last {needed} tokens, got those of {held}: kvpress "
                "keeps them outside of the cache, so a fork, a loaded cache or rows that were reordered have none. Go "
                "on with the cache that was written, or make the press with hidden_states_buffer_size=0"
            )
        self._targets = self._schedule.budgets(list(layers.values()))
        return super().worth(layers)

    def abandon(self) -> None:
        """Forgets a forward that was running: only some layers may have seen its tokens."""
        if self._is_reading:
            self._forget()

    def _scored(self, pairs: LayerPairs) -> torch.Tensor:
        """Returns the base press's scores of some rows, 0 where there is no pair."""
        worth = torch.zeros_like(pairs.scores)
        for row in range(len(pairs.ends)):
            n = int(pairs.valid[row, 0].sum())
            worth[row, :, worth.shape[2] - n :] = self._of_row(pairs, row, n)
        return worth

    def _of_row(self, pairs: LayerPairs, row: int, n: int) -> torch.Tensor:
        module, kwargs = self._calls[pairs.layer_idx]
        states = self._states[pairs.layer_idx]
        own = row_of(kwargs, pairs.first_row + row, states.shape[0])
        own.setdefault("cache_position", pairs.ends[row : row + 1] - 1)
        assert pairs.values is not None
        first = pairs.keys.shape[2] - n
        keys, values = (x[row : row + 1, :, first:] for x in (pairs.keys, pairs.values))
        one = LayerRow(module, keys, values, own, (None, None))
        mine = states[pairs.first_row + row][None]
        base, target = self._press.base_press, self._targets[pairs.first_row + row]
        # Some scores depend on the ratio, and kvpress finds one that rounds to the target.
        base.compression_ratio = self._press._find_target_compression_ratio(n, target)  # noqa: SLF001
        try:
            return one.score_with(base, self._rotary_emb, mine).clamp(-_BOUND, _BOUND)
        except Exception as error:
            raise as_ours(self._name, error, f" while the model writes, in layer {pairs.layer_idx}") from error

    def _forget(self) -> None:
        self._calls, self._states, self._n_columns, self._is_reading = {}, {}, 0, False
