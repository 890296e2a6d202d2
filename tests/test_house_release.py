"""What is said in two places about versions is the same: code, pyproject.toml, constraints, documents, citation."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kvzip_press import compat
from kvzip_press.cli.main import app
from kvzip_press.presses.kvpress_adapter.importing import KVPRESS, TRANSFORMERS
from kvzip_press.version import __version__


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pin(path: Path, package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return version


def bounds(requirements: list[str], package: str) -> tuple[str, str]:
    """The floor and the end of a requirement, each empty if there is none."""
    (clauses,) = [one.removeprefix(package) for one in requirements if re.fullmatch(rf"{package}[<>=][^;]*", one)]
    found = dict(re.findall(r"(>=|<)([\w.]+)", clauses))
    return found.get(">=", ""), found.get("<", "")


def test_the_tested_range_of_transformers_is_that_of_the_constraints(repo_root: Path) -> None:
    """`make test-oldest` and `make test-newest` run on these; a newer pin moves the range that users are told."""
    ends = tuple(pin(repo_root / "constraints" / f"{end}.txt", "transformers") for end in ("oldest", "newest"))
    assert ends == compat.TESTED_TRANSFORMERS


def test_the_floor_is_the_oldest_tested_and_there_is_no_ceiling(project: dict[str, Any]) -> None:
    assert bounds(project["dependencies"], "transformers") == (compat.TESTED_TRANSFORMERS[0], "")


def test_what_the_adapter_accepts_is_what_the_extra_asks_for(project: dict[str, Any]) -> None:
    extra = project["optional-dependencies"]["kvpress"]
    assert (bounds(extra, "kvpress"), bounds(extra, "transformers")) == (KVPRESS, TRANSFORMERS)


@pytest.mark.kvpress
def test_kvpress_itself_accepts_no_newer_transformers_than_the_extra() -> None:
    (own,) = [one for one in importlib.metadata.requires("kvpress") or [] if one.startswith("transformers")]
    assert re.findall(r"<([\d.]+)", own) == [TRANSFORMERS[1]]


def test_documents_name_the_same_ranges(repo_root: Path) -> None:
    """Whatever a page says about transformers, in the forms that pages use."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((repo_root / "docs").glob("**/*.md")))
    minors = {tuple(".".join(end.split(".")[:2]) for end in compat.TESTED_TRANSFORMERS), compat.TESTED_TRANSFORMERS}
    assert set(re.findall(r"transformers ([\d.]*\d) to ([\d.]*\d)", text)) & minors
    assert set(re.findall(r"transformers ([\d.]*\d) to ([\d.]*\d)", text)) <= minors
    assert set(re.findall(r"transformers (?:below|<) ?([\d.]*\d)", text)) == {TRANSFORMERS[1]}


def test_the_command_says_its_version_and_those_that_a_report_needs() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"kvzip-press {__version__} (Python 3.")
    assert f"transformers {compat.TRANSFORMERS_VERSION}" in shown.output and "torch " in shown.output


def test_the_version_is_written_alike(repo_root: Path, project: dict[str, Any]) -> None:
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text(encoding="utf-8"))
    assert {project["version"], citation["version"]} == {__version__}


def test_the_citation_has_what_its_form_requires(repo_root: Path, project: dict[str, Any]) -> None:
    """Citation File Format 1.2.0: four keys, and for each work a type, a title and authors with a name."""
    citation = yaml.safe_load((repo_root / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["type"] == "software"
    assert (citation["title"], citation["license"]) == (project["name"], project["license"])
    for work in [citation, *citation["references"]]:
        assert work["title"] and work["type"] and work["authors"]
        assert all(set(author) in ({"name"}, {"family-names", "given-names"}) for author in work["authors"])
    assert {work["url"] for work in citation["references"]} == set(project["urls"].values())


def test_the_hosted_workflow_runs_what_everybody_runs(repo_root: Path) -> None:
    workflow = yaml.safe_load((repo_root / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == [".ci/run"] and os.access(repo_root / ".ci" / "run", os.X_OK)
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("form", ["bug", "proposal"])
def test_the_forms_of_issues_ask_for_something(repo_root: Path, form: str) -> None:
    body = yaml.safe_load((repo_root / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(body)
    assert any(one["validations"]["required"] for one in body["body"] if "validations" in one)
    assert len({one["id"] for one in body["body"]}) == len(body["body"])
