"""How many rows are done, without transformers' own progress bars beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.terminal import progress


@contextmanager
def row_bar(console: Console, total: int) -> Iterator[Callable[[Row], None]]:
    """Shows how many rows of ``total`` are done while open; gives a function to call with each row."""
    with progress(console) as show:
        show("rows", 0, total, "reading the first context")
        n_done = 0

        def on_row(row: Row) -> None:
            nonlocal n_done
            n_done += 1
            show("rows", n_done, total, f"{row.task} {row.sample_id}: {row.press} {row.compression_ratio}")

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
