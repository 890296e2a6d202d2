"""Answers come from the compressed cache, which is the same afterwards."""

from __future__ import annotations

import pytest
import torch

from kvzip_press import KVzipPress, RandomPress, answer, compress
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError
from kvzip_press.generation import generate, question_ids
from kvzip_press.testing import ByteTokenizer, tiny_model

CONTEXT = "The key of the red box is under the mat, and the mat is at the door."
TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_questions_do_not_influence_each_other(architecture) -> None:
    """The same question before and after another gives the same answer, and the cache holds no more than before."""
    model = tiny_model(architecture)
    cache = compress(model, TOKENIZER, CONTEXT, KVzipPress(0.6))
    before = (cache.get_seq_length(), cache.resident_bytes)
    first = answer(model, TOKENIZER, cache, "Where is the key?", max_new_tokens=8)
    answer(model, TOKENIZER, cache, "What colour has the box?", max_new_tokens=8)
    assert answer(model, TOKENIZER, cache, "Where is the key?", max_new_tokens=8) == first
    assert (cache.get_seq_length(), cache.resident_bytes) == before


def test_uncompressed_answer_is_what_generate_writes() -> None:
    """With nothing removed the answer is that of generate over context and question."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, CONTEXT, RandomPress(0.0))
    ids = [TOKENIZER.bos_token_id, *TOKENIZER.encode(CONTEXT), *question_ids(TOKENIZER, "Where?", "At")]
    expected = tiny_model().generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    question = torch.tensor([question_ids(TOKENIZER, "Where?", "At")])
    [got] = generate(model, cache.fork(), question, 8, eos_ids={2})
    assert got == [token for token in expected if token != 2]


def test_generation_stops_at_the_end_token() -> None:
    """The end token ends the answer and is not part of it; the last token before a limit is not lost."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, CONTEXT, RandomPress(0.0))
    ids = torch.tensor([question_ids(TOKENIZER, "Where?")])
    [free] = generate(model, cache.fork(), ids, 8)
    assert len(free) == 8
    stop = next(token for token in free if token != free[0])
    assert generate(model, cache.fork(), ids, 8, eos_ids={stop}) == [free[: free.index(stop)]]


def test_too_long_and_empty_inputs_are_refused() -> None:
    """An empty context, and one that exceeds the model's positions with its question, raise with the numbers."""
    model = tiny_model(max_position_embeddings=100)
    with pytest.raises(InvalidArgumentError, match="empty"):
        compress(model, TOKENIZER, "", KVzipPress(0.5))
    with pytest.raises(InvalidArgumentError, match="100 positions"):
        compress(model, TOKENIZER, CONTEXT * 2, KVzipPress(0.5))
    cache = compress(model, TOKENIZER, CONTEXT, RandomPress(0.5))
    with pytest.raises(InvalidArgumentError, match="100 positions"):
        answer(model, TOKENIZER, cache, "Where?", max_new_tokens=64)


def test_another_models_cache_is_refused() -> None:
    """A cache goes with the weights that made it."""
    cache = compress(tiny_model(), TOKENIZER, CONTEXT, RandomPress(0.5))
    with pytest.raises(CacheMismatchError, match="another model"):
        answer(tiny_model(seed=1), TOKENIZER, cache, "Where?")
