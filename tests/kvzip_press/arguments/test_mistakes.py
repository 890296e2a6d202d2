"""Mistakes of a first hour: each is one error that says what was expected, what came, and what to write."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, DynamicCache

from kvzip_press import (
    ComposedPress,
    KVzipPress,
    Prefill,
    RaggedCache,
    RandomPress,
    Sampling,
    answer,
    compress,
    compress_in_chunks,
    generate,
    get_press,
    load_model,
    prefill,
    question_ids,
    register_press,
)
from kvzip_press.arguments import named
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, KVzipPressError, UnsupportedCacheError
from kvzip_press.press import Press
from kvzip_press.testing import ByteTokenizer, tiny_model

TEXT = "The key of the red box is under the mat, and the mat is at the door."
MODEL, TOKENIZER, PRESS = tiny_model(), ByteTokenizer(), RandomPress(0.5)
IDS = TOKENIZER.encode(TEXT)
BATCH = BatchEncoding({"input_ids": [IDS], "attention_mask": [[1] * len(IDS)]})
QUESTION = [question_ids(TOKENIZER, "Where?")]


class ReturnsTensors(Press):
    """A press of somebody who has not read what a press returns."""

    def score(self, prefill: Prefill) -> Any:
        return prefill.blank_scores()


class Streamer:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.given.append("end")


def entered(press: Any) -> None:
    with press:
        raise AssertionError


@pytest.fixture(scope="module")
def cache() -> RaggedCache:
    return compress(MODEL, TOKENIZER, TEXT, PRESS)


MISTAKES: dict[str, tuple[Callable[[Any], Any], str]] = {
    # a press
    "a class as press": (
        lambda c: compress(MODEL, TOKENIZER, TEXT, KVzipPress),
        r"the class KVzipPress: make one, KVzip",
    ),
    "None as press": (
        lambda c: compress(MODEL, TOKENIZER, TEXT, None),
        r'expected a press.*got None.*get_press\("none"\)',
    ),
    "a ratio as press": (lambda c: compress(MODEL, TOKENIZER, TEXT, 0.7), r"got 0\.7: a ratio belongs to a press"),
    "a dict as press": (lambda c: compress(MODEL, TOKENIZER, TEXT, {}), r"expected a press, such as .* got dict"),
    "a list of presses": (
        lambda c: compress(MODEL, TOKENIZER, TEXT, [PRESS]),
        r"got a list: ComposedPress\(\[\.\.\.\]\)",
    ),
    "a name alone": (lambda c: compress(MODEL, TOKENIZER, TEXT, "kvzip"), r"'kvzip' alone.*get_press\('kvzip', 0\.7\)"),
    "a wrong name": (lambda c: compress(MODEL, TOKENIZER, TEXT, "kvzp"), r"got 'kvzp'; did you mean 'kvzip'\?"),
    "a wrong option": (
        lambda c: get_press("kvzip", 0.5, chunksize=99),
        r"options of 'kvzip' among allocation, .*, got 'chunksize'; did you mean 'chunk_size'\?",
    ),
    "a ratio beside a press": (
        lambda c: compress(MODEL, TOKENIZER, TEXT, PRESS, compression_ratio=0.7),
        r"beside a press's name only, got 0\.7 beside RandomPress",
    ),
    "a ratio for none": (
        lambda c: compress(MODEL, TOKENIZER, TEXT, "none", compression_ratio=0.7),
        r"no compression_ratio with 'none'",
    ),
    "a ratio in percent": (lambda c: KVzipPress(70), r"KVzipPress: expected compression_ratio .* in \[0, 1\), got 70"),
    "tokens as ratio": (lambda c: KVzipPress(2048), r"got 2048: .*2048 tokens are budget=2048"),
    "a model as ratio": (lambda c: KVzipPress(MODEL), r"got LlamaForCausalLM: a press is made first"),
    "a context in the place of the press": (
        lambda c: compress(MODEL, TOKENIZER, PRESS, TEXT),
        r"^expected a press, got a text of 68 letters.*the context comes before the press",
    ),
    "a class's name as a press's": (lambda c: get_press("KVzipPress", 0.7), r"did you mean 'kvzip'\?"),
    "capital letters": (lambda c: get_press("SnapKV", 0.7), r"did you mean 'snapkv'\?"),
    "a storage in capital letters": (lambda c: KVzipPress(0.5, storage="INT8"), r"did you mean 'int8'\?"),
    "an observer alone": (
        lambda c: prefill(MODEL, TOKENIZER, TEXT, observers=PRESS),
        r"observers as a list of presses",
    ),
    "a class as observer": (lambda c: prefill(MODEL, TOKENIZER, TEXT, observers=[KVzipPress]), r"the class KVzipPress"),
    "a name in a composition": (lambda c: ComposedPress(["kvzip", PRESS]), r"get_press\('kvzip', 0\.7\)"),
    "a class in a composition": (lambda c: ComposedPress([KVzipPress]), r"the class KVzipPress"),
    "a press that returns tensors": (
        lambda c: compress(MODEL, TOKENIZER, TEXT, ReturnsTensors(0.5)),
        r"ReturnsTensors\.score: expected Scores, got dict",
    ),
    "a press in a registration": (lambda c: register_press("mine", PRESS), r"a class or function that makes the press"),
    "a registration of half a target": (lambda c: register_press("mine", "module"), r"'package\.module:Callable'"),
    "a registration the other way round": (lambda c: register_press(KVzipPress, "mine"), r"expected a name, then"),
    "a name that makes no press": (
        lambda c: get_press("makes_a_dict", 0.5),
        r"'makes_a_dict' to make a press.*got dict",
    ),
    "a press instead of its scores": (
        lambda c: prefill(MODEL, TOKENIZER, TEXT).evict(PRESS),
        r"expected Scores, got RandomPress, which makes them: pass press\.score\(prefill\)",
    ),
    "a cache to score": (PRESS.score, r"RandomPress\.score: expected a Prefill, which prefill\(.*got RaggedCache"),
    # a model and a tokenizer
    "a name as model in a with": (lambda c: PRESS("smollm2"), r"with press\(model\): expected a model, got str: load"),
    "a forgotten tokenizer": (
        lambda c: compress(MODEL, TEXT, PRESS),
        r"^compress\(model, tokenizer, context, press, \.\.\.\): expected a tokenizer, got str, a text: was the tokeni",
    ),
    "a tokenizer forgotten in a question": (
        lambda c: answer(MODEL, c, "Where?"),
        r"^answer\(model, tokenizer, cache, question, \.\.\.\): expected a tokenizer, got RaggedCache",
    ),
    "None as tokenizer": (
        lambda c: compress(MODEL, None, TEXT, PRESS),
        r"expected a tokenizer, got None: load_model ret",
    ),
    "None as tokenizer, by name": (lambda c: prefill(MODEL, tokenizer=None, context=TEXT), r"a tokenizer, got None"),
    "a name as model": (lambda c: compress("smollm2", TOKENIZER, TEXT, PRESS), r"load_model\('smollm2'\)"),
    "a pair as model": (lambda c: prefill((MODEL, TOKENIZER), TOKENIZER, TEXT), r"got tuple: unpack what load_model"),
    "a tokenizer as model": (lambda c: prefill(TOKENIZER, MODEL, TEXT), r"expected a model, got ByteTokenizer"),
    "a press without its model": (lambda c: entered(PRESS), r"write `with press\(model\):`, got `with press:`"),
    "a model before the file": (
        lambda c: RaggedCache.load(MODEL, "cache.kvzip"),
        r"RaggedCache\.load\(path, model\): expected a model, got str",
    ),
    "a dtype that there is not": (
        lambda c: load_model("smollm2", dtype="float17"),
        r"expected a dtype among fp32, .*got 'float17'",
    ),
    "a device that there is not": (
        lambda c: c.move_to("cuda:99"),
        r"expected a device that PyTorch can use here, got 'cuda:99' \(",
    ),
    # a context
    "an encoding as context": (
        lambda c: compress(MODEL, TOKENIZER, BATCH, PRESS),
        r"BatchEncoding with input_ids, .*text",
    ),
    "messages as context": (
        lambda c: compress(MODEL, TOKENIZER, [{"role": "user", "content": TEXT}], PRESS),
        r"got a dict with role, content: pass its text; the chat template is put around it",
    ),
    "bytes as context": (lambda c: compress(MODEL, TOKENIZER, TEXT.encode(), PRESS), r"got bytes: decode them first"),
    "a path as context": (lambda c: compress(MODEL, TOKENIZER, Path("notes.txt"), PRESS), r"path\.read_text\(\)"),
    "the name of a file as context": (
        lambda c: compress(MODEL, TOKENIZER, __file__, PRESS),
        r"test_mistakes\.py', the name of a file: read it first, Path\('.*'\)\.read_text\(\)",
    ),
    "an open file as context": (lambda c: compress(MODEL, TOKENIZER, io.StringIO(TEXT), PRESS), r"file\.read\(\)"),
    "floats as context": (lambda c: compress(MODEL, TOKENIZER, torch.tensor(IDS).float(), PRESS), r"of torch\.float32"),
    "a float among ids": (lambda c: compress(MODEL, TOKENIZER, [5, 6.0], PRESS), r"got 6\.0 among its ids"),
    "a mask as context": (lambda c: compress(MODEL, TOKENIZER, torch.ones(5).bool(), PRESS), r"of torch\.bool"),
    "a padded batch as context": (
        lambda c: compress(MODEL, TOKENIZER, torch.ones(2, 9).long(), PRESS),
        r"shape \(2, 9\), whose padding would be read as text: pass a list of rows",
    ),
    "a set as context": (lambda c: compress(MODEL, TOKENIZER, {"a", "b"}, PRESS), r"got set"),
    "None as context": (lambda c: compress(MODEL, TOKENIZER, None, PRESS), r"expected a context .*got None"),
    "nothing as context": (lambda c: compress(MODEL, TOKENIZER, [], PRESS), r"at least one token, got an empty one"),
    "an empty one among contexts": (lambda c: compress(MODEL, TOKENIZER, [TEXT, ""], PRESS), r"at index 1 of 2"),
    "ids of another tokenizer": (
        lambda c: compress(MODEL, TOKENIZER, [5, 30000], PRESS),
        r"ids from 0 to 127, those of the model's vocabulary, got 30000: does the tokenizer belong to another",
    ),
    "several contexts in chunks": (lambda c: compress_in_chunks(MODEL, TOKENIZER, [TEXT, TEXT], PRESS), r"one context"),
    # questions and tokens
    "a dense cache": (
        lambda c: answer(MODEL, TOKENIZER, DynamicCache(), "Where?"),
        r"expected a compressed cache, from compress\(\.\.\.\), .*got DynamicCache",
    ),
    "a prefill as cache": (
        lambda c: answer(MODEL, TOKENIZER, prefill(MODEL, TOKENIZER, TEXT), "Where?"),
        r"expected a compressed cache.*got Prefill",
    ),
    "an encoding as question": (
        lambda c: answer(MODEL, TOKENIZER, c, BATCH),
        r"input_ids, .*: pass the question as text",
    ),
    "ids as question": (
        lambda c: answer(MODEL, TOKENIZER, c, QUESTION[0]),
        r"a question as text, or a list of questions as texts, got \[1",
    ),
    "a text as tokens": (lambda c: generate(MODEL, c.fork(), TEXT, 3), r"question_ids\(tokenizer, text\) makes ids"),
    "an encoding as tokens": (
        lambda c: generate(MODEL, c.fork(), BATCH, 3),
        r"input_ids, attention_mask: pass its input_ids, and",
    ),
    "floats as tokens": (lambda c: generate(MODEL, c.fork(), torch.rand(1, 3), 3), r"got a Tensor of torch\.float32"),
    "no tokens": (lambda c: generate(MODEL, c.fork(), [], 3), r"\[batch, n >= 1\], got a tensor of shape \(0,\)"),
    "ragged rows as tokens": (
        lambda c: generate(MODEL, c.fork(), [[5], [5, 6]], 3),
        r"\[batch, n >= 1\], got \[\[5\], ",
    ),
    "tokens beyond the vocabulary": (
        lambda c: generate(MODEL, c.fork(), [[128]], 3),
        r"ids from 0 to 127, .*got 128: does",
    ),
    "a tokenizer as cache": (lambda c: generate(MODEL, TOKENIZER, c, 3), r"expected a cache, got ByteTokenizer"),
    "a text as number": (lambda c: generate(MODEL, c.fork(), QUESTION, "3"), r"max_new_tokens >= 0, got '3'"),
    "a temperature as sampling": (
        lambda c: answer(MODEL, TOKENIZER, c, "Where?", sampling=0.7),
        r"Sampling\(temperature=",
    ),
    "a seed alone": (lambda c: answer(MODEL, TOKENIZER, c, "Where?", seed=1), r"expected sampling=.*with seed=1"),
    "two seeds": (
        lambda c: answer(MODEL, TOKENIZER, c, "Where?", sampling=Sampling(seed=2), seed=1),
        r"expected one seed, got 1 beside Sampling\(.*seed=2\)",
    ),
    "a function as streamer": (
        lambda c: answer(MODEL, TOKENIZER, c, "Where?", streamer=print),
        r"TextStreamer\(tokenizer",
    ),
    "a streamer for several": (
        lambda c: answer(MODEL, TOKENIZER, c, ["Where?", "Why?"], streamer=Streamer()),
        r"one row for a streamer, got 2",
    ),
    "two questions framed as one": (lambda c: question_ids(TOKENIZER, ["a", "b"]), r"one question .* as texts"),
    "a cache to pickle": (pickle.dumps, r"save\(path\) .*fork\(\) to copy it, got pickle"),
    "a cache to torch.save": (lambda c: torch.save(c, io.BytesIO()), r"save\(path\) .*got pickle \(or torch\.save\)"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test registers end with it."""
    monkeypatch.setattr(named, "_registered", {})
    register_press("makes_a_dict", lambda compression_ratio: {})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error_that_says_what_to_do(mistake: str, cache: RaggedCache) -> None:
    """It is one of ours, on one line, and the cache answers as before."""
    make, match = MISTAKES[mistake]
    before = (cache.get_seq_length(), cache.resident_bytes)
    with pytest.raises(KVzipPressError, match=match) as raised:
        make(cache)
    expected = (
        CacheMismatchError if "compressed cache" in match else UnsupportedCacheError if "pickle" in match else None
    )
    assert isinstance(raised.value, expected or InvalidArgumentError)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    assert (cache.get_seq_length(), cache.resident_bytes) == before


def kept(cache: Any) -> list[Any]:
    """The positions that every head kept."""
    view = RaggedCache.of(cache)
    return [[p.tolist() for row in view.kept_positions(i) for p in row] for i, _ in view.ragged_layers()]


SAME: dict[str, Callable[[], Any]] = {
    "ids": lambda: compress(MODEL, TOKENIZER, IDS, PRESS),
    "a tuple of ids": lambda: compress(MODEL, TOKENIZER, tuple(IDS), PRESS),
    "a list of one context": lambda: compress(MODEL, TOKENIZER, [TEXT], PRESS),
    "a tensor": lambda: compress(MODEL, TOKENIZER, torch.tensor(IDS), PRESS),
    "a tensor of one row": lambda: compress(MODEL, TOKENIZER, torch.tensor([IDS]), PRESS),
    "an array of one row": lambda: compress(MODEL, TOKENIZER, np.array([IDS]), PRESS),
    "a list of tensors of one row": lambda: compress(MODEL, TOKENIZER, [torch.tensor([IDS])], PRESS),
    "numpy's integers": lambda: compress(MODEL, TOKENIZER, list(np.array(IDS)), PRESS),
    "a name and a ratio": lambda: compress(MODEL, TOKENIZER, TEXT, "random", compression_ratio=0.5),
    "a name, in chunks": lambda: compress_in_chunks(MODEL, TOKENIZER, TEXT, "random", compression_ratio=0.5),
    "a copy": lambda: copy.deepcopy(compress(MODEL, TOKENIZER, TEXT, PRESS)),
}


@pytest.mark.parametrize("way", SAME)
def test_what_can_be_meant_in_one_way_only_works(way: str, cache: RaggedCache) -> None:
    assert kept(SAME[way]()) == kept(cache)


def test_tokens_may_be_given_as_lists(cache: RaggedCache) -> None:
    expected = generate(MODEL, cache.fork(), torch.tensor(QUESTION), 4)
    assert generate(MODEL, cache.fork(), QUESTION, 4) == generate(MODEL, cache.fork(), QUESTION[0], 4) == expected


def test_a_cache_that_a_press_left_in_the_users_own_answers(cache: RaggedCache) -> None:
    """A DynamicCache that was compressed in place is taken as it is, and remembers what it is to keep."""
    own = DynamicCache()
    with PRESS(MODEL), torch.no_grad():
        MODEL(torch.tensor([[TOKENIZER.bos_token_id, *IDS]]), past_key_values=own)
    asked = answer(MODEL, TOKENIZER, RaggedCache.of(own), "Where?", max_new_tokens=4)
    assert answer(MODEL, TOKENIZER, own, "Where?", max_new_tokens=4) == asked
    n_seen = own.get_seq_length()
    answer(MODEL, TOKENIZER, own, "Where?", max_new_tokens=4, keep=True)
    assert own.get_seq_length() > n_seen


def test_a_class_is_registered_with_the_first_line_of_its_docstring() -> None:
    from kvzip_press import presses_table

    register_press("mine", RandomPress)
    assert get_press("mine", 0.3, seed=4) == RandomPress(0.3, seed=4)
    assert {info.name: info.summary for info in presses_table()}["mine"] == "Removes pairs at random."


@pytest.mark.kvpress
def test_presses_of_kvpress_are_wrapped(kvpress: Any) -> None:
    """In `compress`, in chunks, as observers and in compositions; as they are at that moment."""
    from kvzip_press import RaggedPress

    knorm = kvpress.KnormPress(0.5)
    expected = kept(compress(MODEL, TOKENIZER, TEXT, RaggedPress(knorm)))
    assert kept(compress(MODEL, TOKENIZER, TEXT, knorm)) == expected
    assert kept(compress_in_chunks(MODEL, TOKENIZER, TEXT, knorm)) == expected
    done = prefill(MODEL, TOKENIZER, TEXT, observers=[knorm])
    [wrapped] = done.observers
    assert kept(done.evict(wrapped.score(done))) == expected
    assert kept(compress(MODEL, TOKENIZER, TEXT, ComposedPress([knorm]))) == expected
    with pytest.raises(InvalidArgumentError, match="the class KnormPress: make one"):
        compress(MODEL, TOKENIZER, TEXT, kvpress.KnormPress)
