"""Decode steps: one token per row through the model, captured in a CUDA graph if that is possible.

A decode step of an 8B model consists of some five hundred short kernels, and Python launches them more slowly than the
GPU runs them: without a graph, the time that a smaller cache saves stays hidden. The graph is captured over static
layers (``static_layers.py``) that share the cache's memory, and counts its position on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from kvzip_press import compat
from kvzip_press.attention.implementation import attach, attention_forward, masks_left_out
from kvzip_press.decoding import capture
from kvzip_press.decoding.eviction import DecodeEviction, decode_eviction_in
from kvzip_press.decoding.forward import check_reading, forward, next_positions, read
from kvzip_press.decoding.new_groups import group_if_due, tokens_to_grouping
from kvzip_press.decoding.static_layers import StaticCache, reason_against
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.devices import input_device
from kvzip_press.model.structure import attention_layers, text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.model.watching import computing

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


class DecodeStep:
    """Decodes one token per row and call, from a cache that grows with every call.

    Args:
        model: A causal language model.
        cache: Its cache. A graph needs ragged layers, with only sliding ones beside them.
        max_new_tokens: Most calls, at least 1.
        position_ids: int64 ``[batch]``, the position of each row's next token; by default each row continues where its
            own tokens end.
        graph: Whether to capture a CUDA graph: None captures one if possible, False never, True captures one or raises.
        compile: Whether to compile the decoder layers around attention with ``torch.compile`` before the capture: fewer
            kernels, for a minute or so of compiling. Only with a graph.

    Attributes:
        captured: Whether calls replay a graph.
        reason: Why calls do not replay a graph; None if they do.

    Raises:
        InvalidArgumentError: ``graph=True`` or ``compile=True`` is given and a graph is impossible, ``compile=True`` is
            given inside a press that evicts while the model generates, or ``max_new_tokens`` < 1.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: Any,
        *,
        max_new_tokens: int,
        position_ids: torch.Tensor | None = None,
        graph: bool | None = None,
        compile: bool = False,  # noqa: A002  # torch's name for it
    ) -> None:
        if max_new_tokens < 1:
            raise InvalidArgumentError(f"expected max_new_tokens >= 1, got {max_new_tokens}")
        attach(model)
        self.model, self.cache = model, cache
        self._n_left = max_new_tokens
        self._device = input_device(model)
        self._positions = position_ids
        check_reading(model, cache, max_new_tokens, position_ids)
        self._static: _StaticStep | None = None
        self._eviction = decode_eviction_in(model, cache)
        if compile and self._eviction is not None:
            raise InvalidArgumentError("expected compile=False with a press that evicts while the model writes")
        self.reason = "graph=False was asked for" if graph is False else _reason_against(model, cache, self._device)
        if self.reason is None and self._eviction is not None and not self._eviction.scorer.can_be_captured:
            self.reason = "the press that evicts looks at each step in a way that no graph holds"
        if self.reason is None:
            self._capture(max_new_tokens, compile)
        if graph and self.reason is not None:
            raise InvalidArgumentError(f"expected a model and a cache that a CUDA graph can hold, but {self.reason}")
        if compile and self._static is None:
            raise InvalidArgumentError(f"compile=True: expected a step in a CUDA graph, but {self.reason}")
        if graph is None and self.reason is not None and self._device.type == "cuda":
            # of other threads, a server would hear at every answer
            level = logging.DEBUG if self.reason == capture.OTHERS_COMPUTE else logging.WARNING
            logger.log(level, "decoding without a CUDA graph: %s", self.reason)

    def _capture(self, max_new_tokens: int, compiled: bool) -> None:
        if self._eviction is not None:
            max_new_tokens = min(max_new_tokens, self._eviction.tokens_to_eviction(self.cache))
        if (n_left := tokens_to_grouping(self.cache)) is not None:
            max_new_tokens = min(max_new_tokens, max(n_left, 1))
        step = _StaticStep(self.model, self.cache, max_new_tokens, self._positions, self._device, self._eviction)
        self.reason = capture.reason_after(lambda: step.capture(compiled))
        if self.reason is None:
            self._static = step

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._static is not None

    @torch.no_grad()
    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Decodes one token per row.

        Args:
            token_ids: int64 ``[batch]``.

        Returns:
            Logits ``[batch, vocabulary]``, valid until the next call.

        Raises:
            InvalidArgumentError: There are more calls than ``max_new_tokens``.
        """
        if self._n_left == 0:
            raise InvalidArgumentError("expected at most max_new_tokens calls, which were made already")
        self._n_left -= 1
        with computing():
            return self._decoded(token_ids)

    def _decoded(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._static is not None:
            return self._replayed(self._static, token_ids)
        token_ids = token_ids.to(self._device)
        if self._positions is None:
            self._positions = next_positions(self.cache, token_ids.shape[0], self._device)
        logits = read(self.model, self.cache, token_ids[:, None], positions=self._positions)
        self._positions = self._positions + 1
        group_if_due(self.cache)
        return logits

    def _replayed(self, step: _StaticStep, token_ids: torch.Tensor) -> torch.Tensor:
        logits = step(token_ids)
        if group_if_due(self.cache):
            return self._captured_anew(step, logits)
        if self._eviction is None or not self._eviction.written() or step.cache.follows_eviction():
            return logits
        return self._captured_anew(step, logits)

    def _captured_anew(self, step: _StaticStep, logits: torch.Tensor) -> torch.Tensor:
        """Ends the graph that wrote these logits, whose pairs lie elsewhere now; returns a copy of them."""
        logits = logits.clone()
        self._positions = step.positions[:, 0].clone()
        step.close()
        self._static = None
        if self._n_left:
            self._capture(self._n_left, compiled=False)
        return logits

    def close(self) -> None:
        """Ends the step, and brings the cache up to date where a graph wrote elsewhere (sliding layers)."""
        self._n_left = 0
        if self._static is not None:
            self._static.close()

    def __enter__(self) -> DecodeStep:
        """Returns the step itself, to be closed at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the step."""
        self.close()


class _StaticStep:
    """A decode step over static layers and static inputs; :meth:`capture` turns it into a graph."""

    def __init__(
        self,
        model: nn.Module,
        cache: Any,
        n_tokens: int,
        positions: torch.Tensor | None,
        device: torch.device,
        eviction: DecodeEviction | None = None,
    ) -> None:
        self.model, self.source, self.eviction = model, cache, eviction
        self.cache = StaticCache(cache, n_tokens)
        self.token_ids = torch.zeros(self.cache.batch_size, 1, dtype=torch.int64, device=device)
        self.positions = torch.empty_like(self.token_ids)
        positions = next_positions(cache, self.cache.batch_size, device) if positions is None else positions
        self.positions.copy_(positions[:, None])
        self.n_steps = 0
        self.graph: capture.Captured | None = None

    @torch.no_grad()
    def run(self, compiled: nn.Module | None = None) -> torch.Tensor:
        """Runs the kernels of one step: the model, or its ``compiled`` twin, and the counters' increments."""
        layers = self.cache.layers.layers
        model, cache = (self.model, self.cache.layers) if compiled is None else (compiled, _PassingCache(layers=layers))
        watched = nullcontext() if self.eviction is None else self.eviction.static_step()
        with watched, masks_left_out():  # eager builds its masks on the host, which no graph can hold
            logits = forward(model, cache, self.token_ids, self.positions)
        self.cache.advance()
        self.positions.add_(1)
        return logits

    def capture(self, compiled: bool = False) -> None:
        """Runs the step as a trial, undoes that, and captures it."""
        start, device = self.positions.clone(), self.positions.device
        compiling = _compiled_layers(self.model, self.cache) if compiled else nullcontext()
        with compiling as model:
            self.graph = capture.captured(lambda: self.run(model), device, undo=lambda: self._rewind(start))

    def _rewind(self, positions: torch.Tensor) -> None:
        self.cache.restart()
        self.positions.copy_(positions)
        if self.eviction is not None:
            self.eviction.restart_static_steps(self.source)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.token_ids.copy_(token_ids[:, None])
        logits = self.run() if self.graph is None else self.graph.replay()
        self.n_steps += 1
        self.cache.count(1)
        return logits

    def close(self) -> None:
        self.cache.write_back(self.n_steps)
        self.n_steps, self.graph = 0, None


def _reason_against(model: nn.Module, cache: Any, device: torch.device) -> str | None:
    """Returns why this model with this cache cannot be captured, as far as is known beforehand; None if it may be."""
    return capture.reason_against(model, device) or reason_against(cache)


class _PassingCache(compat.Cache):
    """Gives keys and values back as they come, for a compiled layer to pass on to the attention function."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns keys and values as they are."""
        return key_states, value_states


def _attend_outside(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Attends, for a compiled layer, with the module and the cache layer that belong to its own."""
    own_module, layer = module.kvzip_press_attends
    return attention_forward(own_module, query, *layer.update(key, value), *args, **kwargs)


def _passed_on(module: Any) -> str:
    """Returns the name of an attention implementation that calls the module's own outside of what is compiled."""
    from torch import _dynamo as dynamo

    name = str(module.config._attn_implementation).removeprefix("compiled|")
    compat.register_attention(f"compiled|{name}", dynamo.disable(_attend_outside), None)
    return f"compiled|{name}"


@contextmanager
def _compiled_layers(model: nn.Module, cache: StaticCache, **options: Any) -> Iterator[nn.Module]:
    """Yields a twin of the model whose decoder layers run compiled, except for the attention inside them.

    It runs over a :class:`_PassingCache`. A graph that is captured while this is open keeps the compiled kernels.
    """
    from torch import _dynamo as dynamo

    twin = twin_of(model)
    layers: Any = text_decoder(twin).layers
    for own, attention in zip(attention_layers(model), attention_layers(twin), strict=True):
        config: Any = attention.module.config
        config._attn_implementation = _passed_on(own.module)
        vars(attention.module)["kvzip_press_attends"] = (own.module, cache.layers.layers[own.layer_idx])
    # All layers share their code and differ in an index, which would otherwise be compiled in as a constant for each.
    limits: dict[str, Any] = {"recompile_limit": 8 * len(layers), "accumulated_recompile_limit": 64 * len(layers)}
    with dynamo.config.patch(allow_unspec_int_on_nn_module=True, **limits):
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False, **options)
        yield twin
