"""A line that was changed is refused, as are values of another type or range; lines of older versions are read."""

import json
import logging
import math
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.profile.rows import ProfileRow
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets, read_heads
from kvzip_press.leaderboard.rows.line_file import LineWriter, read_lines
from kvzip_press.leaderboard.rows.results import Row, RowWriter, read_rows
from kvzip_press.leaderboard.rows.sealed_line import SealedLine, sealed

MakeRow = Callable[..., Row]
PROFILES = Path(__file__).parents[3] / "leaderboard" / "profile" / "results"


@pytest.fixture
def lines(make_row: MakeRow, make_heads: Callable[..., list[HeadBudgets]]) -> list[SealedLine]:
    profile = ProfileRow("tiny", "kvzip", "ragged", 0.5, 128, 4, decode_ms_eager=1.5, notes={"graph": "none"})
    heads = HeadBudgets.from_json(make_heads()[0].to_json())  # with the decimals that are stored
    return [make_row(tags={"depth": 0.25}, prediction="“é” 12"), heads, profile]


def test_any_byte_that_changes_is_seen_or_changes_nothing(lines: list[SealedLine]) -> None:
    rng = random.Random(0)
    for line in lines:
        text = line.to_line().encode()
        assert type(line).from_line(text) == (line, True)
        for place in range(len(text)):
            changed = bytearray(text)
            changed[place] = rng.choice([value for value in range(256) if value != text[place]])
            with suppress(InvalidArgumentError):
                assert type(line).from_line(bytes(changed)) == (line, True)


def test_a_seal_is_of_values_whatever_their_layout(lines: list[SealedLine]) -> None:
    for line in lines:
        values = json.loads(line.to_line())
        other = json.dumps(dict(reversed(values.items())), indent=3)
        assert type(line).from_line(other) == (line, True)
        with pytest.raises(InvalidArgumentError, match="checksum"):
            type(line).from_line(json.dumps({**values, "compression_ratio": 0.25}))


def test_half_of_a_surrogate_pair_goes_to_the_disk_and_back(tmp_path: Path, make_row: MakeRow) -> None:
    row = make_row(prediction="\ud800 alone")
    with RowWriter(tmp_path / "rows.jsonl") as writer:
        writer.write(row)
    assert list(read_rows(tmp_path / "rows.jsonl")) == [row]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("score", value) for value in (5, -0.1, math.nan, math.inf, True, "1", None, 10**400)),
        ("compression_ratio", 1.5),
        ("kept_fraction", math.nan),
        ("prefill_seconds", -1.0),
        ("answer_seconds", 1e300),
        ("n_context_tokens", 2.5),
        ("n_answer_tokens", 10**30),
        ("resident_bytes", -1),
        ("query_aware", 1),
        ("seed", "0"),
        ("prediction", None),
        ("references", "407"),
        ("references", (407,)),
        ("tags", {"depth": math.nan}),
        ("tags", {"depth": [1]}),
        ("tags", ["depth"]),
        ("provenance", {"torch": 2}),
        ("task_version", "1"),
    ],
)
def test_a_row_with_a_value_of_another_type_or_out_of_range_is_neither_read_nor_written(
    make_row: MakeRow, tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(InvalidArgumentError, match=f"expected a row .*{name}"):
        make_row(**{name: value}).to_line()
    values = {**json.loads(make_row().to_json()), name: value}
    for text in (json.dumps(values), json.dumps(sealed(values))):
        (tmp_path / "rows.jsonl").write_text(f"{make_row().to_line()}\n{text}\n", encoding="utf-8")
        with pytest.raises(InvalidArgumentError, match=r"rows\.jsonl:2: expected a row"):
            list(read_rows(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "values",
    [
        {"kept": [[0.5], [0.5]]},
        {"kept": [[0.5, 1.5]]},
        {"kept": [[0.5, None]]},
        {"kept": [0.5]},
        {"layer_idx": [1.5]},
        {"layer_idx": 1},
        {"compression_ratio": -1},
        {"task": 3},
    ],
)
def test_damaged_head_budgets_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    whole = HeadBudgets("run", "niah", "0000", "KVzip", 0.5, (1,), ((0.5, 0.25),))
    text = json.dumps({**json.loads(whole.to_json()), **values})
    (tmp_path / "heads.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"heads\.jsonl:1: expected head budgets"):
        list(read_heads(tmp_path / "heads.jsonl"))


@pytest.mark.parametrize("values", [{"engine": "theirs"}, {"decode_ms_eager": "fast"}, {"notes": {"graph": 1}}])
def test_damaged_rows_of_a_profile_are_refused(values: dict[str, Any]) -> None:
    known = {"model": "m", "press": "p", "engine": "ragged", "compression_ratio": 0.5, "context_length": 1}
    with pytest.raises(InvalidArgumentError, match="expected a row of a profile"):
        ProfileRow.from_json(json.dumps({**known, "decode_tokens": 1, **values}))


# Lines of older versions ---------------------------------------------------------------------------------------------


def older(row: Row) -> str:
    """A row as it was written before there were seals and versions of tasks."""
    values = json.loads(row.to_json())
    del values["task_version"]
    return json.dumps(values, ensure_ascii=False)


def test_lines_without_a_seal_are_accepted_with_one_note_a_file(
    tmp_path: Path, make_row: MakeRow, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [make_row(question_id=str(number)) for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{older(row)}\n" for row in rows[:3]), encoding="utf-8")
    with RowWriter(tmp_path / "rows.jsonl") as writer:
        for row in rows[3:]:
            writer.write(row)
    with caplog.at_level(logging.WARNING):
        assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no checksum" in caplog.text


def test_a_line_without_a_seal_is_refused_behind_lines_with_one(tmp_path: Path, make_row: MakeRow) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{make_row().to_line()}\n{older(make_row())}\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"rows\.jsonl:2: expected a row with a 'seal'"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_an_unknown_field_is_of_a_newer_version_beside_a_seal_and_damage_without_one(make_row: MakeRow) -> None:
    values = {**json.loads(make_row().to_json()), "added_later": [1]}
    assert Row.from_line(json.dumps(sealed(values))) == (make_row(), True)
    with pytest.raises(InvalidArgumentError, match="'added_later' is not known"):
        Row.from_line(json.dumps(values))


def test_a_name_that_is_there_twice_is_refused(make_row: MakeRow) -> None:
    text = make_row().to_line()
    with pytest.raises(InvalidArgumentError, match="'score' twice"):
        Row.from_line(text.replace('"score": 1.0', '"score": 0.0, "score": 1.0'))


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_profiles_that_were_published_are_read_with_one_note(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = list(read_lines(path, ProfileRow))
    assert len(rows) == path.read_text(encoding="utf-8").count("\n")
    assert len(caplog.records) == 1


def test_rows_of_a_profile_are_sealed(tmp_path: Path, lines: list[SealedLine]) -> None:
    profile = lines[2]
    assert isinstance(profile, ProfileRow)
    with LineWriter(tmp_path / "profile.jsonl", ProfileRow) as writer:
        writer.write(profile)
    changed = (tmp_path / "profile.jsonl").read_text().replace('"decode_ms_eager": 1.5', '"decode_ms_eager": 0.5')
    (tmp_path / "profile.jsonl").write_text(changed)
    with pytest.raises(InvalidArgumentError, match="checksum"):
        list(read_lines(tmp_path / "profile.jsonl", ProfileRow))
