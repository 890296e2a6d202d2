"""The shared procedure of the benchmarks: check results first, then time, then write a CSV file and a table."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kvzip_press.kernels.benchmarks import timing
from kvzip_press.kernels.benchmarks.report import Provenance, Row, table, write_csv
from kvzip_press.kernels.benchmarks.timing import Call, Times

_Case = TypeVar("_Case")

PEER_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError)
"""Errors of a peer that is not installed or cannot do an input; its row is then left out, and the reason printed."""


class WrongResultError(Exception):
    """An implementation differs from the exact result by more than is allowed."""


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference over the norm of ``exact``, in fp64; NaN stays NaN."""
    exact = exact.double()
    norm = float(exact.norm())
    return float((out.double() - exact).norm()) / (norm or 1.0)


def check_error(name: str, out: Tensor, exact: Tensor, limit: float) -> float:
    """Returns the relative error, or raises :class:`WrongResultError` if it is over ``limit`` or NaN."""
    if out.shape != exact.shape:
        raise WrongResultError(f"{name}: expected shape {tuple(exact.shape)}, got {tuple(out.shape)}")
    error = relative_error(out, exact)
    if not error <= limit:
        raise WrongResultError(f"{name}: expected a relative error of at most {limit:.3g}, got {error:.3g}")
    return error


class Bench:
    """One run of a benchmark: how long it measures, and the rows so far."""

    def __init__(self, op: str, output: Path, *, quick: bool = False, device: str = "cuda") -> None:
        self.op = op
        self.output = output
        self.device = torch.device(device)
        self.repeats = 5 if quick else 50
        self.rows: list[Row] = []
        self.bandwidth = self.measured_bandwidth()
        self.provenance = Provenance.of_this_run(self.bandwidth / 1e3)

    def measured_bandwidth(self) -> float:
        """Bytes per microsecond that this GPU currently reads."""
        return timing.read_bandwidth(self.repeats)

    def in_graph(self, calls: Sequence[Call]) -> Times:
        """:func:`timing.time_in_graph` with this run's number of repeats."""
        return timing.time_in_graph(calls, self.repeats)

    def eager(self, call: Call) -> Times:
        """:func:`timing.time_eager` with this run's number of repeats."""
        return timing.time_eager(call, self.repeats)

    def on_wall_clock(self, call: Call) -> Times:
        """:func:`timing.time_on_wall_clock` with this run's number of repeats."""
        return timing.time_on_wall_clock(call, self.repeats)

    def synchronize(self) -> None:
        """Waits for the device, so that its errors are raised here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(
        self,
        case: object,
        impl: str,
        build: Callable[[], Sequence[Call]],
        *,
        exact: Sequence[Tensor] = (),
        limit: float = 0.0,
        in_graph: bool = True,
        may_raise: tuple[type[Exception], ...] = PEER_ERRORS,
        n_bytes: int | None = None,
        flops: float | None = None,
    ) -> None:
        """Checks an implementation and, if its results are right, times it and records a row.

        Args:
            case: the case; its text is recorded.
            impl: the implementation's name.
            build: makes the calls, one for each copy of the inputs.
            exact: fp64 results of the first and the last call; if empty, results are not checked.
            limit: the relative error that is allowed.
            in_graph: whether to time all calls in a CUDA graph; if False, for calls that wait for the device, only the
                first is timed, from Python.
            may_raise: what the implementation raises if it cannot do this; then no row is recorded.
            n_bytes: bytes that a call has to move.
            flops: operations that the result needs.

        Raises:
            WrongResultError: a result's error is above ``limit``; nothing was timed.
        """
        try:
            calls = build()
            results = [calls[0](), calls[-1]()]
            self.synchronize()
        except may_raise as reason:
            self.skip(case, impl, reason)
            return
        pairs = zip(results, exact, strict=True) if exact else ()
        errors = [check_error(f"{case}, {impl}", out, expected, limit) for out, expected in pairs]
        del results
        try:
            times = self.in_graph(calls) if in_graph else self.eager(calls[0])
        except may_raise as reason:
            self.skip(case, impl, reason)
            return
        self.add(case, impl, times, n_bytes=n_bytes, flops=flops, error=max(errors, default=None))

    def add(
        self,
        case: object,
        impl: str,
        times: Times,
        *,
        n_bytes: int | None = None,
        flops: float | None = None,
        error: float | None = None,
    ) -> None:
        """Records one measurement."""
        floor = None if n_bytes is None else n_bytes / self.bandwidth
        fraction = None if floor is None else floor / times.median
        tflops = None if flops is None else flops / times.median / 1e6
        self.rows.append(Row(self.op, str(case), impl, *times, n_bytes, floor, fraction, tflops, error))
        print(table(self.rows[-1:]).splitlines()[-1], flush=True)

    def compare(
        self,
        case: object,
        impls: Iterable[str],
        calls_of: Callable[[str], Sequence[Call]],
        error_of: Callable[[str, Tensor], float],
        *,
        n_bytes: int,
        flops: float,
    ) -> None:
        """Records our implementations of an op, whose reference takes as long as hundreds of launches and more.

        Args:
            case: What is computed.
            impls: Their names.
            calls_of: Returns the calls of one, on copies of the inputs.
            error_of: Returns the error of what a call returned, or raises :class:`WrongResultError`.
            n_bytes: Bytes that a call has to move.
            flops: Its FLOPs.
        """
        for impl in impls:
            calls = calls_of(impl)
            try:
                error = error_of(f"{case}, {impl}", calls[0]())
            except ValueError as reason:  # how the dispatch says that it cannot do this
                self.skip(case, f"ours {impl}", reason)
                continue
            times = self.eager(calls[0]) if impl == "reference" else self.in_graph(calls)
            self.add(case, f"ours {impl}", times, n_bytes=n_bytes, flops=flops, error=error)

    def skip(self, case: object, impl: str, reason: object) -> None:
        """Prints why there will be no row."""
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        print(f"{case}  {impl}: left out, {first}", flush=True)

    def write(self) -> None:
        """Writes the rows so far to the CSV file."""
        write_csv(self.output, self.rows, self.provenance)

    def finish(self) -> None:
        """Writes the CSV file and prints the table."""
        self.write()
        print(f"\n{table(self.rows)}\n\n{self.provenance}\nwritten to {self.output}")


def run_cases(op: str, cases: Sequence[_Case], run: Callable[[Bench, _Case], None]) -> None:
    """Runs the cases that the command line asks for; measurements are written even if a later case fails.

    Raises:
        SystemExit: as :func:`start`.
        WrongResultError: an implementation is wrong; the cases after it are not run.
    """
    bench, chosen = start(op, cases)
    try:
        for case in chosen:
            run(bench, case)
            bench.write()
    finally:
        bench.finish()


def start(op: str, cases: Sequence[_Case]) -> tuple[Bench, list[_Case]]:
    """Reads the command line; returns the run and the cases whose name contains the value of ``--cases``.

    Raises:
        SystemExit: there is no GPU, no such case, or the command line is wrong.
    """
    parser = argparse.ArgumentParser(prog=f"python -m kvzip_press.kernels.benchmarks.{op}")
    parser.add_argument("--output", type=Path, required=True, help="the CSV file to write")
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that everything runs")
    arguments = parser.parse_args()
    chosen = [case for case in cases if arguments.cases in str(case)]
    if not chosen:
        parser.error(f"--cases: expected a part of one of {[str(case) for case in cases]}, got {arguments.cases!r}")
    if not torch.cuda.is_available():
        raise SystemExit(f"{parser.prog}: needs a CUDA GPU, and there is none")
    torch.manual_seed(0)
    return Bench(op, arguments.output, quick=arguments.quick), chosen
