"""``kvzip-press profile``: the loop over the cases; every row is written to disk as soon as it is known."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvzip_press.errors import InvalidArgumentError, first_line_of
from kvzip_press.files import check_writable
from kvzip_press.leaderboard.profile.gains import sentences
from kvzip_press.leaderboard.profile.grid import Grid, make_grid
from kvzip_press.leaderboard.profile.measure import Case, Subject, measure
from kvzip_press.leaderboard.profile.report import profile_tables
from kvzip_press.leaderboard.profile.rows import ProfileRow, provenance
from kvzip_press.leaderboard.profile.shapes import get_shape, random_model
from kvzip_press.leaderboard.rows.line_file import LineWriter
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.devices import get_device, get_dtype
from kvzip_press.terminal import plain

logger = logging.getLogger(__name__)


def run_profile(
    output_dir: str | os.PathLike[str] = "outputs/profile",
    *,
    model: str | None = None,
    shape: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    console: Console | None = None,
    **grid_options: Any,
) -> list[ProfileRow]:
    """Measures caches of one model, prints the table and where the gain begins, and appends the rows to a file.

    Args:
        output_dir: Gets ``profile.jsonl``; rows of earlier profiles stay in it.
        model: As for `kvzip_press.load_model`. Exactly one of ``model`` and ``shape`` is given.
        shape: A name from `SHAPES`, for random weights.
        device: By default the GPU, if there is one.
        dtype: By default the checkpoint's; for a shape bf16 on a GPU and fp32 on a CPU.
        console: Where to print.
        **grid_options: See `make_grid`.

    Raises:
        InvalidArgumentError: Arguments out of range, or a place that cannot be written, before a model is loaded.
        ModelNotFoundError: The model is not available.
    """
    console = console or Console()
    if (model is None) == (shape is None):
        given = "neither" if model is None else f"both {model!r} and {shape!r}"
        raise InvalidArgumentError(f"expected exactly one of --model and --shape, got {given}")
    path = Path(output_dir) / "profile.jsonl"
    check_writable(path, "the profile in --output", parents=True)
    place, kind = get_device(device), get_dtype(dtype)
    known = None if shape is None else get_shape(shape)

    def say(line: str) -> None:
        console.print(plain(line, "yellow"))

    grid = make_grid(place, say=say, **grid_options)
    with console.status(plain(f"making {model or shape}")):
        if known is not None:
            kind = kind or (torch.bfloat16 if place.type == "cuda" else torch.float32)
            subject = Subject(str(shape), random_model(known, place, kind))
        else:
            subject = Subject(str(model), *load_on(str(model), place, kind))
    rows = list(_measured(subject, grid, path, console))
    console.print(profile_tables(rows, _title(rows[0])))
    for sentence in sentences(rows):
        console.print(plain(sentence))
    console.print(plain(f"rows: {path}"))
    return rows


def _measured(subject: Subject, grid: Grid, path: Path, console: Console) -> Iterator[ProfileRow]:
    cases, about = list(grid.cases()), provenance(subject.model)
    with console.status("warming up") as status:
        for case in grid.warmups():
            status.update(plain(f"warming up: {case.press} ({case.engine})"))
            _figures(subject, case)
        with LineWriter(path, ProfileRow) as writer:
            for number, case in enumerate(cases, start=1):
                what = f"{case.press} ({case.engine}, {case.storage}) {case.compression_ratio}"
                status.update(plain(f"{number} of {len(cases)}: {case.context_length} tokens, {what}"))
                row = _row(subject, case, about)
                writer.write(row)
                yield row


def _row(subject: Subject, case: Case, about: dict[str, str]) -> ProfileRow:
    return ProfileRow(
        model=subject.name,
        press=case.press,
        engine=case.engine,
        compression_ratio=case.compression_ratio,
        context_length=case.context_length,
        decode_tokens=case.decode_tokens,
        storage=case.storage,
        provenance=about,
        **_figures(subject, case),
    )


def _figures(subject: Subject, case: Case) -> dict[str, Any]:
    """Returns the figures of a case, or its error; its memory is freed afterwards."""
    try:
        return measure(subject, case)
    except Exception as error:  # out of memory, or a press that refuses: a row, and the run continues
        logger.debug("%s", case, exc_info=True)
        return {"error": first_line_of(error)}
    finally:
        gc.collect()
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()


def _title(row: ProfileRow) -> str:
    about = row.provenance
    place = about["gpu"] if about["gpu"] != "CPU" else f"CPU, {about['threads']} threads"
    return f"{row.model}, {about['dtype']}, {place}, torch {about['torch']}, transformers {about['transformers']}"
