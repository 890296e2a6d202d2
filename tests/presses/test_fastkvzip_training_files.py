"""A training's folder: damage gives the same gates or an error, two runs do not meet, and nothing of the user's goes.

The features are made up here (a model's own cost seconds), so that each of some hundred trainings takes milliseconds.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvzip_press.cli.main import app
from kvzip_press.errors import (
    CacheFileError,
    DiskFullError,
    InvalidArgumentError,
    KVzipPressError,
    RunDirectoryError,
)
from kvzip_press.presses.fastkvzip import Gates
from kvzip_press.presses.fastkvzip.training import Agreement, Recipe, Training
from kvzip_press.presses.fastkvzip.training.documents import Piece, read_texts
from kvzip_press.presses.fastkvzip.training.self_generation import SelfGeneration
from kvzip_press.presses.fastkvzip.training.shards import Shards
from kvzip_press.testing import ByteTokenizer, tiny_model
from kvzip_press.training.folder import MARKER, WorkFolder

pytestmark = pytest.mark.any_transformers

TOKENIZER = ByteTokenizer()
MODEL = tiny_model(num_layers=2)
TOKENS = [40, 50, 36, 44]
DISK_BYTES = 140 * 2 * (64 * 2 + 2 * 4)  # two rounds of two pieces
RECIPE = Recipe(tokens=170, held_out_tokens=40, steps=4, batch_size=32, dim=2, n_sink=2, disk_bytes=DISK_BYTES)
DATA = ([Piece(i, list(range(3, 3 + n))) for i, n in enumerate(TOKENS)], [Piece(9, list(range(40)))])


class Killed(BaseException):
    """What a test raises in the midst of a training, as a killed process stops there."""


@pytest.fixture(autouse=True)
def made_up(monkeypatch) -> None:
    def features(model: Any, tokenizer: Any, ids: list[int], weighting: str | None) -> tuple[dict, dict]:
        generator = torch.Generator().manual_seed(len(ids))
        hidden = {i: torch.randn(len(ids), 64, generator=generator) for i in range(3)}
        return hidden, {i: torch.rand(2, len(ids), generator=generator) for i in range(3)}

    found = Agreement((0, 1), (1.0,) * 2, (1.0,) * 2, (1.0,) * 2, {}, 40)
    monkeypatch.setattr("kvzip_press.presses.fastkvzip.training.run.features_of", features)
    monkeypatch.setattr("kvzip_press.presses.fastkvzip.training.run.evaluate", lambda *_: found)


def training(folder: Path | WorkFolder, recipe: Recipe = RECIPE, **options) -> Training:
    return Training(MODEL, TOKENIZER, recipe, DATA, "made up", folder, **options)


def gates_of(folder: Path) -> bytes:
    """The file of the gates: all that a user gets."""
    gates, _ = training(folder).run()
    path = folder.with_name("gates.safetensors")
    gates.save(path)
    return path.read_bytes()


@pytest.fixture
def whole(tmp_path) -> bytes:
    return gates_of(tmp_path / "whole")


@pytest.fixture
def begun(tmp_path) -> Path:
    """A training that was killed in its second round: a state, the features of a piece, and what a kill leaves."""
    folder = tmp_path / "begun"

    def progress(stage: str, done: int, *_: object) -> None:
        if (stage, done) == ("reading and scoring", 3):
            raise Killed

    with pytest.raises(Killed):
        training(folder, progress=progress).run()
    (folder / ".kvzip-press-1-0123456789abcdef.tmp").write_bytes(b"half of a record")
    (folder / "round-001" / ".kvzip-press-1-0123456789abcdef.tmp").write_bytes(b"half of a record")
    return folder


# Damage -----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _swap(path: Path) -> None:
    other = next(one for one in sorted(path.parent.iterdir()) if one.is_file() and one != path)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() * 2),
    "a bit flipped": _flip,
    "other JSON": lambda path: path.write_text("[1, 1000000]"),
    "deep JSON": lambda path: path.write_text("[" * 100_000),
    "removed": Path.unlink,
    "swapped with its neighbour": _swap,
    "a folder": _replace_by_folder,
    "a pipe": _replace_by_pipe,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gives_the_same_gates_or_an_error(begun, whole, tmp_path, damage) -> None:
    files = sorted(path.relative_to(begun) for path in begun.rglob("*") if path.is_file() and path.suffix != ".tmp")
    assert len(files) == 8
    refused = []
    for file in files:
        folder = tmp_path / "damaged"
        shutil.copytree(begun, folder)
        DAMAGES[damage](folder / file)
        try:
            assert gates_of(folder) == whole, file
        except KVzipPressError:
            refused.append(str(file))
        shutil.rmtree(folder)
    in_features = [name for name in refused if name.startswith("round")]
    assert in_features == [] or damage in ("a folder", "a pipe"), "features are simply made again"


def test_features_of_which_none_was_damaged_are_not_made_again(begun, whole, caplog) -> None:
    assert gates_of(begun) == whole and caplog.text == ""
    assert not list(begun.rglob("*.tmp")), "what the kill left half-written is swept"


def test_a_note_says_what_is_made_again(begun, whole, caplog) -> None:
    _flip(begun / "round-001" / "scores-001.bin")
    _flip(begun / "state-000.safetensors")
    assert gates_of(begun) == whole
    assert "state-000.safetensors" in caplog.text and "trained again" in caplog.text
    assert not list(begun.glob("round-*"))


def test_features_that_change_after_they_were_written_are_not_learned_from(tmp_path, whole) -> None:
    def progress(stage: str, done: int, *_: object) -> None:
        if (stage, done) == ("reading and scoring", 2):
            _flip(tmp_path / "run" / "round-000" / "hidden-001.bin")

    with pytest.raises(RunDirectoryError, match="as written, got others: start again"):
        training(tmp_path / "run", progress=progress).run()
    assert gates_of(tmp_path / "run") == whole


def test_features_of_another_training_are_not_continued(begun, tmp_path) -> None:
    (begun / "training.json").unlink()
    other = replace(RECIPE, seed=1)
    gates, _ = training(begun, other).run()
    expected, _ = training(tmp_path / "other", other).run()
    for one, two in zip(gates.layers, expected.layers, strict=True):
        assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in two.state_dict().items())


def test_damaged_samples_are_sampled_again(tmp_path, caplog, monkeypatch) -> None:
    sampling = SelfGeneration(seed=3)
    monkeypatch.setattr(SelfGeneration, "_batch", lambda self, model, tokenizer, batch: [[self.seed, batch, 7]])

    def first(sampling: SelfGeneration = sampling) -> list[int]:
        return next(sampling.documents(MODEL, TOKENIZER, tmp_path))

    document, path = first(), tmp_path / "batch-00000.json"
    for name, damage in DAMAGES.items():
        if name not in ("swapped with its neighbour", "a folder"):
            damage(path)
            assert first() == document, name
            assert name == "removed" or "sampled again" in caplog.text
            path.unlink()
            caplog.clear()
            first()
    with pytest.raises(InvalidArgumentError, match="samples of this model with these settings"):
        first(replace(sampling, seed=4))


# Faults while writing ---------------------------------------------------------------------------------------------


class _Torn:
    """A file of which a write stores half, and then fails."""

    def __init__(self, file: Any, error: OSError) -> None:
        self.file, self.error = file, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.file.write(data[: len(data) // 2])
        raise self.error


class Faults:
    """Fails the n-th thing that is asked of the disk: to make, open, write, sync, rename or remove a file."""

    def __init__(self, monkeypatch, number: int, code: int) -> None:
        self.left, self.code = number, code
        for name in ("open", "fsync", "replace", "mkdir", "unlink"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))
        for module, name in ((os, "fdopen"), (io, "open")):
            monkeypatch.setattr(module, name, self._torn(getattr(module, name)))

    def _due(self) -> bool:
        self.left -= 1
        return self.left == -1

    def _error(self) -> OSError:
        return OSError(self.code, os.strerror(self.code))

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **options: Any) -> Any:
            if self._due():
                raise self._error()
            return function(*arguments, **options)

        return failing

    def _torn(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def torn(*arguments: Any, **options: Any) -> Any:
            file = function(*arguments, **options)
            return _Torn(file, self._error()) if file.writable() and self._due() else file

        return torn


def test_a_failed_write_leaves_what_the_next_run_continues(tmp_path, monkeypatch) -> None:
    """Every write of a training fails once; a run that goes on in spite of it gives the right gates, too."""
    model, recipe, data = tiny_model(num_layers=1), replace(RECIPE, steps=2, disk_bytes=12_000), (DATA[0][:2], DATA[1])

    def parameters(folder: Path) -> list[torch.Tensor]:
        gates, _ = Training(model, TOKENIZER, recipe, data, "made up", folder).run()
        return list(gates.layers[0].state_dict().values())

    expected, failed = parameters(tmp_path / "whole"), []
    for number in range(1000):
        folder = tmp_path / f"run-{number}"
        code = errno.EACCES if number % 4 == 1 else errno.ENOSPC
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, code)
            try:
                got = parameters(folder)
            except (OSError, CacheFileError) as error:  # of ours, or the disk's own with its file
                got = None
                failed.append(str(error))
        if got is None:
            got = parameters(folder)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), number
        if faults.left >= 0:
            break
    assert 30 < len(failed) < number < 999
    assert [said for said in failed if not said.startswith("expected") and not said.startswith("[Errno")] == []


# Two at once ------------------------------------------------------------------------------------------------------


def test_a_second_training_in_the_folder_is_refused(tmp_path, whole) -> None:
    seen = []

    def progress(*_: object) -> None:
        with pytest.raises(RunDirectoryError, match="expected to be alone with the training in"):
            training(tmp_path / "run").run()
        seen.append(True)

    gates, _ = training(tmp_path / "run", progress=progress).run()
    gates.save(tmp_path / "gates.safetensors")
    assert seen and (tmp_path / "gates.safetensors").read_bytes() == whole


@pytest.mark.parametrize("stage", ["reading and scoring", "training"])
@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_lock_was_removed_stops_before_it_writes(tmp_path, whole, stage, again) -> None:
    """Another run may have begun, and have ended already."""
    folder, made = tmp_path / "run", []

    def progress(at: str, *_: object) -> None:
        if at == stage and not made:
            (folder / ".kvzip-press-gates.lock").unlink()
            made.append(gates_of(folder) if again else whole)

    with pytest.raises(RunDirectoryError, match="removed or replaced"):
        training(folder, progress=progress).run()
    assert made == [whole] == [gates_of(folder)]


# What is the user's -----------------------------------------------------------------------------------------------


@pytest.fixture
def invoke(monkeypatch, tmp_path) -> Callable[..., str]:
    monkeypatch.setattr("kvzip_press.loading.by_name.load_model", lambda name, **_: (tiny_model(name), TOKENIZER))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"document {i} " * 8}) + "\n" for i in range(12)))
    small = ("--tokens", 500, "--held-out-tokens", 64, "--steps", 2, "--dim", 2, "--device", "cpu", "--data", texts)

    def run(*arguments: object) -> str:
        words = ["gates", "train", "--model", "llama", *map(str, (*small, *arguments))]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return run


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_users_files_in_the_work_folder_stay_and_so_do_gates_written_there(invoke, tmp_path) -> None:
    home = tmp_path / "home"
    (home / "round-000").mkdir(parents=True)
    mine = {"thesis.tex": b"x", "training.json": b"{}", "done.json": b"[]", "round-000/hidden-000.bin": b"mine"}
    for name, data in mine.items():
        (home / name).write_bytes(data)
    invoke("--out", home / "g.safetensors", "--work", home)
    assert Gates.load(home / "g.safetensors").provenance["data"] == "texts.jsonl"
    left = listing(home)
    assert left.pop("g.safetensors") and left == mine
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["round-000"]


def test_what_a_user_puts_into_the_runs_folder_stays(invoke, tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(Gates, "save", _saving_beside(Gates.save, tmp_path / "w"))
    invoke("--out", tmp_path / "g.safetensors", "--work", tmp_path / "w")
    (left,) = listing(tmp_path / "w").items()
    assert left[0].endswith("notes.txt") and left[1] == b"mine"
    assert "stays: this training did not make ['notes.txt']" in caplog.text


def _saving_beside(save: Callable[..., None], folder: Path) -> Callable[..., None]:
    def saving(gates: Gates, path: Path) -> None:
        save(gates, path)
        next(folder.iterdir()).joinpath("notes.txt").write_bytes(b"mine")

    return saving


def test_a_folder_that_is_not_ours_is_neither_used_nor_removed(invoke, tmp_path) -> None:
    out, work = tmp_path / "g.safetensors", tmp_path / "w"
    folder, elsewhere = WorkFolder.inside(work, out).path, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "training.json").write_text("{}")

    def refused(said: str) -> None:
        before = listing(tmp_path)
        with pytest.raises(RunDirectoryError, match=said):
            invoke("--out", out, "--work", work)
        assert listing(tmp_path) == before

    shutil.copytree(elsewhere, folder)
    refused(rf"to be new, empty or of this training, got a folder with .*'training.json'.* without {MARKER}")
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    refused("got a link or a file")
    folder.unlink()
    training(folder)  # one of another name
    refused(r"to name the training '[0-9a-f]{12}', got .*'run': ''")


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_in_the_folder_does_not_reach_a_users_file(begun, tmp_path, link) -> None:
    """Features are written with truncation: through a link, into what it points to."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine" * 10_000)
    for name in ("hidden-000.bin", "scores-001.bin"):
        (begun / "round-001" / name).unlink()
        link(begun / "round-001" / name, mine)
        with pytest.raises(RunDirectoryError, match=r"expected a file of the training at .*: remove it"):
            training(begun).run()
        assert mine.read_bytes() == b"mine" * 10_000
        (begun / "round-001" / name).unlink()


def test_a_linked_folder_of_features_is_neither_written_nor_cleared(begun, tmp_path) -> None:
    shutil.move(begun / "round-001", tmp_path / "mine")
    before = listing(tmp_path / "mine")
    (begun / "round-001").symlink_to(tmp_path / "mine")
    with pytest.raises(RunDirectoryError, match="got a link: remove it"):
        training(begun).run()
    work = WorkFolder(begun)
    with work.held():
        work.clear(begun / "round-001")
    assert listing(tmp_path / "mine") == before


def test_two_commands_with_one_output_do_not_meet(invoke, tmp_path, monkeypatch) -> None:
    """Not even in two work folders; the second one's error comes at once, and the first one's gates are right."""
    out, run, refusals = tmp_path / "g.safetensors", Training.run, []

    def running(self: Training) -> Any:
        monkeypatch.setattr(Training, "run", run)
        for work in ("a", "b"):
            with pytest.raises(RunDirectoryError, match=r"expected to be alone with the training of .*g\.safetensors"):
                invoke("--out", out, "--work", tmp_path / work)
            refusals.append(work)
        return run(self)

    invoke("--out", tmp_path / "alone.safetensors")
    monkeypatch.setattr(Training, "run", running)
    invoke("--out", out, "--work", tmp_path / "a")
    assert refusals == ["a", "b"] and out.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.safetensors", "g.safetensors", "texts.jsonl"]


def test_what_would_fail_or_destroy_a_text_in_the_end_is_refused_at_once(invoke, tmp_path) -> None:
    texts = tmp_path / "texts.jsonl"
    before = texts.read_bytes()
    (tmp_path / "folder").mkdir()
    for out, said in ((texts, "another file than --data"), (tmp_path / "folder", "--out to be a file")):
        with pytest.raises(InvalidArgumentError, match=said):
            invoke("--out", out)
    with pytest.raises(InvalidArgumentError, match="expected --work to be another place than --out"):
        invoke("--out", tmp_path / "new", "--work", tmp_path / "new")
    assert texts.read_bytes() == before


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EACCES, RunDirectoryError)])
def test_the_command_says_what_the_disk_refused(invoke, tmp_path, monkeypatch, code, kind) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Shards, "append", refuse)
    with pytest.raises(kind, match="expected"):
        invoke("--out", tmp_path / "g.safetensors")


# Texts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path) -> Iterator[Callable[[bytes], list[str]]]:
    def reading(data: bytes, name: str = "texts.jsonl") -> list[str]:
        (tmp_path / name).write_bytes(data)
        return list(read_texts([str(tmp_path / name)]))

    return reading


GOOD = b'{"text": "first"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "caf\xe9"}', "a byte that is not UTF-8, 0xe9 at 13"),
        (b'["text"]', r"""b'\["text"\]'"""),
        (b"null", "b'null'"),
        (b'{"text": 3}', "3"),
        (b'{"text": null}', "null"),
        (b'{"text": ["a"]}', r'\["a"\]'),
        (b'{"text": "a"', "no JSON .* at character 12"),
        (b'{"text": "\\ud800"}', "ud800"),
        (b'{"text": "a", "score": NaN}', "finite numbers, got NaN"),
        (b'{"text": "a", "text": "b"}', "'text' twice"),
        (b'{"text": ' + b"[" * 100_000, "nested"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "5000"),
        (b'{"text": "' + b"a" * 2**24 + b'"}', "more than 16777216 bytes"),
    ],
)
def test_a_line_that_is_no_text_is_named(read, line, said) -> None:
    with pytest.raises(
        InvalidArgumentError, match=rf'^expected {{"text": "..."}} in line 3 of .*texts.jsonl, got .*{said}'
    ):
        read(GOOD + b"\n" + line + b"\n" + GOOD)


def test_sound_lines_are_read_as_they_are(read) -> None:
    assert read(b"\xef\xbb\xbf" + GOOD + b'\n{"text": "caf\xc3\xa9 \\ud83d\\ude00", "id": 1}\r\n') == [
        "first",
        "",
        "café 😀",
    ]


def test_a_file_that_is_no_text_is_refused(read, tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected a text file at .*a.txt, got .*UTF-8"):
        read(b"caf\xe9", "a.txt")
    for name in ("pipe.jsonl", "pipe.txt"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InvalidArgumentError, match="expected a"):
            list(read_texts([str(tmp_path / name)]))
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(InvalidArgumentError, match="a regular file, got a pipe or a device"):
        list(read_texts([str(tmp_path / "zero.jsonl")]))
