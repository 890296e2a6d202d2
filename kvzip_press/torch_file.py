"""Reads the ``.pt`` files of others: a small interpreter of what torch.save writes, which knows data and no programs.

torch.load with ``weights_only`` runs no code either, but it believes what a file claims: a few bytes can ask it for
terabytes, and it does not compare the checksums that torch.save writes. Here nothing is larger than the file, and every
record is compared with its CRC-32. Of a file's objects, tensors, containers, texts and numbers are read; numpy arrays
and dtypes, which training scripts save beside them, are skipped.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import zipfile
from typing import Any

import torch

from kvzip_press.untrusted import read_bytes

PT_BYTES = 2 * 2**30  # the longest .pt that is read, unless its reader names another bound
_MAX_RECORDS = 20_000
_MAX_OPCODES = 2_000_000
_MAX_TUPLES = 10_000  # one inside another, a key of a dict is hashed by recursion
_MAX_DIMENSIONS = 16
_MAX_SHARING = 4  # bytes of all tensors for each byte of the file
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DATA_ONLY = (  # names of opcodes, of all protocols up to 5
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINBYTES SHORT_BINBYTES BINSTRING SHORT_BINSTRING STRING EMPTY_LIST APPEND "
    "APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS GET "
    "BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPERSID"
)
_OPCODES = frozenset(_DATA_ONLY.split())
_SKIPPED = re.compile(
    r"numpy\.(core\.multiarray|_core\.multiarray|_core\.numeric|dtypes)\.\w+|numpy\.ndarray|_codecs\.encode"
    r"|torch\.(b?float\d*|u?int\d+|bool|Size)"
)


def read(path: str | os.PathLike[str], *, max_bytes: int = PT_BYTES) -> Any:
    """Returns what a file of ``torch.save`` holds; tensors are on the CPU, dense, in memory of their own.

    Takes up to three times the file's size of memory.

    Raises:
        ValueError: It is no regular file, longer than ``max_bytes``, damaged, not in the format that torch.save has
            written since torch 1.6, compressed, or it holds something else than tensors and plain data, or a tensor
            that claims more numbers than the file has.
        OSError: It does not exist or cannot be read.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    try:
        records = _records(data)
        program = records.get("data.pkl", b"")
        _check_program(program)
        return _Reader(program, records).load()
    except Exception as error:  # instructions that do not fit together fail in any way; none of them is code
        raise ValueError(f"expected a file as torch.save writes it, got {type(error).__name__}: {error}") from error


def _records(data: bytes) -> dict[str, bytes]:
    """Returns the records of a zip archive, together no longer than it, by their names inside its one folder."""
    # Counted before the directory is read: an entry takes twenty times its size as an object.
    if (n_entries := data.count(b"PK\x01\x02")) > _MAX_RECORDS:
        raise ValueError(f"expected at most {_MAX_RECORDS} records, got {n_entries}")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        size = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or size > len(data):
            raise ValueError(f"expected records that are not compressed, got {size} bytes in a file of {len(data)}")
        records = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    if len(records) < len(entries) or records.get("byteorder", b"little") != b"little":
        raise ValueError(f"expected each record once, and little-endian numbers, got {sorted(records)[:5]}")
    return records


def _check_program(program: bytes) -> None:
    """Raises ValueError unless a pickle has only the instructions that build data, and refers to what it has stored."""
    n_tuples = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        n_tuples += opcode.name.startswith("TUPLE")
        if opcode.name not in _OPCODES or number > _MAX_OPCODES or n_tuples > _MAX_TUPLES:
            raise ValueError(f"expected a few instructions that build data, got {opcode.name} as number {number}")
        if "PUT" in opcode.name and not 0 <= int(argument) <= number:  # room is made for all lower indices
            raise ValueError(f"expected objects stored one after another, got one as number {argument}")


class _Skipped:
    """Stands for an object that is not read, whatever is done with it."""

    def __new__(cls, *_: Any) -> _Skipped:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    def __init__(self, program: bytes, records: dict[str, bytes]) -> None:
        super().__init__(io.BytesIO(program))
        self._records = records
        self._storages: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name; no module is imported, so nothing that a file names is ever found or run."""
        known = {
            "collections.OrderedDict": dict,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "numpy.dtype": _dtype,
            **{f"torch.{storage}": dtype for storage, dtype in _STORAGES.items()},
        }
        full = f"{module}.{name}"
        if full in known:
            return known[full]
        if _SKIPPED.fullmatch(full):
            return _Skipped
        raise ValueError(f"expected tensors and plain data, got {full[:80]!r}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Returns the numbers of one record, flat."""
        kind, dtype, key, _, n = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError(f"expected a storage of numbers, got another of dtype {dtype}"[:120])
        if key not in self._storages:
            record = self._records.get(f"data/{key}", b"")
            self._storages[key] = (
                torch.frombuffer(bytearray(record), dtype=dtype) if record else torch.empty(0, dtype=dtype)
            )
        storage = self._storages[key]
        if storage.dtype != dtype or storage.numel() != n:
            raise ValueError(f"expected record {key[:20]!r} of {n} numbers of {dtype}, got {storage.numel()}")
        return storage

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> torch.Tensor:
        """Returns a view of a storage; all of them together have not many more numbers than the file."""
        tensor = view(storage, offset, shape, strides)
        self._bytes += tensor.nbytes
        if self._bytes > _MAX_SHARING * sum(map(len, self._records.values())):
            raise ValueError("expected tensors of numbers of their own, got many of the same")
        return tensor


def view(storage: Any, offset: Any, shape: Any, strides: Any) -> torch.Tensor:
    """Returns a view of a storage with no more numbers than that. Raises ValueError if there is none."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, torch.Tensor) or not all(type(x) is int and 0 <= x < 2**63 for x in numbers):
        raise ValueError("expected a tensor of a storage, an offset, a shape and strides")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"expected a stride for each of at most {_MAX_DIMENSIONS} dimensions, got {len(strides)}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if count and (count > storage.numel() or last >= storage.numel()):
        raise ValueError(f"expected a tensor within its record of {storage.numel()} numbers, got one of {count}")
    if not count and max(shape) >= 2**31:
        raise ValueError(f"expected an empty tensor of a shape below 2 ** 31, got {tuple(shape)}")
    return storage.as_strided(shape, strides, offset) if count else storage.new_empty(shape)


def _dtype(name: Any, *_: Any) -> _Skipped:
    if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[fiub]\d", name):
        raise ValueError(f"expected arrays of numbers, got one of {name!r}"[:120])
    return _Skipped()
