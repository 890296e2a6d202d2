"""Takes the means of a model's queries over a few texts: one forward pass a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kvzip_press.attention.implementation import attach
from kvzip_press.attention.queries import queries_watched
from kvzip_press.heads.scores import check_texts
from kvzip_press.model.chat import encode
from kvzip_press.model.devices import input_device
from kvzip_press.model.identity import facts_of
from kvzip_press.model.structure import AttentionLayer, check_length, full_attention_layers
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.presses.decoding.triattention.circles import frequencies_of_head, split
from kvzip_press.presses.decoding.triattention.statistics import QueryStatistics, fixed_rope
from kvzip_press.serving.rotation import Rotation
from kvzip_press.version import __version__


def calibrate_queries(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> QueryStatistics:
    """Reads each text once and returns the means of the queries of all tokens, for :class:`TriAttentionPress`.

    Queries are taken where attention gets them and turned back by their positions. How a model turns is found by
    reading eight tokens at two places, see :class:`kvzip_press.serving.rotation.Rotation`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: One text or more, of the kind that the model will write; no chat template is put around them.
        progress: Called after every text with how many are done and how many there are.

    Raises:
        InvalidArgumentError: No text, or one that is empty or longer than the model's positions.
        UnsupportedModelError: The model's RoPE has no fixed frequencies, or turns in a way that is not understood.
    """
    rows = [encode(tokenizer, text) for text in check_texts(texts)]
    for ids in rows:
        check_length(model, len(ids))
    fixed_rope(model)
    attach(model)
    sums = _Sums(model, Rotation.of(model))
    for done, ids in enumerate(rows, start=1):
        input_ids = torch.tensor([ids], device=input_device(model))
        with queries_watched(model, sums):
            run_prefill(model, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
        if progress is not None:
            progress(done, len(rows))
    read = [
        {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(ids)}
        for text, ids in zip(texts, rows, strict=True)
    ]
    return sums.means({**facts_of(model), "texts": json.dumps(read), "kvzip_press": __version__})


class _Sums:
    """Adds up the queries of each layer, turned back to position 0; fp64 sums on the CPU."""

    def __init__(self, model: nn.Module, rotation: Rotation) -> None:
        self._rotation = rotation
        self._indices = tuple(layer.layer_idx for layer in full_attention_layers(model))
        self._centres: dict[int, torch.Tensor] = {}
        self._magnitudes: dict[int, torch.Tensor] = {}
        self._counts = dict.fromkeys(range(len(self._indices)), 0)

    @torch.no_grad()
    def __call__(self, layer: AttentionLayer, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Adds the queries ``[1, heads, n, head_dim]`` of one layer, which stand at positions 0 to n - 1."""
        row = self._indices.index(layer.layer_idx)
        layout, turned = self._rotation.layouts[row], self._rotation.frequencies
        frequencies = frequencies_of_head(turned, layout, query.shape[-1])
        angles = torch.outer(torch.arange(query.shape[2], dtype=torch.float64), frequencies)
        back = torch.polar(torch.ones_like(angles), -angles).to(query.device, torch.complex64)
        centres, magnitudes = [], []
        for head in query[0].unbind(0):  # one at a time: several times as much as its queries is held
            points = torch.complex(*split(head.float(), layout, len(turned)))
            centres.append(torch.view_as_real((points * back).sum(dim=0, dtype=torch.complex128)).cpu())
            magnitudes.append(points.abs().sum(dim=0, dtype=torch.float64).cpu())
        self._centres[row] = self._centres.get(row, 0) + torch.stack(centres)
        self._magnitudes[row] = self._magnitudes.get(row, 0) + torch.stack(magnitudes)
        self._counts[row] += query.shape[2]

    def means(self, provenance: dict[str, str]) -> QueryStatistics:
        """Returns the means over all that was seen."""
        rows = list(self._counts)
        return QueryStatistics(
            torch.stack([self._centres[row] / self._counts[row] for row in rows]),
            torch.stack([self._magnitudes[row] / self._counts[row] for row in rows]),
            self._rotation.frequencies,
            self._rotation.layouts,
            self._indices,
            provenance,
        )
