"""A folder of contexts: names and never paths; what is wrong with a file keeps nobody from the others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvzip_press import RaggedCache, RandomPress, compress
from kvzip_press.cache.file.reading import check_model
from kvzip_press.errors import CacheFileError, InvalidArgumentError
from kvzip_press.serving.folder import ContextFolder
from kvzip_press.testing import ByteTokenizer, tiny_model


def folder_of(path: Path, model: Any) -> ContextFolder:
    return ContextFolder(path, partial(check_model, model=model))


def test_the_contexts_are_the_files_of_the_folder(folder: Path, model: Any) -> None:
    (folder / "notes.txt").write_text("not a context")
    found = folder_of(folder, model)
    assert found.names == ["archive", "lighthouse"]
    assert found.refused == {}
    assert found.find("archive").path == folder / "archive.safetensors"


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "sub/inside", "archive.safetensors", ".", "", "archive\0", None, 5, ["archive"]],
)
def test_a_name_is_never_a_path(name: Any, folder: Path, model: Any, caches: dict[str, RaggedCache]) -> None:
    """Also where a file lies at the place that such a path would lead to."""
    (folder / "contexts" / "sub").mkdir(parents=True)
    for place in ("outside", "contexts/archive", "contexts/sub/inside"):
        caches["archive"].save(folder / f"{place}.safetensors")
    found = folder_of(folder / "contexts", model)
    assert found.names == ["archive"]
    with pytest.raises(InvalidArgumentError, match="expected the name of a context, got"):
        found.find(name)


def test_a_name_that_is_nearly_one_is_named(folder: Path, model: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="got 'archiv'; did you mean 'archive'"):
        folder_of(folder, model).find("archiv")


def test_torn_and_foreign_files_are_refused_with_their_reason_and_the_rest_is_there(
    folder: Path, model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    whole = (folder / "archive.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    save_file({"x": torch.zeros(3)}, folder / "foreign.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / ".hidden.safetensors").write_bytes(whole)
    (folder / "two words.safetensors").write_bytes(whole)
    (folder / "link.safetensors").symlink_to(folder / "nowhere")
    other = tiny_model("llama", num_layers=2, seed=1)
    compress(other, tokenizer, "Some other text.", RandomPress(0.5)).save(folder / "other.safetensors")
    rows = caches["archive"].fork()
    rows.batch_repeat_interleave(2)
    rows.save(folder / "rows.safetensors")
    found = folder_of(folder, model)
    assert found.names == ["archive", "lighthouse"]
    reasons = {
        "torn": "expected a cache that kvzip-press saved, whole",
        "empty": "expected a cache that kvzip-press saved, whole",
        "foreign": "expected metadata",
        "folder": "expected a file",
        ".hidden": "expected a name of letters",
        "two words": "expected a name of letters",
        "other": "made by another model",
        "rows": "expected a cache of one context that is compressed in every layer, got 2 rows",
    }
    assert set(found.refused) == set(reasons)
    for name, reason in reasons.items():
        assert reason in found.refused[name]
        assert str(folder) not in found.refused[name]
        with pytest.raises(InvalidArgumentError) as raised:
            found.find(name)
        assert reason in str(raised.value) and str(folder) not in str(raised.value)


def test_a_file_may_come_change_and_go_meanwhile(folder: Path, model: Any, caches: dict[str, RaggedCache]) -> None:
    found = folder_of(folder, model)
    before = found.find("archive")
    caches["archive"].save(folder / "new.safetensors")
    assert found.find("new").path == folder / "new.safetensors"
    caches["lighthouse"].save(folder / "archive.safetensors")
    assert found.find("archive").mark != before.mark
    (folder / "archive.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match="expected the name of a context"):
        found.find("archive")
    assert found.names == ["lighthouse", "new"]


def test_a_torn_file_that_is_written_again_is_there(folder: Path, model: Any, caches: dict[str, RaggedCache]) -> None:
    path = folder / "archive.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    found = folder_of(folder, model)
    assert list(found.refused) == ["archive"]
    caches["archive"].save(path)
    assert found.find("archive").refused == ""
    assert found.refused == {}


def test_what_is_refused_later_stays_refused_until_it_changes(
    folder: Path, model: Any, caches: dict[str, RaggedCache]
) -> None:
    found = folder_of(folder, model)
    file = found.find("archive")
    found.refuse("archive", file, CacheFileError(f"{file.path}: a byte was changed"))
    assert found.refused == {"archive": "a byte was changed"}
    with pytest.raises(InvalidArgumentError, match="got 'archive': a byte was changed"):
        found.find("archive")
    caches["archive"].save(file.path)
    assert found.find("archive").refused == ""
    found.refuse("archive", file, CacheFileError("of the file before"))
    assert found.refused == {}


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, model: Any) -> None:
    with pytest.raises(CacheFileError, match="expected a folder of contexts, got FileNotFoundError"):
        folder_of(tmp_path / "nothing", model)
