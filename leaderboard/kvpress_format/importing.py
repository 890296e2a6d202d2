"""Reads folders of kvpress's leaderboard as rows: ours come back unchanged, kvpress's with the fields it records."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import digest_of
from kvzip_press.leaderboard.kvpress_format.files import (
    parse_answers,
    read_config,
    read_file,
    read_object,
    read_table,
)
from kvzip_press.leaderboard.kvpress_format.layout import (
    COLUMNS,
    CONFIG,
    EXTRA,
    METRICS,
    PREDICTIONS,
    column_of,
)
from kvzip_press.leaderboard.kvpress_format.scores import Score, check_means, check_own, scorer_of
from kvzip_press.leaderboard.kvpress_format.staging import is_unfinished
from kvzip_press.leaderboard.rows.results import Row, run_id
from kvzip_press.leaderboard.rows.sealed_line import unsealed
from kvzip_press.untrusted import parse_json

logger = logging.getLogger(__name__)

_FLOATS = {"score", "kept_fraction", "prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds"}
_INTS = {"seed", "n_context_tokens", "n_answer_tokens", "resident_bytes", "dense_bytes"}
_OLDER_EXTRA = {"run_id", "press", "provenances"}
_UNKNOWN = (_FLOATS | _INTS | {"task_version"}) - {"seed", "score"}  # fields that kvpress's results do not have
_SETTINGS = ("model", "fraction", "max_context_length", "model_kwargs", "fp8", "seed")  # equal throughout a run


def import_rows(folder: str | os.PathLike[str], *, score: Score | None = None) -> list[Row]:
    """Reads the rows of one folder of results, or of all such folders inside a folder.

    Rows that `export_rows` wrote come back as they were, if none of their files was changed since. Those of kvpress
    have no sizes, times, token counts or versions of tasks (None), and do not record which questions shared a context:
    each line counts as a context of its own, the same for all presses. Results of one model with the same settings form
    one run. Their scores are computed here, by RULER's metric. All scores are compared with the predictions and with
    metrics.json.

    Args:
        folder: A folder of results, or one that holds such folders at any depth.
        score: The metric for data sets other than RULER and our tasks; compared only for the tasks that metrics.json
            names.

    Raises:
        InvalidArgumentError: There are no results, a file is missing, broken or was changed, the metric is not known,
            or the scores do not agree with the predictions or metrics.json.
    """
    configs = sorted(Path(folder).rglob(CONFIG))
    found = [config for config in configs if not is_unfinished(config.relative_to(folder))]
    if not found:
        raise InvalidArgumentError(f"expected folders with {CONFIG}, {PREDICTIONS} and {METRICS} in {folder}, got none")
    return [row for config in found for row in _read(config.parent, score)]


def _read(path: Path, score: Score | None) -> list[Row]:
    if absent := [name for name in (PREDICTIONS, METRICS) if not (path / name).is_file()]:
        raise InvalidArgumentError(f"expected {', '.join(absent)} beside {path / CONFIG}, got none")
    is_own = os.path.lexists(path / EXTRA)
    extra = _extra(path) if is_own else {}
    config, metrics = read_config(path / CONFIG), read_object(path / METRICS)
    lines = list(read_table(path / PREDICTIONS))
    if is_own:
        rows = [_own_row(line, config, extra, path) for line in lines]
        check_own(rows, path, score)
    else:
        rows = [_foreign_row(line, place, config, score, path) for place, line in enumerate(lines)]
    check_means(rows, metrics, path, all_stated=is_own or score is None)
    return rows


def _extra(path: Path) -> dict[str, Any]:
    """Reads our own file, and compares the others with the checksums in it. Older versions wrote none."""
    try:
        extra, has_seal = unsealed(read_object(path / EXTRA))
        changed = _changed(path, extra["files"]) if has_seal else sorted(extra.keys() - _OLDER_EXTRA)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidArgumentError(f"{path / EXTRA}: expected what `export` wrote, got {error}") from error
    if changed:
        raise InvalidArgumentError(
            f"{path / EXTRA}: expected what `export` wrote, but {', '.join(changed)[:200]} was changed since, or added"
        )
    if not has_seal:
        logger.warning("%s was written by an older version, without a checksum: not every change can be seen", path)
    return extra


def _changed(path: Path, digests: Mapping[str, str]) -> list[str]:
    return [name for name in (PREDICTIONS, METRICS, CONFIG) if digest_of(read_file(path / name)) != digests[name]]


def _own_row(line: Mapping[str, str], config: Mapping[str, Any], extra: Mapping[str, Any], path: Path) -> Row:
    line = {column_of("question"): "", **line}  # older versions wrote none
    try:
        provenances = dict(enumerate(extra["provenances"]))
        row = Row(
            run_id=extra["run_id"],
            task=config["dataset"],
            model=config["model"],
            press=extra["press"],
            compression_ratio=float(line["compression_ratio"]),
            query_aware=config["query_aware"],
            provenance=provenances[int(line["provenance"])],
            task_version=extra.get("task_version", 1),
            **{name: _value(name, line[column_of(name)]) for name in COLUMNS},
        )
        row.check()
    except (LookupError, ValueError, TypeError, SyntaxError) as error:
        raise InvalidArgumentError(
            f"{path}: expected what `export` wrote, got a line or file that is not ({error})"
        ) from error
    if row.compression_ratio != config["compression_ratio"]:
        raise InvalidArgumentError(
            f"{path / PREDICTIONS}: expected the compression ratio {config['compression_ratio']}, as in {CONFIG}, got "
            f"{row.compression_ratio}"
        )
    return row


def _foreign_row(
    line: Mapping[str, str], place: int, config: Mapping[str, Any], score: Score | None, path: Path
) -> Row:
    if lacking := {"answer", "predicted_answer"} - line.keys():
        raise InvalidArgumentError(f"{path / PREDICTIONS}: expected the columns {sorted(lacking)}, got {sorted(line)}")
    subset = line.get("task") or config["dataset"]
    unknown: dict[str, Any] = dict.fromkeys(_UNKNOWN)
    scorer = scorer_of(config["dataset"], score, path)
    try:
        references = parse_answers(line["answer"])
        row = Row(
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
            score=scorer(line["predicted_answer"], references, subset),
            query_aware=config.get("query_aware", config.get("compress_questions", False)),  # the older name
            question=line.get("question", ""),
            tags={"subset": subset},
            provenance={"source": "kvpress", "press": str(config.get("press_init_command", config["press_name"]))},
            **unknown,
        )
        row.check()
    except (ValueError, SyntaxError) as error:  # SyntaxError: of a reference in quotes
        raise InvalidArgumentError(f"{path}: expected results of kvpress, got a line that is not ({error})") from error
    return row


def _value(name: str, text: str) -> Any:
    if name == "references":
        return parse_answers(text)
    if name == "tags":
        return parse_json(text)
    if name in _FLOATS | _INTS:
        return None if not text else float(text) if name in _FLOATS else int(text)
    return text
