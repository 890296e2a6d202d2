"""A saved cache answers as it did before; a file that is torn, changed or of another model is refused by name."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import every_fault
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from kvzip_press import RaggedCache, RandomPress
from kvzip_press.cache.file.writing import read_record
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.decoding.forward import read
from kvzip_press.errors import CacheFileError, CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.testing import tiny_model

N = 64
DATA = Path(__file__).parent / "data"
REFUSED = (CacheFileError, CacheMismatchError)


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def compressed(model: Any, batch: int = 1, ratio: float = 0.6, padding: int = 0, n: int = N) -> RaggedCache:
    """A compressed cache; the last row of it begins with ``padding`` tokens of padding."""
    cache = DynamicCache(config=model.config)
    mask = torch.ones(batch, n, dtype=torch.long)
    mask[-1, :padding] = 0
    with torch.no_grad(), RandomPress(ratio)(model):
        model(token_ids(batch, n), attention_mask=mask, past_key_values=cache)
    return RaggedCache.of(cache)


def logits(model: Any, cache: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(ids, past_key_values=cache, **kwargs).logits
    return result


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return tiny_model("gemma3_text")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


# A saved cache is the cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "phi3"])
def test_a_loaded_cache_answers_bit_for_bit_as_the_saved_one(architecture, dtype, path) -> None:
    """Context, tail and sliding layers come back; the model that loads it may be another object of equal weights."""
    made, other = tiny_model(architecture, dtype=dtype), tiny_model(architecture, dtype=dtype)
    cache = compressed(made)
    logits(made, cache, token_ids(1, 5, seed=1))
    cache.save(path, press=RandomPress(0.6))
    loaded = RaggedCache.load(path, other)
    assert torch.equal(logits(other, loaded, token_ids(1, 7, seed=2)), logits(made, cache, token_ids(1, 7, seed=2)))
    assert loaded.get_seq_length() == cache.get_seq_length() == N + 12
    assert loaded.kept_fraction == cache.kept_fraction
    record = read_record(path)
    assert (record.n_context, record.n_seen, record.press) == (N, N + 5, repr(RandomPress(0.6)))


def test_as_many_bytes_are_resident_as_before(model, hybrid, path) -> None:
    """A loaded cache owns storage of exactly its size: nothing maps the file, nothing was padded."""
    cache = compressed(model)
    cache.save(path)
    assert RaggedCache.load(path, model).resident_bytes == cache.resident_bytes
    sliding = compressed(hybrid)
    sliding.save(path)
    loaded = RaggedCache.load(path, hybrid)
    held = [t for layer in loaded.layers for t in (*getattr(layer, "tensors", ()),)]
    held += [t for layer in loaded.layers if not isinstance(layer, RaggedLayer) for t in (layer.keys, layer.values)]
    assert loaded.resident_bytes == sum(tensor.nbytes for tensor in held) <= sliding.resident_bytes


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rows_with_padding_come_back(architecture, path) -> None:
    """A padded batch answers as before, row by row."""
    made = tiny_model(architecture)
    cache = compressed(made, batch=2, padding=9)
    cache.save(path)
    loaded = RaggedCache.load(path, made)
    mask = torch.cat([torch.ones(2, N), torch.ones(2, 4)], dim=1).long()
    mask[-1, :9] = 0
    positions = torch.stack([torch.arange(N, N + 4), torch.arange(N - 9, N - 5)])
    kwargs = {"attention_mask": mask, "position_ids": positions}
    question = token_ids(2, 4, seed=1)
    assert torch.equal(logits(made, loaded, question, **kwargs), logits(made, cache, question, **kwargs))
    for layer_idx, _ in cache.ragged_layers():
        assert loaded.layers[layer_idx].n_protected == cache.layers[layer_idx].n_protected
        assert str(loaded.kept_positions(layer_idx)) == str(cache.kept_positions(layer_idx))


def test_positions_that_begin_late_come_back(model, path) -> None:
    """Position ids are the user's: they may exceed the number of tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), RandomPress(0.6)(model):
        model(token_ids(1, N), position_ids=torch.arange(1000, 1000 + N)[None], past_key_values=cache)
    RaggedCache.of(cache).save(path)
    loaded = RaggedCache.load(path, model)
    assert str(loaded.kept_positions(0)) == str(RaggedCache.of(cache).kept_positions(0))
    assert read_record(path).n_positions == 1000 + N


@pytest.mark.parametrize("tail", [0, 3])
def test_beams_that_share_a_context_come_back(model, path, tail) -> None:
    """The pointers of batch rows to packed rows are kept: the context is in the file once."""
    cache = compressed(model, batch=2)
    if tail:
        logits(model, cache, token_ids(2, tail))
    cache.save(path)
    once = path.stat().st_size
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([5, 0, 1, 2, 2, 3]))
    cache.save(path)
    assert path.stat().st_size < once + 6 * 8 * 3 + 2000 + tail * 4 * 3 * 2 * 2 * 16 * 4
    loaded = RaggedCache.load(path, model)
    question = token_ids(6, 4, seed=1)
    assert torch.equal(logits(model, loaded, question), logits(model, cache, question))


def test_later_turns_truncate_and_fork_go_on(model, path) -> None:
    """A loaded cache is a cache as any other: it takes questions, forgets them, and merges a further turn."""
    cache = compressed(model)
    logits(model, cache, token_ids(1, 5, seed=1))
    cache.save(path)
    loaded = RaggedCache.load(path, model)
    question = token_ids(1, 9, seed=2)
    first = logits(model, loaded.fork(), question)
    logits(model, loaded, question)
    loaded.truncate(N + 5)
    assert torch.equal(logits(model, loaded.fork(), question), first)
    for each in (cache, loaded):
        with torch.no_grad(), RandomPress(0.6)(model):
            model(token_ids(1, 40, seed=3), past_key_values=each)
    assert loaded.get_seq_length() == N + 45
    assert torch.equal(logits(model, loaded, question), logits(model, cache, question))
    loaded.save(path)
    assert RaggedCache.load(path, model).resident_bytes <= loaded.resident_bytes


def test_a_reset_cache_is_saved_empty(model, path) -> None:
    """Nothing seen is a cache too, also after it was used for a batch of another size."""
    cache = compressed(model, batch=2)
    cache.reset()
    cache.save(path)
    assert RaggedCache.load(path, model).get_seq_length() == 0
    expected = logits(model, cache, token_ids(3, 4))
    cache.save(path)
    loaded = RaggedCache.load(path, model)
    cache.truncate(4)
    assert expected.shape[0] == loaded.layers[0].batch_size == 3
    assert torch.equal(logits(model, loaded, token_ids(3, 2)), logits(model, cache, token_ids(3, 2)))


def test_the_file_is_as_large_as_what_was_kept(path) -> None:
    """Within 3 % of the resident pairs, at every ratio; the dense bytes are nowhere."""
    large = tiny_model(head_dim=128)
    for ratio in (0.3, 0.9):
        cache = compressed(large, ratio=ratio, n=1024)
        cache.save(path)
        assert cache.resident_bytes <= path.stat().st_size < 1.03 * cache.resident_bytes
    assert path.stat().st_size < 0.15 * cache.dense_bytes


def test_a_loaded_cache_does_not_need_its_file(model, path) -> None:
    """What was loaded is a copy: the file may go, or another cache take its name."""
    cache = compressed(model)
    cache.save(path)
    loaded = RaggedCache.load(path, model)
    expected = logits(model, cache.fork(), token_ids(1, 4))
    path.write_bytes(b"\0" * path.stat().st_size)
    path.unlink()
    assert torch.equal(logits(model, loaded, token_ids(1, 4)), expected)


def test_a_file_of_the_first_format_still_answers() -> None:
    """Saved before pairs could carry scores: two rows of different length, a kept turn, and what came of one more."""
    expected = load_file(DATA / "format_1_expected.safetensors")
    weights = {name.removeprefix("weights."): x for name, x in expected.items() if name.startswith("weights.")}
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(num_layers=2, head_dim=8, **shape)
    model.load_state_dict(weights)
    cache = RaggedCache.load(DATA / "format_1.safetensors", model)
    assert (cache.n_seen, cache.turn_starts) == ([52, 46], [35])
    for layer_idx, layer in cache.ragged_layers():
        assert torch.equal(layer.packed.positions, expected[f"positions.{layer_idx}"])
    got = read(model, cache, torch.arange(3, 11).expand(2, -1))
    torch.testing.assert_close(got, expected["logits"])


def test_a_cache_that_has_no_scores_is_saved_as_it_was(model, path) -> None:
    """But for the note that says so: older files and new ones are read alike."""
    compressed(model).save(path)
    with safe_open(path, framework="pt") as file:
        parts = {name.partition(".")[2] for name in file.keys()}  # noqa: SIM118  # not a mapping
        text = json.loads(file.metadata()["kvzip_press"])
    assert parts == {"keys", "values", "positions", "cu_seqlens"}
    assert text["format"] == 1 and not any(layer["has_scores"] for layer in text["layers"])


# Saving -----------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file_and_nothing_else(model, path, monkeypatch) -> None:
    """The name always stands for a whole cache; half a temporary file is taken away."""
    cache = compressed(model)
    cache.save(path)
    before = path.read_bytes()

    def full_disk(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvzip_press.files.save_file", full_disk)
    with pytest.raises(CacheFileError, match=r"cache.safetensors.*No space left"):
        cache.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_save_is_a_file_like_any_other(model, path) -> None:
    """It has the rights that the user's umask gives, replaces an older one, and leaves no temporary."""
    plain = path.with_name("plain")
    plain.write_bytes(b"")
    path.write_bytes(b"older")
    compressed(model).save(str(path))
    assert path.stat().st_mode == plain.stat().st_mode
    assert {file.name for file in path.parent.iterdir()} == {path.name, "plain"}
    with pytest.raises(CacheFileError, match="nowhere"):
        compressed(model).save(path.parent / "nowhere" / "cache.safetensors")


def test_what_cannot_be_saved_is_refused(model, path) -> None:
    """Caches that are not compressed, not whole, or of a kind of layer that the format does not know."""
    with pytest.raises(UnsupportedCacheError, match="ragged"):
        RaggedCache(DynamicCache(config=model.config).layers).save(path)
    cache = compressed(model)
    cache.layers[2].tail.append(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    with pytest.raises(InvalidArgumentError, match="tokens seen"):
        cache.save(path)
    cache.layers[2] = object()
    with pytest.raises(UnsupportedCacheError, match="object"):
        cache.save(path)
    with pytest.raises(CacheMismatchError, match="another model"):
        compressed(model).save(path, model=tiny_model(seed=1))
    assert not path.exists()


def test_a_cache_whose_model_is_gone_asks_for_it(model, path) -> None:
    """The settings of the model belong into the file; equal weights can stand in for it."""
    cache = compressed(tiny_model())
    for _, layer in cache.ragged_layers():
        layer._known_module = lambda: None  # what a weak reference gives once its object is gone
    with pytest.raises(InvalidArgumentError, match="model="):
        cache.save(path)
    cache.save(path, model=model)
    assert RaggedCache.load(path, model).get_seq_length() == N


# Another model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: tiny_model(seed=1), "fingerprint"),
        (lambda: tiny_model(dtype=torch.bfloat16), "bfloat16"),
        (lambda: tiny_model(num_layers=2), "num_hidden_layers"),
        (lambda: tiny_model(num_key_value_heads=4), "num_key_value_heads"),
        (lambda: tiny_model(rms_norm_eps=1e-5), "rms_norm_eps"),
        (lambda: tiny_model("mistral"), "model_type"),
        (lambda: tiny_model("gemma3_text"), "layer_types"),
    ],
)
def test_another_model_is_refused_with_what_differs(model, path, other, named) -> None:
    """The error names expected and got, before anything is computed."""
    compressed(model).save(path)
    with pytest.raises(CacheMismatchError, match=r"expected.*got") as caught:
        RaggedCache.load(path, other())
    assert named in str(caught.value)


def test_another_rope_is_refused_with_equal_weights(model, path) -> None:
    """The weights are the same and every shape fits; keys would be at other angles all the same."""
    compressed(model).save(path)
    turned = tiny_model()
    rope = getattr(turned.config, "rope_parameters", None)
    if rope is None:
        turned.config.rope_theta = 5e5
    else:
        rope["rope_theta"] = 5e5
    with pytest.raises(CacheMismatchError, match=r"rope_theta.*10000.*500000"):
        RaggedCache.load(path, turned)


# Files that are not whole -----------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(model, path) -> None:
    """So is a folder of that name."""
    for missing in (path, path.parent):
        with pytest.raises(CacheFileError, match=missing.name):
            RaggedCache.load(missing, model)


@pytest.fixture(scope="module")
def saved(hybrid, tmp_path_factory) -> bytes:
    """A file with every part that there is: ragged and sliding layers, a tail, beams."""
    cache = compressed(hybrid, batch=2, padding=5)
    logits(hybrid, cache, token_ids(2, 3))
    cache.batch_repeat_interleave(2)
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    cache.save(path)
    RaggedCache.load(path, hybrid)
    return path.read_bytes()


def header_length(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def test_a_torn_file_is_refused_at_every_length(saved, hybrid, path) -> None:
    """Whatever was cut off, and whatever was written behind the end."""
    drawn = random.Random(0)
    lengths = [*range(20), header_length(saved) - 1, header_length(saved), len(saved) - 1]
    lengths += [drawn.randrange(len(saved)) for _ in range(100)]
    for length in lengths:
        path.write_bytes(saved[:length])
        with pytest.raises(CacheFileError, match=path.name):
            RaggedCache.load(path, hybrid)
    path.write_bytes(saved + b"\0")
    with pytest.raises(CacheFileError):
        RaggedCache.load(path, hybrid)


@pytest.mark.parametrize("where", ["header", "data"])
def test_every_flipped_bit_is_noticed(saved, hybrid, path, where) -> None:
    """One bit anywhere: the file is refused."""
    drawn = random.Random(1)
    start, end = (0, header_length(saved)) if where == "header" else (header_length(saved), len(saved))
    for place in [start, end - 1, *(drawn.randrange(start, end) for _ in range(200))]:
        changed = bytearray(saved)
        changed[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(REFUSED):
            RaggedCache.load(path, hybrid)


def test_without_verify_only_the_bytes_of_tensors_are_taken_on_trust(saved, hybrid, path) -> None:
    """A changed value passes; a changed text, length or position does not."""
    changed = bytearray(saved)
    last = next(i for i in range(len(saved) - 1, 0, -1) if saved[i])
    changed[last] ^= 1
    path.write_bytes(changed)
    RaggedCache.load(path, hybrid, verify=False)
    with pytest.raises(CacheFileError, match="byte"):
        RaggedCache.load(path, hybrid)
    changed[header_length(saved) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CacheFileError):
        RaggedCache.load(path, hybrid, verify=False)


def test_random_bytes_and_lying_headers_are_refused(hybrid, path) -> None:
    """No length that a header claims is believed: nothing is allocated that the file does not hold."""
    drawn = random.Random(2)
    huge = {"0.keys": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    empty = {"0.keys": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}
    bodies = [json.dumps(header).encode() for header in (huge, empty, {}, [], {"__metadata__": {"kvzip_press": "{}"}})]
    files = [struct.pack("<Q", len(body)) + body for body in bodies]
    files += [struct.pack("<Q", length) + b"{}" for length in (2**63, 2**40, 2**31, 10**8)]
    files += [drawn.randbytes(drawn.randrange(300)) for _ in range(50)]
    for data in files:
        path.write_bytes(data)
        with pytest.raises(CacheFileError):
            RaggedCache.load(path, hybrid)


# Files that were forged: every checksum is right --------------------------------------------------------------------


def forge(data: bytes, path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Writes a file with other metadata or tensors, and the checksums that go with them."""
    path.write_bytes(data)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["kvzip_press"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a mapping
    kept = change(record, tensors)
    if isinstance(record, dict) and isinstance(record.get("tensors"), dict) and kept is None:
        record["tensors"] = {
            name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
            for name, tensor in tensors.items()
        }
    text = json.dumps(record)
    save_file(tensors, path, {"kvzip_press": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def test_a_forged_file_without_a_change_loads(saved, hybrid, path) -> None:
    """The forger of these tests makes files that only what it changed can be refused for."""
    forge(saved, path, lambda record, tensors: None)
    RaggedCache.load(path, hybrid)


WRONG = [None, -1, 1.5, 2**31, 10**30, True, "x", "\ud800", [], [[]], {}, {"a": 1}, [-1], [10**30], "9" * 5000]


def test_metadata_of_wrong_types_are_refused(saved, hybrid, path) -> None:
    """Each entry, of the file and of a layer, replaced by each wrong value, and left out."""
    record = json.loads(_text_of(saved, path))
    information = {"kvzip_press", "transformers", "torch", "press"}  # any text is right there
    for name, right in record.items():
        for wrong in WRONG:
            if (name in information and isinstance(wrong, str)) or wrong == right == []:
                continue
            forge(saved, path, lambda record, _, name=name, wrong=wrong: record.update({name: wrong}) or True)
            _refused(path, hybrid)
        forge(saved, path, lambda record, _, name=name: record.pop(name) and True)
        _refused(path, hybrid)


def test_metadata_of_a_layer_of_wrong_types_are_refused(saved, hybrid, path) -> None:
    """The same inside each kind of layer."""
    record = json.loads(_text_of(saved, path))
    for index in (0, 1):
        for name, right in record["layers"][index].items():
            for wrong in [*WRONG, "sliding", 7, False]:
                if wrong == right and type(wrong) is type(right):
                    continue
                layers = [{**layer, name: wrong} if i == index else layer for i, layer in enumerate(record["layers"])]
                forge(saved, path, lambda record, _, layers=layers: record.update(layers=layers))
                _refused(path, hybrid)


def test_numbers_that_contradict_each_other_are_refused(saved, hybrid, path) -> None:
    """Every count of the metadata is compared with the tensors or with another count."""
    record = json.loads(_text_of(saved, path))
    forge(saved, path, lambda record, _: record.update(n_positions=record["n_positions"] - 1))
    _refused(path, hybrid)
    for name in ("format", "batch_size", "n_context", "n_seen"):
        for value in (0, 1, record[name] - 1, record[name] + 1, 2**31 - 1):
            if value in (record[name], -1):
                continue
            forge(saved, path, lambda record, _, name=name, value=value: record.update({name: value}))
            _refused(path, hybrid)


def _text_of(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["kvzip_press"])


def _refused(path: Path, model: Any) -> None:
    with pytest.raises(REFUSED) as caught:
        RaggedCache.load(path, model)
    assert len(str(caught.value)) < 1500  # what came is shortened: a lying file does not fill a screen


def test_tensors_of_another_shape_dtype_or_name_are_refused(saved, hybrid, path) -> None:
    """Each tensor missing, renamed, transposed, cut, grown or cast; and one too many."""
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda tensor: tensor[..., :-1],
        lambda tensor: tensor[:-1],
        lambda tensor: tensor[:0],
        lambda tensor: torch.cat([tensor, tensor]),
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to(torch.float16),
        lambda tensor: torch.zeros((), dtype=tensor.dtype),
    ]
    for name in json.loads(_text_of(saved, path))["tensors"]:
        for change in changes:
            forge(saved, path, lambda _, t, n=name, c=change: t.update({n: c(t[n]).contiguous()}))
            _refused(path, hybrid)
        for keep_digests in (None, True):
            forge(saved, path, lambda _, t, n=name, keep=keep_digests: t.pop(n) is None or keep)
            _refused(path, hybrid)
        forge(saved, path, lambda _, t, n=name: t.update({n + "x": t.pop(n)}))
        _refused(path, hybrid)
    forge(saved, path, lambda _, t: t.update({"9.keys": torch.zeros(1)}))
    _refused(path, hybrid)


@pytest.mark.parametrize("value", [-(2**31), -1, 10**6, 2**31 - 1])
@pytest.mark.parametrize("part", ["cu_seqlens", "positions", "row_index"])
def test_indices_out_of_range_are_refused(saved, hybrid, path, part, value) -> None:
    """Kernels trust lengths and pointers, so they are compared one by one with what they point into."""
    count = json.loads(_text_of(saved, path))["tensors"]
    assert f"1.{part}" in count
    for place in (0, 1, 3, -1):
        forge(saved, path, lambda _, t, place=place: t[f"1.{part}"].__setitem__(place, value))
        _refused(path, hybrid)


def test_metadata_that_are_no_json_are_refused(saved, hybrid, path) -> None:
    """Nor JSON too deep or too long to be read."""
    for text in ("", "{", "null", "[]", "[" * 100_000, "1" * 10_000, " " * 5_000_000, '{"format": 1}'):
        save_file(
            {"a": torch.zeros(1)},
            path,
            {"kvzip_press": text, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        )
        with pytest.raises(CacheFileError):
            RaggedCache.load(path, hybrid)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CacheFileError, match="metadata"):
        RaggedCache.load(path, hybrid)


def test_a_shared_list_that_is_not_there_is_refused(saved, hybrid, path) -> None:
    """Files of very many rows write each list of numbers once, and layers point to them."""
    record = json.loads(_text_of(saved, path))
    rows = [record["layers"][1][name] for name in ("n_protected", "n_padding", "context_ends")]
    right = dict(zip(("n_protected", "n_padding", "context_ends"), range(3), strict=True))

    def with_rows(entries: dict[str, Any], shared: Any) -> None:
        layers = [{**layer, **entries} if layer["kind"] == "ragged" else layer for layer in record["layers"]]
        forge(saved, path, lambda record, _: record.update(layers=layers, rows=shared))

    with_rows(right, rows)
    RaggedCache.load(path, hybrid)
    for entries, shared in [
        ({**right, "n_padding": 3}, rows),
        ({**right, "n_padding": -1}, rows),
        ({**right, "n_padding": True}, rows),
        (right, []),
        (right, {"0": rows[0]}),
        (right, [*rows[:2], "x"]),
        (right, [rows[0], rows[2], rows[0]]),
    ]:
        with_rows(entries, shared)
        _refused(path, hybrid)


def swapped(tensor: torch.Tensor) -> None:
    tensor[[0, 1]] = tensor[[1, 0]]


FORGED: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "a key that is NaN": lambda _, t: t["1.keys"].view(-1).__setitem__(5, torch.nan),
    "an infinite value": lambda _, t: t["1.values"].view(-1).__setitem__(-1, -torch.inf),
    "a key of a sliding layer that is NaN": lambda _, t: t["0.keys"].view(-1).__setitem__(0, torch.nan),
    "a key of the tail that is NaN": lambda _, t: t["1.tail_keys"].view(-1).__setitem__(0, torch.nan),
    "positions out of order": lambda _, t: swapped(t["1.positions"]),
    "a position twice": lambda _, t: t["1.positions"].__setitem__(1, t["1.positions"][0]),
    "a position beyond its row's context": lambda _, t: t["1.positions"].__setitem__(-1, N - 5),
    "more pairs than tokens": lambda _, t: t["1.cu_seqlens"].__setitem__(slice(1, -1), t["1.cu_seqlens"][-1]),
    "a context that ends before its pairs": lambda r, _: r["layers"][1].update(context_ends=[N // 2, N - 5]),
    "a batch of two billion rows": lambda r, _: r.update(batch_size=2**31 - 1),
    "heads without end": lambda r, _: r["layers"][1].update(num_heads=2**31 - 1),
    "a head as wide as memory": lambda r, _: r["layers"][0].update(head_dim=2**31 - 1),
    "a million turns of a hundred thousand rows": lambda r, _: r.update(
        turn_starts=list(range(10**6)), tail_padding=[0] * 10**5
    ),
    "a window of two billion tokens": lambda r, _: r["layers"][0].update(sliding_window=2**31 - 1),
    "an infinite setting": lambda r, _: r.update({"config": {**r["config"], "x": float("inf")}}),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_cache_whose_sums_are_right_is_refused(saved, hybrid, path, what) -> None:
    forge(saved, path, FORGED[what])
    _refused(path, hybrid)


def test_what_would_not_be_read_again_is_not_written(model, path) -> None:
    """Saving checks what loading checks: the old file stays."""
    compressed(model).save(path)
    before = path.read_bytes()
    changes: list[Callable[[Any], Any]] = [
        lambda layer: layer.packed.columns["keys"].view(-1).__setitem__(3, torch.nan),
        lambda layer: swapped(layer.packed.positions),
        lambda layer: layer.packed.positions.__setitem__(-1, N),
        lambda layer: setattr(layer, "context_ends", (3,)),
        lambda layer: setattr(layer, "n_protected", (N + 1,)),
    ]
    for change in changes:
        cache = compressed(model)
        change(cache.layers[1])
        with pytest.raises(InvalidArgumentError, match="would not be read again"):
            cache.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_cache_of_sixty_thousand_rows_is_read_again(path) -> None:
    """Layers of one batch have the same numbers of rows: with very many, the file says them once."""
    made = tiny_model(num_layers=6, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    cache = compressed(made, n=2)
    for layer in cache.layers:  # heads that have lost all: what is in the rows plays no part
        layer.packed, layer.context_ends = layer.packed.emptied(60_000), (10**8 + 2,) * 60_000
        layer.n_protected = layer.n_padding = (0,) * 60_000
    cache.save(path)
    loaded = RaggedCache.load(path, made)
    assert [layer.context_ends for layer in loaded.layers] == [(10**8 + 2,) * 60_000] * 6
    assert loaded.resident_bytes == cache.resident_bytes


def test_whatever_fails_while_saving_the_old_cache_stays_or_the_new_one_is_there(model, path) -> None:
    old, new = compressed(model), compressed(model, ratio=0.3)
    old.save(path)
    before = path.read_bytes()
    faults = set()
    for fault, raised in every_fault(lambda: new.save(path)):
        assert raised is None or isinstance(raised, CacheFileError)
        assert (path.read_bytes() == before) == (raised is not None) and list(path.parent.iterdir()) == [path]
        RaggedCache.load(path, model)
        faults.add(fault)
        path.write_bytes(before)
    assert {"write to a file", "os.fsync", "os.replace", "os.open"} <= faults
