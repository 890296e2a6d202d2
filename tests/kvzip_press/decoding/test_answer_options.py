"""Answers are sampled by a seed of their own, and shown while they are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TextStreamer

from kvzip_press import RaggedCache, RandomPress, Sampling, answer, compress, generate, question_ids
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = "The key of the red box is under the mat, and the mat is at the door."
TOKENIZER, HOT = ByteTokenizer(), Sampling(temperature=3.0)
MODEL = tiny_model()
MODEL.generation_config.eos_token_id = None
TOKENIZER.eos_token_id = None


@pytest.fixture
def cache() -> RaggedCache:
    return compress(MODEL, TOKENIZER, CONTEXT, RandomPress(0.5))


def asked(cache: RaggedCache, question: Any = "Where?", **options: Any) -> Any:
    return answer(MODEL, TOKENIZER, cache, question, max_new_tokens=8, **options)


def test_a_seed_gives_the_same_answer_and_leaves_torchs_numbers_alone(cache: RaggedCache) -> None:
    """Given beside the sampling or in it; another seed, or none, gives another answer, and greedy is the default."""
    before = torch.get_rng_state()
    first = asked(cache, sampling=HOT, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked(cache, sampling=HOT, seed=5) == asked(cache, sampling=Sampling(3.0, seed=5)) == first
    assert asked(cache, sampling=Sampling(3.0, seed=5), seed=5) == first
    assert len({first, asked(cache, sampling=HOT, seed=6), asked(cache), asked(cache, sampling=HOT)}) == 4
    assert asked(cache) == asked(cache, sampling=Sampling(top_k=1))
    assert asked(cache, ["Where?", "Why?"], sampling=HOT, seed=5) == asked(
        cache, ["Where?", "Why?"], sampling=HOT, seed=5
    )


@pytest.mark.parametrize("seed", [1.5, "1", True])
def test_a_seed_is_an_integer(cache: RaggedCache, seed: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="seed as an int"):
        asked(cache, sampling=HOT, seed=seed)


class Collected(TextStreamer):
    """Collects what transformers' own would print."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER, skip_prompt=True)
        self.text, self.ended = "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.ended += stream_end


@pytest.mark.parametrize("options", [{}, {"sampling": HOT, "seed": 1}, {"keep": True}])
def test_a_streamer_shows_what_is_returned(cache: RaggedCache, options: dict[str, Any]) -> None:
    """Without the question, and it may be used again."""
    streamer = Collected()
    for n_answers in (1, 2):
        streamer.text = ""
        assert asked(cache, streamer=streamer, **options) == streamer.text.strip() != ""
        assert streamer.ended == n_answers


def stop(*_: object) -> None:
    raise RuntimeError("stop")


def test_a_streamer_is_ended_when_the_model_fails(cache: RaggedCache) -> None:
    """Somebody in another thread may be waiting for it."""
    streamer = Collected()
    handle = MODEL.model.layers[2].register_forward_hook(stop)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            asked(cache, streamer=streamer)
    finally:
        handle.remove()
    assert streamer.ended == 1


def test_a_streamer_for_several_rows_is_refused_before_anything_is_read(cache: RaggedCache) -> None:
    streamer = Collected()
    with pytest.raises(InvalidArgumentError, match="one row for a streamer, got 2"):
        asked(cache, ["Where?", "Why?"], streamer=streamer)
    assert (streamer.text, streamer.ended) == ("", 0)


def test_question_ids_are_what_answer_reads(cache: RaggedCache) -> None:
    """With them, `generate` writes what `answer` returns."""
    ids = question_ids(TOKENIZER, "Where?", "At")
    [written] = generate(MODEL, cache.fork(), ids, 8)
    assert TOKENIZER.decode(written) == answer(MODEL, TOKENIZER, cache, "Where?", "At", 8)
