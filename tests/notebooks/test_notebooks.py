"""The notebooks run, hold no outputs, use the public interface only, and their pages in the documents are theirs."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

NAMES = ("01_quickstart", "02_compare_presses", "03_memory_and_speed", "04_write_your_own_press", "05_long_answers")
MAX_PAGE_BYTES = 1_000_000
#: What a notebook does often or at length, to measure, and the test less: each text stands in it once.
SMALLER = {
    "02_compare_presses": {"n_keys=4), n_contexts=4": "n_keys=2), n_contexts=2", "(0.3, 0.6, 0.9)": "(0.6,)"},
    "03_memory_and_speed": {"n_rounds=8, n_steps=5": "n_rounds=2, n_steps=2", "page(1500)": "page(600)"},
    "04_write_your_own_press": {"n_keys=4), n_contexts=4": "n_keys=2), n_contexts=2"},
    "05_long_answers": {"n_tokens=80": "n_tokens=40"},
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def cells(root: Path, name: str) -> list[Any]:
    return nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4).cells


def code(root: Path, name: str) -> str:
    return "\n".join(cell.source for cell in cells(root, name) if cell.cell_type == "code")


def test_these_are_the_notebooks(repo_root: Path) -> None:
    assert tuple(sorted(path.stem for path in (repo_root / "notebooks").glob("*.ipynb"))) == NAMES


def test_a_notebook_is_valid_and_holds_no_outputs(repo_root: Path, name: str) -> None:
    notebook = nbformat.read(repo_root / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def private_imports(source: str) -> list[str]:
    """What a program uses that is not public: names with an underscore, and what a module's ``__all__`` leaves out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kvzip_press":
            module = importlib.import_module(str(node.module))
            public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in public]
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            found.append(node.attr)
    return found


def test_a_notebook_uses_public_names_only(repo_root: Path, name: str) -> None:
    assert private_imports(code(repo_root, name)) == []


@pytest.mark.parametrize(
    "line",
    ["from kvzip_press import compat", "from kvzip_press.loading.by_name import _aliases", "cache._any_ragged()"],
)
def test_a_private_name_is_seen(line: str) -> None:
    assert len(private_imports(line)) == 1


def test_the_page_of_a_notebook_has_its_code_and_its_pictures(repo_root: Path, name: str) -> None:
    page = repo_root / "docs" / "notebooks" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)\n```$", text, flags=re.DOTALL | re.MULTILINE)
    assert shown == [cell.source for cell in cells(repo_root, name) if cell.cell_type == "code"], "run `make notebooks`"
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in linked if not (page.parent / link).exists()] == []
    pictures = sorted((page.parent / name).glob("*"))  # the folder of a page without any is not in git
    assert [f"{name}/{picture.name}" for picture in pictures] == [link for link in linked if link.endswith(".png")]
    assert sum(path.stat().st_size for path in [page, *pictures]) < MAX_PAGE_BYTES


def load_renderer(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("render_notebooks", root / "docs" / "render_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_a_page_lead_where_those_of_the_notebook_did(repo_root: Path) -> None:
    pytest.importorskip("nbclient")
    text = "[a](../README.md#x), [b](02_compare_presses.ipynb), [c](https://example.org/a)"
    expected = "[a](../../README.md#x), [b](02_compare_presses.md), [c](https://example.org/a)"
    assert load_renderer(repo_root).relinked(text) == expected


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.kvpress
def test_a_notebook_runs(repo_root: Path, name: str, tmp_path: Path) -> None:
    """On fewer contexts and tokens; at its full size, `make notebooks` runs it."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    source = (repo_root / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    for text, smaller in SMALLER.get(name, {}).items():
        assert source.count(text) == 1
        source = source.replace(text, smaller)
    (tmp_path / f"{name}.ipynb").write_text(source, encoding="utf-8")
    notebook = load_renderer(repo_root).execute(tmp_path / f"{name}.ipynb")
    assert any(cell.get("outputs") for cell in notebook.cells)


def test_a_notebook_with_an_error_is_noticed(repo_root: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        load_renderer(repo_root).execute(tmp_path / "broken.ipynb")
