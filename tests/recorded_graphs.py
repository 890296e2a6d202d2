"""A stand-in for CUDA graphs on a CPU: it records what a step calls, and replays that on the same tensors.

As with a graph, Python runs only once: whatever a step decides on the host (a length, a slice, a number that it reads)
stays as it was in the recording, and a step that waits for the device while it is recorded fails. Attention to a pool
is recorded as one call, and so is what Triton does to share its work: those kernels are none of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvzip_press.decoding import capture
from kvzip_press.kernels.context_attention.plan import ContextPlan
from kvzip_press.kernels.triton_support import reason_against_triton
from kvzip_press.serving import row_step

_WAITS = {getattr(torch.Tensor, name) for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__")}


class _Waiting(TorchFunctionMode):
    """Refuses what reads a number from the device."""

    def __init__(self, recorded: RecordedGraph) -> None:
        super().__init__()
        self._recorded = recorded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS and not self._recorded.is_paused:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class RecordedGraph(TorchDispatchMode):
    """Records while it is open; :meth:`replay` does the same again."""

    memory = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.is_paused = False
        self.n_replays = 0
        self.output = torch.empty(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.is_paused:
            self.calls.append((func, args, kwargs or {}, output))
        return output

    def opaque(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function as one call of the recording."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.is_paused = True
            output = function(*args, **kwargs)
            self.is_paused = False
            self.calls.append((function, args, kwargs, output))
            return output

        return run

    def replay(self) -> torch.Tensor:
        self.n_replays += 1
        for func, args, kwargs, before in self.calls:
            after = func(*args, **kwargs)
            returns = getattr(getattr(func, "_schema", None), "returns", ())
            if not any(one.alias_info is not None for one in returns):  # views and what is written in place lie there
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)
        return self.output


@contextmanager
def _recording(graph: RecordedGraph) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(row_step, "context_attention", graph.opaque(row_step.context_attention))
        if reason_against_triton(torch.device("cpu")) is None:
            from kvzip_press.kernels.context_attention import triton_sharing

            patched.setattr(triton_sharing, "shared", graph.opaque(triton_sharing.shared))
        patched.setattr(ContextPlan, "_check_values", lambda _: None)  # values are looked at on a CPU only
        with graph, _Waiting(graph):
            yield


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Lets sessions on a CPU capture their steps; returns the graphs that were captured, filled as they are."""
    graphs: list[RecordedGraph] = []

    def captured(run: Callable[[], torch.Tensor], device: torch.device, **_: Any) -> RecordedGraph:
        assert device.type == "cpu"
        run()  # the trial
        graph = RecordedGraph()
        with _recording(graph):
            graph.output = run()
        graphs.append(graph)
        return graph

    monkeypatch.setattr(capture, "captured", captured)
    monkeypatch.setattr(capture, "reason_against", lambda *_: None)
    return graphs
