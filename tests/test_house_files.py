"""What no file of the repository may hold.

The rules are functions of a text, and each is held to broken examples, built of pieces so that this file obeys them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_BYTES = 3_000_000

# A path that only one machine has: it begins at the root, in a folder that people and machines own.
OWNED = "home|root|Users|tmp|work|workspace|mnt|opt|scratch|private"
MACHINE_PATH = re.compile(rf"(?<![\w.~$}})-])/(?:{OWNED})/[\w.][\w./-]*")
PIP_OPTION = re.compile("--(?:" + "|".join(["(?:extra-)?index" + "-url", "find" + "-links", "trusted" + "-host"]) + ")")
TORCH_LOAD = re.compile(r"torch\.load" + r"\((?!.*weights_only=True)")


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def forbidden_in_text(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if found := MACHINE_PATH.search(line):
            yield f"{number}: a path of one machine: {found[0]}"
        if found := PIP_OPTION.search(line):
            yield f"{number}: where packages come from is the user's setting, not ours: {found[0]}"


def forbidden_in_python(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load" and not _loads_weights_only(node):
            yield f"{node.lineno}: torch.load without weights_only=True runs code out of the file"
        if isinstance(node, ast.Call) and _imports_kvpress(node):
            yield f"{node.lineno}: importing kvpress plainly wraps attention for all tests: take the fixture kvpress"
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant):
            yield f"{node.lineno}: an assert that cannot fail" if node.test.value else f"{node.lineno}: raise instead"


def _loads_weights_only(call: ast.Call) -> bool:
    values = [word.value for word in call.keywords if word.arg == "weights_only"]
    return any(isinstance(value, ast.Constant) and value.value is True for value in values)


def _imports_kvpress(call: ast.Call) -> bool:
    return ast.unparse(call.func).endswith("importorskip") and ast.unparse(call.args[0]) == repr("kvpress")


def forbidden_elsewhere(text: str) -> Iterator[str]:
    """The same in notebooks and in the code of documents, line by line."""
    for number, line in enumerate(text.splitlines(), start=1):
        if TORCH_LOAD.search(line):
            yield f"{number}: torch.load without weights_only=True runs code out of the file"


def forbidden(name: Path, text: str) -> list[str]:
    rest = forbidden_in_python(text) if name.suffix == ".py" else forbidden_elsewhere(text)
    return [f"{name}:{found}" for found in [*forbidden_in_text(text), *rest]]


def test_no_file_holds_what_is_forbidden(repo_root: Path, repo_files: list[Path]) -> None:
    texts = {name: text_of(repo_root / name) for name in repo_files}
    assert len(texts) > 10, "no files found: the walk is broken"
    assert [line for name, text in texts.items() if text is not None for line in forbidden(name, text)] == []


def test_tests_of_vllm_lie_where_make_looks_for_them(repo_root: Path, repo_files: list[Path]) -> None:
    """`make test-vllm` reads no others: its environment has not what all tests import."""
    marked = [
        name for name in repo_files if name.suffix == ".py" and "mark." + "vllm" in (text_of(repo_root / name) or "")
    ]
    assert {str(name.parent) for name in marked} == {"tests/kvzip_press/serving/vllm"}


def test_no_file_is_larger_than_three_megabytes(repo_root: Path, repo_files: list[Path]) -> None:
    sizes = {str(name): (repo_root / name).stat().st_size for name in repo_files}
    assert {name: size for name, size in sizes.items() if size > MAX_BYTES} == {}


SLASH = "/"
BROKEN = [
    ("a.md", f"see {SLASH}home/someone/models"),
    ("a.py", f"path = '{SLASH}tmp/cache'"),
    ("a.yaml", f"root: {SLASH}work/data"),
    ("a.ipynb", f'"File {SLASH}root/.venv/lib/x.py"'),
    ("a.toml", f"url = 'file://{SLASH}mnt/models'"),
    ("a.sh", "pip install --index" + "-url https://example.org torch"),
    ("a.py", "import torch\ntorch.load" + "('x.pt')"),
    ("a.py", "import torch\ntorch.load" + "('x.pt', weights_only=False)"),
    ("a.ipynb", '"state = torch.load' + "('x.pt')\""),
    ("a.py", "pytest.importor" + "skip('kvpress')"),
    ("a.py", "assert" + " True"),
    ("a.py", "assert" + " False, 'never'"),
]
ALLOWED = [
    ("a.md", "https://example.org/home/page and ~/work/x and ./tmp/x and $HOME/tmp/x"),
    ("a.py", "import torch\ntorch.load('x.pt', weights_only=True)"),
    ("a.ipynb", "state = torch.load('x.pt', weights_only=True)"),
    ("a.py", "assert x is True"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_a_broken_rule_is_seen(name: str, text: str) -> None:
    assert forbidden(Path(name), text) != []


@pytest.mark.parametrize(("name", "text"), ALLOWED)
def test_what_the_rules_allow_passes(name: str, text: str) -> None:
    assert forbidden(Path(name), text) == []
