"""Whatever a kvpress press does to a model or raises, the model is afterwards as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvzip_press import RaggedPress
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import run_prefill

pytestmark = pytest.mark.kvpress


def everything(model: Any) -> dict[str, Any]:
    """Every attribute of every module; tables by their content."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else id(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("lost")


NAMES = ["SnapKVPress", "ExpectedAttentionPress", "PyramidKVPress", "AdaKVPress", "FastKVzipPress", "KVzipPress"]
NAMES += ["KVComposePress", "KVgradPress"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_model_and_press_as_they_were(name: str, tiny_model: Any, make_press: Any, context: Any) -> None:
    model, press, ids = tiny_model(), make_press(name), context(60)
    ragged = RaggedPress(press)
    before, press_before = everything(model), repr(vars(press))
    implementation, path = model.config._attn_implementation, model.config.name_or_path
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool), observers=[ragged])
    ragged.score(done)
    assert everything(model) == before
    assert (model.config._attn_implementation, model.config.name_or_path) == ("ragged|" + implementation, path)
    assert repr(vars(press)) == press_before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("SnapKVPress", "score"),
        ("AdaKVPress", "compress"),
        ("KVzipPress", "compress_post"),
        ("FastKVzipPress", "compress_post"),
        ("KVgradPress", "_score_chunk"),
        ("KVComposePress", "forward_hook"),
    ],
)
def test_an_exception_leaves_no_hook_and_no_attribute(
    name: str, method: str, tiny_model: Any, make_press: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, press, ids = tiny_model(), make_press(name), context(60)
    ragged = RaggedPress(press)
    valid = torch.ones_like(ids, dtype=torch.bool)
    run_prefill(model, ids, valid)  # attached from here on
    before, implementation = everything(model), model.config._attn_implementation
    monkeypatch.setattr(type(press), method, fail)
    # KVCompose goes on after the error and trips over itself
    with pytest.raises((RuntimeError, AttributeError), match=r"lost|NoneType"):
        ragged.score(run_prefill(model, ids, valid, observers=[ragged]))
    assert everything(model) == before
    assert model.config._attn_implementation == implementation


def test_loaded_weights_are_shared_and_loaded_once_a_model(
    kvpress: Any, tiny_model: Any, make_press: Any, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    press, ids = make_press("KVzapPress"), context(60)
    loads: list[str] = []
    load: Callable[[str], Any] = kvpress.presses.kvzap_press.KVzapModel.from_pretrained
    counted = staticmethod(lambda name: loads.append(name) or load(name))
    monkeypatch.setattr(kvpress.presses.kvzap_press.KVzapModel, "from_pretrained", counted)
    ragged, model = RaggedPress(press), tiny_model()
    for _ in range(3):
        ragged.score(run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool)))
    assert len(loads) == 1
    assert not hasattr(press, "kvzap_model")


def test_weights_that_do_not_exist_are_refused_before_the_forward(kvpress: Any, tiny_model: Any, context: Any) -> None:
    ids = context(60)
    for press in (kvpress.LUKVPress(compression_ratio=0.5), kvpress.DuoAttentionPress(0.5)):
        with pytest.raises(InvalidArgumentError, match=r"refused: (KeyError|AssertionError): .*(No LU-KV|Checkpoint)"):
            run_prefill(tiny_model(), ids, torch.ones_like(ids, dtype=torch.bool), observers=[RaggedPress(press)])


def test_a_press_without_its_tokenizer_says_so(kvpress: Any, tiny_model: Any, context: Any) -> None:
    model, ids = tiny_model(), context(60)
    model.config.name_or_path = "no/such-model"
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match="refused: OSError: "):
        RaggedPress(kvpress.KVzipPress(0.5)).score(done)
