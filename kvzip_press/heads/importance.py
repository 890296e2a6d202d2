"""How much each head changes what passes through it: the importance behind BaKlaVa's budgets.

BaKlaVa, https://arxiv.org/abs/2502.13176. The paper says that a head matters as far as what goes into it and what comes
out differ, and leaves open which vectors are compared, so this is a definition of ours ("BaKlaVa-style"): of a KV head,
``1 - cos(v_t, o_t)``, its value at token t and the output of one of its query heads there, averaged over query heads
and tokens, times ``1 - cos(x, y)`` of its layer, the residual stream before and behind it, averaged over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kvzip_press.attention.implementation import attached, attention_watched
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import AttentionLayer, full_attention_layers, text_decoder
from kvzip_press.model.watching import after_forward, computing


class _Changes:
    """Sums up what one forward after another changes."""

    def __init__(self, model: nn.Module) -> None:
        layers, decoder = full_attention_layers(model), text_decoder(model)
        blocks: Any = decoder.layers
        self.blocks: dict[int, nn.Module] = {layer.layer_idx: blocks[layer.layer_idx] for layer in layers}
        self.of_heads: dict[int, torch.Tensor] = {}
        self.of_layers: dict[int, float] = {}
        self.n_tokens = 0

    def __call__(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Looks at one attention call; the arguments are those of the attention interface."""
        heads = values.shape[1]
        split = output.float().transpose(1, 2).unflatten(1, (heads, -1))  # [1, heads, groups, n, head_dim]
        changed = 1 - functional.cosine_similarity(values.float().unsqueeze(2), split, dim=-1)
        found = changed.mean(dim=2)[0].sum(dim=-1).double().cpu()
        self.of_heads[layer.layer_idx] = self.of_heads.get(layer.layer_idx, 0) + found

    def look_at_block(self, layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Looks at one decoder layer."""
        before = args[0] if args else kwargs["hidden_states"]
        behind = output[0] if isinstance(output, tuple) else output
        changed = 1 - functional.cosine_similarity(before.float(), behind.float(), dim=-1)
        self.of_layers[layer_idx] = self.of_layers.get(layer_idx, 0.0) + float(changed.sum())


@computing()
@torch.no_grad()
def head_importance(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns the importance of each KV head, ``[full_attention_layers, num_key_value_heads]``, float64.

    Args:
        model: A causal language model.
        rows: Token ids of the texts that it reads, one by one.

    Raises:
        UnsupportedModelError: The model has no layer that can be compressed.
    """
    changes, decoder = _Changes(model), text_decoder(model)
    with ExitStack() as stack:
        stack.enter_context(attached(model))
        stack.enter_context(attention_watched(model, changes))
        for layer_idx, block in changes.blocks.items():
            stack.enter_context(
                after_forward(block, lambda _, *call, layer_idx=layer_idx: changes.look_at_block(layer_idx, *call))
            )
        for row in rows:
            decoder(input_ids=torch.tensor([list(row)], device=input_device(model)), use_cache=False)
            changes.n_tokens += len(row)
    of_layers = torch.tensor([changes.of_layers[i] for i in changes.blocks], dtype=torch.float64)
    of_heads = torch.stack([changes.of_heads[i] for i in changes.blocks])
    return of_heads * of_layers[:, None] / changes.n_tokens**2
