"""Watching one dense forward, in which kvpress's per-layer presses score or evict copies; the cache is only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.models import attention_layers, full_attention_layers, text_decoder
from kvzip_press.presses.kvpress_adapter.layer_rows import LayerRow
from kvzip_press.presses.kvpress_adapter.module_state import presses_in

if TYPE_CHECKING:
    from kvzip_press.prefilling import Prefill
    from kvzip_press.presses.kvpress_adapter.ragged_press import RaggedPress
    from kvzip_press.scores import Scores

#: What kvpress raises for input that a press does not take.
REFUSALS = (AssertionError, ValueError, KeyError, NotImplementedError)


class KvpressObserver:
    """Runs one kvpress press over one forward; one that acts in its own context only looks whether it is a first turn.

    A press that refuses (a context shorter than its window, say) does not break the forward, whose cache is the user's:
    :meth:`rows` raises instead.

    Args:
        press: The press.
        model: The model to watch.
    """

    def __init__(self, press: RaggedPress, model: nn.Module) -> None:
        self._press, self._model = press, model
        self._handles: list[Any] = []
        self._rows: dict[int, list[torch.Tensor]] = {}
        self._refusal: Exception | None = None
        self._ratio_reads: list[str] = []

    def __enter__(self) -> KvpressObserver:
        watched = [] if self._press.is_native else full_attention_layers(self._model)
        if watched:
            self._run = self._press.prepared(self._model)
            self._ratio_reads = watch_ratio(self._run) if self._press.is_scorer else []
            self._rotary_emb = getattr(text_decoder(self._model), "rotary_emb", None)
        first = attention_layers(self._model)[0].module
        self._handles = [first.register_forward_pre_hook(self._check, with_kwargs=True)]
        self._handles += [layer.module.register_forward_hook(self._look, with_kwargs=True) for layer in watched]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._run = [], None

    @property
    def any_ratio(self) -> bool:
        """Whether the scores are good for every ratio: the press did not look at its own."""
        return not self._ratio_reads

    def rows(self) -> dict[int, list[torch.Tensor]]:
        """``layer_idx -> [row] -> [num_key_value_heads, n]``: scores in fp32, or the pairs kept in bool.

        Raises:
            InvalidArgumentError: The press refused.
        """
        if self._refusal is not None:
            raise self._refusal
        return self._rows

    def scores(self, prefill: Prefill) -> Scores:
        """The scores of the prefill that was watched."""
        return self._press.score(prefill)

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses a later turn before anything of it is in the cache."""
        cache = kwargs.get("past_key_values", kwargs.get("past_key_value"))
        if cache is not None and (seen := cache.get_seq_length()):
            raise InvalidArgumentError(later_turn(self._press, seen))

    @torch.no_grad()
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._refusal is not None:
            return
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        try:
            rows = LayerRow.split(module, args, kwargs, output)
            if self._press.is_scorer:
                self._rows[layer_idx] = [row.score(self._run, self._rotary_emb) for row in rows]
            else:
                self._rows[layer_idx] = [row.keep(self._run, self._rotary_emb) for row in rows]
        except REFUSALS as error:
            self._refusal = refusal(self._press, error, f" in layer {layer_idx}")


def refusal(press: RaggedPress, error: Exception, where: str = "") -> InvalidArgumentError:
    """A refusal of kvpress's own as an error of ours, with its message."""
    if isinstance(error, InvalidArgumentError):
        return error
    ours = InvalidArgumentError(f"{press!r} refused{where}: {type(error).__name__}: {error}")
    ours.__cause__ = error.with_traceback(None)  # whose frames would keep a layer's tensors alive
    return ours


def later_turn(press: RaggedPress, seen: int) -> str:
    """Why a kvpress press does not go on where a cache ends."""
    return (
        f"{press!r} compresses a context that is read in one forward into an empty cache, but this cache has seen "
        f"{seen} tokens: end `with press(model):` before the next turn (the compressed cache goes on without it)"
    )


def watch_ratio(press: Any) -> list[str]:
    """Makes a press (a copy for one run), or one inside it, note in the list when it looks at its compression ratio."""
    reads: list[str] = []
    for one in presses_in(press):
        cls: Any = type(one)

        def get(self: Any, name: str, cls: Any = cls) -> Any:
            if name == "compression_ratio":
                reads.append(name)
            return cls.__getattribute__(self, name)

        one.__class__ = type(cls)(cls.__name__, (cls,), {"__getattribute__": get, "__module__": cls.__module__})
    return reads
