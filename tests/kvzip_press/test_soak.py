"""Two models and their caches in turn, a thousand times: nothing accumulates and no answer drifts.

The test runs this file in a process of its own: what other tests leave behind comes and goes by more than a leak.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvzip_press import KVzipPress, RaggedCache, answer, compress
from kvzip_press.decoding.forward import read
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
N_CYCLES, N_WARM_UP = 1200, 80
N_TRACED = 400  # of the last cycles: traced, one takes three times as long
QUESTIONS = ("Where?", "Who has it", "Why", "What is at the door")


@dataclass
class Chat:
    """A model and the cache it is asked through."""

    model: Any
    cache: RaggedCache
    path: Path

    def cycle(self, number: int) -> list[Any]:
        """Asks, keeps, forks, saves, loads, asks what was loaded, goes back: what was said on the way."""
        start, question = self.cache.n_seen, QUESTIONS[number % len(QUESTIONS)]
        said = [self.ask(self.cache, question, keep=True)]
        said += [self.ask(self.cache.fork(), "And?", keep=True)]
        self.cache.save(self.path)
        self.cache = RaggedCache.load(self.path, self.model)
        said += [self.ask(self.cache, "So?")]
        self.cache.truncate(start)
        return said

    def ask(self, cache: RaggedCache, question: str, *, keep: bool = False) -> Any:
        return answer(self.model, TOKENIZER, cache, question, max_new_tokens=2, keep=keep)

    def logits(self) -> torch.Tensor:
        ids = torch.arange(5, 9).repeat(self.cache.batch_size, 1)
        return read(self.model, self.cache.fork(), ids)


def chats(folder: Path) -> list[Chat]:
    """One context behind full attention, and two of different length behind a hybrid model."""
    text, press = "The key of the red box is under the mat, and the mat is at the door.", KVzipPress(0.5)
    full = tiny_model("llama", num_layers=2)
    layer_types = ["sliding_attention", "full_attention"]
    options = {"layer_types": layer_types, "num_hidden_layers": 2, "sliding_window": 256, "tie_word_embeddings": False}
    hybrid = tiny_model("gemma3_text", **options)
    contexts = [(full, text), (hybrid, [text[:40], text[:25]])]
    made = [(model, compress(model, TOKENIZER, context, press)) for model, context in contexts]
    return [Chat(model, cache, folder / f"{number}.safetensors") for number, (model, cache) in enumerate(made)]


def held() -> tuple[int, int, Counter[str]]:
    """Live tensors, the bytes of their storages, and live containers by their type."""
    gc.collect()
    everything = gc.get_objects()
    tensors = [x for x in everything if issubclass(type(x), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return len(tensors), sum(storages.values()), Counter(repr(type(x)) for x in everything)


def python_bytes() -> int:
    """Bytes of Python's objects, but for what safetensors (0.8) itself loses: a number with each tensor it gives."""
    gc.collect()
    theirs = [tracemalloc.Filter(False, pattern) for pattern in ("*/cache/file/reading.py", "*/safetensors/*")]
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(theirs).traces)


@pytest.mark.slow
def test_a_thousand_cycles_leave_no_trace(tmp_path) -> None:
    """Every cycle says what the first ones said; at the end the same tensors, bytes and Python memory are held."""
    command = [sys.executable, Path(__file__), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def run(folder: Path) -> None:
    """Raises AssertionError if something accumulates or an answer changes."""
    torch.set_num_threads(1)
    pair = chats(folder)
    logits = [chat.logits() for chat in pair]
    turns = [(chat, number) for number in range(N_CYCLES // 2) for chat in pair]
    first: dict[Any, list[Any]] = {}
    sizes: list[int] = []
    before = held()
    for done, (chat, number) in enumerate(turns):
        said = chat.cycle(number)
        assert said == first.setdefault((pair.index(chat), number % len(QUESTIONS)), said), said
        if done == N_WARM_UP:
            before = held()
        if done == N_CYCLES - N_TRACED:
            tracemalloc.start()
        if tracemalloc.is_tracing() and done % 100 == 99:
            sizes.append(python_bytes())
    after = held()
    for chat, expected in zip(pair, logits, strict=True):
        assert torch.equal(chat.logits(), expected)
    assert after[:2] == before[:2], f"tensors and bytes: {before[:2]} and {after[:2]}"
    leaked = after[2] - before[2]  # one a cycle would be 1120
    assert leaked.total() < 58, f"more containers: {leaked.most_common(8)}"
    assert sizes[-1] - sizes[1] < 100 * 200, f"Python's bytes after every 100 cycles: {sizes}"


if __name__ == "__main__":
    run(Path(sys.argv[1]))
