"""Captured steps of a session write what eager ones write, and no row that joins or leaves needs a new capture."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraph, record_graphs

from kvzip_press import RaggedCache, RandomPress, Sampling, compress
from kvzip_press.decoding import capture
from kvzip_press.decoding.answering import answer_ids
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.watching import computing
from kvzip_press.serving.row_step import RowStep
from kvzip_press.serving.session import Session
from kvzip_press.serving.stream import Stream
from kvzip_press.testing import ByteTokenizer, tiny_model

ASKED = [  # one context twice at a time, others, none
    ("lighthouse", "Who is the keeper?", 9, None),
    ("archive", "What does room four hold?", 4, 7),
    (None, "Good morning to you", 6, None),
    ("lighthouse", "Where did she come from?", 12, 3),
    ("archive", "x", 5, None),
    (None, "And to you", 3, 5),
    ("lighthouse", "Who is the keeper?", 7, 7),
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    return record_graphs(monkeypatch)


def opened(model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache], **options: Any) -> Session:
    session = Session(model, tokenizer, **{"pool_bytes": 10**6, "max_rows": 3, "max_tokens": 90, **options})
    for name, cache in caches.items():
        session.add(name, cache)
    return session


def ask(session: Session) -> list[Stream]:
    return [
        session.submit(question, context, max_new_tokens=n, sampling=None if seed is None else Sampling(2.0), seed=seed)
        for context, question, n, seed in ASKED
    ]


def written(session: Session) -> list[list[int]]:
    streams = ask(session)
    while session.step():
        pass
    assert all(stream.error is None for stream in streams)
    return [stream.ids for stream in streams]


def n_rows(graph: RecordedGraph) -> int:
    return graph.output.shape[0]


@pytest.mark.parametrize(("max_rows", "sizes"), [(1, [1]), (3, [3, 2, 1]), (6, [6, 4, 1])])
def test_rows_join_and_leave_captured_steps(
    max_rows: int,
    sizes: list[int],
    graphs: list[RecordedGraph],
    model: Any,
    tokenizer: ByteTokenizer,
    caches: dict[str, RaggedCache],
) -> None:
    """A graph a size, however often the rows change; eager, and `answer` alone, give the same tokens."""
    eager = opened(model, tokenizer, caches, max_rows=max_rows, graph=False)
    expected = written(eager)
    assert (eager.captured, eager.reason, graphs) == (False, "graph=False was asked for", [])
    session = opened(model, tokenizer, caches, max_rows=max_rows)
    assert (session.captured, session.reason) == (False, None)
    assert written(session) == expected
    assert (session.captured, session.reason) == (True, None)
    assert written(session) == expected
    assert [n_rows(graph) for graph in graphs] == sizes
    assert sum(graph.n_replays for graph in graphs) >= 2 * (12 - 1)  # the first token comes with the question
    for ids, (context, question, n, seed) in zip(expected, ASKED, strict=True):
        if context is not None:
            sampling = None if seed is None else Sampling(2.0)
            alone = answer_ids(
                model, tokenizer, caches[context], question, max_new_tokens=n, sampling=sampling, seed=seed
            )
            assert ids == alone[0]


@pytest.mark.parametrize("context", ["archive", None])
def test_an_answer_grows_in_one_captured_step(
    context: str | None,
    graphs: list[RecordedGraph],
    model: Any,
    tokenizer: ByteTokenizer,
    caches: dict[str, RaggedCache],
) -> None:
    """Far beyond the length that it had when the step was captured: no length is a part of the graph."""
    ids = []
    for graph in (False, None):
        session = opened(model, tokenizer, caches, graph=graph)
        session._eos = set()
        stream = session.submit("x", context, max_new_tokens=40)
        stream.text()
        ids.append(stream.ids)
    assert ids[0] == ids[1]
    assert (len(ids[1]), len(graphs)) == (40, 1)


@pytest.mark.parametrize("architecture", ["qwen3", "phi3"])
def test_a_pool_of_codes_is_read_by_captured_steps(
    architecture: str, graphs: list[RecordedGraph], tokenizer: ByteTokenizer
) -> None:
    """Queries are turned by the length of the context that a row reads now."""
    model = tiny_model(architecture, num_layers=2)
    texts = {"lighthouse": "The keeper is Ingrid. " * 4, "archive": "Room four holds maps. " * 2}
    caches = {name: compress(model, tokenizer, text, RandomPress(0.5), storage="int8") for name, text in texts.items()}
    session = opened(model, tokenizer, caches, storage="int8")
    assert written(session) == written(opened(model, tokenizer, caches, storage="int8", graph=False))
    assert len(graphs) == 3


def test_contexts_come_and_go_in_the_pool_between_captured_steps(
    graphs: list[RecordedGraph], model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    """Room for the larger one alone, so that each is loaded over the other; nothing that a graph reads moves."""
    size = max(sum(int(layer.packed.cu_seqlens[-1]) for _, layer in cache.ragged_layers()) for cache in caches.values())
    expected = written(opened(model, tokenizer, caches, graph=False))
    one = opened(model, tokenizer, {}, graph=False)
    session = opened(model, tokenizer, caches, pool_bytes=size * one.pool.shape.pair_bytes)
    pool, rows = session.pool, session._rows
    assert isinstance(pool.keys, torch.Tensor) and isinstance(pool.values, torch.Tensor)
    static = (pool.keys, pool.values, pool.begins, pool.lengths, rows.keys, rows.values, session._read_tokens._inputs)
    addresses = [tensor.data_ptr() for tensor in static]
    assert written(session) == expected
    assert written(session) == expected
    now = pool.keys, pool.values, pool.begins, pool.lengths, rows.keys, rows.values, session._read_tokens._inputs
    assert [tensor.data_ptr() for tensor in now] == addresses
    assert len(graphs) == len({n_rows(graph) for graph in graphs}) > 1


def test_where_a_graph_is_impossible_it_is_said(
    model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    session = opened(model, tokenizer, caches)
    written(session)
    assert (session.captured, session.reason) == (False, "the model is on cpu")
    with pytest.raises(InvalidArgumentError, match="steps a CUDA graph can hold, but the model is on cpu"):
        opened(model, tokenizer, caches, graph=True)


def test_a_capture_that_fails_leaves_eager_steps_with_the_reason(
    graphs: list[RecordedGraph],
    model: Any,
    tokenizer: ByteTokenizer,
    caches: dict[str, RaggedCache],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A layer that waits for the device: said once, tried once, and the answers are right."""
    expected = written(opened(model, tokenizer, caches, graph=False))
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    try:
        session = opened(model, tokenizer, caches)
        with caplog.at_level(logging.WARNING):
            assert written(session) == expected
        assert (session.captured, graphs) == (False, [])
        assert str(session.reason).startswith("the capture failed: operation not permitted")
        assert caplog.text.count("without a CUDA graph: the capture failed") == 1
        asked_for = opened(model, tokenizer, caches, graph=True)
        stream = asked_for.submit("Who?", "archive")
        for _ in range(2):
            with pytest.raises(InvalidArgumentError, match="can hold, but the capture failed"):
                stream.text()
    finally:
        handle.remove()


def test_a_capture_that_others_keep_from_being_made_is_made_later(
    graphs: list[RecordedGraph], model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    expected = answer_ids(model, tokenizer, caches["archive"], "Which?", max_new_tokens=6)[0]
    session, inside, done = opened(model, tokenizer, caches), threading.Event(), threading.Event()
    stream = session.submit("Which?", "archive", max_new_tokens=6)

    def compute() -> None:
        with computing():
            inside.set()
            done.wait(60)

    other = threading.Thread(target=compute)
    other.start()
    inside.wait(60)
    for _ in range(3):
        session.step()
    assert (session.captured, session.reason) == (False, capture.OTHERS_COMPUTE)
    done.set()
    other.join(60)
    assert stream.text() and stream.ids == expected
    assert (session.captured, session.reason, len(graphs)) == (True, None, 1)


def test_a_model_that_was_moved_is_captured_anew(
    graphs: list[RecordedGraph], tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    """The weights are the same elsewhere: a graph would go on reading where they were."""
    model = tiny_model("llama", num_layers=2)
    session = opened(model, tokenizer, caches)
    expected = written(session)
    n_before = len(graphs)
    moved = model.model.layers[1].mlp.up_proj.weight
    old, moved.data = moved.data, moved.data.clone()
    old.fill_(torch.nan)
    assert written(session) == expected
    assert len(graphs) == 2 * n_before


@torch.no_grad()
def test_a_step_beyond_the_room_of_a_row_is_refused(
    model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    rows = opened(model, tokenizer, caches, max_tokens=4)._rows
    rows.join(model, [5, 6, 7, 8], 0)
    with pytest.raises(InvalidArgumentError, match=r"expected rows of less than 4 tokens, got \[4\]"):
        RowStep(model, rows)([9])


@pytest.mark.triton
@pytest.mark.slow
def test_the_kernel_reads_rows_and_contexts_in_recorded_steps(
    graphs: list[RecordedGraph], model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    """With Triton a row's own tokens are read by the pool's kernel too, and work lists are made within the graph."""
    asked = [("lighthouse", 3), ("archive", 2), (None, 2)]
    session = opened(model, tokenizer, caches, max_rows=2)
    streams = [session.submit("Who?", context, max_new_tokens=n) for context, n in asked]
    while session.step():
        pass
    assert session.captured and graphs
    for stream, (context, n) in zip(streams, asked, strict=True):
        if context is not None:
            assert stream.ids == answer_ids(model, tokenizer, caches[context], "Who?", max_new_tokens=n)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["model", "int8"])
@pytest.mark.parametrize("max_rows", [1, 3, 6])
def test_graphs_write_what_eager_steps_write(max_rows: int, storage: str, tokenizer: ByteTokenizer) -> None:
    model = tiny_model("llama", num_layers=2).to("cuda")
    texts = {"lighthouse": "The keeper is Ingrid. " * 4, "archive": "Room four holds maps. " * 2}
    caches = {name: compress(model, tokenizer, text, RandomPress(0.5), storage=storage) for name, text in texts.items()}
    expected = written(opened(model, tokenizer, caches, max_rows=max_rows, storage=storage, graph=False))
    session = opened(model, tokenizer, caches, max_rows=max_rows, storage=storage, graph=True)
    for _ in range(2):
        assert written(session) == expected
    assert (session.captured, session.reason) == (True, None)


@pytest.mark.gpu
def test_a_replayed_step_neither_waits_nor_allocates(tokenizer: ByteTokenizer) -> None:
    """The scheduler waits once a step, for the tokens; the step itself never does."""
    model = tiny_model("llama", num_layers=2).to("cuda")
    session = opened(model, tokenizer, {}, graph=True, max_rows=4)
    session._eos = set()
    for _ in range(3):
        session.submit("Good morning", max_new_tokens=40)
    for _ in range(4):
        session.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            session._read_tokens([5, 6, 7])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_a_folder_is_answered_from_on_a_gpu(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    model = tiny_model("llama", num_layers=2).to("cuda")
    cache = compress(model, tokenizer, "The keeper is Ingrid. " * 4, RandomPress(0.5))
    cache.save(tmp_path / "lighthouse.safetensors")
    with Session(model, tokenizer, tmp_path, pool_bytes=10**6, max_tokens=90) as session:
        streams = [session.submit("Who?", "lighthouse", max_new_tokens=8) for _ in range(5)]
        expected = answer_ids(model, tokenizer, cache, "Who?", max_new_tokens=8)[0]
        assert [stream.text() and stream.ids for stream in streams] == [expected] * 5
