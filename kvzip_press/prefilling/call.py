"""The arguments that a decoder was called with, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press import compat
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Prefill, Scorer

if TYPE_CHECKING:
    from torch import nn

    from kvzip_press.prefilling.query_window import LastQueries


class PrefillCall:
    """The arguments of a decoder's forward, however they were passed."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.input_ids: torch.Tensor | None = arguments.get("input_ids")
        self.embeds: torch.Tensor | None = arguments.get("inputs_embeds")
        self.cache = compat.cache_given(arguments)
        self.use_cache: bool | None = arguments.get("use_cache")
        self.position_ids: torch.Tensor | None = arguments.get("position_ids")
        self.attention_mask = arguments.get("attention_mask")
        self.outer_ids: torch.Tensor | None = None

    @classmethod
    def of(cls, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PrefillCall:
        """Returns the call whose arguments a forward hook was given."""
        names = list(inspect.signature(decoder.forward).parameters) if args else []
        return cls({**dict(zip(names, args, strict=False)), **kwargs})

    def within(self, outer: PrefillCall | None) -> PrefillCall:
        """Adds to this call what the model around the decoder was given and the decoder was not; returns the call."""
        if outer is None or outer.input_ids is None or outer.input_ids.shape != self.shape:
            return self
        self.outer_ids = outer.input_ids
        if isinstance(self.attention_mask, Mapping):
            self.attention_mask = outer.attention_mask
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Batch size and query length."""
        tokens = self.input_ids if self.input_ids is not None else self.embeds
        if tokens is None:
            raise InvalidArgumentError("expected input_ids or inputs_embeds, got neither")
        return tokens.shape[0], tokens.shape[1]

    @property
    def query_length(self) -> int:
        """Number of tokens that are read."""
        return self.shape[1]

    @property
    def n_seen(self) -> int:
        """Number of tokens that the cache had seen before."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def is_prefill(self) -> bool:
        """Whether a span is read that a press compresses, rather than a single token after a context."""
        return self.n_seen == 0 or self.query_length > 1

    def valid(self) -> torch.Tensor:
        """Returns a mask, bool ``[batch, query_length]``, False at padding.

        Raises:
            InvalidArgumentError: The mask is not 2-D, has padding elsewhere than at the ends of a row, or has a row of
                padding only.
        """
        batch, length = self.shape
        mask = self.attention_mask
        if mask is None:
            tokens = self.input_ids if self.input_ids is not None else self.embeds
            assert tokens is not None
            return torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            shape = tuple(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
            raise InvalidArgumentError(f"expected a 2-D attention mask [batch, tokens] under a press, got {shape}")
        valid = mask[:, -length:].bool()
        runs = (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1) + valid[:, 0]
        if bool((runs > 1).any()):
            raise InvalidArgumentError("expected padding at the ends of a row only, got an attention mask with holes")
        if not bool(valid.any(dim=1).all()):
            raise InvalidArgumentError("expected at least one token in every row, got a row of padding only")
        return valid

    def valid_before(self, start: int) -> torch.Tensor:
        """Returns a mask, bool ``[batch, start]``, False at padding among the tokens that the cache had seen before.

        Raises:
            InvalidArgumentError: The attention mask does not cover them.
        """
        batch, length = self.shape
        if self.attention_mask is None or not start:
            return self.valid().new_ones(batch, start)
        if self.attention_mask.shape[1] != start + length:
            raise InvalidArgumentError(
                f"expected an attention mask over the {start} tokens in the cache and the {length} new ones, got one "
                f"over {self.attention_mask.shape[1]}"
            )
        return self.attention_mask[:, :start].bool()

    def positions(self, start: int, valid: torch.Tensor) -> torch.Tensor:
        """Returns the position of each token in its row, int32 ``[batch, query_length]``.

        Raises:
            InvalidArgumentError: Tokens have several positions that differ (M-RoPE: images and video).
        """
        positions = self.position_ids
        if positions is None:
            positions = start + torch.arange(self.query_length, device=valid.device)[None]
        if positions.dim() == 3 and bool((positions == positions[:1]).all()):
            positions = positions[0]  # text alone has the same position on every axis
        if positions.dim() != 2:
            raise InvalidArgumentError(
                f"expected one position a token under a press, got position_ids {tuple(positions.shape)} that differ "
                "along the first dimension (M-RoPE): images and video cannot be compressed with such a model"
            )
        return positions.expand(valid.shape[0], -1).int()

    def ids_read(self, model: Any) -> torch.Tensor | None:
        """Returns the token ids that were read; None if there are none, as for images, whose ids are placeholders."""
        if self.input_ids is not None or self.outer_ids is None:
            return self.input_ids
        embeds = model.get_input_embeddings()(self.outer_ids)
        same = self.embeds is not None and torch.equal(embeds, self.embeds.to(embeds.device))
        return self.outer_ids if same else None

    def prefill(
        self,
        model: nn.Module,
        cache: Any,
        start: int,
        observers: dict[Scorer, Any],
        weights: str,
        last_queries: LastQueries,
    ) -> Prefill:
        """Returns what was just read, by the weights of this fingerprint, in the form in which presses see it."""
        valid = self.valid()
        positions = self.positions(start, valid)
        return Prefill(
            model,
            cache,
            self.ids_read(model),
            valid,
            positions,
            start=start,
            observers=observers,
            weights=weights,
            last_queries=last_queries,
        )
