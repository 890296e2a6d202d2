"""Converts the GGUF file of an embedded model to the files that ``from_pretrained`` reads.

transformers can load a GGUF itself, but then it requires ``accelerate``, builds a different tokenizer in every release
(in some with a wrong end-of-turn token and a wrong byte decoder) and saves files that other releases misread. Here the
weights are dequantised with the package ``gguf``, bit for bit as in transformers, and every file is written in the
plain form that transformers 4.56 and all later releases agree on.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from kvzip_press.errors import InvalidArgumentError, KVzipPressError
from kvzip_press.loading import gguf_gemma3, gguf_llama
from kvzip_press.loading.gguf import GGUF

_TEMPLATE = "tokenizer.chat_template"  # a base model has none
_ARCHITECTURES = {"llama": gguf_llama, "gemma3": gguf_gemma3}


def convert_gguf(gguf_path: Path, output_dir: Path) -> None:
    """Writes ``model.safetensors`` (fp32), both configs and the tokenizer of a GGUF into a directory.

    Args:
        gguf_path: A GGUF of architecture ``llama`` whose tokenizer is byte-level BPE with digits split ("smollm"), or
            of architecture ``gemma3``.
        output_dir: An existing directory; files of the same names are overwritten.

    Raises:
        MissingDependencyError: The package ``gguf`` is not installed.
        InvalidArgumentError: The file is no whole GGUF, or has another architecture or tokenizer than those above.
    """
    gguf = GGUF(gguf_path)
    try:
        _convert(gguf, output_dir)
    except (KVzipPressError, OSError):
        raise
    except Exception as error:  # fields, tensors and tokens that do not fit together fail in any way
        raise InvalidArgumentError(
            f"expected a GGUF whose fields and tensors fit together at {gguf_path}, got {type(error).__name__}: {error}"
        ) from error


def _convert(gguf: GGUF, output_dir: Path) -> None:
    name = gguf.field("general.architecture")
    if name not in _ARCHITECTURES:
        raise InvalidArgumentError(f"expected a GGUF of architecture {' or '.join(_ARCHITECTURES)}, got {name!r}")
    architecture = _ARCHITECTURES[name]
    architecture.check(gguf)
    config = architecture.model_config(gguf)
    save_file(architecture.state_dict(gguf), output_dir / "model.safetensors", metadata={"format": "pt"})
    architecture.tokenizer(gguf).save(str(output_dir / "tokenizer.json"))
    _write_json(output_dir / "config.json", config)
    _write_json(output_dir / "generation_config.json", gguf.special_ids())
    _write_json(output_dir / "tokenizer_config.json", _tokenizer_config(gguf, config["max_position_embeddings"]))


def _tokenizer_config(gguf: GGUF, max_length: int) -> dict[str, Any]:
    tokens = gguf.field("tokenizer.ggml.tokens")
    named = {key.removesuffix("_id"): tokens[index] for key, index in gguf.special_ids().items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"chat_template": gguf.field(_TEMPLATE)} if gguf.has_field(_TEMPLATE) else {}),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "unk_token": tokens[int(gguf.field("tokenizer.ggml.unknown_token_id"))],
        **named,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
