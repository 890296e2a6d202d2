"""Compares ways to choose whole heads to drop: by KVzip's scores, DuoAttention's, or at random; same sink and window.

``python -m kvzip_press.leaderboard.benchmarks.heads --contexts 13``

The tasks are the demo's. Dropped heads keep the chat template's prefix and, in the second half of the table, also the
last ``window`` tokens of the context. In contexts as short as these both matter, so ratios come in pairs: the fraction
of heads that is dropped, and the one that leaves about that fraction of the bytes with a window of 16. Look at the
measured fraction. Rows are written to a JSONL file as they are made.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kvzip_press.heads.scores import HeadScores
from kvzip_press.leaderboard.analysis.summary import summarise
from kvzip_press.leaderboard.analysis.table import results_table
from kvzip_press.leaderboard.progress import row_bar
from kvzip_press.leaderboard.rows.results import RowWriter
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, count_rows, plan
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.identity import num_kv_heads
from kvzip_press.model.structure import full_attention_layers

REMOVED = (0.4, 0.44, 0.5, 0.55)
N_SINK = 4  # fewer tokens than the chat template's prefix, so that all presses keep the prefix and no more


def main(
    contexts: Annotated[int, typer.Option(help="Pages of profile_qa (8 questions each); twice as many needles.")] = 13,
    tokens: Annotated[int, typer.Option(help="Tokens of each context.")] = 450,
    window: Annotated[int, typer.Option(help="Last tokens that every head keeps, in the second half.")] = 16,
    draws: Annotated[int, typer.Option(help="Draws of random heads.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 17,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts in one forward.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the rows go.")] = Path("outputs/heads.jsonl"),
) -> None:
    """Runs the comparison and prints it."""
    loaded, tokenizer = load_on(model, device)
    shape = len(full_attention_layers(loaded)), num_kv_heads(loaded)
    presses = (PressSpec("none", "full cache", compression_ratios=(0.0,)), *head_presses(shape, window, draws))
    tasks = (
        TaskSpec(get_task("hidden_facts", n_keys=4), 2 * contexts, tokens),
        TaskSpec(get_task("profile_qa", n_people=1, n_attributes=8), contexts, tokens),
    )
    run = Run(model, tasks, presses, REMOVED, seed, batch_size=batch_size)
    works, rows = plan(run, tokenizer), []
    with RowWriter(out) as writer, row_bar(Console(), count_rows(run, works)) as on_row:
        for row in execute(run, works, loaded, tokenizer):
            writer.write(row)
            press, _, draw = row.press.partition(" #")  # random draws are averaged, as if they were more questions
            rows.append(replace(row, press=press, question_id=f"{row.question_id} {draw}".rstrip()))
            on_row(row)
    cells = summarise(rows)
    title = f"{model}, seed {seed}, {cells[0].n_questions} questions a press and ratio, {draws} draws of random heads"
    Console().print(results_table(cells, title))


def head_presses(shape: tuple[int, int], window: int, draws: int) -> list[PressSpec]:
    """Returns the presses of the table: first without a window, as in KVzip, then with one, as in DuoAttention."""
    random = [torch.rand(shape, generator=torch.Generator().manual_seed(draw)) for draw in range(draws)]
    specs = []
    for size, label in ((0, ""), (window, f", window {window}")):
        ends = {"n_sink": N_SINK, "window_size": size}
        specs += [
            PressSpec("kvzip_head", f"kvzip_head{label}", ends),
            PressSpec("duo_attention", f"duo_attention{label}", ends),
            *(
                PressSpec("kvzip_head", f"random heads{label} #{draw}", {**ends, "scores": HeadScores(values)})
                for draw, values in enumerate(random)
            ),
        ]
    return specs


if __name__ == "__main__":
    typer.run(main)
