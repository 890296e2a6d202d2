"""A table of shares for heads (BaKlaVa-style) against equal shares, on pieces of text that it was not searched on.

``python -m kvzip_press.leaderboard.benchmarks.shares --press snapkv --removed 0.85``

Python's language reference, or texts of yours (``--text``), are cut into pieces; every other one is searched on. After
a press on the first half of a held-out piece, the second half is read, under the shares that were found and under equal
ones: nats a token, and their difference with its standard error over pieces. Below 0 the table is better.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvzip_press import get_press
from kvzip_press.heads.share_search import find_shares, nats_per_token
from kvzip_press.leaderboard.tasks.python_reference.task import PythonReferenceTask
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.chat import encode
from kvzip_press.terminal import plain


def main(
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file; several times. Default Python's reference.")
    ] = None,
    length: Annotated[
        int, typer.Option(help="Tokens of a piece, of which half are read before they are evicted.")
    ] = 512,
    pieces: Annotated[int, typer.Option(help="Most pieces of all texts.")] = 80,
    press: Annotated[list[str] | None, typer.Option(help="Presses; streaming_llm, snapkv, expected_attention.")] = None,
    removed: Annotated[list[float] | None, typer.Option(help="Fractions removed; default 0.3, 0.8, 0.85, 0.9.")] = None,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the figures, JSON.")] = None,
) -> None:
    """Runs the comparison and prints it."""
    read_by, tokenizer = load_on(model, device)
    texts = [path.read_text(encoding="utf-8") for path in text] if text else [_reference()]
    every = [piece for one in texts for piece in _pieces(tokenizer, one, length)]
    every = every[:: max(1, len(every) // pieces)][:pieces]
    searched, held_out = every[::2], every[1::2]
    if len(held_out) < 2:
        raise typer.BadParameter(f"expected text of at least 4 pieces of {length} tokens, got {len(every)}")
    columns = ("press", "removed", "found", "equal shares", "table", "difference", "pieces where better")
    table = Table(*columns, box=None, pad_edge=False)
    rows: list[dict[str, Any]] = []
    for name in press or ["streaming_llm", "snapkv", "expected_attention"]:
        for ratio in removed or [0.3, 0.8, 0.85, 0.9]:
            made = get_press(name, ratio)
            found = find_shares(read_by, tokenizer, searched, made)
            both = [found.shares, torch.ones_like(found.shares)]
            got = [
                nats_per_token(read_by, tokenizer, piece, made, both)
                for piece in track(held_out, description=f"{name} {ratio}", transient=True)
            ]
            apart = [ours - equal for ours, equal in got]
            error = statistics.stdev(apart) / math.sqrt(len(apart))
            ours, equal = (statistics.mean(one) for one in zip(*got, strict=True))
            better = statistics.mean(one < 0 for one in apart)
            said = "equal shares" if found.settings is None else ", ".join(f"{one:g}" for one in found.settings)
            difference = f"{statistics.mean(apart):+z.4f} ± {error:.4f}"
            table.add_row(name, f"{ratio:g}", said, f"{equal:.4f}", f"{ours:.4f}", difference, f"{better:.0%}")
            rows.append(
                {"press": name, "removed": ratio, "settings": found.settings, "equal": equal, "table": ours}
                | {"difference": statistics.mean(apart), "error": error, "better": better, "pieces": len(apart)}
            )
    Console().print(table)
    Console().print(plain(f"{model}, {len(searched)} pieces of {length} tokens searched, {len(held_out)} held out"))
    if output is not None:
        output.write_text(
            json.dumps({"model": model, "length": length, "cells": rows}, indent=1) + "\n", encoding="utf-8"
        )


def _reference() -> str:
    return "\n\n".join(section.text for section in PythonReferenceTask().documents)


def _pieces(tokenizer: Any, text: str, length: int) -> list[str]:
    """Returns a text in pieces of so many tokens, as text again; what is left at the end is left out."""
    ids = list(encode(tokenizer, text))
    return [tokenizer.decode(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]


if __name__ == "__main__":
    typer.run(main)
