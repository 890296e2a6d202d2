"""Every Triton kernel compiles for a GPU and fits one; Triton's compiler needs none.

Its interpreter runs what the compiler would refuse, and knows no limit of shared memory. Here each operation is called
with the shapes of a model of 8B parameters on a stand-in for a GPU: kernels are compiled, and not launched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels import triton_support
from kvzip_press.kernels.context_attention import context_attention, plan_contexts
from kvzip_press.kernels.dense_attention import merge_attention
from kvzip_press.kernels.gate_scores import gate_scores
from kvzip_press.kernels.kv_scoring import kv_scoring
from kvzip_press.kernels.near_duplicates import near_duplicates
from kvzip_press.kernels.ragged_attention import Part, parted_attention, ragged_attention
from kvzip_press.kernels.ragged_pack import merge, pack
from kvzip_press.kernels.recall_ranking import recall_ranking
from kvzip_press.kernels.received_attention import received_attention
from kvzip_press.kernels.row_codec import Codes, decode_rows, encode_groups, encode_rows, groups_of
from kvzip_press.kernels.tail_append import Queries, tail_append

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
    pytest.mark.skipif(triton_support.interpreting(), reason="TRITON_INTERPRET=1 leaves nothing to compile"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles and runs them in their own tests"),
]

CAPABILITY = (9, 0)  # of an H100 or H200
SHARED_BYTES = 227 * 1024  # that a program may have there
BATCH, HEADS, GROUPS, DIM, PAIRS = 2, 8, 4, 128, 40


class Gpu:
    """What Triton asks its driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = CAPABILITY
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Each kernel that was compiled, by name, in all its forms."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from kvzip_press.kernels.ragged_attention import split

    found: dict[str, list[Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(self.__name__, []).append(kernel)
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Gpu())
    monkeypatch.setattr(triton_support, "interpreting", lambda: True)  # tensors on a CPU are taken, too
    monkeypatch.setattr(split, "interpreting", lambda: False)  # launches are early, as on such a GPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: CAPABILITY)
    return found


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def heads_of(n: int) -> Tensor:
    return rows(BATCH, HEADS, n, DIM)


def bounds(n_segments: int = BATCH * HEADS, n: int = PAIRS) -> Tensor:
    return torch.arange(n_segments + 1, dtype=torch.int32) * n


def codes_of(codec: str) -> Codes:
    drawn = torch.randn(BATCH * HEADS * PAIRS, DIM)
    if codec.startswith("grouped "):
        groups, count = groups_of(bounds(), len(drawn))
        return encode_groups(drawn, groups, count, codec.removeprefix("grouped "))
    return encode_rows(drawn, codec, impl="reference")


def query_of(n_rows: int) -> Tensor:
    return rows(BATCH, HEADS * GROUPS, n_rows, DIM)


def attend() -> None:
    packed = [rows(BATCH * HEADS * PAIRS, DIM) for _ in range(2)]
    tail = [heads_of(9) for _ in range(2)]
    for n_rows in (1, 9):
        ragged_attention(query_of(n_rows), *packed, bounds(), *tail, return_lse=True, impl="triton")
    listed = torch.arange(BATCH * HEADS * 8, dtype=torch.int32)
    shorter = bounds(n=8)
    ragged_attention(query_of(1), *packed, shorter, *tail, pair_index=listed, impl="triton")


def attend_to_codes() -> None:
    for codec in (("int8", "int8"), ("int8", "int4"), ("int4", "int2")):
        both, tail = map(codes_of, codec), [heads_of(9) for _ in range(2)]
        ragged_attention(query_of(1), *both, bounds(), *tail, impl="triton")


def attend_to_parts() -> None:
    exact = Part(*(rows(BATCH * HEADS * 4, DIM) for _ in range(2)), bounds(n=4))
    for codec in (("int8", "int8"), ("int4", "int4")):
        coded = Part(*map(codes_of, codec), bounds())
        parted_attention(query_of(1), [exact, coded], *(heads_of(9) for _ in range(2)), impl="triton")


def attend_to_contexts() -> None:
    begins = bounds(3 * HEADS)[:-1].view(1, 3, HEADS).clone()
    lengths = torch.full_like(begins, PAIRS)
    lengths[:, 0] = 0
    pool = [rows(3 * HEADS * PAIRS, DIM) for _ in range(2)]
    for n_tokens in (4, 70):
        tokens = torch.arange(n_tokens, dtype=torch.int32) % 3
        plan = plan_contexts(tokens, begins, lengths, num_attention_heads=HEADS * GROUPS)
        query = rows(n_tokens, HEADS * GROUPS, DIM)
        tail = rows(n_tokens, HEADS * GROUPS, DIM), torch.zeros(n_tokens, HEADS * GROUPS)
        context_attention(query, *pool, plan, 0, impl="triton")
        context_attention(query, *pool, plan, 0, tail=tail, impl="triton")
        context_attention(query, *pool, plan, 0, tail=tail, out=tail[0], return_lse=False, impl="triton")


def merge_two() -> None:
    of_each = query_of(1), torch.zeros(BATCH, HEADS * GROUPS, 1)
    merge_attention(*of_each, *of_each, impl="triton")


def score() -> None:
    query, keys = query_of(64), [heads_of(n) for n in (4, 64, 64)]
    kv_scoring(query, *keys, impl="triton")
    weights = {"key_weight": torch.ones(BATCH, HEADS * GROUPS, 64), "query_weight": torch.ones(BATCH, 64)}
    kv_scoring(query, *keys, lse=torch.zeros(BATCH, HEADS * GROUPS, 64), **weights, impl="triton")


def score_by_gates() -> None:
    queries, keys = rows(64, HEADS, GROUPS, 16), rows(64, HEADS, 16)
    parameters = [torch.ones(16), torch.ones(16), torch.ones(HEADS, GROUPS), torch.ones(HEADS, 16, 16)]
    gate_scores(queries, keys, *parameters, impl="triton")


def compare_keys() -> None:
    near_duplicates(heads_of(200), torch.ones(BATCH, HEADS, 200, dtype=torch.bool), 0.9, impl="triton")


def receive() -> None:
    positions, seen = torch.zeros(BATCH, 32, dtype=torch.int64), torch.zeros(BATCH, HEADS, 200, dtype=torch.int64)
    for squared in (False, True):
        received_attention(query_of(32), heads_of(200), positions, seen, squared=squared, impl="triton")


def pack_rows() -> None:
    columns = [heads_of(PAIRS), heads_of(PAIRS), torch.zeros(BATCH, HEADS, PAIRS)]
    keep = torch.ones(BATCH, HEADS, PAIRS, dtype=torch.bool)
    whole = pack(columns, keep, impl="reference")
    pack(columns, keep, impl="triton")
    kept = torch.ones(BATCH * HEADS * PAIRS, dtype=torch.bool)
    merge(whole, columns, keep, keep_context=kept, total=2 * BATCH * HEADS * PAIRS, impl="triton")


def rank() -> None:
    sizes = torch.tensor([[4, 12, 12, 12]] * BATCH * HEADS).int()
    order = torch.arange(PAIRS).int().repeat(BATCH * HEADS)
    for width, per_query_head in ((DIM, False), (2 * DIM, True)):
        marks = rows(BATCH * HEADS, 3, width)
        query = rows(BATCH, HEADS * GROUPS, DIM)
        options = {"num_key_value_heads": HEADS, "budget": 20, "per_query_head": per_query_head}
        recall_ranking(query, marks, sizes, order, bounds(), **options, impl="triton")


def encode() -> None:
    drawn = rows(BATCH * HEADS * PAIRS, DIM)
    for codec in ("int8", "int4", "int2", "fp8"):
        encode_rows(drawn, codec, impl="triton")
        decode_rows(codes_of(codec), torch.bfloat16, impl="triton")
    encode_rows(drawn, "int4", rotated=True, impl="triton")


def append() -> None:
    tails, new = [heads_of(9) for _ in range(2)], [heads_of(1) for _ in range(2)]
    index = torch.zeros(1, dtype=torch.int64)
    queries = Queries(window=query_of(32), new=query_of(1), shift=index)
    for one in (None, queries):
        tail_append(*tails, *new, index, queries=one, impl="triton")


KERNELS: dict[Callable[[], None], str] = {  # what each launches
    attend: "attend merge",
    attend_to_codes: "attend_parts merge",
    attend_to_parts: "attend_parts merge",
    attend_to_contexts: "attend items merge tiles",
    merge_two: "merge_pair",
    score: "column_max row_lse",
    score_by_gates: "scores",
    compare_keys: "newest",
    receive: "column_sum row_lse",
    pack_rows: "move",
    rank: "list products",
    encode: "decode encode",
    append: "append",
}


@pytest.mark.slow
@pytest.mark.any_transformers
@pytest.mark.parametrize("call", KERNELS, ids=lambda call: call.__name__)
def test_it_compiles_and_fits(call: Callable[[], None], compiled: dict[str, list[Any]]) -> None:
    call()
    assert set(compiled) == {f"_{name}_kernel" for name in KERNELS[call].split()}
    shared = {name: max(kernel.metadata.shared for kernel in forms) for name, forms in compiled.items()}
    assert max(shared.values()) <= SHARED_BYTES, shared


@pytest.mark.slow
@pytest.mark.any_transformers
def test_kernels_over_contexts_wait_as_late_as_they_can_and_always(compiled: dict[str, list[Any]]) -> None:
    """The second begins with the first; the plan is read before they wait; no program ends without having waited."""
    attend_to_contexts()
    n_waits = {"_attend_kernel": 2, "_merge_kernel": 1}  # of programs without work, and of others
    for name, n in n_waits.items():
        for kernel in compiled[name]:
            before, *after = kernel.asm["ptx"].split("griddepcontrol.wait")
            assert len(after) == n and "ret;" not in before
            assert "ld.global" in before and "st.global" not in before and "cp.async" not in before
    for kernel in compiled["_attend_kernel"]:
        assert "griddepcontrol.launch_dependents" in kernel.asm["ptx"].split("ld.global")[0]


def test_no_kernel_was_forgotten() -> None:
    folder = Path(triton_support.__file__).resolve().parent
    every = {
        name
        for path in folder.rglob("*.py")
        for name in re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.MULTILINE)
    }
    assert every == {name for names in KERNELS.values() for name in names.split()}
