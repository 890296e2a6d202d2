"""The results of a benchmark, one row per measurement, written as CSV and printed as a table."""

import csv
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

COMMIT_VARIABLE = "KVZIP_PRESS_COMMIT"


@dataclass(frozen=True)
class Row:
    """One implementation on one case.

    Attributes:
        op: the op.
        case: the inputs it was given.
        impl: the implementation.
        median_us: median time of a call, in microseconds.
        p20_us: 20th percentile of the times.
        p80_us: 80th percentile of the times.
        bytes: bytes that a call has to move, reads and writes; None if that is not meaningful.
        floor_us: those bytes divided by the bandwidth that this run measured.
        fraction_of_floor: floor_us / median_us; 1 is as fast as the memory.
        tflops: operations that the result needs, in 1e12 per second of the median; None if memory is the bound.
        error: relative error against fp64, 0 for equal bits; None if results were not checked.
    """

    op: str
    case: str
    impl: str
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int | None = None
    floor_us: float | None = None
    fraction_of_floor: float | None = None
    tflops: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Provenance:
    """Where a run's rows come from."""

    gpu: str
    bandwidth_gb_s: float
    torch: str
    triton: str
    flashinfer: str
    commit: str
    date: str

    @classmethod
    def of_this_run(cls, bandwidth_gb_s: float) -> "Provenance":
        """Reads device, versions, commit and date."""
        return cls(
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            bandwidth_gb_s=round(bandwidth_gb_s, 1),
            torch=torch.__version__,
            triton=_version("triton"),
            flashinfer=_version("flashinfer-python"),
            commit=commit(Path(__file__).parent),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def commit(folder: Path) -> str:
    """Returns the commit of the checkout that holds ``folder``, with "-dirty" if that was changed, or "unknown".

    The environment variable KVZIP_PRESS_COMMIT wins: a machine with a GPU may have a copy without its history.
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    head, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain")
    if head is None or changes is None:
        return "unknown"
    return f"{head}-dirty" if changes else head


def write_csv(path: Path, rows: Sequence[Row], provenance: Provenance) -> None:
    """Writes the rows, each with the provenance, and a header; numbers have four significant digits or more."""
    names = [field.name for kind in (Row, Provenance) for field in fields(kind)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row) | asdict(provenance)
            writer.writerow({name: _text(value) for name, value in values.items()})


def table(rows: Sequence[Row]) -> str:
    """Formats the rows as lines of text with aligned columns."""
    names = ["case", "impl", "median_us", "p20_us", "p80_us", "floor_us", "fraction_of_floor", "tflops", "error"]
    cells = [names, *([_text(getattr(row, name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(folder: Path, *arguments: str) -> str | None:
    """Returns git's output, or None if there is no git or no checkout."""
    try:
        asked = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S607  # the user's own git
    except OSError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None
