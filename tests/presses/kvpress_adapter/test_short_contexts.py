"""Contexts of a few tokens: presses of kvpress work on them, or say that they cannot."""

from __future__ import annotations

import pytest
import torch

from kvzip_press import RaggedCache, RaggedPress, compat
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.presses.kvpress_adapter import importing
from kvzip_press.testing import tiny_model

pytestmark = pytest.mark.kvpress

ANY_LENGTH = ["KnormPress", "KeyDiffPress", "LagKVPress", "LeverageScorePress", "CURPress", "NonCausalAttnPress"]


def of_kvpress(name: str, ratio: float) -> RaggedPress:
    return RaggedPress(getattr(importing.kvpress(), name)(ratio))  # imported so, it leaves attention functions alone


def read(press: RaggedPress, n_tokens: int) -> RaggedCache:
    model = tiny_model(num_layers=2)
    cache = compat.DynamicCache(config=model.config)
    with torch.no_grad():
        with press(model):
            model(torch.arange(3, 3 + n_tokens)[None], **compat.cache_argument(model, cache))
        assert model(torch.tensor([[5, 6]]), **compat.cache_argument(model, cache)).logits.isfinite().all()
    return RaggedCache.of(cache)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_a_context_of_a_few_tokens_is_compressed(n_tokens, ratio) -> None:
    for name in [*ANY_LENGTH, *(["TOVAPress"] if n_tokens > 1 else [])]:
        cache = read(of_kvpress(name, ratio), n_tokens)
        assert cache.get_seq_length() == n_tokens + 2, name


@pytest.mark.parametrize(
    ("name", "n_tokens"), [("TOVAPress", 1), ("CompactorPress", 1), ("CompactorPress", 5), ("SnapKVPress", 5)]
)
def test_a_press_that_needs_more_tokens_refuses_with_their_number(name, n_tokens) -> None:
    """What torch says of empty tensors is no answer: the press's name and the context's length are."""
    with pytest.raises(InvalidArgumentError, match=rf"{name}.*refused in layer 0, of {n_tokens} tokens?: \w+Error"):
        read(of_kvpress(name, 0.5), n_tokens)
