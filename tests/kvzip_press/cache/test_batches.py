"""Many contexts at once: each row of a batch keeps, reads, answers and forgets what the row alone does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvzip_press import DecodeStep, KVzipPress, RaggedCache, RandomPress, answer, compress, load_model, prefill
from kvzip_press.cache.padding import left_padded, padding_in
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.step import _StaticStep
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.testing import ARCHITECTURES, ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
TEXT = "The key of the red box is under the mat, and the mat is at the door, and the door is green. "
HYBRID = "gemma3_text"  # its window is 32 tokens: shorter than some contexts here and longer than others
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def tiny(architecture: str = "llama", **options):
    """A tiny model whose answers differ (with tied embeddings they repeat a token); one token in seven ends them."""
    model = tiny_model(architecture, tie_word_embeddings=False, **options)
    model.generation_config.eos_token_id = list(range(0, 128, 7))
    return model


def kept(cache: RaggedCache, row: int) -> list[list[list[int]]]:
    """Positions that each head of each layer keeps in a row."""
    layers = [cache.kept_positions(layer_idx)[row] for layer_idx, _ in cache.ragged_layers()]
    return [[positions.tolist() for positions in heads] for heads in layers]


def alone(model, contexts, press) -> list[RaggedCache]:
    return [compress(model, TOKENIZER, context, press) for context in contexts]


def token_lists(sizes: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (size,), generator=generator).tolist() for size in sizes]


def texts(sizes: list[int], seed: int) -> list[str]:
    return ["".join(chr(32 + token % 90) for token in ids).strip() for ids in token_lists(sizes, seed)]


def sizes_of(rows: int, longest: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, longest), min_size=rows, max_size=rows)


@pytest.mark.parametrize("architecture", ["llama", HYBRID])
@pytest.mark.parametrize("press", [RandomPress(0.6), KVzipPress(0.6, chunk_size=16)], ids=["random", "kvzip"])
def test_rows_of_a_batch_keep_and_answer_what_each_does_alone(architecture, press) -> None:
    """Any lengths of contexts and questions: the same kept sets, the same answers, and the cache is as it was."""
    model = tiny(architecture)

    @settings(max_examples=15, deadline=None)
    @given(sizes=sizes_of(3, 90), asked=sizes_of(3, 40), max_new_tokens=st.integers(0, 7), seed=st.integers(0, 99))
    def check(sizes, asked, max_new_tokens, seed) -> None:
        contexts, questions = token_lists(sizes, seed), texts(asked, seed + 1)
        batch = compress(model, TOKENIZER, contexts, press)
        singles = alone(model, contexts, press)
        before = (batch.n_seen, batch.resident_bytes)
        got = answer(model, TOKENIZER, batch, questions, max_new_tokens=max_new_tokens)
        for row, (single, question) in enumerate(zip(singles, questions, strict=True)):
            assert kept(batch, row) == kept(single, 0)
            assert got[row] == answer(model, TOKENIZER, single, question, max_new_tokens=max_new_tokens)
        assert (batch.n_seen, batch.resident_bytes) == before

    check()


@pytest.mark.parametrize("architecture", ["llama", HYBRID])
def test_dialogues_in_a_batch_go_on_as_each_does_alone(architecture) -> None:
    """Kept turns of any lengths, whose answers end at different tokens; a turn that is forgotten leaves no trace."""
    model = tiny(architecture)

    turns = st.lists(st.tuples(sizes_of(2, 40), st.booleans()), min_size=3, max_size=3)

    @settings(max_examples=12, deadline=None)
    @given(sizes=sizes_of(2, 60), turns=turns, seed=st.integers(0, 99))
    def check(sizes, turns, seed) -> None:
        contexts, press = token_lists(sizes, seed), RandomPress(0.5)
        batch, singles = compress(model, TOKENIZER, contexts, press), alone(model, contexts, press)
        for number, (asked, keep) in enumerate(turns):
            questions = texts(asked, seed + number)
            got = answer(model, TOKENIZER, batch, questions, max_new_tokens=6, keep=keep)
            expected = [
                answer(model, TOKENIZER, single, question, max_new_tokens=6, keep=keep)
                for single, question in zip(singles, questions, strict=True)
            ]
            assert got == expected
        assert len(batch.turn_starts) == len(singles[0].turn_starts)
        assert next_positions(batch) == [single.n_seen for single in singles]

    check()


def next_positions(cache: RaggedCache) -> list[int]:
    return next(cache.ragged_layers())[1].next_positions.tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_answers_row_by_row(architecture) -> None:
    """Contexts around a sliding window's length, questions of different lengths, two kept turns."""
    model = tiny(architecture)
    contexts = [TEXT[:70], TEXT[:9], TEXT[:33]]
    questions = [["Where?", "Who has the key of the box?", "Why"], ["And?", "x", "What is at the door, then?"]]
    batch, singles = compress(model, TOKENIZER, contexts, RandomPress(0.5)), alone(model, contexts, RandomPress(0.5))
    for turn in questions:
        got = answer(model, TOKENIZER, batch, turn, max_new_tokens=12, keep=True)
        asked = zip(singles, turn, strict=True)
        assert got == [answer(model, TOKENIZER, one, text, max_new_tokens=12, keep=True) for one, text in asked]
    assert len({len(text.split()) for text in got}) > 1


def test_forgetting_a_turn_restores_every_row() -> None:
    """``truncate`` to the start of a turn gives the columns, the padding and, bit for bit, the answers of then."""
    model = tiny(max_position_embeddings=1024)
    batch = compress(model, TOKENIZER, [TEXT[:70], TEXT[:9]], RandomPress(0.5))
    states = []
    for questions in (["a", "a longer one"], ["quite a long question", "b"], ["c", "d?"]):
        states.append((batch.n_seen, batch.get_seq_length(), logits_after(model, batch)))
        answer(model, TOKENIZER, batch, questions, max_new_tokens=6, keep=True)
    assert [state[0] for state in states] == batch.turn_starts
    for n_seen, columns, logits in reversed(states):
        batch.truncate(n_seen)
        assert (batch.n_seen, batch.get_seq_length()) == (n_seen, columns)
        torch.testing.assert_close(logits_after(model, batch), logits, rtol=0, atol=0)
    assert batch.turn_starts == []


def logits_after(model, cache: RaggedCache, n: int = 3) -> torch.Tensor:
    ids = torch.arange(5, 5 + n).repeat(cache.batch_size, 1)
    return read(model, cache.fork(), ids)


def test_sliding_rows_go_back_while_their_window_holds_all() -> None:
    """A hybrid cache forgets a turn exactly while nothing left the window, and refuses afterwards."""
    model = tiny(HYBRID, sliding_window=256)
    batch = compress(model, TOKENIZER, [TEXT[:40], TEXT[:9]], RandomPress(0.5))
    logits, n_seen = [], []
    for questions in (["a", "a longer one"], ["quite a long question", "b"]):
        logits.append(logits_after(model, batch))
        n_seen.append(batch.n_seen)
        answer(model, TOKENIZER, batch, questions, max_new_tokens=4, keep=True)
    batch.truncate(n_seen[1])
    torch.testing.assert_close(logits_after(model, batch), logits[1], rtol=0, atol=0)
    batch.truncate(n_seen[0])
    torch.testing.assert_close(logits_after(model, batch), logits[0], rtol=0, atol=0)
    short = compress(tiny(HYBRID), TOKENIZER, [TEXT[:40], TEXT[:9]], RandomPress(0.5))
    answer(tiny(HYBRID), TOKENIZER, short, ["a", "a longer one"], max_new_tokens=4, keep=True)
    with pytest.raises(InvalidArgumentError, match="fork"):
        short.truncate(short.turn_starts[0])


@pytest.mark.parametrize("architecture", ["llama", HYBRID])
def test_rows_of_a_dialogue_come_back_from_a_file(architecture, tmp_path) -> None:
    """Padding of contexts and of turns is saved: the loaded cache answers as the saved one, and forgets as it does."""
    model = tiny(architecture)
    batch = compress(model, TOKENIZER, [TEXT[:70], TEXT[:9]], RandomPress(0.5))
    answer(model, TOKENIZER, batch, ["a", "a longer one"], max_new_tokens=6, keep=True)
    batch.save(tmp_path / "cache.safetensors")
    loaded = RaggedCache.load(tmp_path / "cache.safetensors", model)
    assert (loaded.n_seen, loaded.turn_starts) == (batch.n_seen, batch.turn_starts)
    questions = ["Where is it?", "x"]
    answers = [answer(model, TOKENIZER, one, questions, max_new_tokens=6, keep=True) for one in (batch, loaded)]
    assert answers[0] == answers[1]
    torch.testing.assert_close(logits_after(model, loaded), logits_after(model, batch), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", HYBRID])
def test_static_steps_hide_what_is_padding(architecture) -> None:
    """Steps over layers that stand still in memory, for a graph, equal eager ones over longer than a window."""
    model = tiny(architecture)
    cache = compress(model, TOKENIZER, [TEXT[:50], TEXT[:5], TEXT[:20]], RandomPress(0.5))
    ids, valid = left_padded([[5, 6], [7] * 20, [8] * 9], torch.device("cpu"))
    token = read(model, cache, ids, padding=padding_in(valid, tuple(ids.shape))).argmax(-1)
    twin = cache.fork()
    static = _StaticStep(model, twin, 60, None, torch.device("cpu"))
    start = static.positions.clone()
    static.run()
    static._rewind(start)
    eager = DecodeStep(model, cache, max_new_tokens=60)
    for _ in range(40):
        expected = eager(token)
        torch.testing.assert_close(static(token), expected, **TOLERANCE)
        token = expected.argmax(-1)
    static.close()
    torch.testing.assert_close(logits_after(model, twin), logits_after(model, cache), **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", HYBRID])
def test_a_graph_hides_what_is_padding(architecture) -> None:
    """Answers of rows of different length from a captured graph are those of eager steps."""
    model = tiny(architecture).to("cuda")
    cache = compress(model, TOKENIZER, [TEXT[:50], TEXT[:5], TEXT[:20]], RandomPress(0.5))
    ids, valid = left_padded([[5, 6], [7] * 20, [8] * 9], torch.device("cuda"))
    runs = [generate(model, cache.fork(), ids, 60, attention_mask=valid, graph=graph) for graph in (True, False)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("architecture", ["llama", HYBRID])
def test_many_questions_share_one_context(architecture) -> None:
    """A list of questions to a cache of one row is one batch; each gets the answer that it gets alone."""
    model = tiny(architecture)
    cache = compress(model, TOKENIZER, TEXT[:60], KVzipPress(0.5))
    questions = ["Where?", "Who has the key of the box?", "Why is it", "x"]
    before = (cache.n_seen, cache.resident_bytes)
    got = answer(model, TOKENIZER, cache, questions, max_new_tokens=8)
    assert got == [answer(model, TOKENIZER, cache, question, max_new_tokens=8) for question in questions]
    assert answer(model, TOKENIZER, cache, ["Where?"], max_new_tokens=8) == got[:1]
    assert (cache.n_seen, cache.resident_bytes) == before
    with pytest.raises(InvalidArgumentError, match="kept in its own row"):
        answer(model, TOKENIZER, cache, questions, keep=True)


def test_one_question_goes_to_all_rows() -> None:
    """A text or a list of one is asked of every row; another number of questions than rows is refused."""
    model, contexts, press = tiny(), [TEXT[:40], TEXT[:9]], RandomPress(0.5)
    batch = compress(model, TOKENIZER, contexts, press)
    asked = [answer(model, TOKENIZER, one, "Where?", max_new_tokens=8) for one in alone(model, contexts, press)]
    assert answer(model, TOKENIZER, batch, "Where?", max_new_tokens=8) == asked
    assert answer(model, TOKENIZER, batch, ["Where?"], max_new_tokens=8) == asked
    for questions in ([], ["a", "b", "c"]):
        with pytest.raises(InvalidArgumentError, match="one for each of 2 rows"):
            answer(model, TOKENIZER, batch, questions)


def test_what_is_one_context_and_what_is_several() -> None:
    """Texts and sequences of integers are one context; lists of these are several; anything else is refused by name."""
    model = tiny()
    ids = TOKENIZER.encode("some text")
    for one in ("some text", ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy()):
        assert prefill(model, TOKENIZER, one).input_ids.tolist() == [[1, *ids]]
    for several in (["some text", "so"], [ids, ids[:2]], [torch.tensor(ids), "so"], (range(3, 12), [3, 4])):
        done = prefill(model, TOKENIZER, several)
        assert done.valid.tolist() == [[True] * 10, [False] * 7 + [True] * 3]
    assert prefill(model, TOKENIZER, list(torch.tensor([ids, ids]))).input_ids.tolist() == [[1, *ids]] * 2
    assert prefill(model, TOKENIZER, ["some text"]).input_ids.tolist() == [[1, *ids]]
    padded = torch.tensor([ids, ids])  # nobody can tell: it may hold padding
    refused = (["a", ""], "index 1 of 2"), ([], "empty"), ([[1.5]], "token ids"), (3, "token ids"), (padded, "padding")
    for bad, named in refused:
        with pytest.raises(InvalidArgumentError, match=named):
            prefill(model, TOKENIZER, bad)


def test_generate_refuses_masks_it_cannot_keep() -> None:
    """Padding that is not on the left, a mask of another shape, other rows than the cache's, a cache without a note."""
    model = tiny()
    cache = compress(model, TOKENIZER, [TEXT[:40], TEXT[:9]], RandomPress(0.5))
    ids = torch.full((2, 3), 5)
    for mask in ([[1, 1, 0], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]]):
        with pytest.raises(InvalidArgumentError, match="padding on the left"):
            generate(model, cache, ids, 2, attention_mask=torch.tensor(mask))
    with pytest.raises(InvalidArgumentError, match=r"of shape \(2, 3\), got \(2, 4\)"):
        generate(model, cache, ids, 2, attention_mask=torch.ones(2, 4))
    with pytest.raises(CacheMismatchError, match="2 rows of the cache, got 1"):
        generate(model, cache, ids[:1], 2)
    with pytest.raises(UnsupportedCacheError, match="compressed cache"):
        generate(model, DynamicCache(), ids, 2, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert cache.n_seen == 41


@pytest.mark.parametrize("architecture", ["llama", HYBRID])
def test_padding_on_the_right_of_a_context(architecture) -> None:
    """Ragged layers keep none of it, so rows answer as alone; sliding layers hold it without a note, and refuse."""
    model, lengths = tiny(architecture), (40, 9)
    ids, valid = left_padded([TOKENIZER.encode(TEXT[:n]) for n in lengths], torch.device("cpu"))
    ids, valid = (torch.stack([row.roll(n - 40) for row, n in zip(x, lengths, strict=True)]) for x in (ids, valid))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), RandomPress(0.5)(model):
        model(ids, attention_mask=valid.long(), past_key_values=cache)
    batch = RaggedCache.of(cache)
    if architecture == HYBRID:
        with pytest.raises(InvalidArgumentError, match="padded on the left"):
            answer(model, TOKENIZER, batch, "Where?")
        return
    expected = []
    for n in lengths:
        single = DynamicCache(config=model.config)
        with torch.no_grad(), RandomPress(0.5)(model):
            model(torch.tensor([TOKENIZER.encode(TEXT[:n])]), past_key_values=single)
        expected.append(answer(model, TOKENIZER, RaggedCache.of(single), "Where?", max_new_tokens=8))
    assert answer(model, TOKENIZER, batch, "Where?", max_new_tokens=8) == expected


def test_positions_go_on_where_the_model_left_them() -> None:
    """A context whose positions begin late is asked at the positions behind it."""
    model, ids = tiny(), torch.tensor([TOKENIZER.encode(TEXT[:30])])
    late, usual = DynamicCache(), DynamicCache()
    with torch.no_grad(), RandomPress(0.0)(model):
        model(ids, position_ids=100 + torch.arange(30)[None], past_key_values=late)
        model(ids, past_key_values=usual)
    assert next_positions(RaggedCache.of(late)) == [130]
    torch.testing.assert_close(
        logits_after(model, RaggedCache.of(late)), logits_after(model, RaggedCache.of(usual)), **TOLERANCE
    )


def test_a_later_turn_of_ragged_rows_is_not_compressed_wrongly() -> None:
    """Rows that have read different numbers of tokens cannot be compressed further; the error says so."""
    model = tiny()
    batch = compress(model, TOKENIZER, [TEXT[:40], TEXT[:9]], RandomPress(0.5))
    answer(model, TOKENIZER, batch, ["a", "a longer one"], max_new_tokens=4, keep=True)
    with pytest.raises(UnsupportedCacheError, match="equally many tokens"), torch.no_grad(), RandomPress(0.5)(model):
        model(torch.full((2, 3), 5), past_key_values=batch)


def test_rows_can_be_selected_and_repeated_with_their_padding() -> None:
    """What beam search does with rows keeps each row's own padding and positions."""
    model = tiny()
    batch = compress(model, TOKENIZER, [TEXT[:40], TEXT[:9], TEXT[:20]], RandomPress(0.5))
    answer(model, TOKENIZER, batch, ["a", "a longer one", "the longest of them all"], max_new_tokens=4, keep=True)
    expected = logits_after(model, batch)
    picked = batch.fork()
    picked.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(logits_after(model, picked), expected[[2, 0, 0]], **TOLERANCE)
    picked.batch_select_indices(torch.tensor([0, 1]))
    torch.testing.assert_close(logits_after(model, picked), expected[[2, 0]], **TOLERANCE)
    picked.batch_repeat_interleave(2)
    torch.testing.assert_close(logits_after(model, picked), expected[[2, 2, 0, 0]], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.embedded
def test_a_real_model_answers_row_by_row() -> None:
    """SmolLM2 in fp32, KVzip: contexts and questions of different length, two kept turns, token for token."""
    model, tokenizer = load_model("smollm2")
    facts = ["Anna keeps the key of the red box in the kitchen. ", "Ben was born in 1960 in Lima. ", "It rains. "]
    contexts = [facts[0] * 1 + facts[2] * 40, facts[1], facts[2] * 12 + facts[0]]
    press = KVzipPress(0.5)
    batch = compress(model, tokenizer, contexts, press)
    singles = [compress(model, tokenizer, context, press) for context in contexts]
    for row, single in enumerate(singles):
        assert kept(batch, row) == kept(single, 0)
    first = ["Who keeps the key?", "When and where was Ben born, exactly?", "Where is the key?"]
    for questions in (first, ["Why?", "Who?", "Is it so?"]):
        got = answer(model, tokenizer, batch, questions, max_new_tokens=20, keep=True)
        asked = zip(singles, questions, strict=True)
        assert got == [answer(model, tokenizer, one, text, max_new_tokens=20, keep=True) for one, text in asked]
