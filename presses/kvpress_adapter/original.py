"""Runs a press in kvpress's own way: the other side of a comparison.

kvpress's layer-wise presses replace the tensors of a DynamicCache; its head-wise ones (KVzip, AdaKV ...) leave all
bytes where they are, and hide the evicted keys from the decode steps by masks on the modules.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvzip_press import compat
from kvzip_press.attention.implementation import detach
from kvzip_press.model.devices import now
from kvzip_press.model.structure import attention_layers, text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.presses.kvpress_adapter.copies import fresh_copy
from kvzip_press.presses.kvpress_adapter.importing import kvpress
from kvzip_press.presses.kvpress_adapter.ragged_press import RaggedPress
from kvzip_press.registry import get_press, press_names

SAME_PAPER = {  # presses of ours whose paper kvpress implements too
    name: f"kvpress_{name}"
    for name in (
        *("kvzip", "snapkv", "pyramidkv", "expected_attention"),
        *("tova", "knorm", "keydiff", "streaming_llm"),
    )
}


@dataclass(frozen=True)
class OriginalRun:
    """A context that kvpress read and compressed.

    Attributes:
        model: A twin of the model, on whose modules kvpress left what decode steps need.
        cache: The DynamicCache that it left.
        kept_fraction: Pairs that decode steps see, divided by the pairs that were read.
        prefill_seconds: Seconds of the forward, including what the press does in it.
        compress_seconds: Seconds of what the press does when its context manager ends.
    """

    model: Any
    cache: Any
    kept_fraction: float
    prefill_seconds: float
    compress_seconds: float


def original_press(name: str, compression_ratio: float) -> Any | None:
    """Returns kvpress's own press object; None if kvpress has no press of this name.

    Args:
        name: A name of the registry.
        compression_ratio: Fraction of pairs removed, in [0, 1).

    Raises:
        MissingDependencyError: kvpress is missing, or a version is outside the range that works.
    """
    kvpress()
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # it logs for every KVzip press that KVzip takes time
    known = SAME_PAPER.get(name, name)
    press = get_press(known, compression_ratio) if known in press_names() else None
    return fresh_copy(press.press) if isinstance(press, RaggedPress) else None


@contextmanager
def run_original(press: Any, model: Any, input_ids: torch.Tensor, tokenizer: Any = None) -> Iterator[OriginalRun]:
    """Reads ``input_ids`` ``[1, n]`` under kvpress's context manager; while open, decode steps see what it left.

    All of it happens on a twin of the model, which attends as kvpress needs it to (no ragged caches). Attention
    functions of transformers have kvpress's wrappers meanwhile, in the whole process.

    Args:
        press: From :func:`original_press`.
        model: A model; if kvpress requires it, one whose layers all attend to the whole context.
        input_ids: The context, int64 ``[1, n]``.
        tokenizer: For kvpress's KVzip, which loads one from the model's path. If None, it gets a blank one, which makes
            every text one token, so that the replay runs almost without a prompt.
    """
    model = twin_of(model)
    decoder: Any = text_decoder(model)
    device = input_ids.device
    with _wrapped_attention(), _path_with(model, tokenizer):
        detach(model)
        cache = compat.DynamicCache(config=decoder.config)
        begin = now(device)
        with torch.no_grad(), press(model):
            decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)
            read = now(device)
        end = now(device)
        yield OriginalRun(model, cache, _kept_fraction(model, cache, input_ids.shape[1]), read - begin, end - read)


def _kept_fraction(model: Any, cache: Any, n: int) -> float:
    kept = seen = 0
    for layer in attention_layers(model):
        if not layer.is_full:
            continue
        keys = cache.layers[layer.layer_idx].keys
        masked = getattr(layer.module, "masked_key_indices", None)
        kept += keys.shape[1] * keys.shape[2] - (0 if masked is None else len(masked[0]))
        seen += keys.shape[1] * n
    return kept / seen


@contextmanager
def _wrapped_attention() -> Iterator[None]:
    """While open, kvpress's wrappers are around the attention functions; our import of it leaves them off."""
    before = dict(ALL_ATTENTION_FUNCTIONS)
    wrap = kvpress().attention_patch.attention_patch
    for name, function in before.items():
        if not compat.is_kvpress_wrapper(function):
            ALL_ATTENTION_FUNCTIONS[name] = wrap(function)
    try:
        yield
    finally:
        for name, function in before.items():
            if ALL_ATTENTION_FUNCTIONS[name] is not function:
                del ALL_ATTENTION_FUNCTIONS[name]  # the override that was put over the library-wide entry
                if ALL_ATTENTION_FUNCTIONS.get(name) is not function:
                    ALL_ATTENTION_FUNCTIONS[name] = function


@contextmanager
def _path_with(model: Any, tokenizer: Any) -> Iterator[None]:
    """While open, the model's path is a folder with the tokenizer, or with a blank one."""
    before = model.config.name_or_path
    with tempfile.TemporaryDirectory() as folder:
        (tokenizer or blank_tokenizer()).save_pretrained(folder)
        model.config.name_or_path = folder
        try:
            yield
        finally:
            model.config.name_or_path = before


def blank_tokenizer() -> Any:
    """Returns a tokenizer that makes every text one token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")  # noqa: S106  # no password
