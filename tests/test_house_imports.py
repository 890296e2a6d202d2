"""Imports run one way: kernels <- kvzip_press <- presses <- leaderboard (DESIGN.md, decision 4).

Inside the core they run one way from room to room (core DESIGN.md, "Rooms"); its command line stands above everything.

`violations` reads one source file with `ast`. `test_a_broken_rule_is_seen` holds it to broken lines for each rule, so
that a rule that sees nothing any more is noticed.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRESSES, KERNELS, LEADERBOARD = "kvzip_press.presses", "kvzip_press.kernels", "kvzip_press.leaderboard"
PACKAGE_OF_FOLDER = {"kvzip_press": "kvzip_press", "presses": PRESSES, "kernels": KERNELS, "leaderboard": LEADERBOARD}

COMPAT, TOP = Path("kvzip_press/compat.py"), Path("kvzip_press/__init__.py")
# A room of the core imports what stands to its left, and itself; the command line also presses and leaderboard.
ROOMS = (
    *(
        "errors",
        "version",
        "compat",
        "untrusted",
        "files",
        "torch_file",
        "locks",
        "terminal",
        "training",
        "arguments",
        "model",
        "budget",
        "loading",
        "attention",
        "sharing",
        "cache",
        "prefilling",
        "decoding",
    ),
    *("session", "press", "heads", "registry", "serving", "calibration", "pipeline", "testing", "cli"),
)
STRANGERS = {("prefilling", "decoding"), ("decoding", "prefilling")}  # neighbours that do not know each other
KVPRESS_ITSELF = "kvzip_press.presses.kvpress_adapter.original"
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


@cache  # asked once for each file of the project
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
    if path.as_posix() not in FOUND_BY_NAME:
        found += [(line, "no import passes a rule as a string: spell the module out") for line in imports_by_name(tree)]
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


def room_of(module: str) -> str:
    """`kvzip_press.cache.file.reading` -> `cache`; empty for what is no room of the core."""
    _, _, inside = module.partition("kvzip_press.")
    room = inside.partition(".")[0]
    return room if room in ROOMS else ""


def room_rules(path: Path, one: Import) -> Iterator[str]:
    if path == TOP:
        return  # the public names, from all rooms
    own, other = room_of(module_name(path)), room_of(one.full if one.target == "kvzip_press" else one.target)
    if not own and path.name != "__init__.py":
        yield f"{path.parts[1]} is no room: name it in ROOMS, between what it imports and what imports it"
    if other and own and (ROOMS.index(other) > ROOMS.index(own) or (own, other) in STRANGERS):
        yield f"a room imports only rooms to its left: {own} imports {other}"
    if one.target == "kvzip_press" and one.name and not other and not one.is_in(PRESSES, KERNELS, LEADERBOARD):
        yield f"inside the core a name is imported from its room: {one.full}"


def core_rules(path: Path, one: Import, presses: frozenset[str]) -> Iterator[str]:
    if one.for_types and path == TOP:
        return  # what the package's __getattr__ finds by registry name, spelled out for type checkers
    yield from room_rules(path, one)
    if room_of(module_name(path)) == "cli":
        if one.is_in(PRESSES, LEADERBOARD) and not one.in_function:
            yield f"a command imports presses and leaderboard inside the function that needs them: {one.full}"
        return
    if names_concrete_press(one, presses):
        yield f"the core knows no concrete press, it asks the registry: {one.full}"
    elif one.is_in(PRESSES) and not one.in_function:
        yield "the core reads the table of presses inside the function that needs it"
    if one.is_in(LEADERBOARD):
        yield "the core knows no leaderboard; only its command line does"


def press_rules(path: Path, one: Import, presses: frozenset[str]) -> Iterator[str]:
    own = ".".join(module_name(path).split(".")[:3])  # kvzip_press.presses.<file or folder>
    is_table = own == PRESSES
    if names_concrete_press(one, presses) and not (one.for_types if is_table else one.is_in(own)):
        yield f"a press knows no other press, it asks the registry: {one.full}"
    if one.is_in(LEADERBOARD):
        yield f"a press knows no leaderboard: {one.full}"


def leaderboard_rules(path: Path, one: Import, presses: frozenset[str]) -> Iterator[str]:
    if path.parts[1] in {"benchmarks", "profile"} and one.is_in(KVPRESS_ITSELF) and one.in_function:
        return  # no press of ours, but the other side of the comparison
    if names_concrete_press(one, presses):
        yield f"the leaderboard reaches presses by registry name: {one.full}"


def names_concrete_press(one: Import, presses: frozenset[str]) -> bool:
    if f"{one.target}.".startswith(f"{PRESSES}.") and one.target != PRESSES:
        return True  # a module under presses, or something out of one
    return one.target in {PRESSES, "kvzip_press"} and one.name in presses


#: Where a module is imported by a name that the source does not spell out: out of a table of names, or of a user's.
FOUND_BY_NAME = {
    "kvzip_press/__init__.py",
    "kvzip_press/arguments/named.py",
    "kernels/dispatch.py",
    "leaderboard/tasks/__init__.py",
    "leaderboard/metrics/code.py",
}


def imports_by_name(tree: ast.AST) -> Iterator[int]:
    """Lines that import a module whose name they do not spell out, so that no rule sees it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        by_name = ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"}
        if by_name and (len(node.args) > 1 or not isinstance(node.args[0], ast.Constant)):
            yield node.lineno


def version_reads(tree: ast.AST) -> Iterator[int]:
    """Lines that read `transformers.__version__` or ask the metadata for the version of transformers."""
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if text == "transformers.__version__" or re.fullmatch(r"(\w+\.)*version\('transformers'\)", text):
            yield node.lineno


def imports_of_modules(folder: str) -> dict[str, set[str]]:
    """Module -> modules of the same folder that it imports, for types only and inside functions included."""
    paths = {module_name(path): path for path in source_files() if path.parts[0] == folder}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        reader = ImportReader(path)
        reader.visit(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        targets = {target for one in reader.found for target in (one.full, one.target) if target in paths}
        packages = {target for target in targets if paths[target].name == "__init__.py"}
        graph[module] = targets - {module} - packages
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """A chain of imports that ends where it began; empty where there is none."""
    done: set[str] = set()

    def follow(module: str, chain: list[str]) -> list[str]:
        if module in chain:
            return [*chain[chain.index(module) :], module]
        if module not in done:
            for target in sorted(graph[module]):
                if found := follow(target, [*chain, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := follow(module, []))), [])


@pytest.mark.parametrize("folder", list(PACKAGE_OF_FOLDER))
def test_no_imports_go_in_a_circle(folder: str) -> None:
    """Not even those that only type checkers read."""
    assert circle_in(imports_of_modules(folder)) == []


def test_a_circle_is_seen() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]


def test_no_folder_of_the_core_is_a_shelf() -> None:
    """Whoever opens one sees what it is about: at most 14 files."""
    folders = Counter(path.parent for path in source_files() if path.parts[0] == "kvzip_press")
    assert {str(folder): n for folder, n in folders.items() if n > 14} == {}


def test_rooms_are_as_their_order_says() -> None:
    """Each room exists or waits for its feature, and the arrows between rooms all point to the left."""
    arrows = {(room_of(a), room_of(b)) for a, targets in imports_of_modules("kvzip_press").items() for b in targets}
    arrows = {(a, b) for a, b in arrows if a != b and a and b}
    assert all(ROOMS.index(b) < ROOMS.index(a) for a, b in arrows)
    assert {a for a, _ in arrows} | {b for _, b in arrows} == set(ROOMS)


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
        ("kvzip_press/model/structure.py", "def f():\n    import kvpress"),
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
        ("kvzip_press/registry.py", "from kvzip_press import leaderboard"),
    ],
    "a command imports": [
        ("kvzip_press/cli/main.py", "from kvzip_press import leaderboard"),
        ("kvzip_press/cli/heads.py", "from kvzip_press.presses.kvzip_head import builtin_texts"),
    ],
    "a room imports only rooms to its left": [
        ("kvzip_press/budget/scores.py", "from kvzip_press.cache.ragged_layer import RaggedLayer"),
        ("kvzip_press/cache/file/reading.py", "def f():\n    import kvzip_press.prefilling.whole"),
        ("kvzip_press/prefilling/whole.py", "if TYPE_CHECKING:\n    from kvzip_press.press import Press"),
        ("kvzip_press/prefilling/whole.py", "from kvzip_press.decoding.step import DecodeStep"),
        ("kvzip_press/decoding/step.py", "from kvzip_press.prefilling.whole import prefill"),
        ("kvzip_press/errors.py", "from kvzip_press import compat"),
        ("kvzip_press/press.py", "from kvzip_press.heads.scores import HeadScores"),
    ],
    "is no room": [
        ("kvzip_press/utils/helpers.py", "from kvzip_press.errors import KVzipPressError"),
    ],
    "inside the core a name is imported from its room": [
        ("kvzip_press/prefilling/whole.py", "from kvzip_press import Scores"),
    ],
    "only kvzip_press/compat.py": [
        ("kvzip_press/model/structure.py", "import transformers\nx = transformers.__version__"),
        ("kvzip_press/model/structure.py", "from transformers import __version__"),
        ("kvzip_press/model/structure.py", "from packaging.version import Version"),
        ("kvzip_press/model/structure.py", "from packaging import version"),
        ("kvzip_press/model/structure.py", "import importlib\nx = importlib.metadata.version('transformers')"),
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
    "no import passes a rule as a string": [
        ("kvzip_press/cli/heads.py", "import importlib\nimportlib.import_module(PRESSES[name])"),
        ("leaderboard/profile/grid.py", "import_module('.original', 'kvzip_press.presses.kvpress_adapter')"),
        ("presses/fast/gate.py", "name = 'x'\n__import__(name)"),
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
    ("kvzip_press/press.py", "from kvzip_press.kernels.op import api\nfrom kvzip_press import compat"),
    (
        "kvzip_press/cache/all_layers.py",
        "from kvzip_press.cache.tail import Tail\nfrom kvzip_press.errors import CacheFileError",
    ),
    ("kvzip_press/registry.py", "def f():\n    from kvzip_press.presses import PRESSES"),
    ("kvzip_press/__init__.py", "if TYPE_CHECKING:\n    from kvzip_press.presses.kvzip import KVzipPress"),
    (
        "kvzip_press/cli/main.py",
        "def f():\n    from kvzip_press.leaderboard import cli\n    import kvzip_press.presses.kvzip",
    ),
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
