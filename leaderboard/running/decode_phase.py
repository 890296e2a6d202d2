"""Runs samples without a context: the prompt and the answer are compressed while the answer is generated."""

from collections.abc import Sequence
from typing import Any

import torch

from kvzip_press import compat
from kvzip_press.cache.pair_pool import staying_pairs
from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.compat import DynamicCache
from kvzip_press.decoding.generation import eos_ids, generate
from kvzip_press.errors import BudgetMismatchError, InvalidArgumentError
from kvzip_press.leaderboard.running.measured import Measured
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import text_config
from kvzip_press.press import Press


def check_decodes(label: str, press: Press, *, keeps_all: bool) -> None:
    """Raises InvalidArgumentError for a press that evicts pairs, but not while decoding."""
    if not keeps_all and not press.evicts_while_decoding:
        raise InvalidArgumentError(
            f"expected presses that evict while decoding (`decoding: true`), or the full cache, for samples without a "
            f"context, got {label!r}"
        )


def generate_evicting(
    model: Any, tokenizer: Any, press: Press, prompt: Sequence[int], max_new_tokens: int
) -> tuple[list[int], RaggedCache]:
    """Answers a prompt greedily inside ``with press(model)``.

    Returns:
        The answer's ids, without the end token, and the cache as it is afterwards.
    """
    ids = torch.tensor([list(prompt)], device=input_device(model))
    cache, ended = DynamicCache(config=text_config(model)), eos_ids(model, tokenizer)
    with torch.no_grad(), press(model):
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **compat.cache_argument(model, cache)).logits
        first = logits[:, -1].argmax(dim=-1, keepdim=True)
        compressed = RaggedCache.of(cache)
        if int(first) in ended:
            return [], compressed
        (rest,) = generate(model, compressed, first, max_new_tokens - 1, eos_ids=ended)
    return [int(first), *rest], compressed


def measure_grown(label: str, press: Press, cache: RaggedCache) -> Measured:
    """Measures a one-row cache after an answer, including the tokens since the last eviction.

    Raises:
        BudgetMismatchError: The cache holds more pairs than the sum of the press's budget, the buffer that it may fill
            between evictions, the protected first tokens and the pairs that stay outside its budget.
    """
    layers = dict(cache.ragged_layers())
    kept = {
        layer_idx: [pairs + layer.tail.length for pairs in layer.packed.seqlens[0].tolist()]
        for layer_idx, layer in layers.items()
    }
    found = Measured(int(cache.get_seq_length()), kept, cache.resident_bytes, cache.dense_bytes)
    if press.budget is not None:
        a_head = press.budget if press.schedule is None else press.schedule.limit
        most = sum((a_head + layer.n_protected[0]) * len(kept[layer_idx]) for layer_idx, layer in layers.items())
        most += sum(int(staying_pairs(layer.packed).sum()) for layer in layers.values())
        if found.n_kept > most:
            raise BudgetMismatchError(
                f"{label} with budget {press.budget}: expected at most {most} pairs, got {found.n_kept}"
            )
    return found
