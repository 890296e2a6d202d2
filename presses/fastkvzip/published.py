"""The checkpoints that Fast KVzip published: how they are named, and how to read them without running their code.

They are ``{model, lower case}/q{groups}_dim16_sink16.pt`` in the hub repository :data:`REPOSITORY`. A file is a pickled
dict, with one state dict per layer under "module" and training curves as numpy arrays beside it.
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
    """Returns the name of a model's gate file in the repository."""
    groups = text_config(model).num_attention_heads // num_kv_heads(model)
    return f"{model_name(model)}/q{groups}_dim16_sink16.pt"


def model_name(model: Any) -> str:
    """Returns the last part of the model's path or hub id, in lower case; empty if it has neither."""
    return Path(str(getattr(model.config, "name_or_path", "") or "")).name.lower()


def read(path: Path) -> list[dict[str, torch.Tensor]]:
    """Reads the state dicts of a published file.

    Raises:
        InvalidArgumentError: The file does not exist, or holds something else.
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
    """Returns only the functions and types that unpickle an array of floats, by their names in numpy 1 and 2."""
    reconstruct = np.zeros(1).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    dtypes = (np.dtypes.Float64DType, np.dtypes.Float32DType)
    return [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *dtypes]


def find(model: nn.Module, folder: Path) -> Path:
    """Finds a model's file in a folder that is laid out like the repository.

    Raises:
        InvalidArgumentError: The file is not there.
    """
    path = folder / file_name(model)
    if not path.is_file():
        there = sorted(str(one.relative_to(folder)) for one in folder.rglob("*.pt"))
        raise InvalidArgumentError(f"expected {file_name(model)} in {folder}, got {there[:10]}")
    return path


def download(model: nn.Module, repository: str = REPOSITORY) -> Path:
    """Fetches a model's file from the hub, or from the hub's cache on this machine.

    Raises:
        InvalidArgumentError: The file is in neither.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file_name(model)))
    except (OSError, ValueError) as error:  # what the hub raises for anything missing, unreachable or misspelled
        cause = str(error).strip().partition("\n")[0]
        raise InvalidArgumentError(
            f"expected {file_name(model)} in the hub repository {repository}, got {type(error).__name__}: {cause}"
        ) from error
