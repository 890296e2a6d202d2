"""What a measurement depends on besides its configuration."""

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from kvzip_press.compat import TRANSFORMERS_VERSION
from kvzip_press.kernels.benchmarks.report import commit
from kvzip_press.model.structure import text_decoder
from kvzip_press.model.weights import weights_fingerprint
from kvzip_press.version import __version__

ABSENT = "-"


def provenance(model: Any) -> dict[str, str]:
    """Returns versions, commit (with "-dirty" if files were changed, "unknown" without git), device, dtype, model."""
    parameter = next(model.parameters())
    return {
        "kvzip_press": __version__,
        "commit": commit(Path(__file__).parent),
        "torch": str(torch.__version__),
        "transformers": str(TRANSFORMERS_VERSION),
        "kvpress": _version("kvpress"),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(parameter.device),
        "gpu": torch.cuda.get_device_name(parameter.device) if parameter.device.type == "cuda" else "CPU",
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "model_revision": model_revision(model),
    }


def model_revision(model: Any) -> str:
    """Returns the hub's commit of the model's files, or, if there is none, a digest of its weights."""
    known = getattr(model.config, "_commit_hash", None)
    if known:
        return str(known)
    return f"weights:{hashlib.sha256(weights_fingerprint(text_decoder(model)).encode()).hexdigest()[:12]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT
