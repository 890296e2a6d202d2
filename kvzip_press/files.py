"""This package's files: written whole or not at all; whatever is wrong with one raises an error of this package."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvzip_press.errors import CacheFileError, InvalidArgumentError, KVzipPressError
from kvzip_press.untrusted import parse_json

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

DIGEST = "sha256"  # metadata key of a text's seal, which is stored beside the text
HEADER_BYTES = 64 * 2**20  # the longest header of a safetensors file that is written or read
_NAMES = {  # how safetensors names the dtypes of our files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
logger = logging.getLogger(__name__)
_TEMPORARY = re.compile(r"\.kvzip-press-\d+-[0-9a-f]{16}\.tmp")
_ABANDONED_SECONDS = 24 * 3600
_BINARY = getattr(os, "O_BINARY", 0)


@contextmanager
def replacing(path: Path, *, parents: bool = False) -> Iterator[Path]:
    """Yields a temporary file beside ``path`` that replaces it when all is written; after an error the old file stays.

    The caller writes into that very file. It is locked until then, so that :func:`sweep_temporaries` leaves it alone.
    With ``parents``, its folder is created if it does not exist.

    Raises:
        CacheFileError: The file cannot be written. The message names the path and the cause.
    """
    if not _can_be_named(path):
        raise CacheFileError(f"expected a name that a file can have, got {str(path)!r}")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _new_temporary(path.parent)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to be told
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        with suppress(OSError):  # makes the new name survive a power cut, if folders can be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        raise CacheFileError(f"expected to write {path}, got {_cause(error)}") from error


def check_writable(path: str | os.PathLike[str], what: str, *, parents: bool = False) -> None:
    """Refuses a place that no file can be written to, before the work whose result goes there.

    It is looked at, and nothing is made. What may still go wrong later (a full disk) is told when the file is written.

    Args:
        path: The file.
        what: What the user gave it as, such as "--out"; the message begins with it.
        parents: Whether its folder, and those around it, will be made if they do not exist.

    Raises:
        InvalidArgumentError: A folder or a device is there, the folder around it does not exist, is no folder, or may
            not be written in; or the name is none that a file can have.
    """
    path = Path(path)
    expected = f"expected {what} to be a file that can be written, got {str(path)!r:.200}"
    if not _can_be_named(path):
        raise InvalidArgumentError(f"{expected}: no file can have that name")
    try:
        found = path.stat() if path.exists() else None
        around = path.absolute().parent
        while parents and not around.exists() and around != around.parent:
            around = around.parent
        may = around.is_dir() and os.access(around, os.W_OK | os.X_OK)
    except OSError as error:
        raise InvalidArgumentError(f"{expected}: {error.strerror}") from error
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise InvalidArgumentError(f"{expected}, which is {kind}")
    if not may:
        why = "may not be written in" if around.is_dir() else "is no folder" if around.exists() else "does not exist"
        raise InvalidArgumentError(f"{expected}: {around} {why}")


def without_temporaries(error: OSError, names: re.Pattern[str] = _TEMPORARY) -> str:
    """Returns an error of the operating system in words, without the name of a temporary that a user never gave."""
    paths = [Path(os.fsdecode(one)) for one in (error.filename, error.filename2) if isinstance(one, str | bytes)]
    if any(names.fullmatch(part) for path in paths for part in path.parts):
        return error.strerror or type(error).__name__
    return str(error)


def _cause(error: OSError | SafetensorError) -> str:
    said = without_temporaries(error) if isinstance(error, OSError) else str(error)
    return f"{type(error).__name__}: {said}"


def _can_be_named(path: Path) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeError:
        return False


def _new_temporary(folder: Path) -> tuple[Path, int]:
    """Returns a new empty file and its descriptor, which holds the lock that says that someone writes there."""
    while True:
        path = folder / f".kvzip-press-{os.getpid()}-{secrets.token_hex(8)}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)  # minus the umask
        with suppress(BlockingIOError):  # a sweep came between its creation and its lock, and removes it
            lock_file(descriptor)
            if path.exists():  # nor has a sweep removed it already
                return path, descriptor
        os.close(descriptor)


def sweep_temporaries(folder: Path) -> int:
    """Removes the temporary files that killed processes left in a folder, and returns how many there were.

    Only regular files are removed that bear a name of :func:`replacing` and that no living process writes: a writer
    holds the operating system's lock on its file, which goes with the process, however that ends. Where files cannot be
    locked, a day without a change stands for that. Folders inside are not looked at, and a missing folder is empty.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        return sum(_remove_abandoned(path) for path in sorted(folder.iterdir()) if _TEMPORARY.fullmatch(path.name))
    return 0


def _remove_abandoned(path: Path) -> bool:
    try:
        if path.is_symlink() or not path.is_file():
            return False
        descriptor = os.open(path, os.O_RDWR | _BINARY)
        try:
            locked = lock_file(descriptor)
            if not locked and time.time() - os.fstat(descriptor).st_mtime < _ABANDONED_SECONDS:
                return False
            path.unlink()  # under the lock: a writer that created it just now sees that it is gone
        finally:
            os.close(descriptor)
    except OSError:  # somebody writes it, removed it first, or owns it
        return False
    return True


def lock_file(descriptor: int) -> bool:
    """Locks an open file until it is closed. Returns False where files cannot be locked.

    Raises:
        BlockingIOError: Someone else holds the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems
        return False
    return True


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str], *, seal: str = "", parents: bool = False
) -> None:
    """Writes tensors of any device, and texts that describe them, as a safetensors file: whole or not at all.

    Equal tensors and texts give equal files. ``seal`` names the text whose SHA-256 is stored, too, for
    :func:`check_seal`; ``parents`` is that of :func:`replacing`.

    Raises:
        CacheFileError: The file cannot be written, or its header would be longer than `HEADER_BYTES`; nothing is
            written then.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**texts, **({DIGEST: digest_of(texts[seal].encode())} if seal else {})}
    if (length := len(_header(plain, metadata))) > HEADER_BYTES:
        raise CacheFileError(f"expected to write {path} with a header of at most {HEADER_BYTES} bytes, got {length}")
    with replacing(path, parents=parents) as temporary:
        save_file(plain, temporary, metadata=metadata)


def save_file(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes CPU tensors and texts into an existing file, in the format of safetensors.

    Theirs would write a file of another name first, which nobody could tell to be ours if the process were killed, and
    gives the texts in any order.
    """
    header = _header(tensors, metadata)
    with path.open("r+b") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in _order(tensors):
            file.write(_bytes_of(tensors[name]))


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in _order(tensors):
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def _order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the names, those of the largest numbers first: then each tensor is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


@contextmanager
def opened(
    path: Path, error: type[KVzipPressError], expected: str, *, malformed: tuple[type[Exception], ...] = ()
) -> Iterator[Any]:
    """Opens a safetensors file, mapped into memory. Whatever is wrong with it inside is raised as ``error``.

    Pipes, devices and headers of more than `HEADER_BYTES` are refused before they are read. What a header says of a
    tensor is within the file: safetensors compares shapes, dtypes and offsets with its length.

    The message is ``expected`` and the cause; an error of this package says enough, and is raised as it is.
    ``malformed`` are further exceptions that malformed contents cause inside the context. A caller that checks the
    contents itself gives none, so that its own mistakes are not blamed on the file.
    """
    causes: tuple[type[Exception], ...] = (OSError, SafetensorError, UnicodeError, *malformed)
    try:
        _check_header_length(path, error, expected)
        with safe_open(path, framework="pt") as file:
            yield file
    except KVzipPressError:  # some are a ValueError or an OSError too
        raise
    except causes as cause:
        raise error(f"{expected}, got {type(cause).__name__}: {cause}") from cause


def _check_header_length(path: Path, error: type[KVzipPressError], expected: str) -> None:
    if path.exists() and not path.is_file():  # reading a pipe would wait for someone to write into it
        raise error(f"{expected}, got a folder, a pipe or a device")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if HEADER_BYTES < length <= os.fstat(file.fileno()).st_size:
            raise error(f"{expected}, got a header of {length} bytes, more than {HEADER_BYTES}")


def tensor_in(
    file: Any, name: str, dtypes: Collection[torch.dtype], error: type[KVzipPressError], expected: str
) -> torch.Tensor:
    """Returns a tensor of an open file, in memory of its own, if it is of one of these dtypes; else raises ``error``.

    A copy: mapped memory would change or vanish with the file, and its alignment depends on the header's length.
    """
    held = file.get_slice(name)
    if held.get_dtype() not in {_NAMES[dtype] for dtype in dtypes}:
        raise error(f"{expected}, got {name!r} of the dtype {held.get_dtype()}")
    tensor: torch.Tensor = file.get_tensor(name).clone(memory_format=torch.contiguous_format)
    return tensor


def check_format(
    got: object, known: object, file: Any, error: type[KVzipPressError], expected: str, *, n_named: int | None = None
) -> None:
    """Raises ``error`` unless a format mark is the known one; the message names the file's first ``n_named`` tensors.

    None names all of them.
    """
    if got != known:
        raise error(f"{expected}, got the tensors {sorted(file.keys())[:n_named]}")


def check_seal(texts: Mapping[str, str], name: str, error: type[KVzipPressError]) -> None:
    """Raises ``error`` if the SHA-256 stored beside the text ``name`` is missing or is not that of the text."""
    if digest_of(texts[name].encode()) != texts.get(DIGEST):
        raise error("expected metadata with the SHA-256 beside them, got another: the file was changed")


def digest_of_contents(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes of tensors, and of the texts beside them."""
    described = {name: [str(t.dtype), list(t.shape), digest_of_tensor(t)] for name, t in tensors.items()}
    return digest_of(to_json([described, dict(texts)]).encode())


def check_contents(
    tensors: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    digest: object,
    error: type[KVzipPressError],
    where: str,
) -> None:
    """Raises ``error`` unless a digest is that of the contents. If it is None, which older files have, logs a note."""
    if digest is None:
        logger.warning("%s is an older file without a checksum: whether it was damaged cannot be told", where)
    elif digest != digest_of_contents(tensors, texts):
        raise error(f"expected {where} with the SHA-256 of its contents, got another: the file was changed or damaged")


def json_of(text: str, error: type[KVzipPressError], expected: str) -> Any:
    """Returns the value of a JSON text that a file holds; raises ``error`` if it is none, or beyond all bounds."""
    try:
        return parse_json(text)
    except ValueError as cause:
        raise error(f"{expected}, got {type(cause).__name__}: {cause}") from cause


def to_json(value: Any) -> str:
    """Returns JSON in which equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(data: Any) -> str:
    """Returns the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """Returns the SHA-256 of a CPU tensor's bytes, in hexadecimal."""
    return digest_of(_bytes_of(tensor))


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Returns a view of a CPU tensor's bytes, in order; of a tensor that is not contiguous, of a copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
