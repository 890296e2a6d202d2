"""Fast KVzip (https://arxiv.org/abs/2601.17668): small gates predict KVzip's scores while the context is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from kvzip_press.budget.scores import Scores
from kvzip_press.cache.compressible import compressible_layers
from kvzip_press.decoding.eviction import DecodeEviction, Schedule
from kvzip_press.decoding.scorer import HiddenStateScorer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.hidden_states import FromHiddenStates
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress, ObservingPress
from kvzip_press.presses.fastkvzip.finding import gates_for
from kvzip_press.presses.fastkvzip.gates import Gates


@dataclass(frozen=True)
class FastKVzipPress(AllocatingPress, ObservingPress):
    """Scores pairs with gates, from the hidden states that enter each layer's attention, during the prefill itself.

    Nothing is read again, and no hidden state is kept. As in the authors' code, the last tokens are protected inside
    the budget, and the chat-template prefix outside it. Their window is 4096 tokens for contexts of 16000 tokens or
    more, 2 % of the context for shorter ones, and cut to the budget. Ours is always the smaller of the two: it does not
    jump, and up to a ratio of 0.98 it never crowds out what the gates chose (beyond that, the window is what is kept).

    With ``decoding=True`` the cache also stays within its budget while the model reads questions and writes answers::

        press = FastKVzipPress(decoding=True, budget=2048)
        with press(model):
            model.generate(**inputs, max_new_tokens=16384)

    The prompt is compressed to ``budget`` tokens' worth of pairs. After it, hidden states are buffered; ``buffer``
    tokens are scored at once, and then the worst of all pairs are evicted, including those of the prompt. Everything
    counts towards the budget, including the template's prefix and the last ``buffer`` tokens, which no eviction
    touches. So the cache holds at most ``budget + buffer`` tokens' worth, on average over its heads, however long the
    answer is.

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1); the prefix is not counted.
        allocation: "global" (the paper), "layer", "head" or "adakv".
        budget: Tokens' worth of pairs to keep, instead of a ratio. This, ``layer_ratios``, ``safeguard`` and
            ``min_kept_per_head`` are explained in :class:`kvzip_press.press.AllocatingPress`; all four are
            keyword-only.
        gate: :class:`Gates`; a file of them, ours or (``.pt``) a published one; a folder or a hub repository (``name``,
            or ``name@revision``) with the layout of the authors' ``Jang-Hyun/Fast-KVzip``; None for those that the
            package ships for the model, or else those in that repository.
        window_size: Most last tokens of a row that every head keeps.
        window_ratio: The same limit as a fraction of the row's tokens, in [0, 1]; the smaller of the two applies.
        n_sink: Number of first tokens that are protected if the chat-template prefix is not known.
        decoding: Whether to evict while the model generates; needs a budget, and works under every allocation.
        buffer: Number of tokens between two such evictions (128 in the paper), less than the budget.

    Raises:
        InvalidArgumentError: A value is out of range, or a file cannot be read.
    """

    gate: Gates | str | PathLike[str] | None = None
    window_size: int = 4096
    window_ratio: float = 0.02
    n_sink: int = 4
    decoding: bool = False
    buffer: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoding:
            self._check_decoding()
        if self.window_size < 0 or self.n_sink < 0 or not 0 <= self.window_ratio <= 1:
            raise InvalidArgumentError(
                f"expected window_size >= 0, n_sink >= 0 and window_ratio in [0, 1], got {self.window_size}, "
                f"{self.n_sink} and {self.window_ratio}"
            )
        if not isinstance(self.gate, Gates | str | PathLike | None):
            raise InvalidArgumentError(f"expected Gates, a path or a hub repository, got {type(self.gate).__name__}")
        if self.gate is not None and not isinstance(self.gate, Gates) and Path(self.gate).is_file():
            object.__setattr__(self, "gate", Gates.load(self.gate))

    def _check_decoding(self) -> None:
        if self.budget is None or not 1 <= self.buffer < self.budget:
            raise InvalidArgumentError(
                "expected decoding=True with budget=TOKENS and a buffer of 1 or more and fewer tokens, got "
                f"budget={self.budget} and buffer={self.buffer}"
            )

    def decode_eviction(self, model: nn.Module) -> DecodeEviction | None:
        """Returns what keeps caches within the budget while ``model`` generates; None without ``decoding``.

        Raises:
            InvalidArgumentError: There are no gates for the model, or they do not fit it.
        """
        schedule = self.schedule
        if schedule is None:
            return None
        gates = self.gates(model)

        def score(layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
            return gates.scores(hidden_states, layer_idx)

        return DecodeEviction(HiddenStateScorer(score), schedule, self.policy.allocation)

    @property
    def schedule(self) -> Schedule | None:
        """With ``decoding``: cut to ``budget`` every ``buffer`` tokens; None otherwise."""
        return Schedule(self.budget, self.buffer) if self.decoding and self.budget is not None else None

    def requires(self, model: nn.Module) -> None:
        """Raises InvalidArgumentError if there are no gates for a model, or they do not fit it."""
        self.gates(model)

    def observer(self, model: nn.Module) -> GateObserver:
        """Returns an observer that scores one prefill while it runs.

        Raises:
            InvalidArgumentError: There are no gates for the model, or they do not fit it.
        """
        return GateObserver(self, model)

    def gates(self, model: nn.Module) -> Gates:
        """Returns the gates for a model.

        Raises:
            InvalidArgumentError: There are none, or they do not fit the model.
        """
        return gates_for(model, self.gate)

    def scores(
        self, hidden_states: Mapping[int, torch.Tensor], model: nn.Module | None = None
    ) -> dict[int, torch.Tensor]:
        """Returns the gates' scores of hidden states, for engines with caches of their own to decide by what to keep.

        A score is about one token and depends on nothing but its hidden state, so chunks, steps and whole contexts give
        the same. It predicts, in (0, 1), the most attention that the pair would get while the model repeats the
        context.

        Args:
            hidden_states: ``layer_idx -> [..., n, hidden_size]``, any floating dtype and device: what enters the
                attention module, after the layer's input norm. Any layers that have a gate may be given.
            model: The model; needed if ``gate`` does not hold the gates themselves.

        Returns:
            ``layer_idx -> [..., num_key_value_heads, n]``, fp32, on the same device.

        Raises:
            InvalidArgumentError: There are no gates and no model to find them by, a layer has no gate, or the hidden
                size is another.
        """
        gates = self.gate if model is None else self.gates(model)
        if not isinstance(gates, Gates):
            raise InvalidArgumentError(f"expected a model to find its gates by, or gate=Gates or a file, got {gates!r}")
        return {layer_idx: gates.scores(states, layer_idx) for layer_idx, states in hidden_states.items()}

    def window(self, valid: torch.Tensor) -> torch.Tensor:
        """Returns ``[batch, span]``, bool: the last tokens of each row that no head loses, wherever its padding is."""
        lengths = valid.sum(dim=-1, keepdim=True)
        size = (lengths.double() * self.window_ratio).long().clamp(max=self.window_size)
        tokens_after = valid.long().flip(-1).cumsum(dim=-1).flip(-1) - 1
        return valid & (tokens_after < size)


class GateObserver(FromHiddenStates):
    """Holds the gates' scores of one forward; each layer's are computed when its attention begins.

    Args:
        press: The press.
        model: The model to watch.

    Attributes:
        layers: ``layer_idx -> [batch, num_key_value_heads, n]``, fp32, of the layers that have run.
    """

    def __init__(self, press: FastKVzipPress, model: nn.Module) -> None:
        gates = press.gates(model)
        super().__init__(model, lambda layer_idx, hidden_states: gates.scores(hidden_states, layer_idx))
        self._press = press

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the scores of the prefill that was watched, with 0 at padding."""
        valid = prefill.valid
        layers = {
            layer_idx: torch.where(valid.to(scores.device).unsqueeze(1), scores, 0)
            for layer_idx in compressible_layers(prefill.model, prefill.cache)
            for scores in [self.layers[layer_idx]]
        }
        prefix = prefill.protected(self._press.n_sink)
        window = self._press.window(valid) & ~prefix
        counted: bool | torch.Tensor = self._press.decoding or window  # with decoding, the budget counts everything
        return Scores(
            layers, prefix | window, self._press.policy, protected_count=counted, carried=self._press.decoding
        )
