"""RoPE whose frequencies depend on how far a forward reads: as the uncompressed model answers, or refused before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import answer, compress, compress_in_chunks
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.step import DecodeStep
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.rope import depends_on_length, frequencies_differ, pinned
from kvzip_press.presses.kvzip import KVzipPress
from kvzip_press.presses.random import RandomPress
from kvzip_press.testing import ARCHITECTURES, ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
SWITCH = 64


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return tiny_model(max_position_embeddings=SWITCH, rope_parameters=rope)


def longrope() -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope["original_max_position_embeddings"] = SWITCH
    return tiny_model(
        "phi3", max_position_embeddings=512, original_max_position_embeddings=SWITCH, rope_parameters=rope
    )


def ids_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def framed(context: list[int], question: str = "") -> list[int]:
    """The tokens of a context in its template, and of a question."""
    from kvzip_press.decoding.answering import question_ids
    from kvzip_press.model.chat import chat_frame

    return [*chat_frame(TOKENIZER).prefix, *context, *(question_ids(TOKENIZER, question, "") if question else [])]


@torch.no_grad()
def uncompressed(model_of: Any, ids: list[int], n: int) -> list[int]:
    """What a fresh model generates after everything in one prefill."""
    model, cache = model_of(), None
    said: list[int] = []
    step = ids
    for _ in range(n):
        output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        step = [int(output.logits[0, -1].argmax())]
        said += step
    return said


def said_behind(model: Any, cache: Any, question: str, n: int = 6) -> list[int]:
    ids = torch.tensor([framed([], question)[1:]])
    return generate(model, cache.fork(), ids, n)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_usual_embeddings_do_not_depend_on_the_length(architecture: str) -> None:
    model = tiny_model(architecture, attn_implementation="eager")  # Gemma 2 knows no other everywhere
    assert not depends_on_length(model)
    decoder = model.model
    assert pinned(decoder, 10) is decoder


@pytest.mark.parametrize("model_of", [dynamic, longrope])
def test_those_that_do_are_found_by_what_they_do(model_of: Any) -> None:
    model = model_of()
    assert depends_on_length(model)
    assert not frequencies_differ(model, 10, SWITCH)
    assert frequencies_differ(model, 10, SWITCH + 1)
    assert frequencies_differ(model, SWITCH + 1, SWITCH + 40) == (model_of is dynamic)


@pytest.mark.parametrize("model_of", [dynamic, longrope])
def test_a_replay_that_reads_further_than_the_context_changes_nothing(model_of: Any) -> None:
    """Neither the model's later answers nor, through other frequencies, the scores."""
    model, probe = model_of(), torch.tensor([ids_of(20, 9)])
    with torch.no_grad():
        before = model(probe).logits
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        compress(model, TOKENIZER, ids_of(50), KVzipPress(0.5))
        assert torch.equal(model(probe).logits, before)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    with KVzipPress(0.5)(model):
        model.generate(torch.tensor([ids_of(50)]), max_new_tokens=3)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_reading_and_answering_leave_the_model_s_frequencies_to_others() -> None:
    """Another thread may be reading on the other side of the switch."""
    model = longrope()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cache = compress_in_chunks(model, TOKENIZER, ids_of(100), KVzipPress(0.5), chunk_size=40)
    answer(model, TOKENIZER, cache, "?", max_new_tokens=3)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_a_replay_turns_as_the_context_was_turned() -> None:
    """A replay across the switch has the scores of a model without one."""
    static = longrope()
    static.model.rotary_emb.rope_type = "default"  # keeps the short factors
    kept = [
        compress(model, TOKENIZER, ids_of(50), KVzipPress(0.5)).layers[1].packed.positions.tolist()
        for model in (longrope(), static)
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("model_of", "length"), [(dynamic, 40), (longrope, 40), (longrope, 100), (longrope, 200)])
@pytest.mark.parametrize("way", ["one prefill", "chunks"])
def test_nothing_removed_it_answers_as_the_model_does(model_of: Any, length: int, way: str) -> None:
    model, context = model_of(), ids_of(length)
    if way == "chunks":
        cache = compress_in_chunks(model, TOKENIZER, context, KVzipPress(0.0), chunk_size=30)
    else:
        cache = compress(model, TOKENIZER, context, KVzipPress(0.0))
    expected = uncompressed(model_of, framed(context, "what?"), 6)
    assert said_behind(model, cache, "what?") == expected


def test_turns_on_one_side_of_the_switch_are_answered_as_the_model_answers() -> None:
    model, context = longrope(), ids_of(100)
    cache = compress(model, TOKENIZER, context, KVzipPress(0.0))
    first = said_behind(model, cache, "what?")
    answer(model, TOKENIZER, cache, "what?", max_new_tokens=4, keep=True)
    assert said_behind(model, compress(model, TOKENIZER, context, RandomPress(0.0)), "what?") == first


@pytest.mark.parametrize("model_of", [dynamic, longrope])
def test_a_question_that_crosses_the_switch_is_refused_before_anything_is_read(model_of: Any) -> None:
    model = model_of()
    cache = compress(model, TOKENIZER, ids_of(50), RandomPress(0.5))
    n_seen, limited = cache.get_seq_length(), "frequencies|positions"
    with pytest.raises(InvalidArgumentError, match=limited):
        answer(model, TOKENIZER, cache, "what? " * 5, max_new_tokens=4, keep=True)
    with pytest.raises(InvalidArgumentError, match=limited):
        answer(model, TOKENIZER, cache, "?", max_new_tokens=40)
    assert cache.get_seq_length() == n_seen
    if model_of is longrope:
        with pytest.raises(InvalidArgumentError, match="context of 51 tokens and up to 81"):
            DecodeStep(model, cache, max_new_tokens=30)


def test_rows_on_both_sides_of_the_switch_are_refused_and_others_are_as_alone() -> None:
    model = longrope()
    with pytest.raises(InvalidArgumentError, match="41 to 101 tokens: compress them one by one"):
        compress(model, TOKENIZER, [ids_of(40), ids_of(100)], RandomPress(0.5))
    for lengths in ((20, 50), (80, 140)):
        contexts = [ids_of(length, length) for length in lengths]
        together = compress(model, TOKENIZER, contexts, KVzipPress(0.5))
        for row, context in enumerate(contexts):
            alone = compress(model, TOKENIZER, context, KVzipPress(0.5))
            for layer, single in zip(together.layers, alone.layers, strict=True):
                for head in range(2):
                    kept = layer.packed.head_positions(row, head).tolist()
                    assert kept == single.packed.head_positions(0, head).tolist()


def test_rows_of_a_cache_cross_together() -> None:
    """One question is long: the row beside it would be turned anew, too."""
    model = longrope()
    cache = compress(model, TOKENIZER, [ids_of(40), ids_of(50)], RandomPress(0.5))
    with pytest.raises(InvalidArgumentError, match="row 0 with a context of 41 tokens"):
        answer(model, TOKENIZER, cache, ["?", "what is it? " * 3], max_new_tokens=2)


@pytest.mark.parametrize("model_of", [dynamic, longrope])
@pytest.mark.parametrize("length", [40, 62, 90])
def test_generate_inside_a_press_is_what_it_is_without(model_of: Any, length: int) -> None:
    """The model's own loop sees the same forwards, whatever it does at a switch."""
    ids, said = torch.tensor([ids_of(length)]), []
    for pressed in (False, True):
        model = model_of()
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "max_new_tokens": 10, "do_sample": False}
        if pressed:
            with KVzipPress(0.0)(model):
                said.append(model.generate(ids, **options).tolist())
        else:
            said.append(model.generate(ids, **options).tolist())
    assert said[0] == said[1]


def test_an_embedding_that_cannot_be_held_is_refused() -> None:
    from kvzip_press.errors import UnsupportedModelError

    model = longrope()
    own = model.model.rotary_emb.forward

    class Restless(type(model.model.rotary_emb)):
        def forward(self, x: Any, position_ids: Any) -> Any:
            cos, sin = own(x, position_ids)
            return cos * (1 + 0.01 * position_ids.max()), sin

    model.model.rotary_emb.__class__ = Restless
    with pytest.raises(InvalidArgumentError, match="each further token changes them"):
        compress(model, TOKENIZER, ids_of(30), RandomPress(0.5))
    with KVzipPress(0.5)(model), pytest.raises(UnsupportedModelError, match="Restless"):
        model.generate(torch.tensor([ids_of(30)]), max_new_tokens=2)
