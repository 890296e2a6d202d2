"""A .pt file is read as data: what it claims is compared with what it holds, before memory is taken."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvzip_press import torch_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.pt"


def saved(path: Path, held: Any) -> Path:
    torch.save(held, path)
    return path


def rewritten(path: Path, program: bytes, *, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """A file of torch.save with another program and further records, and with right checksums."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {"data.pkl": program, "version": b"3\n", **records}.items():
            archive.writestr(f"file/{name}", data)
    return path


class Call:
    """Is pickled as the call of a function that its file names."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


HELD = [
    torch.arange(6.0).view(2, 3).T,
    torch.rand(4, 4)[1:3, ::2],
    torch.ones(3, dtype=torch.bfloat16),
    torch.zeros(0, 3),
    torch.tensor(1.5, dtype=torch.float64),
    torch.nn.Parameter(torch.ones(2, 2), requires_grad=False),
    torch.tensor([True, False]),
]


@pytest.mark.parametrize("held", HELD, ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.dtype}")
def test_tensors_come_back_as_torch_loads_them(path, held) -> None:
    got = torch_file.read(saved(path, held))
    assert torch.equal(got, torch.load(path, weights_only=True)) and got.dtype == held.dtype


def test_containers_and_plain_data_come_back_and_arrays_are_skipped(path) -> None:
    shared = torch.rand(4)
    held = {"module": [OrderedDict(a=shared, b=shared[1:])], "n": -3, "x": 0.5, "s": "é", "none": (None, True)}
    got = torch_file.read(saved(path, {**held, "curve": np.arange(5.0), "dtype": torch.bfloat16}))
    assert got["module"][0]["a"].tolist() == shared.tolist() and got["module"][0]["b"].tolist() == shared[1:].tolist()
    assert {name: got[name] for name in ("n", "x", "s", "none")} == {
        name: held[name] for name in ("n", "x", "s", "none")
    }


def test_every_changed_byte_of_a_record_is_noticed(path) -> None:
    held = torch.rand(5, 3)
    whole = saved(path, held).read_bytes()
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            got = torch_file.read(path)
        except ValueError:
            refused += 1
        else:
            assert torch.equal(got, held), at
    assert refused > 0.4 * len(whole), "the rest is padding, times and attributes of the archive"


BOMBS = {
    "a tensor whose strides are 0": lambda: torch.zeros(1).expand(10**6, 10**6),
    "a few numbers counted twice": lambda: torch.rand(4).unfold(0, 3, 1),
    "a sparse tensor": lambda: torch.zeros(3, 2).to_sparse(),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.rand(3, 2), 0.1, 0, torch.qint8),
    "a tensor without memory": lambda: torch.zeros(10**6, 10**6, device="meta"),
    "complex numbers": lambda: torch.zeros(3, 2, dtype=torch.complex64),
    "float8": lambda: torch.zeros(3, 2).to(torch.float8_e4m3fn),
    "a large array of bytes": lambda: Call(bytearray, 10**11),
    "a folder": lambda: Call(os.mkdir, "made"),
    "a module": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_claims_more_than_it_holds_and_what_is_no_plain_tensor_is_refused(path, name) -> None:
    saved(path, BOMBS[name]())
    with pytest.raises(ValueError, match="expected"):
        torch_file.read(path)


def test_tensors_that_share_their_numbers_claim_little_more_than_there_are(path) -> None:
    shared = torch.rand(1000)
    assert len(torch_file.read(saved(path, [shared, shared.view(10, 100)]))) == 2
    saved(path, [shared.view(10, 100)[:, :99] for _ in range(1000)])
    with pytest.raises(ValueError, match="got many of the same"):
        torch_file.read(path)


def program_of(*instructions: bytes) -> bytes:
    return b"\x80\x02" + b"".join(instructions) + b"."


PROGRAMS = {
    "nothing": b"",
    "no end": b"\x80\x02]",
    "an object stored as number four billion": program_of(b"]r\xf0\xff\xff\xff"),
    "a text of four gigabytes": program_of(b"X\xff\xff\xff\xff"),
    "an array of bytes of an exabyte": b"\x80\x05\x96" + (10**18).to_bytes(8, "little") + b".",
    "a number of a million digits": program_of(b"I" + b"9" * 10**6 + b"\n"),
    "a hundred thousand tuples, one in another, as a key": program_of(b"})" + b"\x85" * 100_000 + b"Ns"),
    "an extension": program_of(b"\x82\x01"),
    "nothing to take": program_of(b"s"),
    "a name of another package": pickle.dumps(Path("x"), 2),
    "a list as a key": program_of(b"}]Ns"),
    "what is called is a tuple": program_of(b")))R"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_instructions_that_no_data_need_are_refused(path, name) -> None:
    with pytest.raises(ValueError, match="expected"):
        torch_file.read(rewritten(path, PROGRAMS[name]))


def test_compressed_records_are_refused_before_they_are_unpacked(path) -> None:
    rewritten(path, program_of(b"N"), compression=zipfile.ZIP_DEFLATED, **{"data/0": bytes(10**8)})
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="not compressed"):
        torch_file.read(path)


def test_an_archive_of_very_many_records_is_refused(path) -> None:
    path.write_bytes(b"PK\x01\x02" * 20_001)
    with pytest.raises(ValueError, match="at most 20000 records"):
        torch_file.read(path)


def test_a_pipe_and_the_format_before_torch_1_6_are_refused(path, tmp_path) -> None:
    torch.save(torch.rand(3, 2), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"expected a file as torch\.save writes it"):
        torch_file.read(path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ValueError, match="expected a regular file"):
        torch_file.read(tmp_path / "pipe.pt")


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2,), (1,), 5),
        ((-1,), (1,), 0),
        ((2,), (-1,), 1),
        ((7,), (1,), 0),
        ((2,), (1, 1), 0),
        ((1,) * 17, (1,) * 17, 0),
    ],
)
def test_a_tensor_reaches_no_further_than_its_record(path, shape, strides, offset) -> None:
    numbers = torch.rand(6)
    assert torch.equal(torch_file.view(numbers, 0, (2, 3), (3, 1)), numbers.view(2, 3))
    with pytest.raises(ValueError, match="expected a "):
        torch_file.view(numbers, offset, shape, strides)


def test_a_record_of_another_length_is_refused(path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.rand(6), buffer)
    with zipfile.ZipFile(buffer) as archive:
        program = archive.read("archive/data.pkl")
    assert torch_file.read(rewritten(path, program, **{"data/0": bytes(24)})).tolist() == [0.0] * 6
    for length in (0, 20, 23, 28):
        with pytest.raises(ValueError, match="expected"):
            torch_file.read(rewritten(path, program, **{"data/0": bytes(length)}))
