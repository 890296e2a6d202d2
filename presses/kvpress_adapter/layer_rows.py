"""Runs presses on one row of one layer at a time, so that no row of a batch depends on its neighbours.

In some presses of kvpress, rows do depend on their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.cache.compressible import last_pairs
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.twin import twin_of
from kvzip_press.presses.kvpress_adapter.keep_masks import kept_pairs


@dataclass(frozen=True)
class LayerRow:
    """The inputs and outputs of an attention module for one row of the batch, as kvpress passes them to a press.

    Attributes:
        module: The attention module.
        keys: ``[1, num_key_value_heads, n, head_dim]``, after RoPE, from the user's cache.
        values: ``[1, num_key_value_heads, n, v_head_dim]``, likewise.
        kwargs: The module's keyword arguments, including ``hidden_states`` ``[1, n, hidden_size]``.
        output: What the module returned; attention weights come second, and are None unless attention is eager.
    """

    module: nn.Module
    keys: torch.Tensor
    values: torch.Tensor
    kwargs: dict[str, Any]
    output: Any

    @classmethod
    def split(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[LayerRow]:
        """Returns the rows of one call of an attention module.

        Raises:
            InvalidArgumentError: The cache layer is neither dense nor ragged.
        """
        hidden_states = args[0] if args else kwargs["hidden_states"]
        batch, n = hidden_states.shape[:2]
        cache: Any = compat.cache_given(kwargs)
        layer = cache.layers[module.layer_idx]
        if not isinstance(layer, RaggedLayer | compat.DynamicLayer):
            raise InvalidArgumentError(f"expected a dense cache layer with the {n} tokens read, got {layer}")
        every = last_pairs(layer, n)
        if isinstance(layer, compat.DynamicLayer) and layer.get_seq_length() > n:
            output = (output[0], None)  # weights over a prefix, too, are not what presses expect
        call = {**kwargs, "hidden_states": hidden_states}
        rows = []
        for row in range(batch):
            own = {**row_of(call, row, batch), "cache_position": torch.arange(n, device=hidden_states.device)}
            keys, values = (x[row : row + 1] for x in every)
            rows.append(cls(module, keys, values, own, row_of(output, row, batch)))
        return rows

    def score(self, press: Any, rotary_emb: nn.Module | None) -> torch.Tensor:
        """Returns the press's scores, ``[num_key_value_heads, n]``, fp32.

        Raises:
            InvalidArgumentError: The press returned scores of another shape.
        """
        return self.score_with(press, rotary_emb, self.kwargs["hidden_states"])

    def score_with(self, press: Any, rotary_emb: nn.Module | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the press's scores, as :meth:`score` does, for other hidden states than those of the call."""
        module = self._prepared(rotary_emb)
        scores = press.score(module, hidden_states, self.keys, self.values, self.output[1], self.kwargs)
        if scores.shape != self.keys.shape[:3]:
            raise InvalidArgumentError(f"expected scores {tuple(self.keys.shape[:3])}, got {tuple(scores.shape)}")
        bound = torch.finfo(torch.float32).max  # some presses protect or doom by infinity, or by float64's largest
        row: torch.Tensor = scores[0].detach().clamp(-bound, bound).float()
        return row

    def keep(self, press: Any, rotary_emb: nn.Module | None) -> torch.Tensor:
        """Returns which pairs the press keeps, ``[num_key_value_heads, n]``, bool; it acts on a copy of the pairs."""
        scratch = SimpleNamespace(keys=self.keys.clone(), values=self.values.clone())
        cache = SimpleNamespace(layers={self.module.layer_idx: scratch})
        module = self._prepared(rotary_emb)
        press.forward_hook(module, [], {**self.kwargs, "past_key_values": cache}, self.output)
        masked: Any = module.masked_key_indices
        return kept_pairs((self.keys, self.values), (scratch.keys, scratch.values), masked, type(press).__name__)

    def _prepared(self, rotary_emb: nn.Module | None) -> nn.Module:
        """Returns a twin of the module that is as kvpress expects it."""
        module: nn.Module = twin_of(self.module)
        if rotary_emb is not None:
            module.rotary_emb = rotary_emb
        vars(module)["masked_key_indices"] = None
        return module


def row_of(value: Any, row: int, batch: int) -> Any:
    """Returns one row of everything that has rows, as a batch of one."""
    if batch == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value[row : row + 1] if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: row_of(item, row, batch) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(row_of(item, row, batch) for item in value)
    return value
