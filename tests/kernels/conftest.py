"""What the kernel tests share: devices, the error budget, views inside buffers full of NaN, packed rows made dense."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.triton_support import reason_against_triton

Accurate = Callable[[Tensor, Tensor, Tensor], None]
View = Callable[[Tensor], Tensor]
Unpack = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True)
def _only_where_triton_runs(request: pytest.FixtureRequest) -> None:
    """A test of several implementations and devices leaves out Triton on a CPU outside its interpreter."""
    values = getattr(request.node, "callspec", None)
    if values is not None and values.params.get("impl") == "triton" and "device" in values.params:
        reason = reason_against_triton(torch.device(values.params["device"]))
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _empty_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """For Triton kernels ``torch.empty`` is full of NaN (or of the largest integer): what is not written is seen."""
    if request.node.get_closest_marker("triton") is None:
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory  # PyTorch's default, in force under the switch below
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _nothing_in_vain_in_the_interpreter() -> Iterator[None]:
    """Leaves out of Triton's interpreter what changes nothing: it is two thirds of what a test waits for.

    Whenever a kernel calls another function, ``tl.sum`` and ``tl.cdiv`` included, all functions of the language are
    replaced. Within a launch nothing is put back, so once is enough for each module. And each sum or product of
    integers is made again in 64 bits, to look whether it overflows; without its option ``debug`` the answer is dropped.
    """
    if reason_against_triton(torch.device("cpu")) is not None:
        yield
        return
    from triton.runtime import interpreter

    patch_lang, run_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def patched_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in done:
            return None
        done.add(module)
        return patch_lang(fn)  # the launch's own, which is the first one, takes it all back at the end

    def run_grid_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return run_grid(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patched_once)
        patch.setattr(interpreter.GridExecutor, "__call__", run_grid_anew)
        options = interpreter.interpreter_builder.options
        if not options.debug:
            patch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
        yield


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests of kernels."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def assert_accurate() -> Accurate:
    """Asserts that a result is about as near to the exact one as a plain computation in the inputs' precision is."""

    def check(got: Tensor, exact: Tensor, plain: Tensor) -> None:
        assert exact.dtype == torch.float64
        assert got.shape == exact.shape == plain.shape
        finite = exact.isfinite()
        assert torch.equal(got.double()[~finite], exact[~finite])
        if not finite.any():
            return
        # The plain error is one draw: with another order of sums it comes out up to about three times as large.
        # To that comes the rounding of the largest result. A wrong kernel errs by orders of magnitude more.
        plain_error = (plain.double() - exact)[finite].abs().max()
        rounding = torch.finfo(got.dtype).eps * exact[finite].abs().max()
        error = (got.double() - exact)[finite].abs().max()
        budget = 4 * plain_error + rounding
        assert error <= budget, f"error {error:.3e} is over the budget {budget:.3e}"

    return check


@pytest.fixture(scope="session")
def captured() -> Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]:
    """Captures a run in a CUDA graph; gives what it returned, which the graph writes anew, and what replays it."""

    def capture(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        run()  # compiles and tunes, which no capture allows
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        return output, graph.replay

    return capture


@pytest.fixture(scope="session")
def inside_nan() -> View:
    """Makes a view that equals a tensor and lies inside a larger buffer, the rest of which is NaN."""

    def view(tensor: Tensor) -> Tensor:
        sizes = [size + 3 for size in tensor.shape]
        buffer = torch.full(sizes, torch.nan, dtype=tensor.dtype, device=tensor.device)
        inner = buffer[tuple(slice(1, size + 1) for size in tensor.shape)]
        inner.copy_(tensor)
        return inner

    return view


@pytest.fixture(scope="session")
def unpack() -> Unpack:
    """Spreads packed rows over [segments, longest, ...], 0 where there is none; with a mask of where there is one."""

    def spread(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        lengths = cu_seqlens.diff()
        mask = torch.arange(int(lengths.max()), device=packed.device) < lengths.unsqueeze(-1)
        dense = packed.new_zeros(*mask.shape, *packed.shape[1:])
        dense[mask] = packed
        return dense, mask

    return spread
