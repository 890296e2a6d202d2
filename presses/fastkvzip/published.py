"""The checkpoints that Fast KVzip published: their names, and reading them without running what is in them.

``{model, lower case}/q{groups}_dim16_sink16.pt`` in the hub repository :data:`REPOSITORY`. A file is a pickled dict:
under "module" one state dict a layer, beside it curves of the training as numpy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.identity import num_kv_heads
from kvzip_press.model.structure import text_config

REPOSITORY = "Jang-Hyun/Fast-KVzip"
WANTED = 'a gate as Fast KVzip publishes it (a .pt of a dict whose "module" is a list of state dicts)'


def file_name(model: Any) -> str:
    """The name that a model's gate has in the repository."""
    groups = text_config(model).num_attention_heads // num_kv_heads(model)
    return f"{model_name(model)}/q{groups}_dim16_sink16.pt"


def model_name(model: Any) -> str:
    """The last part of the model's path or hub id, in lower case; empty where it has none."""
    return Path(str(getattr(model.config, "name_or_path", "") or "")).name.lower()


def read(path: Path) -> list[dict[str, torch.Tensor]]:
    """The state dicts of a published file.

    Raises:
        InvalidArgumentError: There is no such file, or it holds something else.
    """
    try:
        with torch.serialization.safe_globals(_numpy_arrays()):
            loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a torn or hostile file raises anything; none of it was run
        cause = str(error).strip().partition("\n")[0]
        raise InvalidArgumentError(f"expected {WANTED} at {path}, got {type(error).__name__}: {cause}") from error
    states = loaded.get("module") if isinstance(loaded, dict) else None
    if not isinstance(states, list) or not states or not all(isinstance(state, Mapping) for state in states):
        got = f"a dict with {sorted(map(str, loaded))}" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise InvalidArgumentError(f"expected {WANTED} at {path}, got {got}")
    return [dict(state) for state in states]


def _numpy_arrays() -> list[Any]:
    """What an array of floats is put together from, under the names of numpy 1 and 2, and nothing else."""
    reconstruct = np.zeros(1).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    dtypes = (np.dtypes.Float64DType, np.dtypes.Float32DType)
    return [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *dtypes]


def find(model: nn.Module, folder: Path) -> Path:
    """A model's file in a folder that is laid out as the repository.

    Raises:
        InvalidArgumentError: It is not there.
    """
    path = folder / file_name(model)
    if not path.is_file():
        there = sorted(str(one.relative_to(folder)) for one in folder.rglob("*.pt"))
        raise InvalidArgumentError(f"expected {file_name(model)} in {folder}, got {there[:10]}")
    return path


def download(model: nn.Module, repository: str = REPOSITORY) -> Path:
    """A model's file from the hub, or from the hub's cache on this machine.

    Raises:
        InvalidArgumentError: It is neither there nor here.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file_name(model)))
    except (OSError, ValueError) as error:  # what the hub raises for whatever is missing, unreachable or misspelled
        cause = str(error).strip().partition("\n")[0]
        raise InvalidArgumentError(
            f"expected {file_name(model)} in the hub repository {repository}, got {type(error).__name__}: {cause}"
        ) from error
