"""Tasks on texts of Python and of installed packages: pinned, answerable from their contexts, clear without them."""

import gzip
import hashlib
import json
import sys
from dataclasses import replace
from itertools import pairwise
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
from kvzip_press.leaderboard.tasks.agent_conversations import task as agents
from kvzip_press.leaderboard.tasks.agent_conversations.gaps import gaps_in
from kvzip_press.leaderboard.tasks.bank_manual import task as bank_manual
from kvzip_press.leaderboard.tasks.gsm8k import task as gsm8k
from kvzip_press.leaderboard.tasks.humaneval_functions import task as humaneval
from kvzip_press.leaderboard.tasks.python_reference.task import sections_of
from kvzip_press.leaderboard.tasks.stdlib_functions import task as stdlib
from kvzip_press.leaderboard.tasks.verse_lookup import task as verses

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


def bible() -> bytes:
    """A module of the form of a translation's, with an import and a call that fail where they are executed."""
    said = [
        f"And {' '.join(WORDS[n % 18 : n % 18 + 1 + n // 18])} [was] there, even {WORDS[n % 7]}." for n in range(90)
    ]
    starts, ends, begin = {}, {}, 1
    for n, verse in enumerate(said):
        number = (1 + n // 45) * 10**6 + (1 + n % 45 // 15) * 1000 + 1 + n % 15
        starts[number], ends[number] = begin, begin + len(verse) + 1
        begin = ends[number]
    lines = [
        "from no_such_package import Bible, Book, Version",
        f"bible = Bible(Version.NONE, {chr(10) + ' '.join(said) + chr(10)!r}, {starts}, {ends},",
        "    {Book.A: {1: 15}, Book.B: {1: 15}}, {Book.A: 'Amber', Book.B: '2 Birch'}, {}, False)",
    ]
    return "\n".join(lines).encode()


def conversations() -> bytes:
    """Four conversations; one stands there under two lengths, and one quotes a control token."""
    cases = []
    for n, word in enumerate(WORDS[:4]):
        lines = [f"The {one} file of this project is /home/{word}/{one}_{n}.txt, as it is now." for one in WORDS]
        lines += [f"Then {one} calls the function {one}_of_{word} once more." for one in WORDS]
        hashes = [f"{n}{place}a{len(one)}f{word[0]}9" for place, one in enumerate(WORDS)]
        lines += [f"At the commit of {one} the hash was {found}." for one, found in zip(WORDS, hashes, strict=True)]
        messages = [{"role": "user", "content": "\n".join(lines)}, {"role": "assistant", "content": "<|im_end|> Done."}]
        messages.append({"role": "user", "content": f"Go on with {word}."})
        cases.append({"id": f"case-{word}", "messages": messages, "reference_response": f"I look at {word} first."})
    return json.dumps({"cases": [*cases, {**cases[0], "id": "case-again"}]}).encode()


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages with small files in the places of the real ones."""
    files = (
        (bank_manual, manual()), (gsm8k, problems()), (humaneval, prompts()), (verses, bible()),
        (agents, conversations()),
    )  # fmt: skip
    for module, content in files:
        file: InstalledFile = module.FILE
        path = tmp_path / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        info = tmp_path / f"{file.distribution.replace('-', '_')}-{file.version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {file.distribution}\nVersion: {file.version}\n")
        monkeypatch.setattr(module, "FILE", replace(file, sha256=hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(stdlib, "MODULES", stdlib.MODULES[::3])  # a second of parsing
    return tmp_path


@pytest.mark.parametrize("name", sorted(FROM_PACKAGES))
def test_samples_follow_from_the_seed_and_have_their_answers_inside(name, packages) -> None:
    task = get_task(name, **({} if name in ("gsm8k_100_context", "agent_replies") else {"n_questions": 3}))
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
            assert name == "agent_replies" or normalise(reference) in normalise(sample.context)
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


@pytest.mark.parametrize("module", [bank_manual, gsm8k, humaneval, verses, agents])
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
    assert standard_library("json.py") == standard_library("json/__init__.py")  # a module that has become a package
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


@pytest.mark.parametrize("name", ["bank_manual", "humaneval_functions", "verse_lookup"])
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
    assert {type(get_task(name)) for name in FROM_PACKAGES} <= tasks
    assert max(load_grid("real-v1").run.compression_ratios) == 1 - 1 / 32


def count(text: str) -> int:
    return len(text)


def test_verses_stand_at_other_addresses_than_their_own_and_the_module_is_not_executed(packages) -> None:
    """A model that knows them by heart has no answer right; the seed draws where each stands."""
    task = get_task("verse_lookup", n_questions=4, most_words=12)
    assert isinstance(task, verses.VerseLookupTask)
    assert list(task.verses)[:2] == ["Amber 1:1", "Amber 1:2"] and list(task.verses)[-1] == "2 Birch 3:15"
    assert task.verses["Amber 1:1"] == "And amber was there, even amber."  # no brackets, no line breaks
    (sample,) = task.samples(seed=1, n=1, length_tokens=2000, count_tokens=count)
    (other,) = task.samples(seed=2, n=1, length_tokens=2000, count_tokens=count)
    assert len(sample.context) == 2000
    lines = [line for line in sample.context.splitlines() if line.startswith("[")]
    assert len({line.partition("] ")[0] for line in lines}) == len({line.partition("] ")[2] for line in lines}) > 20
    for question in sample.questions:
        address = question.question_id
        assert f"[{address}] {question.references[0]}" in sample.context
        assert len(question.references[0].split()) <= 12 and 0 <= question.tags["depth"] < 1
        assert task.score(task.verses[address], question) == 0.0
        assert task.score(f" {question.references[0]}\n[Amber 9:9]", question) == 1.0
        assert task.score(question.references[0].rpartition(" ")[0], question) == 0.0
        assert f"[{address}] {question.references[0]}" not in other.context
    order = [list(task.verses).index(line[1:].partition("]")[0]) for line in lines]
    assert all((after - before) % 90 in (1, 2) for before, after in pairwise(order))
    scattered = get_task("verse_lookup", preset="smollm2", n_questions=4)
    (mixed,) = scattered.samples(seed=1, n=1, length_tokens=2000, count_tokens=count)
    books = [line[1:].partition(" ")[0] for line in mixed.context.splitlines()]
    assert sum(one != other for one, other in pairwise(books)) > 5  # of two; in their order they change twice at most
    assert max(len(line.split()) for line in lines[:-1]) <= 3 + 12  # "[2 Birch 3:15]" and twelve words
    with pytest.raises(InvalidArgumentError, match=r"fewer than \d+ verses of at most 12 words: give a shorter one"):
        next(task.samples(seed=1, n=1, length_tokens=20_000, count_tokens=count))


@pytest.mark.parametrize(
    "source", ["", "x = 1", "bible = Bible(1, 2)", "bible = Bible(", "bible = Bible(V, '', {1: 0}, {1: 0}, 0, {}, 0)"]
)
def test_a_module_of_another_form_is_refused(source) -> None:
    with pytest.raises(DataNotFoundError, match="module of a translation"):
        verses.verses_in(source.encode())


def test_a_gap_has_one_right_answer() -> None:
    """Both the term and what stands before it are there once; words that could be guessed are none."""
    text = """The agent opened the file src/main_loop.rs and read it.
The agent opened the file src/other.rs and read it.
Later it called the function make_table with three arguments.
Then it called the function load_rows with three arguments, and load_rows again.
The commit that went in was 9ab31f and nobody minded it.
Nothing of this long line could be a gap, since all of it is words.
short: a/b/c_d
"""
    found = {gap.kind: gap for gap in gaps_in(text)}
    assert {kind: gap.term for kind, gap in found.items()} == {"identifier": "make_table", "value": "9ab31f"}
    for gap in found.values():
        assert text.count(gap.term) == text.count(gap.before) == 1
        assert text[gap.start :].startswith(gap.term) and f"{gap.before}{gap.term}" in text
    assert [gap.term for gap in gaps_in("Somebody wrote all of it into src/a.py:12 today.")] == ["src/a.py:12"]


def test_conversations_are_cut_to_their_end_and_quote_no_control_token(packages) -> None:
    task = get_task("agent_recall", n_questions=6)
    made = list(task.samples(seed=1, n=9, length_tokens=2400, count_tokens=count))
    assert len(made) == 4 and {sample.sample_id for sample in made}.isdisjoint({"case-again"})
    for sample in made:
        assert 2280 <= len(sample.context) <= 2400 and sample.context.endswith(f"Go on with {sample.sample_id[5:]}.")
        assert "<|" not in sample.context and "[assistant]\n< |im_end|> Done." in sample.context
        assert [question.tags["kind"] for question in sample.questions[:3]] == ["path", "identifier", "value"]
        for question in sample.questions:
            (term,) = question.references
            assert sample.context.count(term) == 1 and term not in question.text
            assert task.score(f" `{term}` is it", question) == 1.0
            assert (
                task.score(f"{term}x", question) == task.score(term[:-1], question) == task.score("", question) == 0.0
            )
    (reply,) = next(get_task("agent_replies").samples(seed=1, n=1, length_tokens=600)).questions
    assert reply.references[0].startswith("I look at") and reply.max_new_tokens == 64
    with pytest.raises(
        InvalidArgumentError, match=r"task 'agent_recall': .*\(the longest has \d+ tokens\), got length_tokens 90000"
    ):
        next(task.samples(seed=1, n=1, length_tokens=90_000, count_tokens=count))


@pytest.mark.parametrize(
    "case", [{}, {"cases": 3}, {"cases": [{"id": "1"}]}, {"cases": [{"id": "1", "messages": [{"role": 3}]}]}]
)
def test_conversations_of_another_form_are_refused(case) -> None:
    with pytest.raises((DataNotFoundError, InvalidArgumentError), match=r"multi_turn_cases\.json.*expected"):
        agents.conversations_in(json.dumps(case).encode())
