"""Captures what a step launches in a CUDA graph, which replays it on the same addresses: one way for all steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kvzip_press.model.watching import alone

OTHERS_COMPUTE = "another thread is computing, and a capture has to be alone"
_TRIALS = 2  # steps before the capture, in which kernels are compiled and libraries set up


class Captured:
    """A captured step.

    Args:
        graph: The graph.
        output: What each replay writes anew.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph, self._output = graph, output

    def replay(self) -> torch.Tensor:
        """Runs the step; returns its output, valid until the next replay of this graph or of one in its memory."""
        self._graph.replay()
        return self._output

    @property
    def memory(self) -> Any:
        """The memory pool of the graph, in which others may be captured that are never replayed beside it."""
        return self._graph.pool()


def captured(
    run: Callable[[], torch.Tensor], device: torch.device, *, undo: Callable[[], None] | None = None, memory: Any = None
) -> Captured:
    """Runs a step as a trial, undoes that, and captures it.

    Args:
        run: Launches the step's kernels, over static memory and without waiting for the device.
        device: A CUDA device.
        undo: Undoes what a trial has done; None if the first real step overwrites it.
        memory: :attr:`Captured.memory` of a graph to share it with; None for new memory.

    Raises:
        RuntimeError: The step cannot be captured, or there is not enough memory.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_TRIALS):
                run()
                if undo is not None:
                    undo()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            output = run()
    return Captured(graph, output)


def reason_after(capture: Callable[[], None]) -> str | None:
    """Captures alone; returns why nothing was captured, or None if it was.

    Args:
        capture: Captures; a RuntimeError that it raises is the reason.
    """
    with alone() as is_alone:
        if not is_alone:
            return OTHERS_COMPUTE
        try:
            capture()
        except RuntimeError as error:
            return f"the capture failed: {error}"
    return None


def reason_against(model: nn.Module, device: torch.device) -> str | None:
    """Returns why steps of this model cannot be captured, as far as is known beforehand; None if they may be."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model lies on several devices"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "the model's modules are moved or offloaded by hooks"
    return None
