"""The benchmarks without a GPU: what they compare is right, what they write is complete; only the times are made up."""

import csv
import importlib
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvzip_press.kernels.benchmarks import (
    codecs,
    context_attention,
    decode_peers,
    gathered_attention,
    harness,
    kv_scoring,
    near_duplicates,
    ragged_attention,
    ragged_pack,
    recall_ranking,
    received_attention,
    replay_attention,
    row_codec,
)
from kvzip_press.kernels.benchmarks.cases import DECODE_CASES, DecodeCase, DecodeInputs, uneven_lengths
from kvzip_press.kernels.benchmarks.harness import Bench, WrongResultError, check_error, relative_error
from kvzip_press.kernels.benchmarks.report import COMMIT_VARIABLE, Provenance, Row, commit, table
from kvzip_press.kernels.benchmarks.timing import (
    L2_BYTES,
    Call,
    Times,
    copies_for,
    read_bandwidth,
    time_eager,
    time_in_graph,
    times_of,
)

CPU = torch.device("cpu")
SMALL = DecodeCase(6, 2, 16, 50, batch=2)
SCRIPTS = [
    "codecs",
    "context_attention",
    "gathered_attention",
    "kv_scoring",
    "near_duplicates",
    "ragged_attention",
    "ragged_pack",
    "recall_ranking",
    "received_attention",
    "replay_attention",
    "row_codec",
]


class CallingBench(Bench):
    """Calls what it should time, once, and says that it took 2 microseconds."""

    def measured_bandwidth(self) -> float:
        return 1000.0

    def in_graph(self, calls: Sequence[Call]) -> Times:
        for call in calls:
            call()
        return Times(2.0, 1.0, 3.0)

    def eager(self, call: Call) -> Times:
        return self.in_graph([call])

    def on_wall_clock(self, call: Call) -> Times:
        return self.in_graph([call])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CallingBench:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc")
    return CallingBench("op", tmp_path / "folder" / "rows.csv", device="cpu")


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = (
        codecs,
        context_attention,
        gathered_attention,
        kv_scoring,
        near_duplicates,
        ragged_attention,
        recall_ranking,
        received_attention,
        row_codec,
    )
    for script in scripts:
        monkeypatch.setattr(script, "copies_for", lambda n_bytes: 2)


def impls_of(bench: Bench) -> set[str]:
    return {row.impl for row in bench.rows}


def test_uneven_lengths_are_the_same_each_time_and_have_the_mean_asked_for() -> None:
    lengths = uneven_lengths(64, 16384, 0.3, 1.0)
    assert lengths == uneven_lengths(64, 16384, 0.3, 1.0)
    assert all(0.02 * 16384 - 1 <= length <= 16384 for length in lengths)
    assert math.isclose(sum(lengths) / 64, 0.3 * 16384, rel_tol=0.02)
    assert max(lengths) > 4 * min(lengths)
    assert uneven_lengths(1, 1000, 0.3, 1.0) in ([300], [299])
    assert min(uneven_lengths(8, 10, 0.05, 1.0)) == 1


def test_the_decode_cases_are_distinct_and_fit_together() -> None:
    assert len({str(case) for case in DECODE_CASES}) == len(DECODE_CASES)
    for case in DECODE_CASES:
        assert len(case.lengths()) == case.n_segments
        assert case.groups * case.num_key_value_heads == case.num_attention_heads
    assert DECODE_CASES[-1].lengths() == [32768, 1024, 1024, 1024, 1024, 1024, 1024, 1024]


@pytest.mark.parametrize("n_bytes", [0, 1, 5_000_000, 20_000_000, 10**9])
def test_there_are_8_to_32_copies(n_bytes: int) -> None:
    copies = copies_for(n_bytes)
    assert 8 <= copies <= 32
    assert copies == 32 or copies * n_bytes >= 4 * L2_BYTES


def test_quantiles_are_those_of_the_measurements() -> None:
    assert times_of([float(number) for number in range(100, -1, -1)]) == Times(50.0, 20.0, 80.0)
    assert times_of([3.0, 3.0]) == Times(3.0, 3.0, 3.0)


def test_the_relative_error_is_a_ratio_of_norms() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact.float(), exact) == 0
    assert math.isclose(relative_error(exact + torch.tensor([0.0, 0.5]), exact), 0.1)
    assert relative_error(torch.ones(1), torch.zeros(1, dtype=torch.float64)) == 1


@pytest.mark.parametrize("wrong", [torch.tensor([1.1]), torch.tensor([torch.nan]), torch.ones(1, 1)])
def test_a_wrong_result_is_refused_before_anything_is_timed(bench: CallingBench, wrong: Tensor) -> None:
    exact = torch.ones(1, dtype=torch.float64)
    assert check_error("impl", torch.ones(1), exact, 0.01) == 0
    called: list[int] = []

    def call() -> Tensor:
        called.append(1)
        return wrong

    with pytest.raises(WrongResultError, match="case, impl: expected"):
        bench.measure("case", "impl", lambda: [call], exact=[exact, exact], limit=0.01)
    assert len(called) == 2
    assert bench.rows == []


def test_a_wrong_last_copy_is_refused(bench: CallingBench) -> None:
    one = torch.ones(1)
    with pytest.raises(WrongResultError):
        bench.measure("case", "impl", lambda: [lambda: one, lambda: 2 * one], exact=[one, one], limit=0.01)


def test_a_peer_that_is_missing_is_left_out_with_a_reason(
    bench: CallingBench, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> list[Call]:
        raise ImportError("No module named 'peer'\nmore")

    bench.measure("case", "peer", missing)
    assert bench.rows == []
    assert capsys.readouterr().out == "case  peer: left out, No module named 'peer'\n"
    with pytest.raises(ImportError):
        bench.measure("case", "ours", missing, may_raise=(ValueError,))


def test_rows_hold_floor_and_throughput_and_return_from_the_file(
    bench: CallingBench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.add("a case, with a comma", "impl", Times(2.0, 1.0, 3.0), n_bytes=1000, flops=6e6, error=0.5)
    bench.add("other", "impl", Times(2.0, 1.0, 3.0))
    bench.finish()
    with bench.output.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first["case"] == "a case, with a comma"
    numbers = [first[name] for name in ("median_us", "p20_us", "p80_us", "bytes", "floor_us", "fraction_of_floor")]
    assert numbers == ["2", "1", "3", "1000", "1", "0.5"]
    assert (first["tflops"], first["error"], first["commit"], first["torch"]) == ("3", "0.5", "abc", torch.__version__)
    assert (second["bytes"], second["floor_us"], second["tflops"], second["error"]) == ("", "", "", "")
    assert set(first) == {*Row.__annotations__, *Provenance.__annotations__}
    assert all(first[name] for name in Provenance.__annotations__)
    assert "a case, with a comma  impl" in capsys.readouterr().out


def test_what_was_measured_is_written_when_a_later_case_fails(
    bench: CallingBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(bench: Bench, case: int) -> None:
        if case == 2:
            assert bench.output.exists(), "a run that is killed keeps the cases before"
            raise WrongResultError("case 2")
        bench.add(case, "impl", Times(2.0, 1.0, 3.0))

    monkeypatch.setattr(harness, "start", lambda op, cases: (bench, cases))
    with pytest.raises(WrongResultError, match="case 2"):
        harness.run_cases("op", [1, 2, 3], run)
    with bench.output.open(newline="", encoding="utf-8") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["1"]


def test_columns_of_the_table_are_aligned() -> None:
    rows = [Row("op", "c" * n, "impl", 1.0, 1.0, 1.0) for n in (1, 9)]
    lines = table(rows).splitlines()
    assert [line.index("impl") for line in lines] == [11, 11, 11]


def test_the_commit_is_that_of_the_checkout_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert commit(tmp_path) == "unknown"
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "one")
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "new").write_text("")
    assert commit(tmp_path) == f"{head}-dirty"
    monkeypatch.setenv(COMMIT_VARIABLE, "given")
    assert commit(tmp_path) == "given"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COMMIT_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == "unknown"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --output"),
        (["--output", "x.csv", "--cases", "nonsense"], "--cases: expected a part of one of"),
        (["--output", "x.csv"], "needs a CUDA GPU, and there is none"),
    ],
)
def test_the_command_line_says_what_is_missing(
    script: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(f"kvzip_press.kernels.benchmarks.{script}").main()
    assert message in f"{raised.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_hold_the_packed_context(page_size: int) -> None:
    inputs = DecodeInputs.random(SMALL, CPU)
    pages, kv = decode_peers.pages_of(inputs.cu_seqlens, page_size), decode_peers.paged(inputs, page_size)
    assert kv.shape == (pages.indices.numel(), 2, page_size, 1, SMALL.head_dim)
    assert {tensor.dtype for tensor in pages} == {torch.int32}
    keys, values = (torch.cat(list(rows)) for rows in zip(*by_page(kv, pages), strict=True))
    assert torch.equal(keys, inputs.keys)
    assert torch.equal(values, inputs.values)


def by_page(kv: Tensor, pages: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [n, head_dim] of each request, as a page table means them."""
    found = []
    for (begin, end), last in zip(pairwise(pages.indptr.tolist()), pages.last_page_len.tolist(), strict=True):
        assert 1 <= last <= kv.shape[2]
        rows = kv[pages.indices[begin:end].long(), :, :, 0].transpose(0, 1).flatten(1, 2)
        n_rows = (end - begin - 1) * kv.shape[2] + last
        found.append((rows[0, :n_rows], rows[1, :n_rows]))
    return found


def test_the_copying_append_puts_a_row_behind_each_head() -> None:
    inputs = DecodeInputs.random(SMALL, CPU)
    (call,) = decode_peers.copying_append(SMALL, [inputs])
    keys, values = call()
    for got, packed, tail in ((keys, inputs.keys, inputs.tail_keys), (values, inputs.values, inputs.tail_values)):
        new = tail[:, :, 0].flatten(0, 1)
        bounds = pairwise(inputs.cu_seqlens.tolist())
        expected = [row for head, (a, b) in enumerate(bounds) for row in (packed[a:b], new[head : head + 1])]
        assert torch.equal(got, torch.cat(expected))


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[rows, heads, head_dim] to [n, heads, head_dim]."""
    turned = (tensor.transpose(0, 1) for tensor in (query, keys, values))
    return scaled_dot_product_attention(*turned).transpose(0, 1)


class PagedWrapper:
    """FlashInfer's decode wrapper as its documentation describes it."""

    def __init__(self, workspace: Tensor, layout: str, *, use_tensor_cores: bool) -> None:
        assert layout == "NHD" and use_tensor_cores

    def plan(self, indptr: Tensor, indices: Tensor, last: Tensor, *shape: int, **dtypes: torch.dtype) -> None:
        self.pages, self.shape = decode_peers.Pages(indptr, indices, last), shape

    def run(self, query: Tensor, kv: Tensor) -> Tensor:
        groups, kv_heads, head_dim, page_size = self.shape
        assert query.shape[1:] == (groups, head_dim) and kv.shape[2:] == (page_size, kv_heads, head_dim)
        outs = [
            attend(one[None], *(x[:, None].expand(-1, groups, -1) for x in pair))
            for one, pair in zip(query, by_page(kv, self.pages), strict=True)
        ]
        return torch.cat(outs)


def varlen(query: Tensor, keys: Tensor, values: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Attention of variable length as its documentation describes it."""
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    keys, values = (tensor.expand(-1, query.shape[1], -1) for tensor in (keys, values))
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return torch.cat([attend(query[a:b], keys[c:d], values[c:d]) for (a, b), (c, d) in bounds])


def with_kvcache(query: Tensor, keys: Tensor, values: Tensor, *, cache_seqlens: Tensor) -> Tensor:
    """flash-attn's decode as its documentation describes it."""
    outs = [
        attend(query[row], *(x[row, :n].expand(-1, query.shape[2], -1) for x in (keys, values)))
        for row, n in enumerate(cache_seqlens.tolist())
    ]
    return torch.stack(outs)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what needs a GPU."""
    modules: dict[str, Any] = {
        "flashinfer": SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PagedWrapper),
        "flash_attn": SimpleNamespace(flash_attn_varlen_func=varlen, flash_attn_with_kvcache=with_kvcache),
        "torch.nn.attention.varlen": SimpleNamespace(varlen_attn=varlen),
    }
    for name, functions in modules.items():
        module = ModuleType(name)
        vars(module).update(vars(functions))
        monkeypatch.setitem(sys.modules, name, module)


def test_all_decode_implementations_agree_in_one_run(bench: CallingBench, peers: None) -> None:
    ragged_attention.run(bench, SMALL)
    assert impls_of(bench) >= {"ours reference, tail 0", "ours reference, tail 64", "sdpa flash, full cache"}
    assert impls_of(bench) >= {*decode_peers.EXACT, *decode_peers.TIME_ONLY}
    assert {"flashinfer, page 1: plan alone, wall clock", "flashinfer, page 16: plan alone, wall clock"} < impls_of(
        bench
    )
    errors = {row.impl: row.error for row in bench.rows}
    assert all(0 < errors[impl] < 0.01 for impl in (*decode_peers.EXACT, "ours reference, tail 64"))
    assert all(errors[impl] is None for impl in decode_peers.TIME_ONLY)


def test_a_decode_run_without_the_peers_goes_on(
    bench: CallingBench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("flashinfer", "flash_attn", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, None)
    ragged_attention.run(bench, SMALL)
    assert not impls_of(bench) & {*decode_peers.EXACT}
    assert "memcpy" in impls_of(bench)
    assert capsys.readouterr().out.count("left out") >= len(decode_peers.EXACT) + 2


def test_the_bytes_of_a_decode_are_those_of_the_pairs_it_reads(bench: CallingBench, peers: None) -> None:
    ragged_attention.run(bench, SMALL)
    n_bytes = {row.impl: row.bytes for row in bench.rows}
    context = sum(SMALL.lengths()) * 2 * 16 * 2
    assert n_bytes["ours reference, tail 0"] == n_bytes["flashinfer, page 16"] == context
    assert n_bytes["ours reference, tail 64"] == context + 2 * 2 * 64 * 2 * 16 * 2
    assert n_bytes["memcpy"] == 2 * context
    assert n_bytes["sdpa flash, full cache"] == 2 * 2 * 50 * 2 * 16 * 2


def test_codecs_are_measured_beside_bf16_and_a_failure_does_not_end_the_run(
    bench: CallingBench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Triton here, the op chooses; block sizes of a kernel's own need it, and are left out with a reason."""
    monkeypatch.setattr(codecs, "IMPL", None)
    codecs.measure_all(bench, [SMALL], math.inf)
    assert impls_of(bench) >= {"bf16, tail 0", "int8, tail 0", "k8v4, tail 0", "int4, tail 0", "fp8, tail 64"}
    parted = {name for name in impls_of(bench) if "exact tokens" in name}
    assert {name.split()[0] for name in parted} == {"k8v4", "int4", "tiers"} and len(parted) == 6
    by_name = {row.impl: row for row in bench.rows}
    n_pairs = sum(SMALL.lengths())
    assert by_name["int8, tail 0"].bytes == n_pairs * 2 * (16 + 2)
    assert by_name["int4, tail 0"].bytes == n_pairs * 2 * (8 + 4)
    assert all(row.error is not None and row.error < codecs.ERROR_LIMIT for row in bench.rows if row.impl[:4] != "bf16")
    monkeypatch.setattr(codecs, "ERROR_LIMIT", 1e-12)
    bench.rows.clear()
    codecs.measure_all(bench, [SMALL], math.inf)
    assert impls_of(bench) == {"bf16, tail 0"}
    assert "expected a relative error of at most 1e-12" in capsys.readouterr().out


def test_no_measurement_of_codecs_begins_when_the_time_is_over(bench: CallingBench) -> None:
    codecs.measure_all(bench, [SMALL], 0.0)
    assert not bench.rows


@pytest.mark.parametrize("name", ["shared", "distinct"])
def test_attention_to_a_pool_is_measured_beside_a_read_per_row(
    name: str, bench: CallingBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    case = context_attention.ContextCase(name, 1 if name == "shared" else 3, 5, context=90, **shape)
    paged = ModuleType("vllm.vllm_flash_attn")
    vars(paged)["flash_attn_varlen_func"] = paged_attention
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", paged)
    context_attention.run(bench, case)
    of_32_layers = ("plan of 32 layers", "nobody reads a context, 32 layers")
    assert impls_of(bench) == {
        *("ours aten", "ours reference", "ours, a read per row"),
        *of_32_layers,
        *("ours, pages merged in place", "ours, int8, turned", "vllm, paged, as many pairs in each head"),
    }
    n_bytes = {row.bytes for row in bench.rows if row.impl not in (*of_32_layers, "ours, int8, turned")}
    assert n_bytes == {2 * 2 * 16 * sum(case.lengths())}
    assert {row.bytes for row in bench.rows if row.impl == "ours, int8, turned"} == {2 * 18 * sum(case.lengths())}


def test_attention_to_listed_pairs_is_measured_beside_a_context_of_them_alone(bench: CallingBench) -> None:
    case = gathered_attention.RecallCase(6, 2, 16, context=90, listed=20, cluster=7, tail=3)
    lists = case.lists(3, 6, CPU)
    assert [len(set(one.tolist())) for one in lists.view(-1, 20)] == [20] * 18, "a list has a pair once"
    assert all(set((one.view(6, 20) // 90).T.flatten().tolist()) == {0, 1} for one in lists)
    gathered_attention.run(bench, case)
    assert impls_of(bench) == {"contiguous", "listed", "copied first", "a list for each query head"}
    assert {row.impl: row.bytes for row in bench.rows}["listed"] == 2 * 20 * 2 * 16 * 2
    assert all(row.error is not None and row.error < gathered_attention.ERROR_LIMIT for row in bench.rows)


@pytest.mark.parametrize("case", recall_ranking.CASES, ids=str)
def test_ranking_is_measured_and_lists_of_other_pairs_are_refused(
    case: recall_ranking.RankingCase, bench: CallingBench
) -> None:
    size = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    small = replace(case, group_size=7, context=90, budget=30, **size)
    recall_ranking.run(bench, small)
    assert impls_of(bench) == {"ours reference"}
    rows, vectors = 2 * case.batch, 2 if case.has_bounds else 1
    listed = 8 * 30 * rows * (3 if case.per_query_head else 1)
    assert {row.bytes for row in bench.rows} == {rows * (11 * 16 * 2 * vectors + 12 * 4) + listed}
    index, bounds = torch.arange(40), torch.tensor([0, 20, 40])
    with pytest.raises(WrongResultError, match="got 20 others of 40"):
        recall_ranking.check("impl", (index + 10, bounds), (index, bounds))
    with pytest.raises(WrongResultError, match="expected lists at"):
        recall_ranking.check("impl", (index, bounds), (index, bounds + 1))


@pytest.mark.parametrize("case", near_duplicates.CASES, ids=str)
def test_near_duplicates_are_measured_and_others_are_refused(
    case: near_duplicates.DuplicatesCase, bench: CallingBench
) -> None:
    small = replace(case, batch=min(case.batch, 2), n=300, num_key_value_heads=2)
    near_duplicates.run(bench, small)
    assert impls_of(bench) == {"ours reference"}
    (row,) = bench.rows
    assert (row.bytes, row.error) == (small.batch * 2 * 300 * (256 + 8), 0.0)
    keys, valid = small.tensors(CPU)
    found = near_duplicates.near_duplicates(keys, valid, near_duplicates.THRESHOLD)
    assert float((found >= 0).double().mean()) > 0.95 if case.repeated else not (found >= 0).any()
    with pytest.raises(WrongResultError, match="something else for 1 of all"):
        near_duplicates.check("impl", found + 1, found)


@pytest.mark.parametrize("case", received_attention.CASES, ids=str)
def test_received_attention_is_measured_and_other_sums_are_refused(
    case: received_attention.ReceivedCase, bench: CallingBench
) -> None:
    small = replace(case, batch=2, n=300, num_attention_heads=4, num_key_value_heads=2)
    received_attention.run(bench, small)
    assert impls_of(bench) == {"ours reference"}
    (row,) = bench.rows
    assert row.bytes == 2 * (4 * case.n_rows * 256 + 2 * 300 * (256 + 12)) and 0 < row.error < 1e-5
    sums = torch.ones(2, 3)
    with pytest.raises(WrongResultError, match=r"differ by 0\.1 of them"):
        received_attention.check("impl", 1.1 * sums, sums)


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """vLLM's attention over pages as its source describes it."""
    assert keys.shape == values.shape == (len(keys), 16, 2, 16) and int(options["block_table"].max()) < len(keys)
    assert query.shape[0] == len(options["seqused_k"]) == len(options["cu_seqlens_q"]) - 1
    assert int(options["seqused_k"].max()) == options["max_seqlen_k"] == options["block_table"].shape[1] * 16
    return query


def test_scoring_runs(bench: CallingBench) -> None:
    case = kv_scoring.ScoringCase(2, n_rows=9, n_chunk=7, n_sink=2, num_attention_heads=6, num_key_value_heads=2)
    kv_scoring.run(bench, case)
    assert "ours reference" in impls_of(bench)
    assert case.flops() == 2 * 2 * 6 * 128 * sum(9 + i + 1 for i in range(9))
    assert case.n_bytes() == 2 * sum(tensor.numel() for tensor in kv_scoring.ScoringInputs.random(case, CPU))


@pytest.mark.parametrize("op", [case.op for case in ragged_pack.CASES])
def test_packing_runs(op: str, bench: CallingBench) -> None:
    ragged_pack.run(bench, ragged_pack.PackCase(op, num_key_value_heads=2, length=90, head_dim=8, batch=2))
    assert impls_of(bench) >= {"ours reference", "memcpy"}


def test_packing_that_differs_is_refused(bench: CallingBench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ragged_pack.PackCase("pack", num_key_value_heads=2, length=90, head_dim=8)
    calls = ragged_pack.calls_of(case, CPU)
    right: Callable[[], Any] = calls["reference"]
    keys, *others = right().columns
    wrong = right()._replace(columns=(keys + 1, *others))
    monkeypatch.setattr(ragged_pack, "calls_of", lambda *_: {"reference": right, "other": lambda: wrong})
    with pytest.raises(WrongResultError, match="other: expected the bits of the reference"):
        ragged_pack.run(bench, case)


@pytest.mark.parametrize("case", row_codec.CASES, ids=str)
def test_encoding_and_decoding_run(
    case: row_codec.CodecCase, bench: CallingBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(case, num_key_value_heads=2, length=9, head_dim=16)
    row_codec.run(bench, small)
    assert {"ours reference", "memcpy"} <= impls_of(bench)
    bits, extra = {"int8": (8, 2), "fp8": (8, 2), "int4": (4, 4), "int2": (2, 4)}[case.codec]
    assert {row.bytes for row in bench.rows} == {2 * 9 * (16 * 2 + 16 * bits // 8 + extra)}
    wrong = row_codec.encode_rows(torch.ones(2, 16), case.codec), row_codec.encode_rows(-torch.ones(2, 16), case.codec)
    pair = wrong if case.op == "encode" else [row_codec.decode_rows(one) for one in wrong]
    with pytest.raises(WrongResultError, match="expected"):
        row_codec.check("impl", small, *pair)


def test_a_replay_runs(bench: CallingBench) -> None:
    case = replay_attention.ReplayCase(9, 40, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    replay_attention.run(bench, case)
    assert impls_of(bench) >= {"ours reference", "sdpa, causal_lower_right", "sdpa, bool mask, keys repeated"}
    assert case.flops() == 4 * 6 * 16 * sum(40 + i + 1 for i in range(9))
    assert case.flops(hidden_too=True) == 4 * 6 * 16 * 9 * 49


@pytest.mark.gpu
def test_a_gpu_copies_about_as_fast_as_it_reads() -> None:
    bandwidth = read_bandwidth(5)
    assert 1e5 < bandwidth < 2e7
    pairs = [[torch.ones(2**25, device="cuda") for _ in range(2)] for _ in range(8)]
    expected = 2 * pairs[0][0].nbytes / bandwidth
    graph = time_in_graph([partial(target.copy_, source) for target, source in pairs], 5)
    assert 0.5 * expected < graph.median < 3 * expected
    assert 0.5 * expected < time_eager(partial(pairs[0][0].copy_, pairs[0][1]), 5).median < 4 * expected
