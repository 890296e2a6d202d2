"""Reads folders of kvpress's leaderboard as rows: ours come back unchanged, kvpress's with the fields it records."""

import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.files import digest_of, to_json
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
    OF_KVPRESS,
    PREDICTIONS,
    QUERY_AWARE,
    column_of,
)
from kvzip_press.leaderboard.kvpress_format.scores import Score, check_means, check_own, scorer_of
from kvzip_press.leaderboard.kvpress_format.staging import is_unfinished
from kvzip_press.leaderboard.rows.results import Row, RowKey, run_id
from kvzip_press.leaderboard.rows.sealed_line import check_fractions, unsealed
from kvzip_press.untrusted import parse_json

logger = logging.getLogger(__name__)

_FLOATS = {"score", "kept_fraction", "prefill_seconds", "score_seconds", "evict_seconds", "answer_seconds"}
_INTS = {"seed", "n_context_tokens", "n_answer_tokens", "resident_bytes", "dense_bytes"}
_OLDER_EXTRA = {"run_id", "press", "provenances"}
_UNKNOWN = (_FLOATS | _INTS | {"task_version"}) - {
    "seed",
    "score",
    "kept_fraction",
}  # fields that kvpress's results do not have
_SETTINGS = ("model", "fraction", "max_context_length", "model_kwargs", "fp8", "seed")  # equal throughout a run
_OF_PRESS = ("key_channel_compression_ratio", "target_size", "compression_interval", "hidden_states_buffer_size")
_IN_ROWS = {"dataset", "model", "compression_ratio", "seed", "press_init_command"}


def import_rows(folder: str | os.PathLike[str], *, score: Score | None = None) -> list[Row]:
    """Reads the rows of one folder of results, or of all such folders inside a folder.

    Rows that `export_rows` wrote come back as they were, if none of their files was changed since. Those of kvpress
    have no sizes, times, token counts or versions of tasks (None), and do not record which questions shared a context:
    each line counts as a context of its own, the same for all presses. Results of one model with the same settings form
    one run; an evaluation that was repeated (kvpress puts it into a sub-folder ``1``) is a run of its own. Their scores
    are computed here, by RULER's metric. All scores are compared with the predictions and with metrics.json.

    The ratio is that of config.yaml, never that of a folder's name, which has two decimals. Where config.yaml has a
    threshold or a ratio of heads instead, the ratio is the mean of what the lines say was removed, and each line's
    kept fraction is known. Settings of a press that its name does not say (``key_channel_compression_ratio``) are in
    its label; all others are kept in the provenance, so that `export_rows` writes them again.

    Args:
        folder: A folder of results, or one that holds such folders at any depth.
        score: The metric for data sets other than RULER and our tasks; compared only for the tasks that metrics.json
            names.

    Raises:
        InvalidArgumentError: There are no results, a file is missing, broken or was changed, the metric is not known,
            or the scores do not agree with the predictions or metrics.json.
    """
    configs = sorted(Path(folder).rglob(CONFIG), key=lambda config: config.parent)  # a folder before those inside
    found = [config for config in configs if not is_unfinished(config.relative_to(folder))]
    if not found:
        raise InvalidArgumentError(f"expected folders with {CONFIG}, {PREDICTIONS} and {METRICS} in {folder}, got none")
    rows: list[Row] = []
    seen: set[tuple[str, RowKey]] = set()
    for config in found:
        rows += _apart(_read(config.parent, score), seen, config.parent)
    return rows


def _apart(rows: Sequence[Row], seen: set[tuple[str, RowKey]], path: Path) -> list[Row]:
    """Gives the rows of an evaluation that was repeated a run of their own; adds the keys of all to ``seen``."""
    found, number = list(rows), 0
    while any((row.run_id, row.key) in seen for row in found):
        if not number:
            if any(OF_KVPRESS not in row.provenance for row in rows):
                raise InvalidArgumentError(f"{path}: expected each of our rows once, got some of another folder again")
            logger.warning("%s repeats the evaluation of another folder: its rows are a run of their own", path)
        number += 1
        found = [replace(row, run_id=run_id({"run": row.run_id, "repeated": number})) for row in rows]
    seen.update((row.run_id, row.key) for row in found)
    return found


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
        rows = _foreign_rows(lines, config, score, path)
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
        said = float(line["compression_ratio"])
        ratio = extra.get("compression_ratio", said)
        row = Row(
            run_id=extra["run_id"],
            task=extra.get("task", config["dataset"]),
            model=config["model"],
            press=extra["press"],
            compression_ratio=ratio,
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
    if "compression_ratio" not in extra and said != config["compression_ratio"]:  # of an older version, without a seal
        raise InvalidArgumentError(
            f"{path / PREDICTIONS}: expected the compression ratio {config['compression_ratio']}, as in {CONFIG}, got "
            f"{said}"
        )
    return row


def _foreign_rows(
    lines: Sequence[Mapping[str, str]], config: Mapping[str, Any], score: Score | None, path: Path
) -> list[Row]:
    """Reads the lines of an evaluation by kvpress; a ratio that was not asked for is the mean of those measured."""
    asked = config["compression_ratio"]
    if asked is not None:
        return [_foreign_row(line, place, config, (asked, None), score, path) for place, line in enumerate(lines)]
    try:
        measured = [float(line["compression_ratio"]) for line in lines]
        check_fractions("a line", **{f"compression_ratio {ratio}": ratio for ratio in measured})
    except (KeyError, ValueError) as error:
        raise InvalidArgumentError(
            f"{path / PREDICTIONS}: expected the column compression_ratio with what each line's cache lost, since "
            f"{CONFIG} has no ratio, got {error!r:.80}"
        ) from error
    mean = round(statistics.fmean(measured), 6) if measured else 0.0
    return [
        _foreign_row(line, place, config, (mean, 1 - ratio), score, path)
        for place, (line, ratio) in enumerate(zip(lines, measured, strict=True))
    ]


def _foreign_row(
    line: Mapping[str, str],
    place: int,
    config: Mapping[str, Any],
    removed: tuple[float, float | None],
    score: Score | None,
    path: Path,
) -> Row:
    if lacking := {"answer", "predicted_answer"} - line.keys():
        raise InvalidArgumentError(f"{path / PREDICTIONS}: expected the columns {sorted(lacking)}, got {sorted(line)}")
    subset = line.get("task") or config["dataset"]
    unknown: dict[str, Any] = dict.fromkeys(_UNKNOWN)
    scorer, depth = scorer_of(config["dataset"], score, path), config.get("needle_depth")
    try:
        references = parse_answers(line["answer"])
        row = Row(
            run_id=run_id({name: config.get(name) for name in _SETTINGS}),
            task=config["dataset"],
            model=config["model"],
            press=_label_of(config),
            compression_ratio=removed[0],
            kept_fraction=removed[1],
            sample_id=f"{config.get('data_dir') or ''}/{'' if depth is None else f'depth {depth}/'}{place:06}",
            question_id=subset,
            seed=config.get("seed") or 0,
            prediction=line["predicted_answer"],
            references=references,
            score=scorer(line["predicted_answer"], references, subset),
            query_aware=_is_query_aware(config),
            question=line.get("question", ""),
            tags={"subset": subset, **({} if depth is None else {"depth": depth / 100})},
            provenance={
                "source": "kvpress",
                "press": str(config.get("press_init_command", config["press_name"])),
                OF_KVPRESS: to_json({name: value for name, value in config.items() if _is_kept(name, value)}),
            },
            **unknown,
        )
        row.check()
    except (ValueError, SyntaxError) as error:  # SyntaxError: of a reference in quotes
        raise InvalidArgumentError(f"{path}: expected results of kvpress, got a line that is not ({error})") from error
    return row


def _label_of(config: Mapping[str, Any]) -> str:
    """Returns the press's name, without what says that it knew the question, and with settings that it does not say."""
    label = config["press_name"].removesuffix(f"_{QUERY_AWARE}") or config["press_name"]
    said = [f"{name} {config[name]}" for name in _OF_PRESS if config.get(name) is not None]
    return ", ".join([label, *said])


def _is_query_aware(config: Mapping[str, Any]) -> Any:
    found = config.get(QUERY_AWARE, config.get("compress_questions", False))  # the older name
    return found if found is not False else config["press_name"].endswith(f"_{QUERY_AWARE}")


def _is_kept(name: str, value: Any) -> bool:
    """Returns whether a setting is kept beside the fields of the row: what is not empty, and in none of these."""
    return name not in _IN_ROWS and value not in (None, "", {}, [])


def _value(name: str, text: str) -> Any:
    if name == "references":
        return parse_answers(text)
    if name == "tags":
        return parse_json(text)
    if name in _FLOATS | _INTS:
        return None if not text else float(text) if name in _FLOATS else int(text)
    return text
