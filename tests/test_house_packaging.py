"""The wheel holds what the tree holds, and works without the tree (DESIGN.md, decisions 1 and 2)."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

FOLDERS = {
    "kvzip_press": "kvzip_press",
    "presses": "kvzip_press/presses",
    "kernels": "kvzip_press/kernels",
    "leaderboard": "kvzip_press/leaderboard",
}
NOT_SHIPPED = ["__pycache__", "*.pyc", ".*"]
ONLY_IN_THE_REPOSITORY = PurePosixPath("kvzip_press/leaderboard/results")  # pages and pictures of whole runs
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command: str, cwd: Path) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)
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
def source_copy(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: a build writes beside its sources, and the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("source")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(repo_root / name, copy / name)
    for folder in FOLDERS:
        shutil.copytree(repo_root / folder, copy / folder, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    return copy


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(output), ".", cwd=source_copy)
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
