"""Laws of what is done to a whole cache: what is known of a row follows it, into files too; nothing is half done."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvzip_press import KVzipPress, RaggedCache, RandomPress, compress
from kvzip_press.attention.implementation import attach
from kvzip_press.cache.padding import left_padded, padding_in
from kvzip_press.decoding.forward import read
from kvzip_press.errors import InvalidArgumentError, UnsupportedCacheError
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
PRESS = RandomPress(0.5)
MODELS = {
    "llama": tiny_model(num_layers=2, tie_word_embeddings=False),
    "gemma3_text": tiny_model("gemma3_text", sliding_window=256, tie_word_embeddings=False),
}
CPU = torch.device("cpu")


def ids_of(n: int, seed: int) -> list[int]:
    return torch.randint(3, 120, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def contexts(sizes: list[int]) -> list[list[int]]:
    return [ids_of(size, seed) for seed, size in enumerate(sizes)]


def with_turn(model, cache: RaggedCache, tokens: list[list[int]]) -> None:
    """Lets a cache read a turn of any lengths, and keep it."""
    attach(model)
    grown = cache.fork()
    ids, valid = left_padded(tokens, CPU)
    read(model, grown, ids, padding=padding_in(valid, tuple(ids.shape)))
    cache.adopt_turn(grown)


def logits_after(model, cache: RaggedCache, n: int = 2) -> torch.Tensor:
    attach(model)
    return read(model, cache.fork(), torch.arange(5, 5 + n).repeat(cache.batch_size, 1))


def kept(cache: RaggedCache) -> list[list[list[list[int]]]]:
    """Positions that the heads of each layer keep, by batch row."""
    found = []
    for layer_idx, layer in cache.ragged_layers():
        rows = range(layer.packed.num_rows) if layer.row_index is None else layer.row_index.tolist()
        by_row = cache.kept_positions(layer_idx)
        found.append([[head.tolist() for head in by_row[row]] for row in rows])
    return found


@dataclass
class Told:
    """What a cache has been told, row by row: from this the same cache is made anew."""

    contexts: list[list[int]]
    turns: list[list[list[int]]] = field(default_factory=list)

    def take(self, rows: list[int]) -> None:
        self.contexts = [self.contexts[row] for row in rows]
        self.turns = [[turn[row] for row in rows] for turn in self.turns]

    def made_anew(self, model) -> RaggedCache:
        cache = compress(model, TOKENIZER, self.contexts, PRESS)
        for turn in self.turns:
            with_turn(model, cache, turn)
        return cache


def facts(cache: RaggedCache) -> tuple[object, ...]:
    return cache.n_seen, cache.turn_starts, cache.batch_size, cache.fork().resident_bytes, kept(cache)


def comes_back_from_a_file(model, cache: RaggedCache, path: Path) -> RaggedCache:
    """Saves and loads a cache, and finds it unchanged, bit for bit."""
    cache.save(path, model=model)
    loaded = RaggedCache.load(path, model)
    assert facts(loaded) == facts(cache)
    assert torch.equal(logits_after(model, loaded), logits_after(model, cache))
    return loaded


class Dialogue:
    """A cache, and what it was told; each method is an operation on both."""

    def __init__(self, model, sizes: list[int], path: Path) -> None:
        self.model, self.path, self.told = model, path, Told(contexts(sizes))
        self.cache = self.told.made_anew(model)

    def turn(self, seed: int) -> None:
        tokens = [ids_of(1 + (seed * 7 + row * 5) % 9, seed + row) for row in range(self.cache.batch_size)]
        with_turn(self.model, self.cache, tokens)
        self.told.turns.append(tokens)

    def select(self, seed: int) -> None:
        n = self.cache.batch_size
        rows = [(seed + i * i) % n for i in range(1 + seed % n)]
        self.cache.batch_select_indices(torch.tensor([row - n * (seed % 2) for row in rows]))  # from the end, too
        self.told.take(rows)

    def mask(self, seed: int) -> None:
        rows = [row for row in range(self.cache.batch_size) if row % 2 == 0 or seed % 2]
        self.cache.batch_select_indices(torch.tensor([row in rows for row in range(self.cache.batch_size)]))
        self.told.take(rows)

    def repeat(self, seed: int) -> None:
        n, repeats = self.cache.batch_size, 1 + seed % 2
        if n * repeats <= 6:
            self.cache.batch_repeat_interleave(repeats)
            self.told.take([row for row in range(n) for _ in range(repeats)])

    def reorder(self, seed: int) -> None:
        rows = [(row * 3 + seed) % self.cache.batch_size for row in range(self.cache.batch_size)]
        self.cache.reorder_cache(torch.tensor(rows))
        self.told.take(rows)

    def truncate(self, seed: int) -> None:
        if self.told.turns:
            number = seed % len(self.told.turns)
            self.cache.truncate(self.cache.turn_starts[number])
            del self.told.turns[number:]

    def crop(self, seed: int) -> None:
        """A crop of transformers to the beginning of a turn that began in one column, if there is one."""
        numbers = [i for i, start in enumerate(self.cache.turn_starts) if isinstance(start, int)]
        if numbers and isinstance(self.cache.n_seen, int):
            self.cache.crop(-(self.cache.n_seen - self.cache.turn_starts[numbers[0]]))
            del self.told.turns[numbers[0] :]

    def fork(self, seed: int) -> None:
        parent, self.cache = self.cache, [self.cache.fork, lambda: copy.deepcopy(self.cache)][seed % 2]()
        with_turn(self.model, parent, [[5]] * parent.batch_size)  # a fork knows nothing of it

    def move(self, seed: int) -> None:
        self.cache.move_to("cpu" if seed % 2 else self.model)

    def view(self, seed: int) -> None:
        dense = DynamicCache()
        dense.layers = list(self.cache.layers)
        self.cache = RaggedCache.of(dense)

    def file(self, seed: int) -> None:
        self.cache = comes_back_from_a_file(self.model, self.cache, self.path)


OPERATIONS = ("turn", "select", "mask", "repeat", "reorder", "truncate", "crop", "fork", "move", "view", "file")


@pytest.mark.parametrize(("architecture", "examples"), [("llama", 12), ("gemma3_text", 5)])
@pytest.mark.parametrize("sizes", [[40, 40, 40], [40, 21, 33]], ids=["equal", "padded"])
def test_whatever_is_done_to_a_cache_its_rows_are_those_of_a_cache_made_for_them(
    architecture, examples, sizes, tmp_path
) -> None:
    """After any sequence of operations: saved, loaded, and compared with a cache that only ever had these rows."""

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(
        st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 20)), min_size=2, max_size=6).map(
            lambda operations: [("turn", 3), *operations]
        )
    )
    def check(operations) -> None:
        model = MODELS[architecture]
        dialogue = Dialogue(model, sizes, tmp_path / "cache.safetensors")
        for name, seed in operations:
            getattr(dialogue, name)(seed)
            comes_back_from_a_file(model, dialogue.cache, dialogue.path)
        cache, anew = dialogue.cache, dialogue.told.made_anew(model)
        assert kept(cache) == kept(anew)
        assert len(cache.turn_starts) == len(dialogue.told.turns)
        torch.testing.assert_close(logits_after(model, cache), logits_after(model, anew), atol=1e-4, rtol=1e-4)
        if len(set(sizes)) == 1:  # in a batch of other lengths, other columns are padding
            # Rows that share pairs get their own; columns go that are padding in all rows that a reordering left.
            cache.batch_select_indices(torch.arange(cache.batch_size))
            assert facts(cache) == facts(anew)
        for start, tokens in zip(reversed(cache.turn_starts), reversed(dialogue.told.turns), strict=True):
            cache.truncate(start)
            assert len(tokens) == cache.batch_size
        assert cache.turn_starts == []

    check()


def test_a_turn_that_only_some_rows_have_forgotten_is_not_saved_since_no_file_of_it_could_be_read(tmp_path) -> None:
    """What load refuses, save refuses, and an existing file stays as it was."""
    model, path = MODELS["llama"], tmp_path / "cache.safetensors"
    cache = compress(model, TOKENIZER, contexts([40, 40]), PRESS)
    with_turn(model, cache, [[5, 6, 7], [8, 9, 10, 11]])
    cache.save(path)
    before = path.read_bytes()
    cache.truncate([cache.turn_starts[0], cache.n_seen[1]])
    with pytest.raises(InvalidArgumentError, match="turns"):
        cache.save(path)
    assert path.read_bytes() == before
    cache.truncate(cache.turn_starts[0])
    assert comes_back_from_a_file(model, cache, path).turn_starts == []


def test_a_turn_of_which_nothing_was_read_is_refused() -> None:
    """Its beginning would be that of the next one."""
    cache = compress(MODELS["llama"], TOKENIZER, contexts([40]), PRESS)
    with pytest.raises(InvalidArgumentError, match="read more in every row"):
        cache.adopt_turn(cache.fork())
    assert cache.turn_starts == []


@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("rows", [[0, 3], [-4, 0], [], [0.5], [[0, 1]], [True, False]], ids=str)
def test_rows_that_a_cache_does_not_have_are_refused_and_nothing_changes(operation, architecture, rows) -> None:
    """Also where dense layers come first, which would have taken some of it."""
    cache = compress(MODELS[architecture], TOKENIZER, contexts([40, 40, 40]), PRESS)
    before = facts(cache)
    with pytest.raises(InvalidArgumentError, match="rows of a cache with 3"):
        getattr(cache, operation)(torch.tensor(rows))
    assert facts(cache) == before


def test_a_later_turn_that_a_press_compresses_leaves_the_dialogue_known() -> None:
    """Its tokens are part of the context then, and the next question is still not the first one."""
    model = MODELS["llama"]
    cache = compress(model, TOKENIZER, contexts([40]), PRESS)
    with_turn(model, cache, [[5, 6, 7]])
    dense = DynamicCache()
    dense.layers = list(cache.layers)
    with torch.no_grad(), PRESS(model):
        model(torch.tensor([ids_of(20, 9)]), past_key_values=dense)
    assert RaggedCache.of(dense).turn_starts == [41]


@pytest.mark.parametrize("make", [pickle.dumps, lambda cache: torch.save(cache, BytesIO())], ids=["pickle", "torch"])
def test_a_cache_is_not_pickled_but_told_how_to_be_saved_and_copied(make) -> None:
    """Also a DynamicCache that was compressed in place, whose layers are the same."""
    cache = compress(MODELS["llama"], TOKENIZER, contexts([40]), PRESS)
    dense = DynamicCache()
    dense.layers = cache.layers
    for one in (cache, dense, cache.layers[0]):
        with pytest.raises(UnsupportedCacheError, match=r"save\(path\).*load\(path, model\).*fork\(\)"):
            make(one)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_cache_is_a_fork(copied) -> None:
    """It shares the context, and neither sees what the other reads."""
    model = MODELS["llama"]
    cache = compress(model, TOKENIZER, contexts([40]), KVzipPress(0.5))
    with_turn(model, cache, [[5, 6, 7]])
    logits, twin = logits_after(model, cache), copied(cache)
    assert type(twin) is RaggedCache and facts(twin) == facts(cache)
    with_turn(model, twin, [[9, 9]])
    assert cache.turn_starts == [41] and twin.turn_starts == [41, 44]
    assert torch.equal(logits_after(model, cache), logits)
    dense = DynamicCache()
    dense.layers = list(cache.layers)
    deep = RaggedCache.of(copy.deepcopy(dense))
    assert torch.equal(logits_after(model, deep), logits) and deep.turn_starts == [41]
