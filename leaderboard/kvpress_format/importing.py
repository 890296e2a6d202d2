"""Reads folders of kvpress's leaderboard as rows: ours come back unchanged, kvpress's with the fields it records."""

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.summary import split
from kvzip_press.leaderboard.kvpress_format.files import parse_answers, read_config, read_object, read_table
from kvzip_press.leaderboard.kvpress_format.layout import (
    COLUMNS,
    CONFIG,
    EXTRA,
    METRICS,
    PREDICTIONS,
    column_of,
    subset_of,
)
from kvzip_press.leaderboard.metrics.originals import ruler_all, ruler_any
from kvzip_press.leaderboard.rows.results import Row, run_id

Score = Callable[[str, Sequence[str], str], float]
"""Takes a prediction, its references and the name of its task or subset; returns a score in [0, 1]."""

_FLOATS = {"score", "kept_fraction", "prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds"}
_INTS = {"seed", "n_context_tokens", "n_answer_tokens", "resident_bytes", "dense_bytes"}
_UNKNOWN = (_FLOATS | _INTS) - {"seed", "score"}  # fields that kvpress's results do not have
_SETTINGS = ("model", "fraction", "max_context_length", "model_kwargs", "fp8", "seed")  # equal throughout a run


def import_rows(folder: str | os.PathLike[str], *, score: Score | None = None) -> list[Row]:
    """Reads the rows of one folder of results, or of all such folders inside a folder.

    Rows that `export_rows` wrote come back as they were. Those of kvpress have no sizes, times or token counts (None),
    and do not record which questions shared a context: each line counts as a context of its own, the same for all
    presses. Results of one model with the same settings form one run. Their scores are computed here, by RULER's
    metric, and compared with metrics.json.

    Args:
        folder: A folder of results, or one that holds such folders at any depth.
        score: The metric for data sets other than RULER; compared only for the tasks that metrics.json names.

    Raises:
        InvalidArgumentError: There are no results, a file is missing or broken, the metric is not known, or the scores
            do not agree with metrics.json.
    """
    found = sorted(Path(folder).rglob(CONFIG))
    if not found:
        raise InvalidArgumentError(f"expected folders with {CONFIG}, {PREDICTIONS} and {METRICS} in {folder}, got none")
    return [row for config in found for row in _read(config.parent, score)]


def _read(path: Path, score: Score | None) -> Iterator[Row]:
    if absent := [name for name in (PREDICTIONS, METRICS) if not (path / name).is_file()]:
        raise InvalidArgumentError(f"expected {', '.join(absent)} beside {path / CONFIG}, got none")
    config = read_config(path / CONFIG)
    lines = list(read_table(path / PREDICTIONS))
    if (path / EXTRA).is_file():
        extra = read_object(path / EXTRA)
        yield from (_own_row(line, config, extra, path) for line in lines)
        return
    rows = [_foreign_row(line, place, config, score, path) for place, line in enumerate(lines)]
    _check_scores(rows, read_object(path / METRICS), path, all_stated=score is None)
    yield from rows


def _own_row(line: Mapping[str, str], config: Mapping[str, Any], extra: Mapping[str, Any], path: Path) -> Row:
    try:
        return Row(
            run_id=extra["run_id"],
            task=config["dataset"],
            model=config["model"],
            press=extra["press"],
            compression_ratio=config["compression_ratio"],
            query_aware=config["query_aware"],
            provenance=extra["provenances"][int(line["provenance"])],
            **{name: _value(name, line[column_of(name)]) for name in COLUMNS},
        )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InvalidArgumentError(
            f"{path}: expected what `export` wrote, got a line or file that is not ({error})"
        ) from error


def _foreign_row(
    line: Mapping[str, str], place: int, config: Mapping[str, Any], score: Score | None, path: Path
) -> Row:
    if lacking := {"answer", "predicted_answer"} - line.keys():
        raise InvalidArgumentError(f"{path / PREDICTIONS}: expected the columns {sorted(lacking)}, got {sorted(line)}")
    subset, references = line.get("task") or config["dataset"], parse_answers(line["answer"])
    unknown: dict[str, Any] = dict.fromkeys(_UNKNOWN)
    return Row(
        run_id=run_id({name: config.get(name) for name in _SETTINGS}),
        task=config["dataset"],
        model=config["model"],
        press=config["press_name"],
        compression_ratio=config["compression_ratio"],
        sample_id=f"{config.get('data_dir') or ''}/{place:06}",
        question_id=subset,
        seed=config.get("seed") or 0,
        prediction=line["predicted_answer"],
        references=references,
        score=_scorer(config["dataset"], score, path)(line["predicted_answer"], references, subset),
        query_aware=bool(config.get("query_aware", config.get("compress_questions", False))),  # the older name
        tags={"subset": subset},
        provenance={"source": "kvpress", "press": str(config.get("press_init_command", config["press_name"]))},
        **unknown,
    )


def _scorer(dataset: str, score: Score | None, path: Path) -> Score:
    if score is not None:
        return score
    if dataset == "ruler":
        return lambda prediction, references, subset: (ruler_any if subset.startswith("qa") else ruler_all)(
            prediction, references
        )
    raise InvalidArgumentError(
        f"{path}: expected results of ruler, or a metric (score=), got results of {dataset!r} without one"
    )


def _check_scores(rows: Sequence[Row], metrics: Mapping[str, Any], path: Path, *, all_stated: bool) -> None:
    """Checks that the scores computed here agree with the folder's: a wrong metric would give a wrong table."""
    for task in split(rows, subset_of):
        stated = metrics.get(subset_of(task[0]))
        if stated is None and not all_stated:
            continue
        value = next(iter(stated.values()), None) if isinstance(stated, dict) else stated
        mean = 100 * statistics.fmean(row.score for row in task)
        if not isinstance(value, int | float) or abs(value - mean) > 0.0101:  # two decimals, rounded either way
            raise InvalidArgumentError(f"{path / METRICS}: expected {mean:.2f} for {subset_of(task[0])!r}, got {value}")


def _value(name: str, text: str) -> Any:
    if name == "references":
        return parse_answers(text)
    if name == "tags":
        return json.loads(text)
    if name in _FLOATS | _INTS:
        return None if not text else float(text) if name in _FLOATS else int(text)
    return text
