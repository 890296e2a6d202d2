"""Reads what GGUF files of all architectures have in common: fields, weights, special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
USER_DEFINED_TOKEN = 4


class GGUF:
    """An open GGUF file.

    Args:
        path: The file.

    Raises:
        MissingDependencyError: The package ``gguf`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise MissingDependencyError("reading a GGUF file needs the package gguf: pip install gguf") from error
        self._reader = GGUFReader(str(path))

    def field(self, name: str) -> Any:
        """Returns a field's value. Raises InvalidArgumentError if there is no such field."""
        field = self._reader.get_field(name)
        if field is None:
            raise InvalidArgumentError(f"the GGUF has no field {name!r}")
        return field.contents()

    def has_field(self, name: str) -> bool:
        """Returns whether there is a field of that name."""
        return self._reader.get_field(name) is not None

    def require(self, name: str, expected: str) -> None:
        """Raises InvalidArgumentError unless a field has the expected value."""
        if (value := self.field(name)) != expected:
            raise InvalidArgumentError(f"expected a GGUF with {name} = {expected!r}, got {value!r}")

    def has_tensor(self, name: str) -> bool:
        """Returns whether there are weights of that name."""
        return any(tensor.name == name for tensor in self._reader.tensors)

    def weights(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Yields the name of each tensor without ``.weight``, and its values, dequantised to fp32 without loss."""
        from gguf.quants import dequantize

        for tensor in self._reader.tensors:
            yield tensor.name.removesuffix(".weight"), dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def special_ids(self) -> dict[str, int]:
        """Returns the ids of BOS, EOS and padding, by their names in a config."""
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        return {key: int(self.field(f"tokenizer.ggml.{name}_token_id")) for key, name in names.items()}

    def tokens(self) -> list[tuple[str, int]]:
        """Returns the text and the kind of each token."""
        kinds: list[int] = self.field("tokenizer.ggml.token_type")
        return list(zip(self.field("tokenizer.ggml.tokens"), kinds, strict=True))
