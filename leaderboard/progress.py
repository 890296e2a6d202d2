"""A progress bar that counts rows, without transformers' own bars beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.terminal import printable


@contextmanager
def row_bar(console: Console, total: int) -> Iterator[Callable[[Row], None]]:
    """Shows a progress bar while open; gives a function to call with each row."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}", markup=False), *columns, console=console, transient=True
    ) as progress:
        bar = progress.add_task("reading the first context", total=total)

        def on_row(row: Row) -> None:
            what = f"{row.task} {row.sample_id}: {row.press} {row.compression_ratio}"
            progress.update(bar, advance=1, description=printable(what))

        yield on_row


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides transformers' progress bars while open; afterwards they are as before."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
