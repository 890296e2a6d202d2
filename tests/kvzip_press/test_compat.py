"""Differences between versions of transformers, each played on the version that is installed."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import MethodType
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPast

from kvzip_press import KVzipPress, RaggedCache, attach, compat, compress
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


def with_an_unknown_name(takes: str, gives: str) -> Any:
    """A decoder of a transformers to come: its forward takes its cache as ``takes``, and returns it as ``gives``."""
    decoder = tiny_model().model
    original = decoder.forward

    def newest(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        given = kwargs.pop(takes, None)
        out = original(input_ids=input_ids, **kwargs, **compat.cache_argument(type(decoder), given))
        return _Output({"last_hidden_state": out.last_hidden_state, gives: compat.cache_after(out)})

    decoder.forward = MethodType(newest, decoder)
    return decoder


@pytest.mark.parametrize("name", ["kv_store", "past_key_values"])
def test_a_cache_that_is_returned_under_an_unknown_name_is_refused(name) -> None:
    """The next renaming ends with the version's name, and not with "already evicted"; what is given is found."""
    (takes,) = compat.cache_argument(tiny_model().model, None)  # as this version calls it
    decoder = with_an_unknown_name(takes, name)
    with torch.no_grad(), PRESS(decoder):
        if name == "kv_store":
            with pytest.raises(UnsupportedModelError, match=rf"this is {compat.TRANSFORMERS_VERSION}.*got.*kv_store"):
                decoder(input_ids=IDS, use_cache=True)
        cache = compat.DynamicCache(config=decoder.config)
        decoder(input_ids=IDS, use_cache=True, **{takes: cache})
    assert 0.4 < RaggedCache.of(cache).kept_fraction < 0.7


def test_a_cache_that_is_taken_under_an_unknown_name_is_refused() -> None:
    """Before anything is computed: it would be read as a prompt without a past."""
    decoder = with_an_unknown_name("kv_store", "past_key_values")
    cache = compat.DynamicCache(config=decoder.config)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"5\.24\.0.*got it as `kv_store`"), PRESS(decoder):
        decoder(input_ids=IDS, use_cache=True, kv_store=cache)
    assert cache.get_seq_length() == 0


@pytest.fixture
def version(monkeypatch):
    """Plays another version of transformers in a process that has warned of none."""

    def play(text: str) -> None:
        monkeypatch.setattr(compat, "TRANSFORMERS_VERSION", Version(text))

    compat.warn_if_untested.cache_clear()
    yield play
    compat.warn_if_untested.cache_clear()


@pytest.mark.parametrize("untested", ["5.25.0", "5.25.0.dev0", "6.0", "4.55.4"])
def test_an_untested_version_is_named_once_with_the_tested_range(untested, version, caplog) -> None:
    version(untested)
    for _ in range(2):
        attach(tiny_model())
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"transformers {untested} is outside" in line and "4.56.2 to 5.24.0" in line


@pytest.mark.parametrize("tested", ["5.24.1", "5.24.0", "5.3.0", "4.56.2", "4.56.0"])
def test_a_version_within_the_tested_range_is_not_mentioned(tested, version, caplog) -> None:
    version(tested)
    attach(tiny_model())
    assert caplog.records == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [("5.2.0", True), ("4.56.2", True), ("5.2.9.post1", True), ("4.56.1", False), ("5.3", False), ("5.3.0rc1", False)],
)
def test_a_range_holds_its_first_version_and_nothing_of_the_one_it_ends_with(found, expected) -> None:
    assert compat.is_within(found, ("4.56.2", "5.3")) is expected


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


@pytest.mark.parametrize(
    ("device", "options", "built"),
    [
        ("cpu", {}, "eager"),
        ("cuda", {}, "flex_attention"),
        ("cuda", {"kv_offset": 5}, "sdpa"),  # of a ragged layer, which attends by itself
        ("cuda", {"kv_offset": 5, "local_size": 8}, "flex_attention"),
    ],
)
def test_flex_attention_gets_the_mask_of_what_computes_it(device, options, built, monkeypatch) -> None:
    for name in ("eager", "sdpa", "flex_attention"):
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, lambda name=name, **kwargs: name)
    assert compat.mask_function("flex_attention")(device=torch.device(device), **options) == built
