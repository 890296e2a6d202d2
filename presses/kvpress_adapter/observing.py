"""Watches one dense forward in which kvpress's per-layer presses score or evict copies; the cache is only read."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvzip_press import compat
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import attention_layers, full_attention_layers, text_decoder
from kvzip_press.model.watching import Watcher, after_forward, before_forward
from kvzip_press.presses.kvpress_adapter.copies import presses_in
from kvzip_press.presses.kvpress_adapter.layer_rows import LayerRow
from kvzip_press.presses.kvpress_adapter.refused import as_ours, later_turn

if TYPE_CHECKING:
    from kvzip_press.budget.scores import Scores
    from kvzip_press.prefilling.whole import Prefill
    from kvzip_press.presses.kvpress_adapter.wrapped import WrappedPress


class KvpressObserver(Watcher):
    """Runs one kvpress press during one forward.

    A press that acts in its own context is not run here; it is only checked that the forward is a first turn. A press
    that fails (for a context shorter than its window, say) does not break the forward, whose cache is the user's:
    :meth:`rows` raises instead.

    Args:
        press: The press.
        model: The model to watch.
    """

    def __init__(self, press: WrappedPress, model: nn.Module) -> None:
        self._press, self._model = press, model
        self._rows: dict[int, list[torch.Tensor]] = {}
        self._runs: list[Any] = []  # a copy of the press for each row, which may keep state from layer to layer
        self._ratio_reads: list[str] = []
        self._failure: Exception | None = None

    def _watch(self, stack: ExitStack) -> None:
        watched = [] if self._press.is_native else full_attention_layers(self._model)
        if watched:
            self._runs = [self._new_run()]
        self._rotary_emb = getattr(text_decoder(self._model), "rotary_emb", None)
        first = attention_layers(self._model)[0].module
        stack.enter_context(before_forward(first, self._check))
        for layer in watched:
            stack.enter_context(after_forward(layer.module, self._look))

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._runs = []

    @property
    def any_ratio(self) -> bool:
        """Whether the scores are valid for every ratio, which is so if the press did not read its own."""
        return not self._ratio_reads

    def rows(self) -> dict[int, list[torch.Tensor]]:
        """Returns ``layer_idx -> [row] -> [num_key_value_heads, n]``: scores in fp32, or the pairs kept in bool.

        Raises:
            InvalidArgumentError: The press refused the model or the input. Other errors of the press are raised as they
                are.
        """
        if self._failure is not None:
            raise self._failure
        return self._rows

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the scores of the prefill that was watched."""
        return self._press.score(prefill)

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises InvalidArgumentError for a later turn that the press cannot score, before any of it is cached."""
        cache = compat.cache_given(kwargs)
        if cache is not None and (seen := cache.get_seq_length()) and not self._press.scores_any_span:
            raise InvalidArgumentError(later_turn(repr(self._press), seen))

    @torch.no_grad()
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._failure is not None:
            return
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        look = LayerRow.score if self._press.is_scorer else LayerRow.keep
        try:
            rows = LayerRow.split(module, args, kwargs, output)
            self._runs += [self._new_run() for _ in rows[len(self._runs) :]]
            self._rows[layer_idx] = [
                look(row, run, self._rotary_emb) for row, run in zip(rows, self._runs, strict=True)
            ]
        except Exception as error:  # noqa: BLE001  # kept for rows(): half a forward would leave half a cache
            n_tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
            refused = as_ours(repr(self._press), error, f" in layer {layer_idx}", n_tokens=n_tokens)
            self._failure = refused.with_traceback(None)

    def _new_run(self) -> Any:
        run = self._press.prepared(self._model)
        if self._press.is_scorer:
            watch_ratio(run, self._ratio_reads)
        return run


def watch_ratio(press: Any, reads: list[str]) -> None:
    """Makes a press (a copy for one run) and those inside it note in ``reads`` each access to their ratio."""
    for one in presses_in(press):
        cls: Any = type(one)

        def get(self: Any, name: str, cls: Any = cls) -> Any:
            if name == "compression_ratio":
                reads.append(name)
            return cls.__getattribute__(self, name)

        one.__class__ = type(cls)(cls.__name__, (cls,), {"__getattribute__": get, "__module__": cls.__module__})
