"""What `import kvzip_press` gives, and what it leaves alone (DESIGN.md, decision 5)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONTRACT = ["KVzipPress", "RaggedCache", "answer", "compress", "load_model", "prefill"]
FOLDERS = ["presses", "kernels", "leaderboard"]

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_python(repo_root: Path) -> RunPython:
    """Runs a program in a new interpreter that has imported nothing; for these tests have imported torch already."""

    def run(code: str, cwd: Path = repo_root) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False
        )

    return run


def result_of(finished: subprocess.CompletedProcess[str]) -> Any:
    """What the program printed last, as JSON."""
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_the_names_of_the_contract_are_public() -> None:
    import kvzip_press

    assert set(CONTRACT) <= set(kvzip_press.__all__)


def command_line(command: Any, path: str) -> dict[str, list[str]]:
    """``command with its groups -> its options``, for all commands below one."""
    if hasattr(command, "commands"):
        return {k: v for name, one in command.commands.items() for k, v in command_line(one, f"{path} {name}").items()}
    names = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    return {path: sorted(names - {"--help"})}


def test_names_and_command_line_are_those_that_were_published(repo_root: Path) -> None:
    """Whatever moves inside. A name or an option more is written down here; one less is a break for somebody."""
    import typer

    import kvzip_press
    from kvzip_press.cli import gates, main
    from kvzip_press.leaderboard import cli

    published = json.loads((repo_root / "tests" / "public_interface.json").read_text(encoding="utf-8"))
    groups = {"kvzip-press leaderboard": cli.app, "kvzip-press gates": gates.app}  # what main hands on to
    found = command_line(typer.main.get_command(main.app), "kvzip-press")
    for path, app in groups.items():
        del found[path]
        found |= command_line(typer.main.get_command(app), path)
    assert sorted(kvzip_press.__all__) == published["names"]
    assert found == published["commands"]


def test_every_public_name_resolves() -> None:
    import kvzip_press

    assert [name for name in kvzip_press.__all__ if not hasattr(kvzip_press, name)] == []


def test_a_public_name_is_listed_once_and_by_dir() -> None:
    import kvzip_press

    assert len(kvzip_press.__all__) == len(set(kvzip_press.__all__))
    assert set(kvzip_press.__all__) <= set(dir(kvzip_press))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import kvzip_press

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvzip_press.no_such_name  # type: ignore[attr-defined]


LEAN_IMPORT = """
import json, sys
connections = []
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        connections.append(repr(args))
sys.addaudithook(note)
import kvzip_press
import torch
OPTIONAL = ["kvpress", "matplotlib", "triton", "gguf", "datasets", "ray", "flash_attn"]
PARTS = ("kvzip_press.presses.", "kvzip_press.leaderboard")
print(json.dumps({
    "optional": [name for name in OPTIONAL if name in sys.modules],
    "parts": [name for name in sys.modules if name.startswith(PARTS)],
    "cuda": torch.cuda.is_initialized(),
    "connections": connections,
}))
"""
LIBRARIES_ALONE = "import torch; from transformers import AutoModelForCausalLM, PreTrainedModel"
RESOLVE_CONTRACT = f"import kvzip_press; [getattr(kvzip_press, name) for name in {CONTRACT}]"


@pytest.mark.parametrize("imported", ["import kvzip_press", RESOLVE_CONTRACT], ids=["import", "contract"])
def test_import_brings_in_nothing_optional_and_touches_no_gpu_and_no_network(
    imported: str, run_python: RunPython
) -> None:
    found = result_of(run_python(LEAN_IMPORT.replace("import kvzip_press", imported)))
    if found["optional"]:  # beside a GPU, torch may import triton itself
        others = result_of(run_python(LEAN_IMPORT.replace("import kvzip_press", LIBRARIES_ALONE)))
        found["optional"] = [name for name in found["optional"] if name not in others["optional"]]
    kvzip = "kvzip_press.presses.kvzip"  # the press that was asked for
    parts = [] if imported == "import kvzip_press" else [kvzip, f"{kvzip}.replay_press", f"{kvzip}.weighting"]
    found["parts"].sort()
    assert found == {"optional": [], "parts": parts, "cuda": False, "connections": []}


# The libraries are looked at before and after: each registry by its keys and the identity of what they name, each
# attribute of each loaded module and of each transformers class by identity, and the settings of the process.
LOOK_FOR_PATCHES = """
import json, logging, os, sys, traceback, warnings
import torch, transformers
import transformers.generation.utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models import llama, qwen3
from transformers.pipelines import PIPELINE_REGISTRY
llama.modeling_llama, qwen3.modeling_qwen3  # transformers loads them at this

REGISTRIES = {
    "attention": ALL_ATTENTION_FUNCTIONS,
    "mask": ALL_MASK_ATTENTION_FUNCTIONS,
    "pipeline": PIPELINE_REGISTRY.supported_tasks,
}
MODULES = [module for name, module in sys.modules.items() if name.split(".")[0] in ("transformers", "torch")]
KEPT = []  # keeps alive what was seen, so that an id is not given to something else
SET = []  # environment variables as they are set, for the tests before may have left them set already
sys.addaudithook(lambda event, args: SET.append(str(args)) if event in ("os.putenv", "os.unsetenv") else None)

def members(thing):
    for name, value in list(vars(thing).items()):
        KEPT.append(value)
        yield name, value

def look():
    seen = {key: {str(name): id(entries[name]) for name in list(entries)} for key, entries in REGISTRIES.items()}
    for module in MODULES:
        for name, value in members(module):
            seen[f"{module.__name__}.{name}"] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__ and "transformers" in module.__name__:
                for member, function in members(value):
                    seen[f"{module.__name__}.{name}.{member}"] = id(function)
    seen["environment"] = list(SET)
    seen["warnings"] = [repr(one) for one in warnings.filters]
    seen["handlers"] = [repr(one) for one in logging.getLogger().handlers]
    seen["level"] = logging.getLogger("transformers").level
    seen["torch"] = [torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()]
    seen["dtype"] = [str(torch.get_default_dtype()), torch.get_float32_matmul_precision()]
    seen["path"] = list(sys.path)
    return seen

def changed_by(code):
    before = look()
    try:
        exec(code, globals())
    except Exception:
        return [traceback.format_exc()]
    after = look()
    return [key for key in before if before[key] != after.get(key)]

print(json.dumps({name: changed_by(code) for name, code in STEPS.items()}))
"""
PATCHES = """
ALL_ATTENTION_FUNCTIONS.register("mine", print)
ALL_MASK_ATTENTION_FUNCTIONS.register("mine", print)
llama.modeling_llama.LlamaAttention.forward = print
transformers.generation.utils.logger = None
os.environ["MINE"] = "1"
torch.set_num_threads(torch.get_num_threads() + 1)
warnings.simplefilter("ignore")
"""


@pytest.fixture(scope="module")
def changed(run_python: RunPython) -> dict[str, list[str]]:
    """What each step changed in the libraries and the process; patches come last, to show that the look sees them."""
    steps = {"import": "import kvzip_press", "contract": RESOLVE_CONTRACT, "patches": PATCHES}
    found: dict[str, list[str]] = result_of(run_python(f"STEPS = {steps!r}\n{LOOK_FOR_PATCHES}"))
    return found


@pytest.mark.parametrize("step", ["import", "contract"])
def test_import_patches_and_registers_nothing(step: str, changed: dict[str, list[str]]) -> None:
    assert changed[step] == []


def test_the_look_for_patches_sees_them(changed: dict[str, list[str]]) -> None:
    assert set(changed["patches"]) >= {
        "attention",
        "mask",
        "transformers.models.llama.modeling_llama.LlamaAttention.forward",
        "transformers.generation.utils.logger",
        "environment",
        "torch",
        "warnings",
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_bare_name_of_a_folder_is_refused(folder: str, run_python: RunPython, repo_root: Path) -> None:
    """Or what is in it: transformers imports a package `kernels` where it finds one, to see its version."""
    finished = run_python(f"import sys; sys.path.insert(0, {str(repo_root)!r}); from {folder} import anything")
    assert finished.returncode != 0
    assert f"ImportError: import kvzip_press.{folder}" in finished.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_full_name_of_a_folder_is_that_folder(folder: str, run_python: RunPython, repo_root: Path) -> None:
    finished = run_python(f"import json, kvzip_press.{folder} as m; print(json.dumps(m.__file__))", cwd=Path("/"))
    assert Path(result_of(finished)).parent == repo_root / folder
