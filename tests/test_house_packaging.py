"""The source distribution and the wheel hold what the tree holds, and work alone (DESIGN.md, decisions 1 and 2)."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from kvzip_press.errors import install_command

FOLDERS = {
    "kvzip_press": "kvzip_press",
    "presses": "kvzip_press/presses",
    "kernels": "kvzip_press/kernels",
    "leaderboard": "kvzip_press/leaderboard",
}
NOT_SHIPPED = ["__pycache__", "*.pyc", ".*"]
ONLY_IN_THE_REPOSITORY = PurePosixPath("kvzip_press/leaderboard/results")  # pages and pictures of whole runs
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command: str, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300, check=False)
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def shipped_files(root: Path) -> set[str]:
    """Every file of the four folders, by the path that it has when it is installed."""
    found = set()
    for folder, installed in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            inside = path.relative_to(root / folder)
            hidden = any(PurePosixPath(part).match(pattern) for part in inside.parts for pattern in NOT_SHIPPED)
            name = PurePosixPath(installed, inside.as_posix())
            if path.is_file() and not hidden and not name.is_relative_to(ONLY_IN_THE_REPOSITORY):
                found.add(str(name))
    return found


@pytest.fixture(scope="module")
def source_copy(repo_root: Path, repo_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository: a build writes beside its sources, and the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("source")
    for name in repo_files:
        (copy / name.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(repo_root / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(output)!r})"
    run(sys.executable, "-c", code, cwd=source_copy)
    (made,) = output.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as it is for a release."""
    output = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), str(sdist), cwd=output)
    (made,) = output.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run(*PIP, "install", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


def test_the_packages_of_pyproject_are_the_folders_with_an_init(repo_root: Path) -> None:
    settings = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inits = [PurePosixPath(file) for file in shipped_files(repo_root) if file.endswith("/__init__.py")]
    assert sorted(settings["packages"]) == sorted(str(init.parent).replace("/", ".") for init in inits)


def test_every_python_file_is_in_a_package(repo_root: Path) -> None:
    files = shipped_files(repo_root)
    modules = [PurePosixPath(file) for file in files if file.endswith(".py")]
    assert [str(module) for module in modules if f"{module.parent}/__init__.py" not in files] == []


def test_the_source_distribution_holds_the_repository(repo_files: list[Path], sdist: Path) -> None:
    """All that is needed to build and to run the tests; what git ignores stays out."""
    with tarfile.open(sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(one.name).parts[1:])) for one in archive if one.isfile()}
    made = {name for name in names if name in {"PKG-INFO", "setup.cfg"} or name.startswith("kvzip_press.egg-info/")}
    assert names - made == {name.as_posix() for name in repo_files}


def test_the_wheel_holds_every_module_and_data_file(source_copy: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "kvzip_press/py.typed" in names
    assert names == shipped_files(source_copy)


def test_the_wheel_carries_the_licence_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "kvzip-press = kvzip_press.cli.main:main" in archive.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert len([name for name in names if ".dist-info/licenses/" in name and name.endswith("NOTICE.txt")]) >= 3


def test_beside_what_is_derived_from_a_model_the_wheel_has_the_models_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        derived = [PurePosixPath(name) for name in names if name.endswith(".safetensors")]
        assert len(derived) >= 3
        for file in derived:
            notice = archive.read(str(file.parent / "NOTICE.txt")).decode()
            assert file.name in notice and "SmolLM2-135M-Instruct" in notice
            assert "https://www.apache.org/licenses/LICENSE-2.0" in notice


def test_the_installed_wheel_imports_without_the_tree(installed: Path, tmp_path: Path) -> None:
    names = ["kvzip_press", *(f"kvzip_press.{name}" for name in ["presses", "kernels", "leaderboard", "cli"])]
    code = (
        f"import sys, json, importlib; sys.path.insert(0, {str(installed)!r}); "
        f"print(json.dumps([importlib.import_module(name).__file__ for name in {names!r}]))"
    )
    files = json.loads(run(sys.executable, "-c", code, cwd=tmp_path).splitlines()[-1])
    assert [file for file in files if not file.startswith(f"{installed}{os.sep}")] == []


def test_python_that_is_started_in_a_checkout_finds_all_of_the_package(repo_root: Path) -> None:
    """Where the folder `kvzip_press` comes first, whatever is installed, and nothing says where the others lie."""
    program = (
        "import sys\n"
        "sys.meta_path = [one for one in sys.meta_path if 'editable' not in str(one)]\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import kvzip_press, kvzip_press.kernels, kvzip_press.leaderboard, transformers.modeling_utils\n"
        "print(kvzip_press.KVzipPress.__module__, kvzip_press.__file__)"
    )
    found = run(sys.executable, "-P", "-c", program, str(repo_root), cwd=repo_root.parent)
    assert found.split() == ["kvzip_press.presses.kvzip.replay_press", str(repo_root / "kvzip_press" / "__init__.py")]


def test_the_command_of_an_error_works_however_kvzip_press_was_installed(installed: Path, tmp_path: Path) -> None:
    """pip reads the extra of what is installed, and asks no index for it: of an editable checkout, then of a wheel."""
    (command,) = re.findall(r"pip install '(.+)'", install_command("ray"))
    pip = [*PIP, "install", "--dry-run", "--no-deps", "--no-index", command]
    run(*pip, cwd=tmp_path)
    run(*pip, cwd=tmp_path, PYTHONPATH=str(installed))
    with pytest.raises(AssertionError, match="No matching distribution"):
        run(*pip[:-1], "kvzip-press-of-nobody[ray]", cwd=tmp_path)


NAMED_EXTRAS = re.compile(r"install_command\(['\"]([\w-]+)|(?:kvzip-press|'\.)\[([a-z][\w,-]*)\]")


def test_errors_and_documents_name_extras_that_exist(repo_root: Path, repo_files: list[Path]) -> None:
    extras = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set()
    for name in repo_files:
        if name.suffix in {".py", ".md"} and name.parts[0] != "tests":
            text = (repo_root / name).read_text(encoding="utf-8")
            named |= {extra for groups in NAMED_EXTRAS.findall(text) for extra in "".join(groups).split(",")}
    assert {"kvpress", "tasks"} <= named <= set(extras["optional-dependencies"])


def floors_of(requirements: list[str]) -> dict[str, str]:
    """The name and the floor of each requirement, as `name -> version`; one without a floor has an empty one."""
    found = {}
    for requirement in requirements:
        name, _, rest = re.match(r"([\w-]+)(\[[\w,]+\])?(.*)", requirement).groups()
        if name != "kvzip-press":
            floor = re.search(r">=([\w.]+)", rest.partition(";")[0])
            found[re.sub(r"[-_.]+", "-", name).lower()] = floor[1] if floor else ""
    return found


def pins_of(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def test_every_floor_is_the_version_that_the_oldest_environment_tests(repo_root: Path) -> None:
    """Of what `make test-oldest` installs; a floor that nothing is tested with is a guess."""
    settings = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"]
    (installed,) = re.findall(r"\.venv-oldest/\.stamp: EXTRAS := (\S+)", (repo_root / "Makefile").read_text())
    wanted = [*settings["project"]["dependencies"], *settings["build-system"]["requires"]]
    floors = floors_of([*wanted, *(one for extra in installed.split(",") for one in extras[extra])])
    del floors["torch"]  # pyproject.toml says why
    pins = pins_of(repo_root / "constraints" / "oldest.txt")
    assert len(floors) > 10 and floors == {name: pins.get(name) for name in floors}


@pytest.mark.parametrize("constraints", ["tested.txt", "newest.txt"])
def test_no_floor_is_above_what_is_tested(repo_root: Path, constraints: str) -> None:
    """Of any extra."""
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [one for extra in project["optional-dependencies"].values() for one in extra]
    pins = pins_of(repo_root / "constraints" / constraints)
    floors = floors_of([*extras, *project["dependencies"]])
    assert {name: floor for name, floor in floors.items() if numbers(floor) > numbers(pins.get(name, floor))} == {}


SAFE = {  # the first versions without an advisory that reaches what is called here or by what is called here
    "torch": "2.10.0",  # torch.load(weights_only=True): CVE-2025-32434, CVE-2026-24747
    "filelock": "3.20.3",  # links in the place of a lock: CVE-2025-68146, CVE-2026-22701
    "pyyaml": "5.4",  # safe_load is safe in all; full_load: CVE-2020-14343
    "setuptools": "78.1.1",  # CVE-2025-47273
    "nltk": "3.10",  # CVE-2025-14009, CVE-2026-12243, CVE-2026-12259
    "ray": "2.52",  # the dashboard: CVE-2025-62593
}


def test_floors_leave_out_versions_with_known_holes(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = floors_of([*project["dependencies"], *(o for e in project["optional-dependencies"].values() for o in e)])
    assert {name: floors[name] for name, least in SAFE.items() if numbers(floors[name]) < numbers(least)} == {}
