"""A lock keeps a second process out, goes with its holder, and tells a holder whose file was removed."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvzip_press.errors import RunDirectoryError
from kvzip_press.locks import Lock

HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / ".lock"


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        try:
            yield child
        finally:
            child.kill()


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(path) -> None:
    with another_process(path) as child:
        with pytest.raises(
            RunDirectoryError, match=r"expected to be alone with a run, but another process holds .*lock"
        ):
            Lock(path, "a run").__enter__()
        child.kill()
        child.wait()
        assert path.exists()
        with Lock(path, "a run") as lock:
            lock.check()


def test_the_file_goes_with_the_lock_and_the_next_one_may_take_it(path) -> None:
    for _ in range(3):
        with Lock(path, "a run") as lock, lock, lock:
            assert lock.held and path.read_bytes() == b""
        assert not lock.held and not path.exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_holder_whose_file_was_removed_is_told(path, again) -> None:
    """Also when another run locks a new file at the same path, which then stays that one's."""
    with Lock(path, "a run") as lock:
        path.unlink()
        if again:
            path.touch()
        with pytest.raises(RunDirectoryError, match=r"removed or replaced.* Start again"):
            lock.check()
        with pytest.raises(RunDirectoryError), lock:
            pass
    assert path.exists() == again


def test_a_file_with_contents_is_neither_emptied_nor_removed(path) -> None:
    path.write_text("not empty")
    with pytest.raises(RunDirectoryError, match="expected an empty file or none at"):
        Lock(path, "a run").__enter__()
    with (path.parent / "other").open("w") as other, Lock(path.parent / "other", "a run"):
        other.write("not empty")
        other.flush()
    assert path.read_text() == (path.parent / "other").read_text() == "not empty"


def test_what_cannot_be_locked_is_an_error_of_ours(path) -> None:
    (path.parent / "text").write_text("kept")
    path.symlink_to("text")
    for bad in (path, path.parent):
        with pytest.raises(RunDirectoryError, match="expected"):
            Lock(bad, "a run").__enter__()
    assert (path.parent / "text").read_text() == "kept"
