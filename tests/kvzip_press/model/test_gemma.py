"""Gemma 3 270M with its real weights: three layers of eighteen see everything, and these are what a press saves on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvzip_press import KVzipPress, RaggedCache, RandomPress, answer, load_model, prefill
from kvzip_press.model.structure import full_attention_layers

pytestmark = [pytest.mark.gemma, pytest.mark.slow]

LOCKERS = {"Anna": 4821, "Boris": 7310, "Clara": 1598, "David": 6042, "Elena": 3377, "Frank": 9125}
FILLER = "On weekends the members walk along the river, read old books about the sea and cook a simple meal. " * 40
FACTS = "\n".join(f"The locker number of {name} is {number}." for name, number in LOCKERS.items())
#: Longer than the sliding window of 512 tokens: when the question comes, only the three full layers see the numbers.
CONTEXT = f"Notes about the members of the club.\n\n{FACTS}\n\n{FILLER}"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("gemma3-270m")


def test_the_model_writes_sense(loaded) -> None:
    """What was converted is the model: code and a story go on as a language model's would."""
    model, tokenizer = loaded
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 1
    for prompt, expected in {
        "def fibonacci(n):\n": "    if n == 0:\n        return 0\n",
        "One, two, three, four, five, six,": " seven, eight, nine, ten",
        "The opposite of hot is": " cold",
    }.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id == 2
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).startswith(expected)


def test_the_tokenizer_is_sentencepieces(loaded) -> None:
    """Spaces in runs, digits alone, bytes of what is unknown, control tokens whole; every text comes back."""
    _, tokenizer = loaded
    assert tokenizer("Hello  world 12")["input_ids"] == [2, 9259, 138, 12392, 236743, 236770, 236778]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a<end_of_turn>b", add_special_tokens=False))[1] == (
        "<end_of_turn>"
    )
    for text in ("  two  spaces\n\n\n\tand tabs", "1234", "é 漢字 🙂 \u200b\ue000", "<table><tr>"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_real_savings_on_three_full_layers(loaded) -> None:
    """KVzip drops most of what the full layers hold; sliding layers stay, and what counts can still be asked."""
    model, tokenizer = loaded
    assert [layer.layer_idx for layer in full_attention_layers(model)] == [5, 11, 17]
    done = prefill(model, tokenizer, CONTEXT)
    n_tokens = done.valid.shape[1]
    assert n_tokens > 512 + 200
    pair_bytes = 2 * 256 * 4  # key and value of the one KV head, fp32
    assert done.dense_bytes == (3 * n_tokens + 15 * 511) * pair_bytes
    right = {}
    for press in (RandomPress(0.0), KVzipPress(0.7, tokenizer=tokenizer), RandomPress(0.7)):
        cache = done.evict(press.score(done))
        right[repr(press)] = sum(is_right(model, tokenizer, cache, name) for name in LOCKERS)
        full = sum(
            layer.packed.columns["keys"].nbytes + layer.packed.columns["values"].nbytes
            for _, layer in cache.ragged_layers()
        )
        saved = cache.dense_bytes - cache.resident_bytes
        print(f"{press!r}: {right[repr(press)]} of {len(LOCKERS)} right, full layers {full:,} of", end=" ")
        print(f"{3 * n_tokens * pair_bytes:,} bytes, whole cache {cache.resident_bytes:,} of {cache.dense_bytes:,}")
        if press.compression_ratio:
            assert full == pytest.approx(0.3 * 3 * n_tokens * pair_bytes, rel=0.01)
            assert saved > 0.69 * 3 * n_tokens * pair_bytes
    everything, kvzip, random = right.values()
    assert everything >= 4  # a base model of 270M parameters reads most of them
    assert kvzip >= everything - 2 and random < kvzip


def is_right(model: Any, tokenizer: Any, cache: RaggedCache, name: str) -> bool:
    beginning = f"The locker number of {name} is"
    text = answer(model, tokenizer, cache, f"What is the locker number of {name}?", beginning, max_new_tokens=6)
    return str(LOCKERS[name]) in text
