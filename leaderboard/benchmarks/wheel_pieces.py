r"""Carries wheels to a machine without a network, through a transfer that takes few files of limited sizes at a time.

Here, where the wheels are, without what this GPU cannot run and what the benchmark does not need::

    python leaderboard/benchmarks/wheel_pieces.py cut vllm-*.whl --output pieces --piece-mb 60 --architecture 90 \
        --without 'vllm/vllm_flash_attn/_vllm_fa2_C*' --without 'vllm/_moe_C*' --without 'vllm/vllm-rs'

There, when all pieces have come, with the python that is to have them::

    python leaderboard/benchmarks/wheel_pieces.py join pieces --output wheels --install

It needs Python alone, since the other machine may have nothing else yet. Kernels lie in libraries in containers, one
entry for each architecture; those of other GPUs are overwritten with zeros, which pack to nothing, and what tells the
driver which entry is whose stays. A library that has no machine code for this GPU keeps the PTX that the driver can
compile.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

MANIFEST = "pieces.json"
_MAGIC = struct.pack("<I", 0xBA55ED50)
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, bytes of the code, ..., architecture
_PTX, _MACHINE_CODE = 1, 2
_LEAST_HEADER = _ENTRY.size


@dataclass(frozen=True)
class Entry:
    """The code of one architecture in a container of a library.

    Attributes:
        kind: 1 for PTX, 2 for machine code.
        architecture: 90 for compute capability 9.0.
        begin: Where its code begins.
        end: Where it ends.
    """

    kind: int
    architecture: int
    begin: int
    end: int


def containers(library: bytes | bytearray) -> Iterator[list[Entry]]:
    """Yields the entries of each container of kernels in a library; what is none, though it begins as one, is left."""
    at = 0
    while (at := library.find(_MAGIC, at)) >= 0:
        entries, end = _entries(library, at)
        if entries:
            yield entries
        at = end if entries else at + len(_MAGIC)


def _entries(library: bytes | bytearray, at: int) -> tuple[list[Entry], int]:
    if at + _CONTAINER.size > len(library):
        return [], at
    _, version, header, size = _CONTAINER.unpack_from(library, at)
    place, end, found = at + header, at + header + size, []
    if version != 1 or header != _CONTAINER.size or end > len(library):
        return [], at
    while place + _ENTRY.size <= end:
        kind, _, header, size, architecture = _ENTRY.unpack_from(library, place)
        begin = place + header
        if kind not in (_PTX, _MACHINE_CODE) or header < _LEAST_HEADER or begin + size > end:
            return [], at
        found.append(Entry(kind, architecture, begin, begin + size))
        place = begin + size
    return (found, end) if place == end else ([], at)


def thinned(library: bytes, architecture: int) -> bytes:
    """Returns a library whose kernels for other GPUs are zeros: of the same size, and everything at its place."""
    thin = bytearray(library)
    for entries in containers(library):
        has_own = any(one.kind == _MACHINE_CODE and one.architecture == architecture for one in entries)
        for one in entries:
            own = one.architecture == architecture if one.kind == _MACHINE_CODE else one.architecture <= architecture
            if not own or (one.kind == _PTX and has_own):
                thin[one.begin : one.end] = bytes(one.end - one.begin)
    return bytes(thin)


def rewritten(wheel: Path, target: Path, architecture: int | None, without: Sequence[str]) -> None:
    """Writes a wheel with thinned libraries, without members that match a pattern, packed as tightly as zip can."""
    record, rows = "", []
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for member in old.infolist():
            if any(fnmatch(member.filename, pattern) for pattern in without):
                continue
            if member.filename.endswith(".dist-info/RECORD"):
                record = member.filename
                continue
            data = old.read(member)
            if architecture is not None and member.filename.endswith(".so"):
                data = thinned(data, architecture)
            new.writestr(member, data, zipfile.ZIP_DEFLATED, 9)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append([member.filename, f"sha256={digest}", str(len(data))])
        if not record:
            raise SystemExit(f"{wheel}: expected a wheel, with a RECORD of its files, got none")
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows([*rows, [record, "", ""]])
        new.writestr(record, written.getvalue())


def cut(
    wheels: Sequence[Path], output: Path, piece_bytes: int, architecture: int | None, without: Sequence[str]
) -> list[Path]:
    """Writes wheels in pieces of at most ``piece_bytes``, and a file that says what belongs together; returns both."""
    output.mkdir(parents=True, exist_ok=True)
    noted, written = {}, []
    for wheel in wheels:
        whole = output / wheel.name
        rewritten(wheel, whole, architecture, without)
        data = whole.read_bytes()
        whole.unlink()
        names = []
        for number, begin in enumerate(range(0, len(data), piece_bytes)):
            piece = output / f"{wheel.name}.{number:02d}"
            piece.write_bytes(data[begin : begin + piece_bytes])
            names.append(piece.name)
            written.append(piece)
        noted[wheel.name] = {"sha256": hashlib.sha256(data).hexdigest(), "pieces": names}
    (output / MANIFEST).write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    return [*written, output / MANIFEST]


def join(folder: Path, output: Path) -> list[Path]:
    """Puts wheels together from their pieces, checks each, and returns them."""
    noted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    missing = [name for one in noted.values() for name in one["pieces"] if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"expected all pieces that {MANIFEST} names, got all but {', '.join(missing)}")
    output.mkdir(parents=True, exist_ok=True)
    wheels = []
    for name, one in noted.items():
        data = b"".join((folder / piece).read_bytes() for piece in one["pieces"])
        if (found := hashlib.sha256(data).hexdigest()) != one["sha256"]:
            raise SystemExit(f"{name}: expected SHA-256 {one['sha256']}, got {found}: a piece did not come whole")
        wheels.append(output / Path(name).name)
        wheels[-1].write_bytes(data)
    return wheels


def main(arguments: Sequence[str] | None = None) -> None:
    """Cuts or joins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cutting = commands.add_parser("cut", help="wheels into pieces")
    cutting.add_argument("wheels", nargs="+", type=Path)
    cutting.add_argument("--output", type=Path, required=True, help="folder of the pieces")
    cutting.add_argument("--piece-mb", type=float, default=60.0, help="most 1e6 bytes of a piece")
    cutting.add_argument("--architecture", type=int, help="of the GPU, 90 for 9.0; default: kernels of all stay")
    cutting.add_argument("--without", action="append", default=[], help="pattern of files to leave out; several times")
    joining = commands.add_parser("join", help="pieces into wheels")
    joining.add_argument("folder", type=Path)
    joining.add_argument("--output", type=Path, required=True, help="folder of the wheels")
    joining.add_argument("--install", action="store_true", help="install them, without what they depend on")
    asked = parser.parse_args(arguments)
    if asked.command == "cut":
        made = cut(asked.wheels, asked.output, int(asked.piece_mb * 1e6), asked.architecture, asked.without)
    else:
        made = join(asked.folder, asked.output)
    for path in made:
        print(f"{path.stat().st_size:12,} {path}")
    if asked.command == "join" and asked.install:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *map(str, made)]
        raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
