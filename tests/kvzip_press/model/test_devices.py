"""Models on several devices or with weights put away: every layer's cache lies where its layer computes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import HeadScores, KVzipHeadPress, KVzipPress, RaggedCache, RandomPress, answer, compress, prefill
from kvzip_press.errors import CacheMismatchError, UnsupportedCacheError, UnsupportedModelError
from kvzip_press.model.devices import input_device, timed
from kvzip_press.model.identity import layer_fingerprint
from kvzip_press.testing import ByteTokenizer, tiny_model

TEXT = "A context that is read by a model which does not lie in one place. " * 2
TOKENIZER = ByteTokenizer()
PRESS = KVzipPress(0.5, tokenizer=TOKENIZER)


def device_map(model: Any, devices: list[Any]) -> dict[str, Any]:
    """Layers in order over the devices, the embedding on the first and the head on the last."""
    n = len(model.model.layers)
    ends = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0], "model.norm": devices[-1]}
    layers = {f"model.layers.{i}": devices[i * len(devices) // n] for i in range(n)}
    tied = model.config.tie_word_embeddings  # such a head lies where its weights lie
    return {**ends, **layers, "lm_head": devices[0 if tied else -1]}


def conversation(model: Any, path: Path) -> list[Any]:
    """What a model gives from a context to a saved dialogue: everything that has to do with where things lie."""
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    kept = [[p.tolist() for p in cache.kept_positions(i)[0]] for i, _ in cache.ragged_layers()]
    answers = [answer(model, TOKENIZER, cache, "Where?", max_new_tokens=6) for _ in range(2)]
    answers += [answer(model, TOKENIZER, cache, text, max_new_tokens=6, keep=True) for text in ("And?", "Then?")]
    cache.save(path)
    loaded = RaggedCache.load(path, model)
    answers.append(answer(model, TOKENIZER, loaded, "Still?", max_new_tokens=6))
    assert answers[-1] == answer(model, TOKENIZER, cache, "Still?", max_new_tokens=6)
    ids = torch.tensor([TOKENIZER.encode(TEXT)], device=input_device(model))
    model.generation_config.eos_token_id = None
    with PRESS(model):
        written = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return [kept, answers, written[0, ids.shape[1] :].tolist()]


def offload(model: Any, kind: str, folder: Path) -> None:
    """Puts a model's weights away, as ``device_map`` does where a device is too small."""
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    elif kind == "disk":
        accelerate.disk_offload(model, str(folder), torch.device("cpu"))
    else:
        devices = device_map(model, ["cpu", "disk"])
        accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("kind", ["cpu", "disk", "partly"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_offloaded_weights_change_nothing(architecture, kind, tmp_path) -> None:
    """Weights are on "meta" between forwards; caches, answers and files are those of the model in memory."""
    expected = conversation(tiny_model(architecture, num_layers=4), tmp_path / "a.safetensors")
    model = tiny_model(architecture, num_layers=4)
    offload(model, kind, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert conversation(model, tmp_path / "b.safetensors") == expected
    loaded = RaggedCache.load(tmp_path / "b.safetensors", tiny_model(architecture, num_layers=4))
    assert loaded.layers[1].packed.columns["keys"].device.type == "cpu"


def test_an_offloaded_model_is_told_from_another(tmp_path) -> None:
    """By the values of the weights, wherever they rest."""
    model, other = tiny_model(), tiny_model(seed=1)
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    offload(model, "disk", tmp_path / "a")
    answer(model, TOKENIZER, cache, "Whose?", max_new_tokens=2)
    offload(other, "disk", tmp_path / "b")
    with pytest.raises(CacheMismatchError, match="made by another model"):
        answer(other, TOKENIZER, cache, "Whose?", max_new_tokens=2)


def test_weights_that_are_nowhere_raise() -> None:
    """A meta model has no values to compare."""
    with torch.device("meta"):
        module = tiny_model().model.layers[0].self_attn
    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight on meta"):
        layer_fingerprint(module)


def test_a_dense_cache_with_offloading_is_refused_before_anything_is_read() -> None:
    """Its layers are moved away while others are computed; a compressed cache is small enough to stay."""
    model, cache = tiny_model(), DynamicCache(offloading=True)
    with torch.no_grad(), pytest.raises(UnsupportedCacheError, match="without offloading"), RandomPress(0.5)(model):
        model(torch.tensor([[3, 4, 5]]), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_moving_a_cache_keeps_its_content_and_drops_the_room_of_tails(architecture) -> None:
    """A move and back changes no answer, of a dialogue with two turns; forks keep what they shared."""
    model = tiny_model(architecture)
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    answer(model, TOKENIZER, cache, "First?", max_new_tokens=4, keep=True)
    fork, n_bytes = cache.fork(), cache.resident_bytes
    expected = answer(model, TOKENIZER, cache, "Second?", max_new_tokens=6)
    cache.move_to("cpu")
    cache.move_to(model)
    assert answer(model, TOKENIZER, cache, "Second?", max_new_tokens=6) == expected
    assert answer(model, TOKENIZER, fork, "Second?", max_new_tokens=6) == expected
    assert cache.resident_bytes <= n_bytes


def test_a_cache_elsewhere_raises_and_keeps_its_content() -> None:
    """The error names both devices."""
    model = tiny_model()
    cache = compress(model, TOKENIZER, TEXT, PRESS)
    waiting = cache.fork()
    waiting.move_to("meta")
    assert {tensor.device.type for _, layer in waiting.ragged_layers() for tensor in layer.tensors} == {"meta"}
    with pytest.raises(CacheMismatchError, match=r"device\(type='meta'\).*device\(type='cpu'\)"):
        model(torch.tensor([[3]]), past_key_values=waiting)
    assert waiting.get_seq_length() == cache.get_seq_length()
    assert answer(model, TOKENIZER, cache, "Where?", max_new_tokens=2)


def test_a_cache_does_not_go_to_a_model_with_other_layers() -> None:
    cache = compress(tiny_model(num_layers=2), TOKENIZER, TEXT, PRESS)
    with pytest.raises(CacheMismatchError, match="attention in 2 layers"):
        cache.move_to(tiny_model(num_layers=3))


# ---------------------------------------------------------------------------------------------------------- two devices


def split(architecture: str, **options: Any) -> Any:
    """A model with its layers over two GPUs."""
    from accelerate import dispatch_model

    model = tiny_model(architecture, num_layers=4, **options)
    skip: Any = model._skip_keys_device_placement
    return dispatch_model(model, device_map(model, ["cuda:0", "cuda:1"]), main_device="cuda:0", skip_keys=skip)


@pytest.mark.gpu2
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_two_gpus_give_what_one_gives(architecture, tmp_path) -> None:
    """A dialogue over a model in two halves: kept pairs, answers, files, generate; each layer's state on its device."""
    expected = conversation(tiny_model(architecture, num_layers=4).to("cuda:0"), tmp_path / "one.safetensors")
    model = split(architecture)
    assert conversation(model, tmp_path / "two.safetensors") == expected
    for cache in (compress(model, TOKENIZER, TEXT, PRESS), RaggedCache.load(tmp_path / "two.safetensors", model)):
        for layer_idx, layer in cache.ragged_layers():
            home = model.model.layers[layer_idx].self_attn.k_proj.weight.device
            assert {tensor.device for tensor in layer.tensors} == {home}
    assert len({str(parameter.device) for parameter in model.parameters()}) == 2


@pytest.mark.gpu2
def test_every_kind_of_budget_is_spent_over_two_gpus() -> None:
    """Pools that span devices, and the others; a later turn under the press; padded rows; beams."""
    one, two = tiny_model(num_layers=4).to("cuda:0"), split("llama")
    for allocation in ("global", "layer", "head", "adakv"):
        press = RandomPress(0.6, allocation=allocation)
        kept = []
        for model in (one, two):
            cache = prefill(model, TOKENIZER, TEXT, observers=[press])
            ragged = cache.evict(press.score(cache))
            kept.append([ragged.seqlens(i).tolist() for i in range(4)])
        assert kept[0] == kept[1]
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0)).to("cuda:0")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    rows = []
    for model in (one, two):
        model.generation_config.eos_token_id = None
        with PRESS(model):
            options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
            rows.append(model.generate(ids, attention_mask=mask, **options).tolist())
    assert rows[0] == rows[1]


@pytest.mark.gpu2
def test_head_scores_and_moves_over_two_gpus() -> None:
    """The head-level press, and a cache that waited in host memory and came back to both devices."""
    model = split("llama")
    press = KVzipHeadPress(0.5, scores=HeadScores(torch.rand(4, 2, generator=torch.Generator().manual_seed(0))))
    cache = compress(model, TOKENIZER, TEXT, press)
    expected = answer(model, TOKENIZER, cache, "Where?", max_new_tokens=6)
    devices = [layer.packed.columns["keys"].device for _, layer in cache.ragged_layers()]
    cache.move_to("cpu")
    with pytest.raises(CacheMismatchError, match="device"):
        answer(model, TOKENIZER, cache, "Where?", max_new_tokens=2)
    cache.move_to(model)
    assert [layer.packed.columns["keys"].device for _, layer in cache.ragged_layers()] == devices
    assert answer(model, TOKENIZER, cache, "Where?", max_new_tokens=6) == expected


def test_a_function_is_timed_with_what_it_returns() -> None:
    value, seconds = timed(torch.device("cpu"), lambda n: time.sleep(n) or n, 0.02)
    assert value == 0.02
    assert seconds >= 0.02
