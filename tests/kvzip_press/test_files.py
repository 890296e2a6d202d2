"""Files of ours: written whole or not at all, and read with the caller's error for whatever is wrong with one."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch
from faults import FORBIDDEN, FULL, TORN, every_fault
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvzip_press import files
from kvzip_press.errors import CacheFileError, CacheMismatchError, InvalidArgumentError
from kvzip_press.files import (
    check_format,
    check_seal,
    digest_of,
    digest_of_tensor,
    opened,
    replacing,
    sweep_temporaries,
    write_tensors,
)
from kvzip_press.heads import file as head_file
from kvzip_press.presses.fastkvzip import gate_file

TENSORS = {"b": torch.arange(6).view(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}
MADE_BY = {"made_by": "a test"}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "tensors.safetensors"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def names_in(path: Path) -> list[str]:
    with opened(path, InvalidArgumentError, "expected tensors") as file:
        return sorted(file.keys())


# Writing ----------------------------------------------------------------------------------------------------------


def test_tensors_and_texts_come_back(path) -> None:
    """Views and tensors with a gradient too, which safetensors does not take."""
    write_tensors(path, {**TENSORS, "c": torch.nn.Parameter(torch.rand(3, 2)).T}, MADE_BY)
    assert torch.equal(load_file(path)["b"], TENSORS["b"]) and load_file(path)["c"].shape == (2, 3)
    assert metadata_of(path) == MADE_BY


def test_a_seal_is_the_digest_of_its_text(path) -> None:
    write_tensors(path, TENSORS, MADE_BY, seal="made_by")
    assert metadata_of(path) == {**MADE_BY, "sha256": digest_of(b"a test")}
    check_seal(metadata_of(path), "made_by", CacheFileError)


@pytest.mark.parametrize("changed", [{"made_by": "another"}, {"sha256": digest_of(b"another")}, {"sha256": ""}])
def test_a_text_that_is_not_the_sealed_one_is_refused(path, changed) -> None:
    write_tensors(path, TENSORS, MADE_BY, seal="made_by")
    with pytest.raises(InvalidArgumentError, match="SHA-256"):
        check_seal({**metadata_of(path), **changed}, "made_by", InvalidArgumentError)


@pytest.mark.parametrize("error", [FULL, FORBIDDEN, TORN], ids=repr)
def test_whatever_fails_while_writing_the_old_file_stays_or_the_new_one_is_there(path, error) -> None:
    """And no temporary; the error names the path and the cause."""
    write_tensors(path, TENSORS, {"made_by": "another test"})
    old, faults = path.read_bytes(), []
    for fault, raised in every_fault(lambda: write_tensors(path, TENSORS, MADE_BY), error):
        is_old = path.read_bytes() == old
        assert is_old or (metadata_of(path) == MADE_BY and torch.equal(load_file(path)["b"], TENSORS["b"]))
        assert not raised or (
            isinstance(raised, CacheFileError) and str(path) in str(raised) and str(error) in str(raised)
        )
        assert list(path.parent.iterdir()) == [path] and is_old == (raised is not None)
        faults.append(fault)
        path.write_bytes(old)
    assert faults.count("write to a file") == 1 + len(TENSORS) and {"os.fsync", "os.replace"} <= set(faults)


def test_an_error_of_the_writer_leaves_the_old_file_and_no_temporary(path) -> None:
    """It is no matter of the file, so it stays what it is."""
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_made_only_where_asked(path) -> None:
    nested = path.parent / "a" / "b" / path.name
    with pytest.raises(CacheFileError, match=path.name):
        write_tensors(nested, TENSORS, MADE_BY)
    assert not nested.parent.exists()
    write_tensors(nested, TENSORS, MADE_BY, parents=True)
    assert names_in(nested) == ["a", "b"]


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(path) -> None:
    path.write_bytes(b"a file where a folder should be")
    with pytest.raises(CacheFileError, match=r"expected to write .*FileExistsError"):
        write_tensors(path / "tensors", TENSORS, MADE_BY, parents=True)


# Sweeping ---------------------------------------------------------------------------------------------------------


def killed_while_writing(path: Path) -> None:
    """A process that ends without cleaning up, as one does that is killed."""
    if (pid := os.fork()) == 0:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            os._exit(0)
    os.waitpid(pid, 0)


def test_what_a_killed_process_left_is_swept_and_nothing_else(path) -> None:
    """Names that only resemble ours, folders and links stay."""
    pytest.importorskip("fcntl")
    path.write_bytes(b"old")
    for _ in range(3):
        killed_while_writing(path)
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 4
    ours = ".kvzip-press-1-0123456789abcdef.tmp"
    resembling = {f".{'0' * 16}.tmp", ".kvzip-press-1-0123.tmp", ours[1:], f"{ours}.old"}
    for name in resembling:
        (path.parent / name).write_bytes(b"of someone else")
    (path.parent / ours).mkdir()
    (path.parent / ours.replace("-1-", "-2-")).symlink_to(path)
    assert sweep_temporaries(path.parent) == 3
    assert {one.name for one in path.parent.iterdir()} == {path.name, ours, ours.replace("-1-", "-2-"), *resembling}
    assert path.read_bytes() == b"old" and sweep_temporaries(path.parent) == 0


def test_a_sweep_leaves_what_someone_writes_now(path) -> None:
    pytest.importorskip("fcntl")
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        os.utime(temporary, (0, 0))  # however old
        assert sweep_temporaries(path.parent) == 0
    assert path.read_bytes() == b"new"


def test_a_writer_whose_file_is_swept_before_it_is_locked_takes_another(path, monkeypatch) -> None:
    lock, swept = files.lock_file, []

    def late(descriptor: int) -> bool:
        if not swept:
            swept.append(None)
            swept.append(sweep_temporaries(path.parent))
        return lock(descriptor)

    monkeypatch.setattr(files, "lock_file", late)
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert swept[1] == 1 and path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


def test_without_locks_a_day_without_a_change_is_what_counts(path, monkeypatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with replacing(path) as temporary:
        assert sweep_temporaries(path.parent) == 0
        os.utime(temporary, (time.time() - 23 * 3600,) * 2)
        assert sweep_temporaries(path.parent) == 0
    left = path.with_name(".kvzip-press-1-0123456789abcdef.tmp")
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 25 * 3600,) * 2)
    assert sweep_temporaries(path.parent) == 1 and not left.exists()


def test_a_folder_that_does_not_exist_has_nothing_to_sweep(path) -> None:
    path.write_bytes(b"a file")
    assert sweep_temporaries(path.parent / "missing") == sweep_temporaries(path) == 0


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [CacheFileError, InvalidArgumentError])
def test_a_torn_file_is_refused_at_every_length(path, error) -> None:
    """With the caller's error, which begins with what was expected and is caused by what came."""
    write_tensors(path, TENSORS, MADE_BY)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with (
            pytest.raises(error, match=r"^expected tensors, got SafetensorError: .") as caught,
            opened(path, error, "expected tensors"),
        ):
            pass
        assert caught.value.__cause__ is not None


def test_a_missing_path_and_a_folder_are_refused(path) -> None:
    for other in (path, path.parent):
        with pytest.raises(InvalidArgumentError, match=r"^expected tensors, got "):
            names_in(other)


def test_errors_of_ours_pass_as_they_are(path) -> None:
    """Also those that are an OSError or a ValueError besides."""
    write_tensors(path, TENSORS, MADE_BY)
    for error in (CacheMismatchError("says enough"), InvalidArgumentError("says enough")):
        with (
            pytest.raises(type(error), match=r"^says enough$"),
            opened(path, CacheFileError, "expected tensors", malformed=(ValueError, RuntimeError)),
        ):
            raise error


def test_a_mistake_of_the_reader_is_the_files_only_where_the_reader_says_so(path) -> None:
    write_tensors(path, TENSORS, MADE_BY)
    with pytest.raises(json.JSONDecodeError), opened(path, CacheFileError, "expected JSON") as file:
        json.loads(file.metadata()["made_by"])
    with (
        pytest.raises(CacheFileError, match=r"^expected JSON, got JSONDecodeError: "),
        opened(path, CacheFileError, "expected JSON", malformed=(ValueError,)) as file,
    ):
        json.loads(file.metadata()["made_by"])


@pytest.mark.parametrize(("n_named", "named"), [(None, "['a', 'b', 'c']"), (2, "['a', 'b']")])
def test_a_wrong_format_mark_is_refused_and_the_tensors_there_are_named(path, n_named, named) -> None:
    save_file({name: torch.zeros(1) for name in "cab"}, path)
    with opened(path, CacheFileError, "expected a safetensors file of x") as file:
        check_format(1, 1, file, InvalidArgumentError, "expected x of format 1")
        for mark in (None, 2, "1"):
            with pytest.raises(InvalidArgumentError) as caught:
                check_format(mark, 1, file, InvalidArgumentError, "expected x of format 1", n_named=n_named)
            assert str(caught.value) == f"expected x of format 1, got the tensors {named}"


def test_a_digest_sees_every_bit_of_a_tensor() -> None:
    """Minus zero equals zero, and is another tensor on disk."""
    zero = torch.zeros(3, dtype=torch.bfloat16)
    assert digest_of_tensor(zero) == digest_of(bytes(6))
    assert digest_of_tensor(-zero) != digest_of_tensor(zero)
    assert digest_of_tensor(torch.tensor(0.0)) == digest_of(bytes(4))


# The files of ours ------------------------------------------------------------------------------------------------


def test_a_foreign_file_is_neither_head_scores_nor_gates(path) -> None:
    save_file({f"layer.{number}": torch.zeros(1) for number in range(7)}, path, {"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=r"^expected head scores of format 1 in .*tensors.safetensors, got"):
        head_file.read(path)
    for read in (gate_file.read, gate_file.read_header):
        with pytest.raises(
            InvalidArgumentError, match=r"^expected gates of format 1 in .*got the tensors .*layer.4'\]$"
        ):
            read(path)


def test_a_file_is_the_same_bytes_whatever_order_its_tensors_and_texts_came_in(path) -> None:
    texts = {f"text {number}": "é" * number for number in range(9)}
    write_tensors(path, TENSORS, texts)
    before = path.read_bytes()
    write_tensors(path, dict(reversed(TENSORS.items())), dict(reversed(texts.items())))
    assert path.read_bytes() == before and metadata_of(path) == texts


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused_and_nothing_is_left(name, tmp_path) -> None:
    with pytest.raises(CacheFileError, match="name that a file can have"), replacing(tmp_path / name):
        pytest.fail("nothing is written")
    assert not list(tmp_path.iterdir())


# Places that cannot be written ---------------------------------------------------------------------------------------


def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plays a folder that may not be written in; root may write in all."""
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)


def test_a_place_that_can_be_written_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old", encoding="utf-8")
    files.check_writable(tmp_path / "there", "--out")
    files.check_writable(str(tmp_path / "new"), "--out")
    files.check_writable(tmp_path / "a" / "b" / "new", "--out", parents=True)
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("folder", "which is a folder"),
        ("pipe", "which is a pipe or a device"),
        ("none/new", "none does not exist"),
        ("file/new", "file is no folder"),
        ("nul\0l", "no file can have that name"),
        ("x" * 300, "File name too long|may not be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_by_the_name_that_was_given(
    place: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidArgumentError, match=rf"expected --out to be a file that can be written, got .*({said})"):
        files.check_writable(tmp_path / place, "--out")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden(monkeypatch)
    for parents, place in ((False, tmp_path / "new"), (True, tmp_path / "a" / "b" / "new")):
        with pytest.raises(InvalidArgumentError, match=rf"{tmp_path.name} may not be written in"):
            files.check_writable(place, "--out", parents=parents)


def test_no_error_has_the_name_of_a_temporary(tmp_path: Path) -> None:
    """A user gave another name, and the temporary is gone when the message is read."""
    for _, raised in every_fault(lambda: files.write_tensors(tmp_path / "a.safetensors", {}, {}), FORBIDDEN_THERE):
        assert raised is None or (".tmp" not in str(raised) and "a.safetensors" in str(raised)), raised
    with pytest.raises(CacheFileError, match=r"expected to write .*folder, got .*: Is a directory$"):
        (tmp_path / "folder").mkdir()
        with files.replacing(tmp_path / "folder"):
            pass


FORBIDDEN_THERE = PermissionError(
    errno.EACCES, "Permission denied", str(Path("somewhere") / ".kvzip-press-1-0123456789abcdef.tmp")
)
