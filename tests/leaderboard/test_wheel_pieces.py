"""Wheels in pieces, for a machine without a network: what is cut from them, and that nothing else changes."""

from __future__ import annotations

import csv
import io
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvzip_press.leaderboard.benchmarks import wheel_pieces

NOISE = random.Random(0)


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """Kernels as a compiler lays them into a library: (1 for PTX or 2, architecture, code)."""
    parts = b"".join(
        struct.pack("<HHIQIIHHI", kind, 257, 64, len(code), 0, 0, 0, 0, architecture) + bytes(32) + code
        for kind, architecture, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(parts)) + parts


def code(n: int = 4000) -> bytes:
    return NOISE.randbytes(n)


def test_kernels_of_other_gpus_are_zeros_and_all_else_stays_at_its_place() -> None:
    own, other, ptx = code(), code(), code()
    both = container((2, 80, other), (2, 90, own), (1, 90, ptx))
    only_ptx = container((2, 80, other), (1, 80, ptx), (1, 100, other))
    library = b"\x7fELF" + code(100) + both + code(50) + struct.pack("<I", 0xBA55ED50) + code(7) + only_ptx + b"end"
    thin = wheel_pieces.thinned(library, 90)
    empty = bytes(4000)
    assert thin == library.replace(both, container((2, 80, empty), (2, 90, own), (1, 90, empty))).replace(
        only_ptx, container((2, 80, empty), (1, 80, ptx), (1, 100, empty))
    )
    torn = both[:-1]
    assert wheel_pieces.thinned(torn, 90) == torn, "what is no container is left"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with a library for two GPUs, one that nobody needs, and a module."""
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    files = {
        "thing/__init__.py": b"VALUE = 7\n",
        "thing/_C.abi3.so": container((2, 80, code(30000)), (2, 90, code(10000))),
        "thing/_unused_C.abi3.so": code(20000),
        "thing-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        "thing-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
        file.writestr(
            "thing-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in [*files, "thing-1.0.dist-info/RECORD"])
        )
    return path


def test_pieces_make_a_wheel_that_installs(wheel: Path, tmp_path: Path) -> None:
    """Without the package that has the script: the other machine has only Python."""
    script, pieces = Path(wheel_pieces.__file__), tmp_path / "pieces"
    options = ["--piece-mb", "0.004", "--architecture", "90", "--without", "thing/_unused*"]
    subprocess.run([sys.executable, "-I", script, "cut", wheel, "--output", pieces, *options], check=True)
    assert all(path.stat().st_size <= 4000 for path in pieces.iterdir())
    total = sum(path.stat().st_size for path in pieces.iterdir())
    assert 10000 < total < 13000, "the library's own kernels, and little else"
    subprocess.run([sys.executable, "-I", script, "join", pieces, "--output", tmp_path / "wheels"], check=True)
    joined = tmp_path / "wheels" / wheel.name
    with zipfile.ZipFile(joined) as new, zipfile.ZipFile(wheel) as old:
        assert set(old.namelist()) - set(new.namelist()) == {"thing/_unused_C.abi3.so"}
        assert new.read("thing/_C.abi3.so") == wheel_pieces.thinned(old.read("thing/_C.abi3.so"), 90)
        rows = list(csv.reader(io.StringIO(new.read("thing-1.0.dist-info/RECORD").decode())))
    assert {row[0] for row in rows} == set(zipfile.ZipFile(joined).namelist())
    target = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", tmp_path / "to"]
    subprocess.run([*target, joined], check=True)
    assert (tmp_path / "to" / "thing" / "__init__.py").read_text() == "VALUE = 7\n"


def test_a_piece_that_is_missing_or_torn_is_named(wheel: Path, tmp_path: Path) -> None:
    *pieces, manifest = wheel_pieces.cut([wheel], tmp_path / "pieces", 8000, None, [])
    assert manifest.name == "pieces.json" and len(pieces) > 2
    whole = pieces[1].read_bytes()
    pieces[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SystemExit, match="a piece did not come whole"):
        wheel_pieces.join(tmp_path / "pieces", tmp_path / "wheels")
    pieces[1].unlink()
    with pytest.raises(SystemExit, match=f"got all but {pieces[1].name}"):
        wheel_pieces.join(tmp_path / "pieces", tmp_path / "wheels")


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(SystemExit, match="expected a wheel, with a RECORD"):
        wheel_pieces.cut([tmp_path / "other.whl"], tmp_path / "pieces", 1000, None, [])
