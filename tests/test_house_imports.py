"""Imports run one way: kernels <- kvzip_press <- presses <- leaderboard (DESIGN.md, decision 4).

`violations` reads one source file with `ast`. `test_a_broken_rule_is_seen` holds it to broken lines for each rule, so
that a rule that sees nothing any more is noticed.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRESSES, KERNELS, LEADERBOARD = "kvzip_press.presses", "kvzip_press.kernels", "kvzip_press.leaderboard"
PACKAGE_OF_FOLDER = {"kvzip_press": "kvzip_press", "presses": PRESSES, "kernels": KERNELS, "leaderboard": LEADERBOARD}

COMPAT, TOP = Path("kvzip_press/compat.py"), Path("kvzip_press/__init__.py")
KVPRESS_ADAPTER = re.compile(r"presses/kvpress_adapter\w*(\.py|/.*)")


@dataclass(frozen=True)
class Import:
    """One imported thing: `target` is the module, `name` what is taken out of it (empty for `import module`)."""

    target: str
    name: str
    line: int
    in_function: bool
    for_types: bool

    @property
    def full(self) -> str:
        return f"{self.target}.{self.name}" if self.name else self.target

    @property
    def root(self) -> str:
        return self.target.partition(".")[0]

    def is_in(self, *packages: str) -> bool:
        return any(f"{self.full}.".startswith(f"{package}.") for package in packages)


def source_files() -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in PACKAGE_OF_FOLDER for path in (ROOT / folder).rglob("*.py"))


def press_names() -> frozenset[str]:
    """The modules under presses/ and the classes that they define: whoever names one knows a concrete press."""
    files = list((ROOT / "presses").rglob("*.py"))
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return frozenset({node.name for node in nodes if isinstance(node, ast.ClassDef)} | {path.stem for path in files})


def module_name(path: Path) -> str:
    """`kernels/kv_scoring/api.py` -> `kvzip_press.kernels.kv_scoring.api`."""
    parts = [PACKAGE_OF_FOLDER[path.parts[0]], *path.with_suffix("").parts[1:]]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class ImportReader(ast.NodeVisitor):
    """Collects every import of a file: absolute, relative, inside functions, for types only, and by `import_module`."""

    def __init__(self, path: Path) -> None:
        package = module_name(path).split(".")
        self.package = package if path.name == "__init__.py" else package[:-1]
        self.found: list[Import] = []
        self.function_depth = 0
        self.types_depth = 0

    def add(self, node: ast.stmt | ast.expr, target: str, name: str = "") -> None:
        self.found.append(Import(target, name, node.lineno, self.function_depth > 0, self.types_depth > 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        target = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            self.add(node, target, alias.name)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0] if node.args else None
        if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
            self.add(node, str(first.value))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.function_depth += 1
        self.generic_visit(node)
        self.function_depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  # the name that ast.NodeVisitor calls

    def visit_If(self, node: ast.If) -> None:
        for_types = ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        self.types_depth += for_types
        for child in node.body:
            self.visit(child)
        self.types_depth -= for_types
        for child in [node.test, *node.orelse]:
            self.visit(child)


def violations(path: Path, source: str, presses: frozenset[str]) -> list[str]:
    """What `source`, read as the file `path` (relative to the root), does against the rules."""
    tree = ast.parse(source, str(path))
    reader = ImportReader(path)
    reader.visit(tree)
    rules_of_folder = {"kernels": kernel_rules, "kvzip_press": core_rules, "presses": press_rules}.get(
        path.parts[0], leaderboard_rules
    )
    found = [(one.line, broken) for one in reader.found for broken in rules_of_all(path, one)]
    found += [(one.line, broken) for one in reader.found for broken in rules_of_folder(path, one, presses)]
    found += [(line, "only kvzip_press/compat.py looks at versions") for line in version_reads(tree) if path != COMPAT]
    return [f"{path}:{line}: {broken}" for line, broken in sorted(set(found))]


def rules_of_all(path: Path, one: Import) -> Iterator[str]:
    if one.root in {"presses", "kernels", "leaderboard"}:
        yield f"the bare name {one.root}: write kvzip_press.{one.root}"
    if one.root == "kvpress" and not KVPRESS_ADAPTER.fullmatch(path.as_posix()):
        yield "only presses/kvpress_adapter*.py imports kvpress"
    if one.is_in("packaging.version", "transformers.__version__", "transformers.utils.versions") and path != COMPAT:
        yield "only kvzip_press/compat.py looks at versions"


def kernel_rules(path: Path, one: Import, presses: frozenset[str]) -> Iterator[str]:
    del presses
    if one.root == "kvzip_press":
        if not one.is_in(KERNELS):
            yield f"a kernel knows nothing of the project outside kernels: {one.full}"
    elif one.root in {"transformers", "huggingface_hub", "tokenizers"}:
        yield f"a kernel takes tensors and returns tensors: {one.full}"
    elif "benchmarks" not in path.parts and one.root not in {"torch", "triton", *sys.stdlib_module_names}:
        yield f"a kernel needs torch and Triton only: {one.full}"


def core_rules(path: Path, one: Import, presses: frozenset[str]) -> Iterator[str]:
    if one.for_types and path == TOP:
        return  # what the package's __getattr__ finds by registry name, spelled out for type checkers
    if names_concrete_press(one, presses):
        yield f"the core knows no concrete press, it asks the registry: {one.full}"
    elif one.is_in(PRESSES) and not one.in_function:
        yield "the core reads the table of presses inside the function that needs it"
    if one.is_in(LEADERBOARD) and not (path == CLI and one.in_function):
        yield "the core knows no leaderboard; only a function of cli.py imports it"


def press_rules(path: Path, one: Import, presses: frozenset[str]) -> Iterator[str]:
    own = ".".join(module_name(path).split(".")[:3])  # kvzip_press.presses.<file or folder>
    is_table = own == PRESSES
    if names_concrete_press(one, presses) and not (one.for_types if is_table else one.is_in(own)):
        yield f"a press knows no other press, it asks the registry: {one.full}"
    if one.is_in(LEADERBOARD):
        yield f"a press knows no leaderboard: {one.full}"


def leaderboard_rules(path: Path, one: Import, presses: frozenset[str]) -> Iterator[str]:
    del path
    if names_concrete_press(one, presses):
        yield f"the leaderboard reaches presses by registry name: {one.full}"


def names_concrete_press(one: Import, presses: frozenset[str]) -> bool:
    if f"{one.target}.".startswith(f"{PRESSES}.") and one.target != PRESSES:
        return True  # a module under presses, or something out of one
    return one.target in {PRESSES, "kvzip_press"} and one.name in presses


def version_reads(tree: ast.AST) -> Iterator[int]:
    """Lines that read `transformers.__version__` or ask the metadata for the version of transformers."""
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if text == "transformers.__version__" or re.fullmatch(r"(\w+\.)*version\('transformers'\)", text):
            yield node.lineno


@pytest.mark.parametrize("path", source_files(), ids=str)
def test_imports_run_one_way(path: Path) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8"), press_names()) == []


def test_every_folder_is_read() -> None:
    assert {path.parts[0] for path in source_files()} == set(PACKAGE_OF_FOLDER)


BROKEN = {
    "a kernel knows nothing of the project": [
        ("kernels/op/api.py", "from kvzip_press.errors import KVzipPressError"),
        ("kernels/op/api.py", "from kvzip_press import errors"),
        ("kernels/op/api.py", "from ...errors import KVzipPressError"),
    ],
    "a kernel takes tensors": [
        ("kernels/op/api.py", "import transformers"),
        ("kernels/op/api.py", "def f():\n    from transformers.cache_utils import Cache"),
        ("kernels/op/benchmarks/b.py", "import transformers"),
    ],
    "a kernel needs torch and Triton only": [
        ("kernels/op/api.py", "import numpy as np"),
    ],
    "only presses/kvpress_adapter": [
        ("kernels/op/api.py", "import kvpress"),
        ("kvzip_press/models.py", "def f():\n    import kvpress"),
        ("presses/snapkv.py", "from kvpress import SnapKVPress"),
        ("leaderboard/runner.py", "import kvpress"),
    ],
    "the core knows no concrete press": [
        ("kvzip_press/press.py", "from kvzip_press.presses.kvzip import KVzipPress"),
        ("kvzip_press/press.py", "from kvzip_press.presses import kvzip"),
        ("kvzip_press/press.py", "from kvzip_press.presses import KVzipPress"),
        ("kvzip_press/press.py", "from .presses.kvzip import replay"),
        ("kvzip_press/press.py", "def f():\n    import kvzip_press.presses.kvzip"),
        ("kvzip_press/press.py", "def f():\n    import_module('kvzip_press.presses.kvzip')"),
        ("kvzip_press/__init__.py", "from kvzip_press.presses.kvzip import KVzipPress"),
    ],
    "the core reads the table": [
        ("kvzip_press/registry.py", "from kvzip_press.presses import PRESSES"),
    ],
    "the core knows no leaderboard": [
        ("kvzip_press/pipeline.py", "def f():\n    import kvzip_press.leaderboard"),
        ("kvzip_press/cli.py", "from kvzip_press import leaderboard"),
    ],
    "only kvzip_press/compat.py": [
        ("kvzip_press/models.py", "import transformers\nx = transformers.__version__"),
        ("kvzip_press/models.py", "from transformers import __version__"),
        ("kvzip_press/models.py", "from packaging.version import Version"),
        ("kvzip_press/models.py", "from packaging import version"),
        ("kvzip_press/models.py", "import importlib\nx = importlib.metadata.version('transformers')"),
    ],
    "a press knows no other press": [
        ("presses/snapkv.py", "from kvzip_press.presses.kvzip import KVzipPress"),
        ("presses/snapkv.py", "from . import kvzip"),
        ("presses/snapkv.py", "from kvzip_press import KVzipPress"),
        ("presses/snapkv.py", "if TYPE_CHECKING:\n    from kvzip_press.presses.kvzip import KVzipPress"),
        ("presses/__init__.py", "from kvzip_press.presses.kvzip import KVzipPress"),
    ],
    "a press knows no leaderboard": [
        ("presses/snapkv.py", "from kvzip_press.leaderboard import runner"),
    ],
    "the leaderboard reaches presses": [
        ("leaderboard/runner.py", "from kvzip_press.presses.kvzip import KVzipPress"),
        ("leaderboard/runner.py", "def f():\n    from kvzip_press import KVzipPress"),
    ],
    "the bare name": [
        ("leaderboard/runner.py", "import kernels"),
        ("presses/snapkv.py", "from presses.kvzip import KVzipPress"),
        ("kvzip_press/press.py", "import leaderboard"),
    ],
}
ALLOWED = [
    ("kernels/op/api.py", "import math\nimport torch\nfrom triton import language\nfrom kvzip_press.kernels import op"),
    ("kernels/op/api.py", "from .reference import attend"),
    ("kernels/op/benchmarks/b.py", "import flashinfer\nimport numpy"),
    ("kvzip_press/press.py", "from kvzip_press.kernels.op import api\nfrom kvzip_press import press"),
    ("kvzip_press/registry.py", "def f():\n    from kvzip_press.presses import PRESSES"),
    ("kvzip_press/__init__.py", "if TYPE_CHECKING:\n    from kvzip_press.presses.kvzip import KVzipPress"),
    ("kvzip_press/cli.py", "def f():\n    from kvzip_press.leaderboard import runner"),
    ("kvzip_press/compat.py", "from packaging.version import Version\nx = Version(transformers.__version__)"),
    ("presses/snapkv.py", "from kvzip_press.press import Press\nfrom kvzip_press.registry import get_press"),
    ("presses/fast/gate.py", "from kvzip_press.presses.fast import weights"),
    ("presses/kvpress_adapter.py", "def f():\n    import kvpress"),
    ("presses/kvpress_adapter/state.py", "import kvpress"),
    ("leaderboard/runner.py", "import numpy\nfrom kvzip_press import prefill, registry"),
]
PRESS_NAMES = frozenset({"kvzip", "KVzipPress", "snapkv", "fast"})


@pytest.mark.parametrize(
    ("rule", "path", "source"), [(rule, path, source) for rule, files in BROKEN.items() for path, source in files]
)
def test_a_broken_rule_is_seen(rule: str, path: str, source: str) -> None:
    assert rule in "\n".join(violations(Path(path), source, PRESS_NAMES))


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_the_rules_allow_passes(path: str, source: str) -> None:
    assert violations(Path(path), source, PRESS_NAMES) == []
