"""Where evicted pairs lie: in host memory, in a safetensors file for them alone, or in the file of a saved cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from kvzip_press.errors import CacheFileError, InvalidArgumentError
from kvzip_press.files import check_writable, digest_of_tensor, opened, tensor_in, to_json, write_tensors
from kvzip_press.version import __version__

TEXT, FORMAT = "kvzip_press_cold", 1
_MEMORY = "cpu"

#: ``layer_idx -> name -> tensor``, on the CPU.
LayerTensors = Mapping[int, Mapping[str, torch.Tensor]]


class Place(Protocol):
    """Tensors of layers, outside of the device that the cache is on. Nothing in it ever changes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    def read(self, layer_idx: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Returns some tensors of a layer, on the CPU; they must not be written into.

        Raises:
            CacheFileError: They lie in a file that is gone, or is not as it was written.
        """


def check_place(cold: object) -> None:
    """Raises InvalidArgumentError unless this is "cpu", or the path of a file that can be written."""
    if not isinstance(cold, Path) and cold == _MEMORY:
        return
    if isinstance(cold, Path) or (isinstance(cold, str) and cold and not _is_device(cold)):
        check_writable(cold, "cold=")
        return
    raise InvalidArgumentError(f"expected cold='cpu' (host memory) or the path of a file, got {cold!r:.80}")


def put(cold: str | Path, tensors: LayerTensors, described: Mapping[str, object]) -> Place:
    """Keeps tensors in host memory, as they are, or writes them into a file, and returns the place.

    Args:
        cold: "cpu", or the path of a file, which is replaced.
        tensors: The tensors.
        described: What the file says of itself besides what is in it: values that JSON has.

    Raises:
        CacheFileError: The file cannot be written; an existing one stays as it was.
    """
    return InMemory(tensors) if cold == _MEMORY else InFile.written(Path(cold), tensors, described)


@dataclass(frozen=True, eq=False)
class InMemory:
    """Tensors in host memory."""

    tensors: LayerTensors = field(repr=False)

    def __str__(self) -> str:
        return "host memory"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for of_layer in self.tensors.values() for tensor in of_layer.values())

    def read(self, layer_idx: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Returns the tensors themselves."""
        return {name: self.tensors[layer_idx][name] for name in names}


@dataclass(frozen=True, eq=False)
class InFile:
    """Tensors in a file.

    What the file must hold is known from when it was written: its text, which has the SHA-256 of each tensor, and the
    dtype and shape of each. So nothing in it is believed, and no length in it decides how much is read.

    Attributes:
        path: The file, an absolute path: the working directory may change.
        text: Its metadata.
        digests: The SHA-256 of each tensor by its name in the file.
        expected: The dtype and shape of each that belongs here.
        key: The name of the text in the metadata.
        prefix: What stands before the names of these tensors, in a file that has others, too.
    """

    path: Path
    text: str = field(repr=False)
    digests: Mapping[str, str] = field(repr=False)
    expected: Mapping[str, tuple[torch.dtype, torch.Size]] = field(repr=False)
    key: str = field(default=TEXT, repr=False)
    prefix: str = field(default="", repr=False)

    @classmethod
    def written(cls, path: Path, tensors: LayerTensors, described: Mapping[str, object]) -> InFile:
        """Writes tensors on the CPU into a file, whole or not at all; an existing one is replaced."""
        named = {f"{i}.{name}": tensor for i, of_layer in tensors.items() for name, tensor in of_layer.items()}
        digests = {name: digest_of_tensor(tensor) for name, tensor in named.items()}
        text = to_json({**described, "format": FORMAT, "kvzip_press": __version__, "tensors": digests})
        write_tensors(path, named, {TEXT: text}, seal=TEXT)
        return cls(path.absolute(), text, digests, {name: (t.dtype, t.shape) for name, t in named.items()})

    def __str__(self) -> str:
        return str(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(dtype.itemsize * shape.numel() for dtype, shape in self.expected.values())

    def is_in(self, path: Path) -> bool:
        """Whether this is the file of that path, however it is spelled."""
        return path.exists() and self.path.exists() and self.path.samefile(path)

    def read(self, layer_idx: int, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Reads tensors into memory of their own, and compares every byte with what was written."""
        what = f"expected the evicted pairs of this cache in {self.path}, as they were written"
        if not self.path.is_file():
            raise CacheFileError(f"{what}, got no such file")
        with opened(self.path, CacheFileError, what) as file:
            if (file.metadata() or {}).get(self.key) != self.text:
                raise CacheFileError(f"{what}, got a file of something else: it was replaced")
            return {name: self._read(file, f"{self.prefix}{layer_idx}.{name}", what) for name in names}

    def _read(self, file: object, name: str, what: str) -> torch.Tensor:
        dtype, shape = self.expected[name]
        held = file.get_slice(name)  # type: ignore[attr-defined]  # safetensors is not typed
        if tuple(held.get_shape()) != tuple(shape):
            raise CacheFileError(f"{what}, got {name!r} of another shape: the file was changed")
        tensor = tensor_in(file, name, (dtype,), CacheFileError, what)
        if digest_of_tensor(tensor) != self.digests[name]:
            raise CacheFileError(f"{what}, got other bytes in {name!r}: the file was changed")
        return tensor


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
