"""The checkpoints that Fast KVzip published: how they are named, and how to read them without running their code.

They are ``{model, lower case}/q{groups}_dim16_sink16.pt`` in the hub repository :data:`REPOSITORY`. A file is a pickled
dict, with one state dict per layer under "module" and training curves as numpy arrays beside it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvzip_press import torch_file
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
        loaded = torch_file.read(path)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"expected {WANTED} at {path}, got {type(error).__name__}: {error}") from error
    states = loaded.get("module") if isinstance(loaded, dict) else None
    if not isinstance(states, list) or not states or not all(_is_state(state) for state in states):
        names = f" with {reprlib.repr(sorted(map(str, loaded)))}" if isinstance(loaded, dict) else ""
        raise InvalidArgumentError(f"expected {WANTED} at {path}, got a {type(loaded).__name__}{names}")
    return [dict(state) for state in states]


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    )


def find(model: nn.Module, folder: Path) -> Path:
    """Finds a model's file in a folder that is laid out like the repository: safetensors, else ``.pt``.

    Raises:
        InvalidArgumentError: The file is not there.
    """
    path = folder / file_name(model)
    for found in (path.with_suffix(".safetensors"), path):
        if found.is_file():
            return found
    there = sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.suffix in (".pt", ".safetensors"))
    raise InvalidArgumentError(f"expected {file_name(model)} in {folder}, got {there[:10]}")


def download(model: nn.Module, repository: str = REPOSITORY) -> Path:
    """Fetches a model's file from the hub, or from the hub's cache on this machine: safetensors, else ``.pt``.

    Args:
        model: The model.
        repository: The repository; ``name@revision`` for one commit, tag or branch of it. Without a revision it is the
            newest commit: its authors may replace the files at any time, so name the commit where that matters.

    Raises:
        InvalidArgumentError: The file is in neither.
    """
    from huggingface_hub import hf_hub_download

    name, _, revision = repository.partition("@")
    options = {"revision": revision} if revision else {}
    wanted = file_name(model)
    with suppress(OSError, ValueError):  # what the hub raises for anything missing, unreachable or misspelled
        return Path(hf_hub_download(name, wanted.removesuffix(".pt") + ".safetensors", **options))
    try:
        return Path(hf_hub_download(name, wanted, **options))
    except (OSError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise InvalidArgumentError(
            f"expected {wanted} in the hub repository {repository}, got {type(error).__name__}: {cause}"
        ) from error


def source_of(path: Path) -> str:
    """Returns where a file comes from: its name, after its commit if it lies in the hub's cache."""
    folders = path.parts
    commits = [folders[i + 1] for i, part in enumerate(folders[:-2]) if part == "snapshots"]
    return f"{path.name} of commit {commits[-1]}" if commits else path.name
