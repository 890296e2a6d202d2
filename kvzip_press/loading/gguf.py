"""Reads what GGUF files of all architectures have in common: fields, weights, special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvzip_press.errors import InvalidArgumentError, MissingDependencyError
from kvzip_press.loading.gguf_lengths import check_lengths

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
USER_DEFINED_TOKEN = 4
_MAX_TOKEN = 1000  # letters; each is cut at every place in search of its halves


class GGUF:
    """An open GGUF file.

    Args:
        path: The file.

    Raises:
        InvalidArgumentError: The file does not exist, or is not a whole GGUF.
        MissingDependencyError: The package ``gguf`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise MissingDependencyError("reading a GGUF file needs the package gguf: pip install gguf") from error
        check_lengths(path)
        try:
            self._reader = GGUFReader(str(path))
        except Exception as error:  # it trusts what it reads, and fails in any way
            raise InvalidArgumentError(
                f"expected a whole GGUF file at {path}, got {type(error).__name__}: {error}"
            ) from error

    def field(self, name: str) -> Any:
        """Returns a field's value. Raises InvalidArgumentError if there is no such field."""
        field = self._reader.get_field(name)
        if field is None:
            raise InvalidArgumentError(f"the GGUF has no field {name!r}")
        return field.contents()

    def n_layers(self, name: str) -> int:
        """Returns a number of layers. Raises InvalidArgumentError if there are fewer tensors than that."""
        count = int(self.field(name))
        if not 0 < count <= len(self._reader.tensors):
            raise InvalidArgumentError(f"expected {name} of 1 to {len(self._reader.tensors)}, got {count}")
        return count

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
        tokens: list[str] = self.field("tokenizer.ggml.tokens")
        if max(map(len, tokens), default=0) > _MAX_TOKEN:
            raise InvalidArgumentError(f"expected tokens of at most {_MAX_TOKEN} letters, got a longer one")
        return list(zip(tokens, kinds, strict=True))
