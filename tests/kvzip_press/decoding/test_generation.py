"""Answers come from the compressed cache, which is the same afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvzip_press import KVzipPress, RandomPress, answer, compress
from kvzip_press.decoding.answering import answer_ids, question_ids
from kvzip_press.decoding.generation import generate
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError
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


@pytest.mark.parametrize("keep", [False, True])
def test_each_question_of_a_batch_may_have_its_own_prefix_and_bound(keep) -> None:
    """Token for token what each question gets alone, and of kept turns each row remembers its own answer only."""
    model = tiny_model()
    questions, prefixes, bounds = ["Where is it?", "Why?"], ["It is", ""], [3, 9]
    together = compress(model, TOKENIZER, [CONTEXT, CONTEXT[20:]], KVzipPress(0.6))
    alone = [compress(model, TOKENIZER, context, KVzipPress(0.6)) for context in (CONTEXT, CONTEXT[20:])]
    for _ in range(2):
        found = answer_ids(model, TOKENIZER, together, questions, prefixes, bounds, keep=keep)
        each = zip(alone, questions, prefixes, bounds, strict=True)
        assert found == [answer_ids(model, TOKENIZER, *of_one, keep=keep)[0] for of_one in each]
        assert [len(ids) for ids in found] == bounds
    if keep:
        assert together.n_seen == [alone[0].n_seen, alone[1].n_seen + 20]  # padding of the context is counted
    shared = answer_ids(model, TOKENIZER, alone[1], questions, prefixes, bounds)
    each = zip(questions, prefixes, bounds, strict=True)
    assert shared == [answer_ids(model, TOKENIZER, alone[1], *asked)[0] for asked in each]


def test_a_kept_answer_that_met_its_bound_is_all_that_its_row_remembers() -> None:
    """Also where the other row ended by itself after as many tokens, so that no length tells that the first read on."""
    model, tokenizer = tiny_model(), ByteTokenizer()
    contexts, questions = [CONTEXT, CONTEXT[20:]], ["Where is it?", "Why?"]
    free = answer_ids(model, tokenizer, compress(model, tokenizer, contexts, KVzipPress(0.6)), questions, "", 9)
    length = next(n for n in range(1, 9) if free[1][n] not in free[1][:n] and free[1][n] not in free[0][:n])
    tokenizer.eos_token_id = free[1][length]
    bounds = [length, 9]
    together = compress(model, tokenizer, contexts, KVzipPress(0.6))
    alone = [compress(model, tokenizer, context, KVzipPress(0.6)) for context in contexts]
    for _ in range(2):
        each = zip(alone, questions, bounds, strict=True)
        expected = [answer_ids(model, tokenizer, cache, q, "", n, keep=True)[0] for cache, q, n in each]
        assert answer_ids(model, tokenizer, together, questions, "", bounds, keep=True) == expected


def test_as_many_prefixes_and_bounds_as_questions() -> None:
    """Another number of them is refused with both numbers."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, CONTEXT, RandomPress(0.5))
    with pytest.raises(InvalidArgumentError, match="answer_prefix once, or one for each of 2 questions, got 3"):
        answer(model, TOKENIZER, cache, ["Where?", "Why?"], ["", "", ""])
    with pytest.raises(InvalidArgumentError, match="max_new_tokens once, or one for each of 1 questions, got 2"):
        answer(model, TOKENIZER, cache, "Where?", "", [1, 2])


@pytest.mark.parametrize("bound", ["6", 1.5, None, -1, True, [1.5, 6], [True, 6], ["a", 6], [None, 6], b"6", {1: 2}])
def test_a_bound_that_is_no_number_of_tokens_is_refused_before_anything_is_read(bound: Any) -> None:
    """Alone or in a list: ``[1.5, 6]`` failed when all tokens were written, and ``[True, 6]`` cut an answer at one."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, CONTEXT, RandomPress(0.5))
    with pytest.raises(
        InvalidArgumentError, match="expected max_new_tokens to be an int of 0 or more, or a list of su"
    ):
        answer(model, TOKENIZER, cache, ["Where?", "Why?"], "", bound)


@pytest.mark.parametrize("prefix", [None, 5, b"At", ["At", None], [b"At", "At"]])
def test_a_prefix_that_is_no_text_is_refused(prefix: Any) -> None:
    model = tiny_model()
    cache = compress(model, TOKENIZER, CONTEXT, RandomPress(0.5))
    with pytest.raises(InvalidArgumentError, match="expected answer_prefix to be a text, or a list of such, got"):
        answer(model, TOKENIZER, cache, ["Where?", "Why?"], prefix)


def test_an_empty_question_adds_nothing() -> None:
    """A context that ends with its question is asked as one that the question follows."""
    model = tiny_model()
    known = compress(model, TOKENIZER, f"{CONTEXT}\n\nWhere?", RandomPress(0.0))
    unknown = compress(model, TOKENIZER, CONTEXT, RandomPress(0.0))
    expected = answer_ids(model, TOKENIZER, unknown, " Where? ", "At", 8)
    assert answer_ids(model, TOKENIZER, known, "", "At", 8) == expected


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


class FramedTokenizer(ByteTokenizer):
    """Bytes with a chat template, whose marks are single characters: ``<user>``, then ``;`` ends a turn."""

    chat_template = "yes"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **options) -> str:
        marks = {"user": "U", "assistant": "A"}
        text = "".join(f"{marks[message['role']]}:{message['content']};" for message in messages)
        return text + "A:" if add_generation_prompt else text


@pytest.mark.parametrize("max_new_tokens", [1, 8])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_kept_turns_are_those_of_the_chat_template(architecture, max_new_tokens) -> None:
    """With nothing removed, the second kept answer is what generate writes after the whole dialogue, as text."""
    model, tokenizer = tiny_model(architecture, max_position_embeddings=512), FramedTokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token_id = None
    cache = compress(model, tokenizer, CONTEXT, RandomPress(0.0))
    first = answered(model, tokenizer, cache, "Where?", max_new_tokens, keep=True)
    second = answered(model, tokenizer, cache, "And why?", max_new_tokens, keep=True)
    question = tokenizer.encode(f"U:{CONTEXT}\n\nWhere?;A:")
    after = tokenizer.encode(";U:And why?;A:")
    dialogue = torch.tensor([[*question, *first, *after]])
    expected = model.generate(dialogue, max_new_tokens=max_new_tokens, do_sample=False)[0, dialogue.shape[1] :]
    assert second == expected.tolist()
    assert cache.get_seq_length() == dialogue.shape[1] + max_new_tokens
    assert len(cache.turn_starts) == 2


def answered(model, tokenizer, cache, question, max_new_tokens, *, keep) -> list[int]:
    """The ids of an answer: the bytes of a random model are no text."""
    ids: list[list[int]] = []
    decode = tokenizer.decode
    tokenizer.decode = lambda tokens, **options: ids.append(list(tokens)) or decode(tokens, **options)
    try:
        answer(model, tokenizer, cache, question, max_new_tokens=max_new_tokens, keep=keep)
    finally:
        tokenizer.decode = decode
    return ids[0]


def test_keeping_and_discarding_may_alternate() -> None:
    """A discarded question leaves the history as it was: the kept answers are those of the dialogue without it."""
    model, tokenizer = tiny_model(max_position_embeddings=512), FramedTokenizer()
    with_discarded = compress(model, tokenizer, CONTEXT, KVzipPress(0.5))
    without = with_discarded.fork()
    dialogues = []
    for cache, asides in ((with_discarded, True), (without, False)):
        answers = []
        for question in ("Where?", "Why?", "Who?"):
            if asides:
                answer(model, tokenizer, cache, "An aside?", max_new_tokens=5)
            answers.append(answer(model, tokenizer, cache, question, max_new_tokens=5, keep=True))
        dialogues.append((answers, cache.get_seq_length(), list(cache.turn_starts)))
    assert dialogues[0] == dialogues[1]
    with_discarded.truncate(with_discarded.turn_starts[1])
    assert len(with_discarded.turn_starts) == 1
    again = answer(model, tokenizer, with_discarded, "Why?", max_new_tokens=5)
    assert again == dialogues[0][0][1]


def stop(*_: object) -> None:
    raise RuntimeError("stop")


def test_a_failure_while_keeping_leaves_the_cache_as_it_was(monkeypatch) -> None:
    """Nothing is remembered of a question whose answer did not come to its end."""
    model, tokenizer = tiny_model(), FramedTokenizer()
    cache = compress(model, tokenizer, CONTEXT, KVzipPress(0.5))
    expected = answer(model, tokenizer, cache, "Where?", max_new_tokens=5)
    before = (cache.get_seq_length(), cache.resident_bytes)
    handle = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        answer(model, tokenizer, cache, "Where?", max_new_tokens=5, keep=True)
    handle.remove()
    assert (cache.get_seq_length(), cache.resident_bytes, cache.turn_starts) == (*before, [])
    assert answer(model, tokenizer, cache, "Where?", max_new_tokens=5) == expected


def test_a_dialogue_goes_on_from_a_file(tmp_path) -> None:
    """A cache that was saved after a turn asks its next question as a turn, with the same answer."""
    model, tokenizer = tiny_model(max_position_embeddings=512), FramedTokenizer()
    cache = compress(model, tokenizer, CONTEXT, KVzipPress(0.5))
    answer(model, tokenizer, cache, "Where?", max_new_tokens=5, keep=True)
    cache.save(tmp_path / "cache.safetensors")
    loaded = type(cache).load(tmp_path / "cache.safetensors", model)
    assert loaded.turn_starts == cache.turn_starts
    answers = [answer(model, tokenizer, one, "Why?", max_new_tokens=5, keep=True) for one in (cache, loaded)]
    assert answers[0] == answers[1]
    assert loaded.get_seq_length() == cache.get_seq_length()
