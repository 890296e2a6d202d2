"""Decode steps over static layers write what eager decoding writes; graphs replay them on a GPU."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import KVzipPress, RandomPress, compress, get_press
from kvzip_press.decoding import capture
from kvzip_press.decoding.generation import generate
from kvzip_press.decoding.sampling import Sampling
from kvzip_press.decoding.step import DecodeStep, _compiled_layers, _StaticStep
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.testing import ARCHITECTURES, ByteTokenizer, tiny_model

N_CONTEXT, N_QUESTION, N_STEPS = 40, 3, 40
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def asked(model, *, batch: int = 1, ratio: float = 0.5):
    """A compressed cache that has read a question, and the logits of its last token."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (batch, N_CONTEXT), generator=generator).to(device)
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool))
    cache = done.evict(RandomPress(ratio).score(done))
    question = torch.randint(3, 128, (batch, N_QUESTION), generator=generator).to(device)
    positions = N_CONTEXT + torch.arange(N_QUESTION, device=device)[None].expand(batch, -1)
    with torch.no_grad():
        logits = model(input_ids=question, position_ids=positions, past_key_values=cache, use_cache=True).logits
    return cache, logits[:, -1].argmax(-1)


def run(step, token, n_steps=N_STEPS):
    """Greedy tokens and the logits of every step."""
    tokens, logits = [], []
    for _ in range(n_steps):
        logits.append(step(token).clone())
        token = logits[-1].argmax(-1)
        tokens.append(token.tolist())
    return tokens, torch.stack(logits)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_static_step_equals_an_eager_step(architecture, batch) -> None:
    """Over more steps than a sliding window is long; a trial step before leaves no trace."""
    model = tiny_model(architecture)
    cache, token = asked(model, batch=batch)
    twin = cache.fork()
    static = _StaticStep(model, twin, N_STEPS, None, torch.device("cpu"))
    start = static.positions.clone()
    static.run()
    static._rewind(start)
    expected, expected_logits = run(DecodeStep(model, cache, max_new_tokens=N_STEPS), token)
    got, got_logits = run(static, token)
    assert got == expected
    torch.testing.assert_close(got_logits, expected_logits, **TOLERANCE)


@pytest.mark.parametrize("name", ["none", "random"])
def test_static_steps_run_inside_a_press_that_evicts_no_more(name) -> None:
    """As ``generate`` inside ``with press(model):`` takes them on a GPU, behind the prompt that the press has seen."""
    model = tiny_model()
    cache, token = asked(model)
    static = _StaticStep(model, cache.fork(), N_STEPS, None, torch.device("cpu"))
    expected, expected_logits = run(DecodeStep(model, cache, max_new_tokens=N_STEPS), token)
    with get_press(name)(model):
        got, got_logits = run(static, token)
    assert got == expected
    torch.testing.assert_close(got_logits, expected_logits, **TOLERANCE)


@pytest.mark.parametrize("n_steps", [1, 5, N_STEPS])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_the_cache_goes_on_after_static_steps(architecture, n_steps) -> None:
    """After ``close`` a question behind the decoded tokens gets the same logits, sliding layers included."""
    model = tiny_model(architecture)
    cache, token = asked(model)
    twin = cache.fork()
    static = _StaticStep(model, twin, N_STEPS, None, torch.device("cpu"))
    run(DecodeStep(model, cache, max_new_tokens=N_STEPS), token, n_steps)
    run(static, token, n_steps)
    static.close()
    assert twin.get_seq_length() == cache.get_seq_length() == N_CONTEXT + N_QUESTION + n_steps
    assert twin.resident_bytes >= cache.resident_bytes > 0
    more = {"input_ids": torch.tensor([[7, 8, 9]]), "position_ids": twin.get_seq_length() + torch.arange(3)[None]}
    with torch.no_grad():
        logits = [model(**more, past_key_values=one, use_cache=True).logits for one in (cache, twin)]
    torch.testing.assert_close(*logits, **TOLERANCE)


def test_static_steps_move_and_allocate_nothing() -> None:
    """A hundred steps write into the room that was made for them: same buffers, and the packed pairs untouched."""
    model = tiny_model(max_position_embeddings=256)
    cache, token = asked(model)
    static = _StaticStep(model, cache, 100, None, torch.device("cpu"))
    layer = cache.layers[0]
    before = [tensor.data_ptr() for tensor in layer.tensors]
    packed = copy.deepcopy(layer.packed.columns["keys"])
    run(static, token, 100)
    assert [tensor.data_ptr() for tensor in layer.tensors] == before
    assert layer.tail.length == N_QUESTION + 100
    torch.testing.assert_close(layer.packed.columns["keys"], packed, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_compiled_layers_compute_the_same(architecture) -> None:
    """The parts around attention go through torch.compile, in few graphs for all layers, and come back eager."""
    from torch._dynamo.testing import CompileCounter

    model = tiny_model(architecture, num_layers=6)
    cache, token = asked(model)
    plain = _StaticStep(model, cache.fork(), 4, None, torch.device("cpu"))
    static = _StaticStep(model, cache, 4, None, torch.device("cpu"))
    static.token_ids.copy_(token[:, None])
    counter = CompileCounter()
    torch._dynamo.reset()
    with _compiled_layers(model, static.cache, backend=counter) as compiled:
        got = static.run(compiled)
    torch.testing.assert_close(got, plain(token), **TOLERANCE)
    assert 0 < counter.frame_count <= 6
    assert "forward" not in model.model.layers[0].__dict__


def test_where_a_graph_is_impossible_it_is_said(caplog) -> None:
    """On a CPU a step is eager with a reason; asked for by name, a graph raises; so does a step too many."""
    model = tiny_model()
    cache, token = asked(model)
    step = DecodeStep(model, cache, max_new_tokens=1)
    assert (step.captured, step.reason) == (False, "the model is on cpu")
    step(token)
    with pytest.raises(InvalidArgumentError, match="at most max_new_tokens"):
        step(token)
    with pytest.raises(InvalidArgumentError, match="but the model is on cpu"):
        DecodeStep(model, cache, max_new_tokens=1, graph=True)
    with pytest.raises(InvalidArgumentError, match="compile=True"):
        DecodeStep(model, cache, max_new_tokens=1, compile=True)
    with pytest.raises(InvalidArgumentError, match="max_new_tokens >= 1, got 0"):
        DecodeStep(model, cache, max_new_tokens=0)


class Rerun:
    """Stands in for a captured graph: runs the step anew."""

    def __init__(self, run) -> None:
        self.replay = run


def test_a_captured_step_is_tried_undone_and_replayed(monkeypatch) -> None:
    """Without a GPU, with a stand-in for the graph; a capture that fails leaves an eager step with the reason."""

    def captured(run, device, *, undo):
        assert device.type == "cpu"
        for _ in range(2):
            run()
            undo()
        return Rerun(run)

    monkeypatch.setattr(capture, "captured", captured)
    monkeypatch.setattr(capture, "reason_against", lambda *_: None)
    model = tiny_model()
    cache, token = asked(model)
    expected, _ = run(DecodeStep(model, cache.fork(), max_new_tokens=5, graph=False), token, 5)
    with DecodeStep(model, cache.fork(), max_new_tokens=5, graph=True) as step:
        assert (step.captured, step.reason) == (True, None)
        assert run(step, token, 5)[0] == expected

    def failing(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(capture, "captured", failing)
    step = DecodeStep(model, cache, max_new_tokens=5)
    assert (step.captured, step.reason) == (False, "the capture failed: no")
    assert run(step, token, 5)[0] == expected


def test_generate_equals_transformers_for_a_batch() -> None:
    """Every row is what transformers writes for it; rows end at their own end token."""
    model, ids = tiny_model(), torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(3))
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[:, 20:].tolist()
    assert generate(model, DynamicCache(config=model.config), ids, 12) == expected
    stop = expected[0][4]
    ended = generate(model, DynamicCache(config=model.config), ids, 12, eos_ids={stop})
    assert ended == [row[: row.index(stop)] if stop in row else row for row in expected]


def test_sampling_is_seeded_and_narrowed() -> None:
    """The same seed gives the same tokens, another one others; top_k=1 is greedy."""
    model = tiny_model()
    cache = compress(model, ByteTokenizer(), "some context to be read", KVzipPress(0.5))
    ids = torch.tensor([[5, 6]])

    def sampled(**options):
        return generate(model, cache.fork(), ids, 12, sampling=Sampling(**options))

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert sampled(top_k=1) == generate(model, cache.fork(), ids, 12)
    assert sampled(top_p=1e-6) == generate(model, cache.fork(), ids, 12)
    for bad in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(InvalidArgumentError, match="expected"):
            Sampling(**bad)


def test_a_streamer_gets_prompt_and_tokens() -> None:
    """As transformers' own generate hands them on: the prompt, then token by token, then the end."""

    class Streamer:
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    model, streamer, ids = tiny_model(), Streamer(), torch.tensor([[5, 6]])
    [tokens] = generate(model, DynamicCache(config=model.config), ids, 4, streamer=streamer)
    assert streamer.pieces == [[5, 6], *([token] for token in tokens)]
    assert streamer.ended
    with pytest.raises(InvalidArgumentError, match="one row for a streamer, got 2"):
        generate(model, DynamicCache(config=model.config), ids.expand(2, -1), 4, streamer=streamer)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graph_writes_what_eager_steps_write(architecture, compiled) -> None:
    """Token for token, with room for the tail to grow past a block."""
    model = tiny_model(architecture, max_position_embeddings=512).to("cuda")
    cache, token = asked(model)
    twin = cache.fork()
    expected, _ = run(DecodeStep(model, cache, max_new_tokens=300, graph=False), token, 300)
    with DecodeStep(model, twin, max_new_tokens=300, graph=True, compile=compiled) as step:
        got, _ = run(step, token, 300)
    assert got == expected
    assert twin.get_seq_length() == cache.get_seq_length()


@pytest.mark.gpu
def test_a_capture_that_fails_falls_back_with_a_reason(caplog) -> None:
    """A layer that waits for the device cannot be captured: the step is eager, says why, and is right."""
    model = tiny_model().to("cuda")
    cache, token = asked(model)
    expected, _ = run(DecodeStep(model, cache.fork(), max_new_tokens=5, graph=False), token, 5)
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    with caplog.at_level(logging.WARNING):
        step = DecodeStep(model, cache, max_new_tokens=5)
    assert not step.captured
    assert "capture" in str(step.reason)
    assert "without a CUDA graph" in caplog.text
    got, _ = run(step, token, 5)
    handle.remove()
    assert got == expected


@pytest.mark.gpu
def test_a_decode_step_allocates_nothing() -> None:
    """A hundred replays leave the allocator as it was, and the packed pairs where they were."""
    model = tiny_model(max_position_embeddings=512).to("cuda")
    cache, token = asked(model)
    step = DecodeStep(model, cache, max_new_tokens=110, graph=True)
    run(step, token, 2)
    torch.cuda.synchronize()
    pointers = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(100):
        step(token)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors] == pointers
