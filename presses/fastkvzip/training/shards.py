"""Hidden states and scores on disk, one file per layer, read back as memory maps. A killed run can continue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvzip_press.files import replacing

FEATURE_DTYPE = torch.bfloat16  # gates read the model's dtype, whichever it is; bf16 is close enough


@dataclass(frozen=True)
class Shards:
    """The features of one round: for each layer, the tokens' hidden states and KVzip's scores.

    Attributes:
        folder: The folder of the files.
        layer_indices: The layers.
        hidden_size: The model's hidden size.
        num_key_value_heads: KV heads of each layer.
    """

    folder: Path
    layer_indices: tuple[int, ...]
    hidden_size: int
    num_key_value_heads: int

    @property
    def token_bytes(self) -> int:
        """Bytes on disk of one token."""
        return len(self.layer_indices) * (self.hidden_size * FEATURE_DTYPE.itemsize + self.num_key_value_heads * 4)

    @property
    def done(self) -> tuple[int, int]:
        """Number of pieces and tokens that are completely on disk."""
        path = self.folder / "done.json"
        if not path.exists():
            return 0, 0
        pieces, tokens = json.loads(path.read_text(encoding="utf-8"))
        return pieces, tokens

    def append(self, features: Mapping[int, torch.Tensor], scores: Mapping[int, torch.Tensor]) -> None:
        """Adds one piece.

        Args:
            features: ``layer_idx -> [n, hidden_size]``.
            scores: ``layer_idx -> [num_key_value_heads, n]``.
        """
        n_pieces, n_tokens = self.done
        self.folder.mkdir(parents=True, exist_ok=True)
        for layer_idx in self.layer_indices:
            _write(self._path("hidden", layer_idx), n_tokens, features[layer_idx].to(FEATURE_DTYPE))
            _write(self._path("scores", layer_idx), n_tokens, scores[layer_idx].T.float())
        length = features[self.layer_indices[0]].shape[0]
        with replacing(self.folder / "done.json") as temporary:
            temporary.write_text(json.dumps([n_pieces + 1, n_tokens + length]), encoding="utf-8")

    def read(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Maps, for each layer, ``[tokens, hidden_size]`` in bf16 and ``[tokens, num_key_value_heads]`` in fp32."""
        _, n = self.done
        shapes = {"hidden": (n, self.hidden_size), "scores": (n, self.num_key_value_heads)}
        dtypes = {"hidden": FEATURE_DTYPE, "scores": torch.float32}

        def mapped(kind: str) -> list[torch.Tensor]:
            size = shapes[kind][0] * shapes[kind][1]
            files = (str(self._path(kind, layer_idx)) for layer_idx in self.layer_indices)
            return [torch.from_file(file, size=size, dtype=dtypes[kind]).view(shapes[kind]) for file in files]

        return mapped("hidden"), mapped("scores")

    def _path(self, kind: str, layer_idx: int) -> Path:
        return self.folder / f"{kind}-{layer_idx:03}.bin"


def _write(path: Path, row: int, values: torch.Tensor) -> None:
    """Writes values from row ``row`` on, overwriting whatever a killed run may have left there."""
    values = values.cpu()
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(row * values.shape[1] * values.element_size())
        file.write(values.reshape(-1).contiguous().view(torch.uint8).numpy().data)  # flat: size 1 allows any stride
        file.truncate()
