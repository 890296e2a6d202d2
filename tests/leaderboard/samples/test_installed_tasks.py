"""Tasks on texts of Python and of installed packages: pinned, answerable from their contexts, clear without them."""

import gzip
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvzip_press.errors import DataNotFoundError, InvalidArgumentError, MissingDependencyError
from kvzip_press.leaderboard.metrics import normalise
from kvzip_press.leaderboard.running.grid import load_grid
from kvzip_press.leaderboard.samples import installed
from kvzip_press.leaderboard.samples.documents import Document, DocumentTask
from kvzip_press.leaderboard.samples.functions import functions_in, one_a_name
from kvzip_press.leaderboard.samples.installed import InstalledFile, standard_library
from kvzip_press.leaderboard.samples.task import Task
from kvzip_press.leaderboard.tasks import FROM_PACKAGES, get_task
from kvzip_press.leaderboard.tasks.bank_manual import task as bank_manual
from kvzip_press.leaderboard.tasks.gsm8k import task as gsm8k
from kvzip_press.leaderboard.tasks.humaneval_functions import task as humaneval
from kvzip_press.leaderboard.tasks.python_reference.task import sections_of
from kvzip_press.leaderboard.tasks.stdlib_functions import task as stdlib

WORDS = (
    "amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "ledge", "marsh",
    "night", "ocean", "pearl", "ridge", "stone",
)  # fmt: skip


def manual() -> bytes:
    """Twelve documents of the manual's form, with sentences that no two share."""
    rows = []
    for number in range(12):
        names = [WORDS[(number + step) % 18] + "ly" for step in range(18)]
        prose = f"Whoever asks for {' '.join(names)} gets it. - not prose"
        listed = (
            f"## Steps\n\n1. First the desk looks at {' '.join(reversed(names))} and notes it.\n2. **Then** no more."
        )
        rows.append({"id": str(number), "title": f"Rule {WORDS[number]}", "content": f"{prose}\n\n{listed}"})
    return gzip.compress(json.dumps([*rows, {**rows[0], "id": "again"}]).encode(), mtime=0)


def problems() -> bytes:
    rows = [{"prompt": f"Ann has {n} pears. How many is that?", "expected": str(n)} for n in range(5)]
    return "\n".join(map(json.dumps, rows)).encode()


def prompts() -> bytes:
    rows = []
    for n, word in enumerate(WORDS):
        said = f"Adds the number {n} to what it is given, as {WORDS[n - 1]} does."
        prompt = f'def with_{word}(x):\n    """{said}\n    >>> with_{word}(1)\n    """\n'
        rows.append({"prompt": prompt, "entry_point": f"with_{word}", "canonical_solution": f"    return x + {n}\n"})
    return gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0)


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages with small files in the places of the real ones."""
    for module, content in ((bank_manual, manual()), (gsm8k, problems()), (humaneval, prompts())):
        file: InstalledFile = module.FILE
        path = tmp_path / file.path
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        info = tmp_path / f"{file.distribution.replace('-', '_')}-{file.version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {file.distribution}\nVersion: {file.version}\n")
        monkeypatch.setattr(module, "FILE", replace(file, sha256=hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(stdlib, "MODULES", stdlib.MODULES[::3])  # a second of parsing
    return tmp_path


@pytest.mark.parametrize("name", sorted(FROM_PACKAGES))
def test_samples_follow_from_the_seed_and_have_their_answers_inside(name, packages) -> None:
    task = get_task(name, **({} if name == "gsm8k_100_context" else {"n_questions": 3}))
    assert isinstance(task, Task) and task.name == name
    assert "sha256" in task.data_revision
    made, more = (list(task.samples(seed=1, n=n, length_tokens=700)) for n in (2, 3))
    assert made == more[:2]
    assert made != list(task.samples(seed=2, n=2, length_tokens=700))
    for sample in made:
        assert len({question.question_id for question in sample.questions}) == len(sample.questions)
        assert round(len(sample.context) / 4.5) <= 720
        for question in sample.questions:
            (reference,) = question.references
            assert normalise(reference) in normalise(sample.context)
            assert (
                task.score(reference if name != "gsm8k_100_context" else f"The answer is {reference}.", question) == 1.0
            )
            assert task.score("nothing", question) == 0.0


def test_no_text_of_a_package_is_ours(repo_root) -> None:
    """Tasks read what is installed; their folders hold code and a README that names source and licence."""
    for target in FROM_PACKAGES.values():
        folder = repo_root / "leaderboard" / "tasks" / target.split(".")[-2]
        readme = (folder / "README.md").read_text(encoding="utf-8")
        assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".py", ".md"}
        assert "| Licence |" in readme and "| Source |" in readme and "| Version |" in readme


@pytest.mark.parametrize("module", [bank_manual, gsm8k, humaneval])
def test_without_its_package_a_task_says_how_to_get_it(module, packages, monkeypatch) -> None:
    file: InstalledFile = module.FILE
    path = packages / file.path
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataNotFoundError, match=r"as .* was published .* install the package anew"):
        file.read()
    path.unlink()
    with pytest.raises(DataNotFoundError, match=f"of {file.distribution}"):
        file.read()
    other = replace(file, version="0.0.1")
    with pytest.raises(
        MissingDependencyError, match=rf"{file.distribution} 0\.0\.1, .*, got {file.version}: pip install"
    ):
        other.read()
    absent = replace(file, distribution="no-such-package")
    with pytest.raises(MissingDependencyError, match="got none: pip install"):
        absent.read()


def test_pythons_own_texts_are_read_where_they_are(monkeypatch, tmp_path) -> None:
    assert "def dedent" in standard_library("textwrap.py")
    monkeypatch.setattr(installed.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataNotFoundError, match=r"source of Python's own textwrap\.py"):
        standard_library("textwrap.py")


def test_sections_are_told_by_their_headings() -> None:
    long = "Some words of a section. " * 20
    text = f"Before it\n\nThe title\n*********\n\n{long}\n\nShort\n-----\n\nNo.\n\nThe next\n========\n\n{long}"
    assert [one.title for one in sections_of(text)] == ["The title", "The next"]
    assert sections_of(text).__next__().text == long.strip("\n")


def test_only_whole_sentences_of_prose_are_asked_about() -> None:
    said = "Whoever reads this sentence to its end has read at least sixteen words of plain English prose."
    listed = "The second rule says that nobody who works at this desk may ever sit on the other side of it."
    text = f"{said} Too short a one.\n\n   {said}\n\n- {listed}\n- **Bold** {listed}\n\n| a | table |"
    assert Document("x", text).sentences == [said, listed]


def test_functions_lose_their_docstrings_and_do_not_name_themselves() -> None:
    source = '''def twice(x):
    """Returns what it is given two times over.

    More.
    """
    y = x  # kept
    return y + y


def thrice(x):
    """Gives thrice the value of what it gets there."""
    return 3 * x


def once(x):
    return x
'''
    (found,) = one_a_name(functions_in(source))
    assert (found.name, found.description) == ("twice", "Returns what it is given two times over.")
    assert found.source == "def twice(x):\n    y = x  # kept\n    return y + y"
    assert one_a_name([found, found]) == ()


@pytest.mark.parametrize("name", ["bank_manual", "humaneval_functions"])
def test_a_context_too_short_to_ask_about_is_refused(name, packages) -> None:
    with pytest.raises(InvalidArgumentError, match="give more, or ask fewer"):
        list(get_task(name).samples(seed=1, n=1, length_tokens=60))


def test_what_is_asked_can_be_chosen(packages) -> None:
    for asked, kinds in (("titles", {"title"}), ("sentences", {"sentence"}), ("both", {"title", "sentence"})):
        task = get_task("bank_manual", asked=asked, n_questions=3, multi_turn=True)
        assert isinstance(task, DocumentTask)
        (sample,) = task.samples(seed=1, n=1, length_tokens=700)
        assert sample.multi_turn and {question.tags["kind"] for question in sample.questions} == kinds
    with pytest.raises(InvalidArgumentError, match="both, sentences, titles"):
        get_task("bank_manual", asked="words")


def test_the_suite_is_a_grid() -> None:
    tasks = {type(spec.task) for spec in load_grid("real-v1").run.tasks}
    assert len(tasks) == len(FROM_PACKAGES)
