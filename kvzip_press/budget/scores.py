"""The result of a scorer: the importance of every key/value pair, and how the press would spend a budget on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch

from kvzip_press.arguments.numbers import is_int
from kvzip_press.budget.allocators import AllocationLike, Decided
from kvzip_press.budget.joined_layers import by_head
from kvzip_press.budget.policy import Policy
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.terminal import counted


@dataclass(frozen=True)
class Scores:
    """Importance of the pairs of one span of tokens (the whole context, or a later turn).

    Attributes:
        layers: ``layer_idx -> [batch, num_key_value_heads, span]``, fp32, higher is more important. Only layers that
            can be compressed appear. The values at protected or padded positions do not matter, but must be finite.
        protected: ``[batch, span]``, bool: positions that no head may lose (chat-template prefix, sink, window).
        policy: How much the press would keep and how it would spend that. A press that decides itself how many pairs
            each head keeps uses a policy with :class:`kvzip_press.budget.allocators.Decided`.
        protected_count: Whether protected pairs count towards the budget, as in most papers (not in KVzip); or a mask
            ``[batch, span]``, bool, if only those of some positions do (Fast KVzip: the window, not the prefix).
        carried: Whether the pairs that stay carry their scores, for evictions while the model generates; or what they
            carry instead, like ``layers``.
        press: What made them, in short; empty if nobody said so. A press writes its own name here.
        storage: The name of how the press stores what stays; ``press.score`` notes it.
        attention: ``layer_idx -> [batch, num_key_value_heads, span]``, fp32, what the last token pays to each pair, for
            allocations that look at it; None otherwise. The core fills it in.
        uniform: ``[batch, span]``, fp32, above 0, for scores that are weights of attention: what each pair's score
            would be if attention were spread evenly (``Prefill.uniform_attention()``); None for scores of another kind.
            Rules that compare scores with it refuse those that do not say it.

    Raises:
        InvalidArgumentError: A field is of another type, dtype or shape; the scores are not finite or not of one span;
            or the policy is for other layers than were scored, or decided negative counts. The message names the field.
    """

    layers: Mapping[int, torch.Tensor]
    protected: torch.Tensor
    policy: Policy
    protected_count: bool | torch.Tensor = False
    carried: bool | Mapping[int, torch.Tensor] = False
    press: str = ""
    storage: str = "model"
    attention: Mapping[int, torch.Tensor] | None = None
    uniform: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise InvalidArgumentError(f"expected a Policy as policy, like `press.policy`, got {self.policy!r:.80}")
        if not isinstance(self.layers, Mapping) or not all(is_int(layer_idx) for layer_idx in self.layers):
            raise InvalidArgumentError(f"expected layers as a mapping of layer_idx -> tensor, got {self.layers!r:.80}")
        shape = self._check_positions()
        for layer_idx, values in self.layers.items():
            _check_values(layer_idx, values, shape)
        _check_finite(self.layers)
        self._check_uniform(shape)
        self.policy.amount.check_layers(self.layers)
        if isinstance(self.policy.allocation, Decided):
            self._check_decided(self.policy.allocation)

    def _check_positions(self) -> tuple[int, int]:
        """Checks the masks over positions, and returns their shape: batch and span."""
        if not _is_mask(self.protected) or self.protected.dim() != 2:
            raise InvalidArgumentError(
                f"expected protected as a bool tensor [batch, span], got {_described(self.protected)}"
            )
        shape = (self.protected.shape[0], self.protected.shape[1])
        counted = self.protected_count
        if not isinstance(counted, bool) and not (_is_mask(counted) and tuple(counted.shape) == shape):
            raise InvalidArgumentError(
                f"expected protected_count to be True, False or a bool tensor {shape}, got {_described(counted)}"
            )
        if isinstance(self.carried, Mapping) and set(self.carried) == set(self.layers):
            for layer_idx, values in self.carried.items():
                _check_values(layer_idx, values, shape)
            _check_finite(self.carried)
        elif not isinstance(self.carried, bool):
            raise InvalidArgumentError(
                f"expected carried to be True, False or numbers of the same layers, got {_described(self.carried)}"
            )
        return shape

    def __repr__(self) -> str:
        batch_size, span = self.protected.shape
        parts = [
            counted(len(self.layers), "layer"),
            counted(batch_size, "row"),
            counted(span, "token"),
            f"{int(self.protected.sum())} protected",
            f"{self.policy.amount}, {self.policy.allocation.name or type(self.policy.allocation).__name__}",
            *([f"by {self.press}"] if self.press else []),
        ]
        return f"Scores({', '.join(parts)})"

    def made_by(self, press: str, storage: str) -> Scores:
        """Returns the same scores, with what made them and how that stores what stays; they are not checked again."""
        named = copy.copy(self)
        object.__setattr__(named, "press", press)
        object.__setattr__(named, "storage", storage)
        return named

    @property
    def to_carry(self) -> Mapping[int, torch.Tensor] | None:
        """What the pairs that stay carry, like ``layers``; None for nothing."""
        if isinstance(self.carried, bool):
            return self.layers if self.carried else None
        return self.carried

    @property
    def charged(self) -> torch.Tensor:
        """``[batch, span]``, bool: the protected positions whose pairs count towards the budget."""
        return self.protected & self.protected_count

    @property
    def is_decided(self) -> bool:
        """Whether the press decided the counts itself, so that no other ratio can be asked of these scores."""
        return isinstance(self.policy.allocation, Decided)

    def asked_for(
        self,
        compression_ratio: float | None = None,
        allocation: AllocationLike | None = None,
        budget: int | None = None,
    ) -> Scores:
        """Returns the same scores with the policy that an eviction asks for; None leaves a value as it is.

        Raises:
            InvalidArgumentError: A value is out of range, both a ratio and a budget are given, or the press decided its
                own counts and something else is asked for.
        """
        policy = self.policy.asked(compression_ratio, allocation, budget)
        return self if policy == self.policy else replace(self, policy=policy)

    def relative(self) -> Scores:
        """Returns the scores in units of uniform attention: 1 for a pair that gets as much as all would on average.

        Raises:
            InvalidArgumentError: They are no weights of attention.
        """
        self.check_weights()
        layers = {i: self.of_uniform(i) for i in self.layers}
        assert self.uniform is not None
        return replace(self, layers=layers, uniform=torch.ones_like(self.uniform))

    def of_uniform(self, layer_idx: int) -> torch.Tensor:
        """Returns a layer's scores in units of uniform attention, or as they are if they are no weights of it."""
        values = self.layers[layer_idx]
        return values if self.uniform is None else values / self.uniform.to(values.device).unsqueeze(1)

    def check_weights(self) -> None:
        """Raises InvalidArgumentError unless the scores are weights of attention."""
        if self.uniform is None:
            raise InvalidArgumentError(
                f"expected scores that are weights of attention, to compare them with uniform attention, got those of "
                f"{self.press or 'a press that does not say so'}: take snapkv, tova or kvzip, say, or a rule without "
                "uniform attention"
            )

    def _check_uniform(self, shape: tuple[int, int]) -> None:
        given = self.uniform
        if given is None:
            return
        fits = isinstance(given, torch.Tensor) and given.dtype == torch.float32 and tuple(given.shape) == shape
        if not fits or not bool((given.isfinite() & (given > 0)).all()):
            raise InvalidArgumentError(
                f"expected uniform as None or a float32 tensor {shape} of numbers above 0, got {_described(given)}"
            )

    def _check_decided(self, allocation: Decided) -> None:
        expected = {i: tuple(values.shape[:2]) for i, values in self.layers.items()}
        per_head = allocation.per_head
        got = {
            i: tuple(counts.shape) if isinstance(counts, torch.Tensor) and counts.dtype == torch.int64 else type(counts)
            for i, counts in (per_head.items() if isinstance(per_head, Mapping) else ())
        }
        if got != expected:
            raise InvalidArgumentError(
                f"expected decided counts as int64 tensors of these layers and [batch, heads]: {expected}, got {got}"
            )
        for layer_idx, counts in per_head.items():
            if counts.numel() and int(counts.min()) < 0:
                raise InvalidArgumentError(
                    f"expected decided counts of 0 or more in layer {layer_idx}, got {int(counts.min())}"
                )


def _check_values(layer_idx: int, values: object, shape: tuple[int, int]) -> None:
    """Raises InvalidArgumentError unless these are fp32 scores over a span."""
    if not isinstance(values, torch.Tensor) or values.dtype != torch.float32 or values.is_meta:
        raise InvalidArgumentError(
            f"expected scores of layer {layer_idx} as a float32 tensor with data, got {_described(values)}"
        )
    if values.dim() != 3 or (values.shape[0], values.shape[2]) != shape:
        raise InvalidArgumentError(
            f"expected scores [batch={shape[0]}, heads, span={shape[1]}] for layer {layer_idx}, "
            f"got {tuple(values.shape)}"
        )


def _check_finite(layers: Mapping[int, torch.Tensor]) -> None:
    """Raises InvalidArgumentError for NaN and infinity; waits for each device once."""
    filled = {layer_idx: values for layer_idx, values in layers.items() if values.numel()}
    if not filled:
        return
    (finite,) = by_head(lambda values: (values.isfinite().all(dim=2),), filled)
    for device in {one.device for one in finite.values()}:
        own = {layer_idx: one for layer_idx, one in finite.items() if one.device == device}
        if not bool(torch.cat([one.flatten() for one in own.values()]).all()):
            wrong = next(layer_idx for layer_idx, one in own.items() if not bool(one.all()))
            raise InvalidArgumentError(f"expected finite scores, got NaN or infinity in layer {wrong}")


def _is_mask(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and not value.is_meta


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"a tensor of {value.dtype} and shape {tuple(value.shape)} on {value.device}"
