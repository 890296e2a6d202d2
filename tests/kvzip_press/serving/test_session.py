"""A running batch: every answer is what `answer` gives, whoever joins and leaves meanwhile, and whatever goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvzip_press import KVzipPress, RaggedCache, RandomPress, Sampling, answer, compress
from kvzip_press.decoding.answering import answer_ids, question_ids
from kvzip_press.errors import (
    CacheMismatchError,
    InvalidArgumentError,
    SessionClosedError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from kvzip_press.serving import known_contexts
from kvzip_press.serving import session as session_module
from kvzip_press.serving.row_step import RowStep
from kvzip_press.serving.rows import Rows
from kvzip_press.serving.session import Session
from kvzip_press.serving.stream import Stream
from kvzip_press.testing import ByteTokenizer, tiny_model

QUESTIONS = [
    ("lighthouse", "Who is the keeper?", 9),
    ("archive", "What does room four hold?", 3),
    ("lighthouse", "Where did she come from?", 14),
    ("lighthouse", "x", 1),
    ("archive", "How many rooms are there in the archive of Tolva?", 6),
    ("lighthouse", "Who is the keeper?", 5),
]
Made = Callable[..., Session]


@pytest.fixture
def make(model: Any, tokenizer: ByteTokenizer) -> Made:
    def session(folder: Path | None = None, **options: Any) -> Session:
        options = {"pool_bytes": 10**6, "max_rows": 3, "max_tokens": 90, **options}
        return Session(model, tokenizer, folder, **options)

    return session


@pytest.fixture(scope="module")
def expected(model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]) -> list[list[int]]:
    return [answer_ids(model, tokenizer, caches[c], q, max_new_tokens=n)[0] for c, q, n in QUESTIONS]


def ask_all(session: Session) -> list[Stream]:
    return [session.submit(question, context, max_new_tokens=n) for context, question, n in QUESTIONS]


def bytes_of(session: Session, cache: RaggedCache) -> int:
    return sum(int(layer.packed.cu_seqlens[-1]) for _, layer in cache.ragged_layers()) * session.pool.shape.pair_bytes


def assert_idle(session: Session) -> None:
    """No row and no reader is left, so that every context could be dropped."""
    assert (session.n_running, session.n_waiting) == (0, 0)
    for name in session.pool.names:
        session.pool.drop(name)
    assert session.pool.n_bytes_free == session.pool.n_pairs * session.pool.shape.pair_bytes


@pytest.mark.parametrize("max_rows", [1, 2, 6])
def test_answers_are_those_of_answer_while_rows_join_and_leave(
    max_rows: int, make: Made, folder: Path, expected: list[list[int]]
) -> None:
    session = make(folder, max_rows=max_rows)
    streams = ask_all(session)
    most = 0
    while session.step():
        most = max(most, session.n_running)
    assert most == min(max_rows, 5)
    assert [stream.ids for stream in streams] == expected
    assert_idle(session)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_codes_are_answered_from_as_they_lie_in_the_file(
    architecture: str, tokenizer: ByteTokenizer, make: Made, tmp_path: Path
) -> None:
    """The same codes as `answer` reads, where it reads them: queries are turned instead; others are refused."""
    model = tiny_model(architecture, num_layers=2)
    caches = {
        s: compress(model, tokenizer, "Room four holds maps. " * 4, RandomPress(0.5), storage=s)
        for s in ("int8", "fp8")
    }
    for name, cache in caches.items():
        cache.save(tmp_path / f"{name}.safetensors")
    session = Session(model, tokenizer, tmp_path, pool_bytes=10**6, storage="int8", max_tokens=90)
    session.add("memory", caches["int8"])
    with pytest.raises(UnsupportedCacheError, match=r"stored as int8, as the pool holds it, got one stored as fp8"):
        session.add("other", caches["fp8"])
    with pytest.raises(InvalidArgumentError, match="got one stored as fp8: compress it again with storage='int8'"):
        session.submit("Which?", "fp8")
    for question in ("Which?", "What does room four hold?"):
        expected = answer_ids(model, tokenizer, caches["int8"], question, max_new_tokens=8)[0]
        streams = [session.submit(question, name, max_new_tokens=8) for name in ("int8", "memory")]
        for stream in streams:
            stream.text()
            assert stream.ids == expected
    kept = caches["int8"].fork()
    answer(model, tokenizer, kept, "Which?", max_new_tokens=3, keep=True)
    with pytest.raises(UnsupportedCacheError, match="got one stored as int8 with kept turns"):
        session.add("turns", kept)


def test_a_cache_in_memory_is_asked_about_as_a_file_is(
    make: Made, caches: dict[str, RaggedCache], expected: list[list[int]]
) -> None:
    session = make()
    for name, cache in caches.items():
        session.add(name, cache)
    assert session.names == ["archive", "lighthouse"]
    assert [stream.text() and stream.ids for stream in ask_all(session)] == expected
    assert_idle(session)


def test_pieces_of_an_answer_put_together_are_the_answer(
    make: Made, model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache], folder: Path
) -> None:
    session = make(folder)
    first, second = (session.submit(question, "archive", max_new_tokens=7) for question in ("Which?", "Where?"))
    pieces = list(first)
    assert len(pieces) == 7
    assert "".join(pieces) == answer(model, tokenizer, caches["archive"], "Which?", max_new_tokens=7) == first.text()
    assert second.is_done, "who reads one answer writes all"
    assert "".join(second) == answer(model, tokenizer, caches["archive"], "Where?", max_new_tokens=7)


def test_a_character_is_shown_once_it_is_complete() -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    written = list("  für 5 €  ".encode())
    stream = Stream(Bytes(), lambda one: one.ids.append(written.pop(0)) if written else one.end(), lambda _: None)
    assert list(stream) == ["f", "ü", "r", " 5", " €"]


def test_a_request_without_a_context_is_the_plain_model(make: Made, model: Any, tokenizer: ByteTokenizer) -> None:
    stream = make().submit("Good morning to you", max_new_tokens=6)
    stream.text()
    ids = torch.tensor([question_ids(tokenizer, "Good morning to you")])
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert stream.ids == ids[0, -6:].tolist()


def test_an_end_token_ends_an_answer(
    make: Made, folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make(folder)
    monkeypatch.setattr(session, "_eos", {expected[2][4]})
    stream = session.submit(QUESTIONS[2][1], "lighthouse", max_new_tokens=14)
    stream.text()
    assert stream.ids == expected[2][: expected[2].index(expected[2][4])]
    assert stream.finish_reason == "stop"
    assert_idle(session)


def test_an_answer_ends_where_its_row_has_no_more_room(
    make: Made, folder: Path, model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    """Its tokens are the first of the long answer, and the stream says why it ends; its neighbour goes on."""
    session = make(folder, max_tokens=30)
    long, short = (
        session.submit(question, "archive", max_new_tokens=64) for question in ("What does room four hold?", "x")
    )
    long.text()
    assert (long.finish_reason, short.finish_reason) == ("room", None)
    short.text()
    for stream, question in ((long, "What does room four hold?"), (short, "x")):
        alone = answer_ids(model, tokenizer, caches["archive"], question, max_new_tokens=27)[0]
        n = 30 - len(question_ids(tokenizer, question))
        assert stream.ids == alone[:n] and len(stream.ids) == n
        assert stream.finish_reason == "room"
    n_room = len(short.ids)
    exact = session.submit("x", "archive", max_new_tokens=n_room)
    exact.text()
    assert (exact.ids, exact.finish_reason) == (short.ids, "length"), "as many as were asked for"
    assert_idle(session)


def test_rows_sample_each_with_its_own_seed(
    make: Made, folder: Path, model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    """As `answer` samples alone, whoever shares the batch; PyTorch's own random numbers stay as they are."""
    session, state = make(folder), torch.get_rng_state()
    warm = Sampling(temperature=3.0, top_k=20)
    seeds = [1, 2, None, 1]
    streams = [
        session.submit("Which?", "archive", max_new_tokens=8, sampling=None if seed is None else warm, seed=seed)
        for seed in seeds
    ]
    for stream, seed in zip(streams, seeds, strict=True):
        stream.text()
        sampling = None if seed is None else warm
        alone = answer_ids(
            model, tokenizer, caches["archive"], "Which?", max_new_tokens=8, sampling=sampling, seed=seed
        )
        assert stream.ids == alone[0]
    assert streams[0].ids == streams[3].ids != streams[1].ids
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n_good", [0, 4])
def test_sampling_that_fails_ends_its_own_answer(
    n_good: int, make: Made, folder: Path, expected: list[list[int]]
) -> None:
    """At its first token or later: the others of the batch get theirs from the same step."""
    session, drawn = make(folder), []

    def failing(logits: torch.Tensor) -> torch.Tensor:
        if len(drawn) == n_good:
            raise ZeroDivisionError("no probability")
        drawn.append(1)
        return logits.argmax(-1)

    streams = ask_all(session)
    session._waiting[2].sampler = failing
    with pytest.raises(ZeroDivisionError, match="no probability"):
        streams[2].text()
    assert (streams[2].finish_reason, streams[2].ids) == ("error", expected[2][:n_good])
    for number in (0, 1, 3, 4, 5):
        assert streams[number].text() and streams[number].ids == expected[number]
    assert_idle(session)


def test_a_session_that_is_closed_ends_its_streams(make: Made, folder: Path, expected: list[list[int]]) -> None:
    """Those that run and those that wait raise instead of passing off what there is; what was complete stays."""
    with make(folder, max_rows=2) as session:
        streams = ask_all(session)
        streams[1].text()
        read = iter(streams[0])
        assert next(read)
    session.close()
    assert_idle(session)
    assert streams[1].text() and (streams[1].ids, streams[1].finish_reason) == (expected[1], "length")
    for stream in (streams[0], streams[2], streams[5]):
        stream.cancel()
        with pytest.raises(SessionClosedError, match="closed before its answer"):
            stream.text()
        assert stream.finish_reason == "closed"
    with pytest.raises(SessionClosedError):
        list(read)
    assert 0 < len(streams[0].ids) < 9 and streams[5].ids == []
    with pytest.raises(SessionClosedError, match="got one that was closed"):
        session.submit("Which?", "archive")
    with pytest.raises(SessionClosedError, match="got one that was closed"):
        session.add("more", None)  # type: ignore[arg-type]
    assert session.step() is False


def test_a_session_is_closed_while_other_threads_read(make: Made, folder: Path) -> None:
    """Each reader hears of it, in the middle of its answer or before it; none waits for ever."""
    session, seen, waiting = make(folder, max_tokens=900), [], threading.Semaphore(0)
    streams = [session.submit("Which?", "archive", max_new_tokens=800) for _ in range(4)]
    session._eos = set()

    def read(stream: Stream) -> None:
        run = stream._run

        def run_later(one: Stream) -> None:
            waiting.release()
            run(one)

        stream._run = run_later
        try:
            for _ in stream:
                pass
        except SessionClosedError:
            seen.append(stream)

    threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    with session._lock:  # readers stand before it, so that no answer comes to its end meanwhile
        for thread in threads:
            thread.start()
        for _ in threads:
            assert waiting.acquire(timeout=600)
        while not streams[0].ids:
            session.step()
        session.close()
    for thread in threads:
        thread.join(600)
    assert {id(stream) for stream in seen} == {id(stream) for stream in streams}
    assert [len(stream.ids) > 0 for stream in streams] == [True, True, True, False], "three have rows, one waits"
    assert_idle(session)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_a_model_with_sliding_windows_is_refused(architecture: str, tokenizer: ByteTokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match=r"sliding windows in layers \[0, 2\].*kvzip_press.answer"):
        Session(tiny_model(architecture), tokenizer, pool_bytes=10**6)


@pytest.mark.parametrize("storage", ["int8", "int4", "k8v4"])
def test_codes_are_decoded_into_the_pool(
    storage: str, make: Made, model: Any, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    cache = compress(model, tokenizer, "A lamp of brass stands in the hall. " * 3, RandomPress(0.4, storage=storage))
    cache.save(tmp_path / "hall.safetensors")
    stream = make(tmp_path).submit("Which lamp?", "hall", max_new_tokens=5)
    stream.text()
    assert stream.ids == answer_ids(model, tokenizer, cache, "Which lamp?", max_new_tokens=5)[0]


def test_kept_turns_belong_to_the_context(make: Made, model: Any, tokenizer: ByteTokenizer, tmp_path: Path) -> None:
    cache = compress(model, tokenizer, "A lamp of brass stands in the hall. " * 3, KVzipPress(0.5))
    answer(model, tokenizer, cache, "Which lamp?", max_new_tokens=5, keep=True)
    cache.save(tmp_path / "hall.safetensors")
    session = make(tmp_path)
    stream = session.submit("And where?", "hall", max_new_tokens=6)
    stream.text()
    assert stream.ids == answer_ids(model, tokenizer, cache, "And where?", max_new_tokens=6)[0]
    with_a_row_index = cache.fork()
    with_a_row_index.batch_repeat_interleave(1)
    session.add("again", with_a_row_index)
    again = session.submit("And where?", "again", max_new_tokens=6)
    again.text()
    assert again.ids == stream.ids


def test_contexts_that_do_not_fit_together_take_turns(
    make: Made,
    folder: Path,
    caches: dict[str, RaggedCache],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for the larger one alone: each is loaded when it is asked about, and waits unread while the other is."""
    loaded: list[str] = []
    load = known_contexts.packed_file
    monkeypatch.setattr(
        known_contexts, "packed_file", lambda path, *rest: loaded.append(path.stem) or load(path, *rest)
    )
    size = max(bytes_of(make(), cache) for cache in caches.values())
    session = make(folder, pool_bytes=size)
    streams = ask_all(session)
    session.step()
    assert (session.n_running, session.n_waiting) == (1, 5)
    assert session.pool.names == ["lighthouse"]
    assert [stream.text() and stream.ids for stream in streams] == expected
    assert loaded == ["lighthouse", "archive"] * 2 + ["lighthouse"]
    assert_idle(session)


def test_a_context_that_never_fits_fails_its_own_requests(
    make: Made, folder: Path, caches: dict[str, RaggedCache], expected: list[list[int]]
) -> None:
    session = make(folder, pool_bytes=bytes_of(make(), caches["archive"]))
    first, second = ask_all(session)[:2]
    with pytest.raises(InvalidArgumentError, match=r"expected a context that fits into a pool of \d+ bytes"):
        first.text()
    with pytest.raises(InvalidArgumentError, match="got 'lighthouse'"):
        list(first)
    assert second.text() and second.ids == expected[1]


def test_a_file_that_comes_while_others_are_read_is_asked_about(
    make: Made, folder: Path, model: Any, tokenizer: ByteTokenizer, expected: list[list[int]]
) -> None:
    session = make(folder)
    running = session.submit(QUESTIONS[0][1], "lighthouse", max_new_tokens=9)
    session.step()
    cache = compress(model, tokenizer, "A lamp of brass stands in the hall.", RandomPress(0.5))
    with pytest.raises(InvalidArgumentError, match="expected the name of a context, got 'hall'"):
        session.submit("Which lamp?", "hall")
    cache.save(folder / "hall.safetensors")
    stream = session.submit("Which lamp?", "hall", max_new_tokens=4)
    assert stream.text() == answer(model, tokenizer, cache, "Which lamp?", max_new_tokens=4)
    assert running.text() and running.ids == expected[0]


def test_a_file_that_changes_is_read_again_and_running_answers_keep_the_old_one(
    make: Made, folder: Path, caches: dict[str, RaggedCache], expected: list[list[int]]
) -> None:
    session = make(folder)
    before = session.submit(QUESTIONS[0][1], "lighthouse", max_new_tokens=9)
    session.step()
    caches["archive"].save(folder / "lighthouse.safetensors")
    after = session.submit(QUESTIONS[1][1], "lighthouse", max_new_tokens=3)
    assert after.text() and after.ids == expected[1]
    assert before.text() and before.ids == expected[0]
    assert_idle(session)


def test_a_damaged_file_fails_its_own_requests(make: Made, folder: Path, expected: list[list[int]]) -> None:
    """The metadata are whole, a pair is not: that is seen when the pairs are read."""
    path = folder / "archive.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    session = make(folder)
    streams = ask_all(session)
    for number, stream in enumerate(streams):
        if QUESTIONS[number][0] == "archive":
            with pytest.raises(InvalidArgumentError, match="SHA-256") as raised:
                stream.text()
            assert str(folder) not in str(raised.value)
        else:
            assert stream.text() and stream.ids == expected[number]
    with pytest.raises(InvalidArgumentError, match="SHA-256"):
        session.submit("Now?", "archive")
    assert_idle(session)


def test_a_cancelled_answer_leaves_its_row_to_others(make: Made, folder: Path, expected: list[list[int]]) -> None:
    session = make(folder, max_rows=2)
    streams = ask_all(session)
    session.step()
    streams[0].cancel()
    streams[4].cancel()
    assert (session.n_running, session.n_waiting) == (1, 3)
    assert streams[0].text() != "" and streams[4].text() == ""
    for number in (1, 2, 3, 5):
        assert streams[number].text() and streams[number].ids == expected[number]
    streams[1].cancel()
    assert streams[1].ids == expected[1], "what is done stays"
    assert [streams[number].finish_reason for number in (0, 1, 4)] == ["cancelled", "length", "cancelled"]
    assert_idle(session)


def test_what_fails_in_a_request_is_its_own(
    make: Made, folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make(folder)
    join, calls = Rows.join, []

    def failing(self: Rows, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return join(self, *arguments)

    monkeypatch.setattr(Rows, "join", failing)
    streams = ask_all(session)
    with pytest.raises(RuntimeError, match="out of memory"):
        streams[1].text()
    for number in (0, 2, 3, 4, 5):
        assert streams[number].text() and streams[number].ids == expected[number]
    assert_idle(session)


def test_a_step_that_fails_or_is_interrupted_is_run_again(
    make: Made, folder: Path, model: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way through the layers: what they wrote already is written again. So it is if tokens were not looked at."""
    session, fails = make(folder), [KeyboardInterrupt(), RuntimeError("once")]
    streams = ask_all(session)
    session.step()
    lengths = [len(stream.ids) for stream in streams]

    def fail(*_: Any) -> None:
        if fails:
            raise fails.pop()

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        for kind in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(kind):
                session.step()
            assert [len(stream.ids) for stream in streams] == lengths
        with monkeypatch.context() as patched:
            patched.setattr(session_module, "next_tokens", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.step()
        assert [len(stream.ids) for stream in streams] == lengths
        assert [stream.text() and stream.ids for stream in streams] == expected
    finally:
        handle.remove()
    assert_idle(session)


def test_an_interrupt_while_a_question_is_read_leaves_it_waiting(
    make: Made, folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make(folder)
    stream = session.submit(QUESTIONS[0][1], "lighthouse", max_new_tokens=9)
    with monkeypatch.context() as patched:
        patched.setattr(Rows, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.step()
    assert (session.n_running, session.n_waiting) == (0, 1)
    assert stream.text() and stream.ids == expected[0]
    assert_idle(session)


def test_several_threads_wait_each_for_its_own_answer(make: Made, folder: Path, expected: list[list[int]]) -> None:
    session = make(folder, max_rows=4)
    got: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        context, question, n = QUESTIONS[number]
        stream = session.submit(question, context, max_new_tokens=n)
        assert "".join(stream) == stream.text()
        got[number] = stream.ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert got == dict(enumerate(expected))
    assert_idle(session)


def test_weights_that_change_are_noticed(tokenizer: ByteTokenizer) -> None:
    model = tiny_model("llama", num_layers=2, seed=3)
    session = Session(model, tokenizer, pool_bytes=10**6, max_tokens=90)
    session.add("hall", compress(model, tokenizer, "A lamp of brass.", RandomPress(0.5)))
    session.submit("Which?", "hall", max_new_tokens=2).text()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(CacheMismatchError, match="expected the weights and adapters with which the session began"):
        session.submit("Which?", "hall", max_new_tokens=2).text()


def test_a_cache_that_cannot_be_shared_is_refused(
    make: Made, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    rows = caches["archive"].fork()
    rows.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedCacheError, match="expected a cache of one context"):
        make().add("rows", rows)
    other = tiny_model("llama", num_layers=2, seed=1)
    with pytest.raises(CacheMismatchError, match="made by another model"):
        make().add("other", compress(other, tokenizer, "Some text.", RandomPress(0.5)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_rows": 0}, "max_rows as a whole number of 1 and more, got 0"),
        ({"max_rows": 2.5}, "max_rows as a whole number of 1 and more, got 2.5"),
        ({"max_tokens": "3"}, "max_tokens as a whole number of 1 and more, got '3'"),
        ({"pool_bytes": "1GB"}, "pool_bytes as a whole number of 1 and more, got '1GB'"),
        ({"pool_bytes": float("nan")}, "pool_bytes as a whole number of 1 and more, got nan"),
        ({"graph": "no"}, "expected graph to be True, False or None, got 'no'"),
        ({"tokenizer": None}, "expected a tokenizer, got None"),
        ({"model": "smollm2"}, r"load it first, model, tokenizer = load_model\('smollm2'\)"),
    ],
)
def test_what_a_session_is_begun_with_is_checked(
    given: dict[str, Any], message: str, model: Any, tokenizer: ByteTokenizer
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Session(**({"model": model, "tokenizer": tokenizer, "pool_bytes": 10**6} | given))


def test_a_pool_takes_bytes_as_one_writes_them(model: Any, tokenizer: ByteTokenizer) -> None:
    session = Session(model, tokenizer, pool_bytes=1e6)  # type: ignore[arg-type]
    assert session.pool.shape == Session(model, tokenizer, pool_bytes=10**6).pool.shape


def test_what_is_asked_has_to_fit(make: Made, folder: Path, model: Any, tokenizer: ByteTokenizer) -> None:
    session = make(folder)
    with pytest.raises(InvalidArgumentError, match="room for an answer in a row of 90 tokens, got 93: ask a shorter"):
        session.submit("0123456789" * 9, "archive")
    with pytest.raises(InvalidArgumentError, match=r"expected sampling=Sampling\(temperature=...\) with seed=3"):
        session.submit("Which?", "archive", seed=3)
    with pytest.raises(InvalidArgumentError, match="expected sampling as Sampling"):
        session.submit("Which?", "archive", sampling=0.7)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="max_new_tokens as a whole number of 1 and more, got 0"):
        session.submit("Which?", "archive", max_new_tokens=0)
    with pytest.raises(InvalidArgumentError, match="expected one question"):
        session.submit(None, "archive")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="expected the name of a context, got 'archive'"):
        make().submit("Which?", "archive")
    short = tiny_model("llama", num_layers=2, max_position_embeddings=64)
    near_its_end = Session(short, tokenizer, pool_bytes=10**6, max_tokens=60)
    near_its_end.add("hall", compress(short, tokenizer, "A lamp of brass stands in the hall.", RandomPress(0.5)))
    with pytest.raises(InvalidArgumentError, match="within the model's 64 positions, got up to"):
        near_its_end.submit("Which lamp?", "hall", max_new_tokens=30).text()


@torch.no_grad()
def test_a_row_sees_nothing_of_what_requests_before_it_have_left(make: Made, model: Any) -> None:
    """In a batch of uneven rows, the shorter one's buffer goes on with what was there; the logits show every key."""
    rows = make(max_rows=2)._rows
    rows.keys.normal_()
    rows.values.normal_()
    rows.join(model, [5, 6, 7], 0)
    rows.join(model, list(range(5, 15)), 0)
    got = RowStep(model, rows)([9, 10])
    for own, ids in zip(got, ([5, 6, 7, 9], [*range(5, 15), 10]), strict=True):
        torch.testing.assert_close(own, model(torch.tensor([ids])).logits[0, -1], rtol=1e-4, atol=1e-4)
