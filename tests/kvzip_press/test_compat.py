"""Differences between versions of transformers, each played on the version that is installed."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import MethodType
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvzip_press import KVzipPress, RaggedCache, compat, compress
from kvzip_press.errors import UnsupportedModelError
from kvzip_press.testing import ByteTokenizer, tiny_model

IDS = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(0))
PRESS = KVzipPress(0.5, tokenizer=ByteTokenizer())


class _Output(dict):  # type: ignore[type-arg]
    """An output as a mapping with attributes, and no field that was not given."""

    __getattr__ = dict.__getitem__


def with_cache_as(name: str, form: Any) -> Any:
    """A decoder whose forward takes its cache as ``name``, and returns what ``form`` makes of state and cache."""
    decoder = tiny_model().model
    original = decoder.forward

    def run(cache: Any, kwargs: dict[str, Any]) -> Any:
        out = original(**kwargs, **compat.cache_argument(type(decoder), cache))
        return form(out.last_hidden_state, compat.cache_after(out))

    def newer(self: Any, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return run(cache, {"input_ids": input_ids, **kwargs})

    def older(self: Any, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return run(past_key_values, {"input_ids": input_ids, **kwargs})

    decoder.forward = MethodType(newer if name == "cache" else older, decoder)
    return decoder


FORMS = {
    "cache": lambda state, cache: _Output(last_hidden_state=state, cache=cache),
    "past_key_values": lambda state, cache: _Output(last_hidden_state=state, past_key_values=cache),
    "a tuple": lambda state, cache: (state, cache),
    "nothing": lambda state, cache: _Output(last_hidden_state=state),
}


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_forward_may_take_and_return_its_cache_by_either_name(name, form) -> None:
    """transformers 5.24 renamed ``past_key_values`` to ``cache``: hooks, replays and steps find it under both."""
    decoder = with_cache_as(name, FORMS[form])
    expected = compress(tiny_model(), ByteTokenizer(), IDS[0].tolist(), PRESS)
    found = compress(decoder, ByteTokenizer(), IDS[0].tolist(), PRESS)
    assert [p.tolist() for p in found.kept_positions(1)[0]] == [p.tolist() for p in expected.kept_positions(1)[0]]
    cache = compat.DynamicCache(config=decoder.config)
    with torch.no_grad(), PRESS(decoder):
        decoder(input_ids=IDS, use_cache=True, **{name: cache})
        assert 0.4 < RaggedCache.of(cache).kept_fraction < 0.7
        decoder(input_ids=IDS[:, :1], use_cache=True, **{name: cache})
    assert cache.get_seq_length() == 61


def test_a_forward_that_gives_no_cache_back_is_refused() -> None:
    """Neither name in the output, and none given: what was found is said."""
    decoder = with_cache_as("cache", FORMS["nothing"])
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match=r"`cache` or `past_key_values`.*last_hidden_state"),
        PRESS(decoder),
    ):
        decoder(input_ids=IDS, use_cache=True)


def test_the_installed_names_of_caches_are_read_without_a_warning(recwarn) -> None:
    """The package passes and reads caches by the name that this transformers wants."""
    model = tiny_model()
    cache = compress(model, ByteTokenizer(), IDS[0].tolist(), PRESS)
    with torch.no_grad(), PRESS(model):
        output = model(IDS)
    assert RaggedCache.of(compat.cache_after(output)).get_seq_length() == 60
    assert compat.cache_after(BaseModelOutputWithPast(), cache) is cache
    assert [str(w.message) for w in recwarn if "cache" in str(w.message) or "past" in str(w.message)] == []


def test_what_one_thread_leaves_stays_uncompiled_for_another() -> None:
    """Compiled models in two threads: each runs eagerly to its end, and afterwards models are compiled again."""
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph

    model = torch.nn.Linear(2, 2)
    model.forward = torch.compile(model.forward, backend=backend)
    with ExitStack() as other:
        with compat.uncompiled(model):
            thread = threading.Thread(target=lambda: other.enter_context(compat.uncompiled(model)))
            thread.start()
            thread.join()
        model(torch.ones(1, 2))
        assert not calls
    model(torch.ones(1, 2))
    assert calls
