"""The page's data are aggregated and true to the rows, and nothing in them can be read as HTML."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

from kvzip_press.errors import InvalidArgumentError
from kvzip_press.leaderboard.analysis.maps import columns, head_maps, needle_maps
from kvzip_press.leaderboard.analysis.summary import summarise, summarise_tasks
from kvzip_press.leaderboard.pictures.everything import _folder_of as folder_of_table
from kvzip_press.leaderboard.report import write_report
from kvzip_press.leaderboard.report.data import page_data, rounded
from kvzip_press.leaderboard.report.examples import examples
from kvzip_press.leaderboard.report.page import render, script_json
from kvzip_press.leaderboard.rows.head_budgets import HeadBudgets
from kvzip_press.leaderboard.rows.results import Row

MakeRow = Callable[..., Row]
MakeTable = Callable[..., list[Row]]
MakeHeads = Callable[..., list[HeadBudgets]]
HOSTILE = "</script><script>boom()</script><img src=x onerror=boom()>&lt;\u2028{{data}}"


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_data(self, data: str) -> None:
        if self.names[-1:] == ["script"] and self.cdata_elem == "script":
            self.scripts.append(data)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "a & b", "\u2028\u2029", 'quo"te\\', "é"])
def test_json_in_a_script_holds_any_text_and_cannot_end_it(text: str) -> None:
    written = script_json({"text": text})
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == {"text": text}


def test_hostile_texts_come_through_as_they_are_and_add_no_element(make_row: MakeRow, tmp_path: Path) -> None:
    hostile = [
        make_row(press=HOSTILE, task=HOSTILE, model=HOSTILE, question_id=HOSTILE, prediction=HOSTILE,
                 references=(HOSTILE,), provenance={HOSTILE: HOSTILE})
    ]  # fmt: skip
    write_report(hostile, [], tmp_path / "hostile.html", title=HOSTILE, command=HOSTILE)
    write_report([make_row()], [], tmp_path / "tame.html")
    pages = [(tmp_path / name).read_text(encoding="utf-8") for name in ("hostile.html", "tame.html")]
    assert Elements(pages[0]).names == Elements(pages[1]).names
    (table,) = data_of(pages[0])["tables"]
    assert table["model"] == table["tasks"][0] == table["presses"][0] == HOSTILE
    assert table["examples"][0]["answers"][0][3] == HOSTILE
    assert data_of(pages[0])["command"] == HOSTILE


def test_the_page_names_nothing_outside_itself(make_table: MakeTable, tmp_path: Path) -> None:
    write_report(make_table(2), [], tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\"'\s]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|\bfetch\(|XMLHttpRequest|innerHTML|\beval\(", page)
    assert "{{" not in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_made_leaves_the_one_before(make_row: MakeRow, tmp_path: Path) -> None:
    write_report([make_row()], [], tmp_path / "page.html")
    before = (tmp_path / "page.html").read_bytes()
    with pytest.raises(ValueError, match="two of"):
        write_report([make_row(), make_row()], [], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == before


def test_the_cells_are_those_of_the_table_with_their_comparisons(make_table: MakeTable) -> None:
    rows = make_table(12)
    (table,) = page_data(rows, [])["tables"]
    expected = [rounded(cell.accuracy) for cell in [*summarise(rows), *summarise_tasks(rows)]]
    assert [cell["accuracy"] for cell in table["cells"]] == expected
    assert (table["full"], table["kvzip"], table["tasks"]) == ("full cache", "KVzip", ["niah", "profile_qa"])
    assert (table["n_contexts"], table["n_questions"]) == (24, 48)
    found = {(cell["press"], cell["compression_ratio"], cell["task"]): cell for cell in table["cells"]}
    worst, full = found["random", 0.9375, None], found["full cache", 0.0, None]
    assert worst["marks"] == "†‡"
    assert worst["against_full"]["difference"] == pytest.approx(worst["accuracy"] - full["accuracy"], abs=1e-4)
    assert (full["relative"], full["against_full"]) == (1.0, None)
    assert found["random", 0.9375, "niah"]["against_full"]["p_value"] < 0.05
    assert full["pays_from"] is None and worst["pays_from"] == found["random", 0.9375, "niah"]["pays_from"] == 13
    assert table["areas"]["areas"]["KVzip"] > table["areas"]["areas"]["random"]


def test_runs_models_and_query_aware_rows_are_tables_of_their_own(make_table: MakeTable, make_heads: MakeHeads) -> None:
    rows = make_table(2) + make_table(2, query_aware=True) + make_table(2, run_id="other", model="bigger")
    tables = page_data(rows, make_heads("other"))["tables"]
    assert [(table["model"], table["run_id"], table["query_aware"]) for table in tables] == [
        ("tiny", "0123456789ab", False),
        ("tiny", "0123456789ab", True),
        ("bigger", "other", False),
    ]
    assert [len(table["heads"]) for table in tables] == [0, 0, 4]


def test_rows_that_follow_the_full_cache_are_a_table_of_their_own_in_the_same_run(make_table: MakeTable) -> None:
    """On the page, in the folders of pictures and in the summary of a run."""
    rows = make_table(2, tasks=("replies",))
    followed = [replace(row, tags={"kl_nats": 0.5}, answer_seconds=None) for row in rows]
    tables = page_data([*make_table(2), *followed], [])["tables"]
    assert [(table["run_id"], table["follows"], table["tasks"]) for table in tables] == [
        ("0123456789ab", False, ["niah", "profile_qa"]),
        ("0123456789ab", True, ["replies"]),
    ]
    assert {cell["pays_from"] for cell in tables[1]["cells"]} == {None}
    assert folder_of_table(followed) == f"{folder_of_table(make_table(2))}-agreement"


def test_a_head_map_is_the_mean_over_contexts(make_heads: MakeHeads) -> None:
    first = head_maps(make_heads())[0]
    assert (first.press, first.compression_ratio, first.n_contexts, first.layers) == ("KVzip", 0.5, 2, (1, 2, 3))
    assert first.kept == [pytest.approx([0.5, 0.2]), pytest.approx([0.5, 0.3]), pytest.approx([0.5, 0.4])]
    assert head_maps([]) == []


def test_a_needle_map_places_scores_by_depth_and_length(make_row: MakeRow) -> None:
    places = [(0.0, 500, 1.0), (0.05, 520, 0.0), (0.99, 1000, 1.0), (1.0, 1010, 0.5)]
    rows = [
        make_row(question_id=str(i), tags={"depth": depth}, n_context_tokens=length, score=score)
        for i, (depth, length, score) in enumerate(places)
    ]
    rows += [make_row(question_id="a", n_context_tokens=70), make_row(question_id="b", tags={"depth": "late"})]
    (found,) = needle_maps(rows)
    assert found.lengths == [510, 1005]
    assert (found.scores[0], found.scores[9]) == ([0.5, None], [None, 0.75])
    assert (found.counts[0], found.counts[9]) == ([2, 0], [0, 2])
    assert all(score is None for line in found.scores[1:9] for score in line)


def test_all_maps_of_a_task_have_the_same_columns(make_row: MakeRow) -> None:
    lengths = {"KVzip": (500, 1000), "random": (1000,)}
    rows = [
        make_row(press=press, tags={"depth": 0.5}, n_context_tokens=length, sample_id=str(length))
        for press in lengths
        for length in lengths[press]
    ]
    assert [found.lengths for found in needle_maps(rows)] == [[500, 1000], [500, 1000]]
    assert columns([1000, 505, 500, 1100, 625, 626]) == [500, 626, 1000]


def test_examples_are_the_questions_that_tell_presses_apart(make_row: MakeRow) -> None:
    scores = {"same": (1.0, 1.0), "apart": (1.0, 0.0), "near": (1.0, 0.5)}
    rows = [
        make_row(question_id=name, press=press, score=score, prediction="x" * 1000)
        for name, pair in scores.items()
        for press, score in zip(("a", "b"), pair, strict=True)
    ]
    found = examples(rows, 2)
    assert [example["question_id"] for example in found] == ["apart", "near"]
    assert [len(answer[3]) for answer in found[0]["answers"]] == [300, 300]
    assert examples([]) == []


def test_ten_thousand_rows_give_a_page_of_less_than_a_megabyte(
    make_table: MakeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kvzip_press.leaderboard.report.data.judge", lambda rows: _NoJudgement()
    )  # its time is not asked
    rows = make_table(125, n_questions=4, prediction="word " * 200)
    assert len(rows) == 10_000
    assert len(render(page_data(rows, []), title="", command="").encode()) < 1_000_000


class _NoJudgement:
    full = kvzip = None
    against_full: dict[tuple[str, float], object] = {}  # noqa: RUF012  # stays empty
    against_kvzip: dict[tuple[str, float], object] = {}  # noqa: RUF012  # stays empty

    def marks(self, press: str, ratio: float) -> str:
        return ""


def test_provenance_names_every_value(make_row: MakeRow) -> None:
    rows = [make_row(sample_id=str(i), provenance={"torch": "2", "device": f"cuda:{i}"}) for i in range(2)]
    assert page_data(rows, [])["tables"][0]["provenance"] == {"torch": "2", "device": "cuda:0; cuda:1", "seed": "0"}


def test_numbers_keep_five_digits() -> None:
    assert rounded({"a": [0.123456789, (1234567.0, None)], "b": 3}) == {"a": [0.12346, [1234600.0, None]], "b": 3}


def test_half_a_surrogate_pair_does_not_keep_a_page_from_being_written(make_row: MakeRow, tmp_path: Path) -> None:
    broken = "a\ud800b\udfff"
    row = make_row(press=broken, task=broken, model=broken, prediction=broken, references=(broken,),
                   provenance={broken: broken})  # fmt: skip
    write_report([row], [], tmp_path / "page.html", title=broken, command=broken)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert data_of(page)["tables"][0]["examples"][0]["answers"][0][3] == broken
    assert "<title>a?b?</title>" in page


HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("score", "1.0", "got '1.0'"),
        ("score", HUGE, "got 1000"),
        ("score", float("nan"), "got nan"),
        ("score", True, "got True"),
        ("compression_ratio", float("inf"), "got inf"),
        ("compression_ratio", None, "got None"),
        ("resident_bytes", HUGE, "got an integer of 1329 bits"),
        ("resident_bytes", "7", "got '7'"),
        ("answer_seconds", 1e308, "got 1e.308"),
        ("answer_seconds", float("inf"), "got inf"),
        ("n_context_tokens", HUGE, "got an integer of 1329 bits"),
        ("n_answer_tokens", [1], r"got \[1\]"),
        ("kept_fraction", {}, "got {}"),
        ("press", 3, "got 3"),
        ("run_id", ["a"], r"got \['a'\]"),
        ("prediction", None, "got None"),
        ("references", (7,), r"got \(7,\)"),
        ("seed", "0", "got '0'"),
        ("tags", [1], r"got \[1\]"),
        ("provenance", {"torch": 2}, "got {'torch': 2}"),
    ],
)
def test_a_value_that_no_table_can_be_made_of_is_named(make_row: MakeRow, name: str, value: Any, shown: str) -> None:
    """Where the row is made, or where a table is made of it."""
    for make in (summarise, lambda rows: page_data(rows, [])):
        with pytest.raises(InvalidArgumentError, match=rf"expected .*{name} .*{shown}"):
            make([make_row(**{name: value})])


def test_what_heads_kept_is_in_fractions_of_the_layers_named(make_heads: MakeHeads) -> None:
    one, other = make_heads()[:2]
    for kept in (((0.5,), (float("nan"),), (0.1,)), ((0.5,), ("x",), (0.1,)), ((2.0,), (0.1,), (0.1,))):
        with pytest.raises(InvalidArgumentError, match=r"expected head budgets .*kept"):
            head_maps([replace(one, kept=kept)])
    for kept in (one.kept[:2], (*one.kept, (0.5,))):
        with pytest.raises(InvalidArgumentError, match="as many layers as layer_idx has, 3"):
            head_maps([one, replace(one, sample_id="9", kept=kept)])
    assert len(head_maps([one, other])) == 2


def test_a_mean_that_overflows_is_not_known() -> None:
    assert rounded({"a": float("inf"), "b": [float("nan")]}) == {"a": None, "b": [None]}
