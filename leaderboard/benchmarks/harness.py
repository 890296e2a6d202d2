"""Compares this harness with the usual evaluation loop: one prefill per press and ratio, questions one by one.

``python -m kvzip_press.leaderboard.benchmarks.harness --contexts 4 --tokens 900``

The loop is that of kvpress's evaluation: for every press and ratio it reads every context anew under kvpress's own
press, then asks each question with one forward pass over its tokens and greedy steps, and cuts the cache back. Ours
reads a context once. Both get the same token ids on the same model and machine; the last line says how often they give
the same answer (sums taken in another order can tip near ties).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvzip_press import compat
from kvzip_press.decoding.answering import decoded, question_ids
from kvzip_press.decoding.generation import eos_ids
from kvzip_press.leaderboard.rows.results import Row
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, Work, plan
from kvzip_press.leaderboard.running.runner import execute
from kvzip_press.leaderboard.samples.task import Question
from kvzip_press.leaderboard.tasks import get_task
from kvzip_press.loading.by_name import load_on
from kvzip_press.model.chat import chat_frame, encode
from kvzip_press.model.devices import input_device

PRESSES = ("kvzip", "snapkv", "expected_attention", "adakv_expected_attention", "knorm", "tova")
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)

Answers = dict[tuple[str, float, str, str], str]


def main(
    contexts: Annotated[int, typer.Option(help="Contexts a task.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 900,
    task: Annotated[list[str] | None, typer.Option(help="Tasks; several times.")] = None,
    press: Annotated[list[str] | None, typer.Option(help="Presses that kvpress has too; several times.")] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts that ours reads in one forward.")] = 1,
    model: Annotated[str, typer.Option(help="Path or hub id of a model, or smollm2.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default the GPU if any.")] = None,
) -> None:
    """Runs both and prints their times and the ratio."""
    names = press or list(PRESSES)
    tasks = tuple(TaskSpec(get_task(name), contexts, tokens) for name in task or ("hidden_facts", "profile_qa"))
    run = Run(model, tasks, tuple(PressSpec(name, name) for name in names), RATIOS, seed=31, batch_size=batch_size)
    loaded, tokenizer = load_on(model, device)
    works = plan(run, tokenizer)
    small = replace(run, presses=run.presses[-1:], compression_ratios=RATIOS[:1])
    for warm in (_ours, _loop):
        warm(small, works[:batch_size], loaded, tokenizer)  # in the timed shape: kernels are compiled for it
    ours, ours_times = _timed(_ours, run, works, loaded, tokenizer)
    loop, loop_times = _timed(_loop, run, works, loaded, tokenizer)
    title = f"{len(works)} contexts, {len(ours)} answers, {len(names)} presses x {len(RATIOS)} ratios"
    table = Table("harness", "seconds", "CPU seconds", title=title)
    table.add_row("one prefill a press and ratio", *(f"{seconds:.1f}" for seconds in loop_times))
    table.add_row("one prefill a context", *(f"{seconds:.1f}" for seconds in ours_times))
    table.add_row("times as fast", *(f"{slow / fast:.1f}" for slow, fast in zip(loop_times, ours_times, strict=True)))
    Console().print(table)
    same = sum(ours[key] == said for key, said in loop.items())
    Console().print(f"the same answer to {same} of {len(loop)} questions")


def _ours(run: Run, works: Sequence[Work], model: Any, tokenizer: Any) -> Answers:
    rows: Iterator[Row] = execute(run, works, model, tokenizer)
    return {
        (row.press, row.compression_ratio, f"{row.task}/{row.sample_id}", row.question_id): row.prediction
        for row in rows
    }


def _loop(run: Run, works: Sequence[Work], model: Any, tokenizer: Any) -> Answers:
    from kvzip_press.presses.kvpress_adapter import original

    answers: Answers = {}
    with Progress(transient=True) as shown:
        bar = shown.add_task("the usual loop", total=len(run.presses) * len(run.compression_ratios) * len(works))
        for spec in run.presses:
            for ratio in run.compression_ratios:
                for work in works:
                    ids = [*chat_frame(tokenizer).prefix, *encode(tokenizer, work.sample.context)]
                    context = torch.tensor([ids], device=input_device(model))
                    press = original.original_press(spec.name, ratio)
                    with original.run_original(press, model, context, tokenizer) as read:
                        for question in work.sample.questions:
                            name = f"{work.task.name}/{work.sample.sample_id}", question.question_id
                            answers[spec.label, ratio, *name] = _ask(
                                read.model, tokenizer, read.cache, len(ids), question
                            )
                    shown.advance(bar)
    return answers


@torch.no_grad()
def _ask(model: Any, tokenizer: Any, cache: Any, n_context: int, question: Question) -> str:
    """Answers one question greedily behind whatever kvpress left in the cache, then cuts the cache back."""
    held = [layer.keys.shape[2] for layer in cache.layers]
    ids = torch.tensor([question_ids(tokenizer, question.text, question.answer_prefix)], device=model.device)
    ended, said, position = eos_ids(model, tokenizer), [], n_context
    for _ in range(question.max_new_tokens):
        positions = torch.arange(position, position + ids.shape[1], device=ids.device).unsqueeze(0)
        logits = model(
            input_ids=ids, position_ids=positions, logits_to_keep=1, **compat.cache_argument(model, cache)
        ).logits
        position += ids.shape[1]
        token = int(logits[0, -1].argmax())
        if token in ended:
            break
        said.append(token)
        ids = torch.tensor([[token]], device=ids.device)
    for layer, length in zip(cache.layers, held, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return decoded(tokenizer, said)


def _timed(function: Any, *arguments: Any) -> tuple[Answers, tuple[float, float]]:
    """Returns the answers with wall seconds and seconds of this process, which a busy machine distorts less."""
    wall, process = time.perf_counter(), time.process_time()
    answers: Answers = function(*arguments)
    return answers, (time.perf_counter() - wall, time.process_time() - process)


if __name__ == "__main__":
    typer.run(main)
