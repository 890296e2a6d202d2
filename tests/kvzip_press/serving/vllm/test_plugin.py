"""The plugin without vLLM: what its parts decide, against stand-ins of the classes that they derive from."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvzip_press import RaggedCache, RandomPress, compress
from kvzip_press.errors import CacheFileError, CacheMismatchError, InvalidArgumentError, UnsupportedModelError
from kvzip_press.kernels.dense_attention import attention_with_lse
from kvzip_press.kernels.row_codec import decode_rows
from kvzip_press.serving.packing import Packing, packed_cache
from kvzip_press.serving.rotation import Rotation
from kvzip_press.serving.shares import Share
from kvzip_press.serving.vllm import guard, replicas, requests, steps
from kvzip_press.serving.vllm.facts import ServedModel
from kvzip_press.serving.vllm.plugin import engine_options, register
from kvzip_press.serving.vllm.replicas import SchedulerPool, WorkerPool
from kvzip_press.testing import ByteTokenizer, tiny_model

POOL_BYTES = 10**6
LAYER = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")


@pytest.fixture
def served(model: Any, folder: Path) -> ServedModel:
    return ServedModel.of(model, folder, pool_bytes=POOL_BYTES)


@pytest.fixture
def facts(served: ServedModel, folder: Path) -> Path:
    served.write(folder / "served.json")
    return folder / "served.json"


def row_of(pools: tuple[SchedulerPool, WorkerPool], request: str, name: str | None, block: int = 7) -> int:
    """The row that a request reads, after the worker has done what the scheduler did."""
    scheduler, worker = pools
    assert scheduler.admit(request, name)
    scheduler.start(request, block)
    worker.obey(scheduler.take_orders())
    return int(worker.row_of_block[block])


def pools_of(served: ServedModel) -> tuple[SchedulerPool, WorkerPool]:
    worker = WorkerPool(served, device="cpu")
    worker.begin(64)
    return SchedulerPool(served), worker


def assert_reads(worker: WorkerPool, row: int, cache: RaggedCache, model: Any) -> None:
    expected = packed_cache(cache, model, Packing(Rotation.of(model), torch.device("cpu")))
    got = [
        worker.pool.keys[begin : begin + n]
        for begin, n in zip(worker.pool.begins[:, row].flatten(), worker.pool.lengths[:, row].flatten(), strict=True)
    ]
    assert torch.equal(torch.cat(got), expected.keys)


# ---------------------------------------------------------------------------------------------------------- the facts


def test_facts_survive_their_file(served: ServedModel, facts: Path, model: Any) -> None:
    again = ServedModel.read(facts)
    assert again == served
    assert again.rotation.layouts == Rotation.of(model).layouts
    assert torch.equal(again.rotation.frequencies, Rotation.of(model).frequencies)
    with pytest.raises(CacheMismatchError, match="expected the facts of a served model"):
        facts.write_text("{")
        ServedModel.read(facts)


def test_a_cache_of_another_model_is_told_by_its_settings_dtype_or_weights(
    served: ServedModel, tmp_path: Path, tokenizer: ByteTokenizer
) -> None:
    from kvzip_press.cache.file.reading import read_record

    others = {
        "other settings of intermediate_size": {"intermediate_size": 64},
        "other weights": {"seed": 1},
        "expected a cache in F32, as the model is, got one in BF16": {"dtype": torch.bfloat16},
    }
    for message, options in others.items():
        other = tiny_model("llama", num_layers=2, **options)  # type: ignore[arg-type]
        compress(other, tokenizer, "Some text about nothing.", RandomPress(0.5)).save(tmp_path / "other.safetensors")
        with pytest.raises(CacheMismatchError, match=message):
            served.check(read_record(tmp_path / "other.safetensors"))


def test_a_model_that_cannot_share_contexts_is_refused_before_the_engine(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding windows"):
        ServedModel.of(tiny_model("gemma3_text"), folder, pool_bytes=POOL_BYTES)


# ------------------------------------------------------------------------------------------- one pool in two processes


def test_the_worker_reads_what_the_scheduler_decided(
    served: ServedModel, model: Any, caches: dict[str, RaggedCache]
) -> None:
    pools = pools_of(served)
    rows = {name: row_of(pools, name, name, block) for block, name in enumerate(caches)}
    for name, row in rows.items():
        assert_reads(pools[1], row, caches[name], model)
    assert row_of(pools, "plain", None) == 0
    assert row_of(pools, "again", "archive") == rows["archive"], "one context, held once"


def test_a_context_that_was_dropped_is_loaded_again_on_both_sides(
    served: ServedModel, model: Any, caches: dict[str, RaggedCache]
) -> None:
    """Room for one at a time; under load the other one waits, and both sides drop the same."""
    from dataclasses import replace

    size = max(sum(int(layer.packed.cu_seqlens[-1]) for _, layer in cache.ragged_layers()) for cache in caches.values())
    pools = pools_of(replace(served, pool_bytes=size * served.shape.pair_bytes))
    for turn in range(6):
        name = ("lighthouse", "archive")[turn % 2]
        row = row_of(pools, f"request {turn}", name)
        assert_reads(pools[1], row, caches[name], model)
        assert not pools[0].admit("waiting", ("archive", "lighthouse")[turn % 2])
        pools[0].finish(f"request {turn}")
    assert pools[1].pool.names == ["archive"]


def test_a_preempted_request_is_found_by_its_new_first_block(served: ServedModel) -> None:
    pools = pools_of(served)
    row = row_of(pools, "a", "archive", block=3)
    assert row_of(pools, "a", "archive", block=9) == row
    assert row_of(pools, "b", None, block=3) == 0, "its old block is another request's now"


def test_what_cannot_be_read_is_not_admitted_and_the_others_are(served: ServedModel, folder: Path) -> None:
    pools = pools_of(served)
    path = folder / "lighthouse.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    for name in ("unknown", "../archive", "/etc/passwd", "lighthouse"):
        with pytest.raises(InvalidArgumentError, match="expected"):
            pools[0].admit(name, name)
        pools[0].finish(name)
    assert row_of(pools, "whole", "archive") > 0


def test_a_file_may_come_meanwhile(
    served: ServedModel, folder: Path, model: Any, caches: dict[str, RaggedCache]
) -> None:
    pools = pools_of(served)
    caches["archive"].save(folder / "later.safetensors")
    assert_reads(pools[1], row_of(pools, "a", "later"), caches["archive"], model)
    caches["lighthouse"].save(folder / "later.safetensors")
    assert_reads(pools[1], row_of(pools, "b", "later"), caches["lighthouse"], model)


def test_the_scheduler_reads_a_file_once_however_often_its_context_is_dropped_or_waited_for(
    served: ServedModel, folder: Path, caches: dict[str, RaggedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked at every step while a request waits."""
    from dataclasses import replace

    size = max(sum(int(layer.packed.cu_seqlens[-1]) for _, layer in cache.ragged_layers()) for cache in caches.values())
    pools, read = pools_of(replace(served, pool_bytes=size * served.shape.pair_bytes)), []
    counts = replicas.pair_counts
    monkeypatch.setattr(replicas, "pair_counts", lambda path: read.append(path.stem) or counts(path))  # type: ignore[func-returns-value]
    for turn in range(4):
        row_of(pools, str(turn), ("lighthouse", "archive")[turn % 2])
        for _ in range(3):
            assert not pools[0].admit("waiting", ("archive", "lighthouse")[turn % 2])
        pools[0].finish(str(turn))
    assert sorted(read) == ["archive", "lighthouse"]
    caches["archive"].save(folder / "lighthouse.safetensors")
    row_of(pools, "changed", "lighthouse")
    assert sorted(read) == ["archive", "lighthouse", "lighthouse"]


def test_kept_turns_are_part_of_the_context(
    served: ServedModel, folder: Path, model: Any, tokenizer: ByteTokenizer, caches: dict[str, RaggedCache]
) -> None:
    from kvzip_press import answer

    cache = caches["archive"].fork()
    answer(model, tokenizer, cache, "Which?", max_new_tokens=3, keep=True)
    cache.save(folder / "turns.safetensors")
    pools = pools_of(served)
    assert_reads(pools[1], row_of(pools, "a", "turns"), cache, model)


@pytest.mark.parametrize("n_ranks", [2, 4], ids=["a head each", "a head in two processes"])
def test_each_process_holds_its_own_heads(
    n_ranks: int, served: ServedModel, model: Any, caches: dict[str, RaggedCache]
) -> None:
    """Room for one context at a time, as the process with the most pairs has it: all put and drop the same."""
    from dataclasses import replace

    counts = {
        name: torch.stack([one.packed.seqlens[0] for _, one in cache.ragged_layers()]) for name, cache in caches.items()
    }
    room = max(Share(0, n_ranks).room(one) for one in counts.values())
    assert room == max(int(one.sum(0).max()) for one in counts.values())
    served = replace(served, pool_bytes=room * served.shape.pair_bytes, n_ranks=n_ranks)
    scheduler, workers = SchedulerPool(served), []
    for rank in range(n_ranks):
        workers.append(WorkerPool(served, device="cpu", rank=rank))
        workers[-1].begin(64)
    packing = Packing(Rotation.of(model), torch.device("cpu"))
    for turn in range(4):
        name = ("lighthouse", "archive")[turn % 2]
        assert scheduler.admit("a", name)
        scheduler.start("a", 7)
        orders = scheduler.take_orders()
        whole = packed_cache(caches[name], model, packing)
        parts = whole.keys.split(whole.lengths.flatten().tolist())
        for rank, worker in enumerate(workers):
            worker.obey(orders)
            row, head = int(worker.row_of_block[7]), rank * 2 // n_ranks
            for layer in range(2):
                begin, n = int(worker.pool.begins[layer, row, 0]), int(worker.pool.lengths[layer, row, 0])
                assert torch.equal(worker.pool.keys[begin : begin + n], parts[2 * layer + head])
        assert not scheduler.admit("b", ("archive", "lighthouse")[turn % 2])
        scheduler.finish("a")


def test_a_pool_of_codes_takes_contexts_that_are_stored_so(model: Any, folder: Path, tokenizer: ByteTokenizer) -> None:
    served = ServedModel.of(model, folder, pool_bytes=POOL_BYTES, storage="int8")
    assert served.shape.pair_bytes == 2 * (16 + 2) < served.shape.head_dim * 8
    cache = compress(model, tokenizer, "Stored in few bits.", RandomPress(0.5), storage="int8")
    cache.save(folder / "few.safetensors")
    pools = pools_of(served)
    row = row_of(pools, "a", "few")
    pool, layer = pools[1].pool, cache.layers[1]
    begin, n = int(pool.begins[1, row, 0]), int(pool.lengths[1, row].sum())
    assert torch.equal(pool.keys.codes[begin : begin + n], layer.packed.columns["key_codes"])
    assert torch.equal(pool.values.scales[begin : begin + n], layer.packed.columns["value_scales"])
    assert int(pool.n_tokens[row]) == cache.n_seen
    assert "compress it again with storage='int8'" in pools[0]._folder.refused["archive"]
    with pytest.raises(InvalidArgumentError, match=r"expected a pool's storage out of model, int8, got 'int4'"):
        ServedModel.of(model, folder, pool_bytes=POOL_BYTES, storage="int4")


def test_nothing_grows_over_many_requests(served: ServedModel) -> None:
    pools = pools_of(served)
    for number in range(50):
        row_of(pools, str(number), ("archive", "lighthouse", None)[number % 3])
        pools[0].finish(str(number))
    pools[1].obey(pools[0].take_orders())
    assert not pools[0]._held
    assert not any(pools[1]._held.values())


# ------------------------------------------------------------------------------------------- what a request may ask for


def as_sent(params: Any) -> bytes:
    return json.dumps({"prompt": "Who?", "kv_transfer_params": params}).encode()


@pytest.fixture
def check(served: ServedModel) -> Any:
    names = requests.NameCheck(served)
    return lambda params: guard.check_body(as_sent(params), names)


@pytest.mark.parametrize("params", [{"context": "archive"}, {"context": None}, {}, None])
def test_what_can_be_answered_is_accepted(params: Any, check: Any) -> None:
    check(params)


@pytest.mark.parametrize(
    "params",
    [{"context": "unknown"}, {"context": "../archive"}, {"context": "/etc/passwd"}, {"context": 5}, "archive", ["x"]],
    ids=str,
)
def test_what_cannot_is_an_error_of_the_client(params: Any, check: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"expected (the name of a context|kv_transfer_params)"):
        check(params)


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"kv_transfer_params": "unknown"}},
        {"sampling_params": {"extra_args": {"kv_transfer_params": {"context": "unknown"}}}},
        {"use_beam_search": True, "kv_transfer_params": {"context": "archive"}},
    ],
    ids=["arguments of vLLM's own", "parameters of vLLM's own", "beam search, which would not read the context"],
)
def test_a_context_is_found_wherever_vllm_takes_it_from(body: Any, served: ServedModel) -> None:
    with pytest.raises(InvalidArgumentError, match="expected"):
        guard.check_body(json.dumps(body).encode(), requests.NameCheck(served))


@pytest.mark.parametrize("body", [b"kv_transfer_params", b'"kv_transfer_params"', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_request_is_left_to_the_server(body: bytes, served: ServedModel) -> None:
    guard.check_body(body, requests.NameCheck(served))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`context_params`, with a stand-in for vLLM's class."""
    module = ModuleType("vllm")
    vars(module)["SamplingParams"] = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(requests, "_CHECKS", {})
    monkeypatch.delenv(requests.FACTS, raising=False)
    return requests.context_params


def test_parameters_of_a_question_name_its_context(asked: Any, facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vars(asked(None, temperature=0)) == {"temperature": 0}
    with pytest.raises(InvalidArgumentError, match="expected an engine with the options of engine_options"):
        asked("archive", temperature=0)
    monkeypatch.setenv(requests.FACTS, str(facts))
    made = asked("archive", temperature=0, extra_args={"own": 1})
    assert vars(made) == {
        "temperature": 0,
        "extra_args": {"own": 1, "kv_transfer_params": {"context": "archive"}},
    }
    for name in ("unknown", "../archive"):
        with pytest.raises(ValueError, match="expected the name of a context"):
            asked(name)


def test_a_damaged_file_is_refused_before_the_engine_reads_it(check: Any, folder: Path) -> None:
    path = folder / "archive.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="SHA-256") as raised:
            check({"context": "archive"})
        assert str(folder) not in str(raised.value)
    check({"context": "lighthouse"})


def test_a_file_is_read_whole_once(check: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(requests, "check_contents", read.append)
    for _ in range(3):
        check({"context": "archive"})
    assert read == [folder / "archive.safetensors"]


def test_without_an_engine_of_ours_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(requests.FACTS, raising=False)
    register()  # would import vLLM


# ------------------------------------------------------------------------------------------ against vLLM's classes


class Role(Enum):
    SCHEDULER = 0
    WORKER = 1


class Base:
    """vLLM's connector as far as it is called."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._role = role

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata


@dataclass
class Metadata:
    """vLLM's metadata of a step of CPU attention, as far as it is read."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int = 5


class Impl:
    """vLLM's layer of attention on a CPU, as far as it is read."""

    num_heads, scale, logits_soft_cap = 4, 0.25, 0
    sliding_window: Any = -1
    alibi_slopes = sinks = kv_sharing_target_layer_name = None
    attn_type = "decoder"

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        assert act_dtype == torch.float32

    def forward(self, *args: Any) -> torch.Tensor:
        assert args[5] is None, "only while memory is measured"
        filled: torch.Tensor = args[6].fill_(0)
        return filled


class GraphSupport(Enum):
    UNIFORM_BATCH = 2
    ALWAYS = 3


class Enumerated(Enum):
    CPU_ATTN = "CPU_ATTN"
    FLASH_ATTN = "FLASH_ATTN"


@dataclass
class FlashMetadata:
    """vLLM's metadata of a step of FlashAttention, as far as it is read."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int = 5
    max_seq_len: int = 64
    max_num_splits: int = 0
    scheduler_metadata: Any = None


class FlashImpl(Impl):
    """vLLM's layer of FlashAttention, as far as it is read."""

    head_size, vllm_flash_attn_version = 16, 3
    sliding_window: Any = (-1, -1)
    fa4_hd256 = batch_invariant_enabled = False


def paged_attention(
    *, q: Any, k: Any, v: Any, out: Any, cu_seqlens_q: Any, seqused_k: Any, block_table: Any, softmax_scale: float,
    causal: bool, return_softmax_lse: bool, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """FlashAttention over pages [blocks, block_size, heads, head_dim]; its log-sum-exp is [heads, tokens].

    What it does not write, behind the last request, is undefined: NaN here.
    """
    assert causal and return_softmax_lse and options["fa_version"] == 3 and options["softcap"] == 0
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    for row, (start, stop) in enumerate(pairwise(cu_seqlens_q.tolist())):
        n = int(seqused_k[row])
        own = [pages[block_table[row].long()].flatten(0, 1)[:n].transpose(0, 1)[None] for pages in (k, v)]
        got, own_lse = attention_with_lse(q[start:stop].transpose(0, 1)[None], *own, causal=True, scaling=softmax_scale)
        out[start:stop], lse[:, start:stop] = got[0].transpose(0, 1), own_lse[0]
    return out, lse


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Stand-ins for the modules of vLLM that the plugin imports; gives what it registers as backends."""
    backends: dict[str, Any] = {}
    names: dict[str, dict[str, Any]] = {
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": object,
            "KVConnectorRole": Role,
        },
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionBackend": object,
            "CPUAttentionBackendImpl": Impl,
        },
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": Enumerated,
            "register_backend": lambda name, path: backends.__setitem__(name.value, path),
        },
        "vllm.v1.attention.backends.flash_attn": {
            "FlashAttentionBackend": object,
            "FlashAttentionImpl": FlashImpl,
            "FlashAttentionMetadataBuilder": object,
        },
        "vllm.v1.attention.backends.fa_utils": {"flash_attn_varlen_func": paged_attention},
        "vllm.utils.torch_utils": {"canonicalize_singleton_dim_strides": lambda pages: pages},
        "vllm.config": {"get_current_vllm_config": lambda: backends["config"]},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.v1.attention.backend": {"AttentionCGSupport": GraphSupport},
    }
    for name, contents in names.items():
        for end in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            if part not in names:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    ours = [f"kvzip_press.serving.vllm.{name}" for name in ("attention", "connector", "cpu_backend", "cuda_backend")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield backends
    for name in ours:
        sys.modules.pop(name, None)


def parallel_of(
    world_size: int, tensor_parallel_size: int, decode_context: int = 1, use_ubatching: bool = False
) -> Any:
    return SimpleNamespace(
        use_ubatching=use_ubatching,
        world_size=world_size,
        tensor_parallel_size=tensor_parallel_size,
        decode_context_parallel_size=decode_context,
    )


def config_of(facts: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "cache_config": SimpleNamespace(enable_prefix_caching=False, cache_dtype="auto"),
        "parallel_config": parallel_of(1, 1),
        "model_config": SimpleNamespace(enable_sleep_mode=False),
        "compilation_config": SimpleNamespace(static_forward_context={}),
        "speculative_config": None,
        "lora_config": None,
        "device_config": SimpleNamespace(device=torch.device("cpu")),
        "kv_transfer_config": SimpleNamespace(
            get_from_extra_config=lambda name, default: str(facts) if name == "served_model" else default
        ),
    }
    return SimpleNamespace(**{**options, **changes})


def request_of(name: str | None, request_id: str = "a") -> Any:
    return SimpleNamespace(request_id=request_id, kv_transfer_params=None if name is None else {"context": name})


def blocks_of(first: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: ([first, first + 1],))


def connectors(facts: Path) -> tuple[Any, Any]:
    made = importlib.import_module("kvzip_press.serving.vllm.connector").ContextConnector
    cache = SimpleNamespace(num_blocks=64)
    scheduler, worker = (made(config_of(facts), role, cache) for role in (Role.SCHEDULER, Role.WORKER))
    return scheduler, worker


def test_the_connector_goes_through_the_life_of_a_request(
    vllm: Any, facts: Path, model: Any, caches: dict[str, RaggedCache]
) -> None:
    scheduler, worker = connectors(facts)
    assert scheduler.get_num_new_matched_tokens(request_of("archive"), 0) == (0, False)
    scheduler.update_state_after_alloc(request_of("archive"), blocks_of(5), 0)
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    assert_reads(worker._worker, int(worker._worker.row_of_block[5]), caches["archive"], model)
    assert scheduler.request_finished(request_of("archive"), [5, 6]) == (False, None)
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    assert not any(worker._worker._held.values())


@pytest.mark.parametrize("params", [{"context": "unknown"}, {"context": "torn"}, "archive", {"context": 5}], ids=str)
def test_a_request_whose_context_cannot_be_read_ends_with_an_error_and_the_engine_does_not(
    params: Any, vllm: Any, facts: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It came past the checks, or the context went after them: vLLM is told of a load that failed, before any step."""
    scheduler, worker = connectors(facts)
    (folder / "torn.safetensors").write_bytes((folder / "archive.safetensors").read_bytes()[:-9])
    request = SimpleNamespace(request_id="a", kv_transfer_params=params)
    for _ in range(2):  # again, if there were no pages
        assert scheduler.get_num_new_matched_tokens(request, 0) == (1, True), "a token that is loaded beside the steps"
    scheduler.update_state_after_alloc(request, blocks_of(5), 1)
    assert caplog.messages.count(f"request a ends, about what cannot be read: {params!r}") == 1
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    assert worker.get_finished(set()) == (None, {"a"}) and worker.get_block_ids_with_load_errors() == {5}
    assert scheduler.request_finished(request, [5]) == (False, None)
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    assert worker.get_finished(set()) == (None, set()) and worker.get_block_ids_with_load_errors() == set(), "once"
    assert scheduler.get_num_new_matched_tokens(request_of("archive", "b"), 0) == (0, False)


def test_a_request_waits_also_when_it_must_not_read_cached_pages(vllm: Any, facts: Path) -> None:
    """vLLM 0.32 starts such requests whatever a connector says."""
    scheduler, _ = connectors(facts)
    request = SimpleNamespace(skip_reading_prefix_cache=True)
    scheduler.on_new_request(request)
    assert request.skip_reading_prefix_cache is False


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        (
            {"cache_config": SimpleNamespace(enable_prefix_caching=True, cache_dtype="auto")},
            "--enable-prefix-caching: one question",
        ),
        ({"cache_config": SimpleNamespace(enable_prefix_caching=False, cache_dtype="fp8")}, "--kv-cache-dtype"),
        ({"parallel_config": parallel_of(2, 2)}, "--tensor-parallel-size other than 1: a context"),
        ({"parallel_config": parallel_of(2, 1)}, "--pipeline-parallel-size"),
        ({"parallel_config": parallel_of(1, 1, 2)}, "--decode-context-parallel-size"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"model_config": SimpleNamespace(enable_sleep_mode=True)}, "--enable-sleep-mode"),
        ({"parallel_config": parallel_of(1, 1, use_ubatching=True)}, "--enable-dbo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_would_answer_wrongly_are_refused(
    changes: dict[str, Any], option: str, vllm: Any, facts: Path
) -> None:
    made = importlib.import_module("kvzip_press.serving.vllm.connector").ContextConnector
    with pytest.raises(InvalidArgumentError, match=f"expected an engine that can share contexts, got {option}"):
        made(config_of(facts, **changes), Role.SCHEDULER, SimpleNamespace(num_blocks=64))


def test_an_engine_that_would_not_look_at_contexts_is_refused(vllm: Any, facts: Path) -> None:
    backend = importlib.import_module("kvzip_press.serving.vllm.cuda_backend")
    _, worker = connectors(facts)
    layers = {"model.layers.0.attn": SimpleNamespace(impl=backend.ContextFlashImpl())}
    worker._layers.update(layers)
    worker.register_kv_caches(dict.fromkeys(layers))
    worker._layers["model.layers.1.attn"] = SimpleNamespace(impl=Impl())
    with pytest.raises(InvalidArgumentError, match=r"got Impl: leave --attention-backend out, or take FLASH_ATTN"):
        worker.register_kv_caches(dict.fromkeys([*layers, "model.layers.1.attn"]))


IMPLS = ["cpu_backend.ContextAttentionImpl", "cuda_backend.ContextFlashImpl"]


def impl_of(name: str) -> Any:
    module, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"kvzip_press.serving.vllm.{module}"), attribute)()


@pytest.mark.parametrize("name", IMPLS)
def test_the_pool_and_what_a_step_takes_are_there_when_memory_is_measured(
    name: str, vllm: Any, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM loads weights, measures memory and captures a few graphs, and only then makes the connector."""
    vllm["config"], impl = config_of(facts), impl_of(name)
    workers = importlib.import_module("kvzip_press.serving.vllm.attention").WORKERS
    for _ in range(2):
        impl.process_weights_after_loading(torch.float32)
    [early] = workers
    attended: list[int] = []
    attend = steps.context_attention

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> Any:
        attended.append(len(query))
        assert options["return_lse"] is False, "vLLM wants none, and without one nothing is written for plain requests"
        return attend(query, *args, **options)

    monkeypatch.setattr(steps, "context_attention", counted)
    output = torch.full((2, 4, 16), torch.nan)
    assert impl.forward(LAYER, output, None, None, None, None, output).eq(0).all()
    assert attended == [2], "with as many tokens as vLLM measures with"
    _, worker = connectors(facts)
    assert worker._worker is early and early.row_of_block.numel() == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"sliding_window": (127, 0)}, "sliding windows"),
        ({"sliding_window": 128}, "sliding windows"),
        ({"alibi_slopes": torch.zeros(4)}, "ALiBi"),
        ({"attn_type": "encoder"}, "attention that is not a decoder's"),
        ({"kv_sharing_target_layer_name": "model.layers.0.attn"}, "layers that read another layer's keys"),
        ({"fa4_hd256": True}, "heads of 256 numbers in FlashAttention 4"),
        ({"batch_invariant_enabled": True}, "VLLM_BATCH_INVARIANT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", IMPLS)
def test_layers_that_cannot_be_merged_with_a_context_are_refused_when_they_are_loaded(
    name: str, changes: dict[str, Any], message: str, vllm: Any, facts: Path
) -> None:
    vllm["config"], impl = config_of(facts), impl_of(name)
    vars(impl).update(changes)
    with pytest.raises(InvalidArgumentError, match=f"expected plain causal attention, got a model with .*{message}"):
        impl.process_weights_after_loading(torch.float32)


def test_a_graph_does_not_keep_the_contexts_of_its_warm_up(
    vllm: Any, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were metadata shared by both, a graph would have no look-up in it, and answer about one context for ever."""
    scheduler, worker = connectors(facts)
    attention = importlib.import_module("kvzip_press.serving.vllm.attention")
    metadata = Metadata(3, torch.tensor([0, 3]), torch.tensor([3]), torch.tensor([[5]]))
    warm = attention.step_of(metadata, 4)
    assert attention.step_of(metadata, 4) is warm, "once a step, for all layers"
    monkeypatch.setattr(attention, "is_captured", lambda device: device.type == "cpu")
    scheduler.get_num_new_matched_tokens(request_of("archive"), 0)
    scheduler.update_state_after_alloc(request_of("archive"), blocks_of(5), 0)
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    captured = attention.step_of(metadata, 4)
    assert warm.plan.context_of_token.tolist() == [0] * 3 and captured.plan.context_of_token.tolist() == [1] * 3
    assert attention.step_of(metadata, 4) is captured


@pytest.mark.parametrize("max_query_len", [1, 2])
def test_each_token_of_a_step_that_writes_reads_what_its_request_reads(
    max_query_len: int, vllm: Any, facts: Path
) -> None:
    """Two requests and two places that fill a graph up, whose blocks are those of an earlier step, or -1."""
    connectors(facts)
    attention = importlib.import_module("kvzip_press.serving.vllm.attention")
    attention.WORKERS[0].row_of_block[torch.tensor([5, 9])] = torch.tensor([1, 2], dtype=torch.int32)
    starts, blocks = torch.tensor([0, 1, 2, 2, 2]), torch.tensor([[9], [5], [9], [-1]], dtype=torch.int32)
    metadata = Metadata(4, starts, torch.ones(4), blocks, max_query_len)
    assert attention.step_of(metadata, 4).plan.context_of_token.tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize(
    "name", ["rswa_prefix_lens", "mm_prefix_query_range_tensor", "mm_prefix_range_tensor", "causal"]
)
def test_a_step_of_other_attention_is_refused(name: str, vllm: Any, facts: Path) -> None:
    connectors(facts)
    metadata = Metadata(3, torch.tensor([0, 3]), torch.tensor([3]), torch.tensor([[5]]))
    vars(metadata)[name] = torch.zeros(1)
    attention = importlib.import_module("kvzip_press.serving.vllm.attention")
    with pytest.raises(InvalidArgumentError, match=f"expected a step of plain causal attention, got one with {name}"):
        attention.step_of(metadata, 4)


@pytest.mark.parametrize("layout", ["vLLM 0.24", "vLLM 0.32"])
@pytest.mark.parametrize("storage", ["model", "int8"])
def test_flash_attention_over_pages_and_ours_over_the_pool_are_one(
    storage: str, layout: str, vllm: Any, folder: Path, model: Any, tokenizer: ByteTokenizer
) -> None:
    """Two requests and a token of none, as a captured graph has it; each beside its context and own tokens, dense."""
    served = ServedModel.of(model, folder, pool_bytes=POOL_BYTES, storage=storage)
    served.write(folder / "served.json")
    compress(model, tokenizer, "Nine rooms. " * 5, RandomPress(0.5), storage=storage).save(folder / "c.safetensors")
    scheduler, worker = connectors(folder / "served.json")
    backend = importlib.import_module("kvzip_press.serving.vllm.cuda_backend")
    for number, (name, first) in enumerate((("c", 5), (None, 9))):
        assert scheduler.get_num_new_matched_tokens(request_of(name, str(number)), 0) == (0, False)
        scheduler.update_state_after_alloc(request_of(name, str(number)), blocks_of(first), 0)
    starts, seen, blocks = torch.tensor([0, 3, 4, 4]), torch.tensor([3, 20, 0]), torch.tensor([[5, 0], [9, 1], [0, 0]])
    metadata = FlashMetadata(5, starts.int(), seen.int(), blocks.int())
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    pages = torch.randn(12, 2, 16, 2, 16)
    cache = pages if layout == "vLLM 0.24" else torch.cat(pages.unbind(1), -1).transpose(1, 2)
    impl, query, output = backend.ContextFlashImpl(), torch.randn(6, 4, 16), torch.full((6, 4, 16), torch.nan)
    assert impl.forward(LAYER, query, None, None, cache, metadata, output) is output
    assert not backend.ContextFlashMetadataBuilder().use_cascade_attention()
    assert backend.ContextFlashMetadataBuilder.get_cudagraph_support(None, None) is GraphSupport.UNIFORM_BATCH
    pool, row = worker._worker.pool, int(worker._worker.row_of_block[5])
    keys, values = (decode_rows(one, torch.float32) if storage == "int8" else one for one in (pool.keys, pool.values))
    n_tokens = int(pool.n_tokens[row])
    for head in range(2):
        place = slice(int(pool.begins[1, row, head]), int(pool.begins[1, row, head] + pool.lengths[1, row, head]))
        turned = keys[place] if storage == "model" else Rotation.of(model).turned(keys[place], 1, -n_tokens)
        own_keys, own_values = (part[5, :3, head] for part in pages.unbind(1))
        every = (torch.cat(parts)[None, None] for parts in ((turned, own_keys), (values[place], own_values)))
        group = query[:3, 2 * head : 2 * head + 2].transpose(0, 1)[None]
        expected, _ = attention_with_lse(group, *every, causal=True, scaling=0.25)
        torch.testing.assert_close(output[:3, 2 * head : 2 * head + 2].transpose(0, 1)[None], expected)
    plain, _ = paged_attention(
        q=query[:4], k=pages[:, 0], v=pages[:, 1], out=torch.empty(4, 4, 16), cu_seqlens_q=starts[:3],
        seqused_k=seen, block_table=blocks, softmax_scale=0.25, causal=True, return_softmax_lse=True, fa_version=3,
        softcap=0,
    )  # fmt: skip
    assert torch.equal(output[3], plain[3]), "without a context, vLLM's own answer, to the bit"


def test_attention_over_pages_and_pool_is_one_attention(vllm: Any, facts: Path, model: Any) -> None:
    """Three requests in one step: a question to each of a context and none, and an answer that goes on."""
    scheduler, worker = connectors(facts)
    backend = importlib.import_module("kvzip_press.serving.vllm.cpu_backend")
    n_new, n_seen, blocks = [5, 2, 1], [5, 2, 38], [[1, 40], [2, 41], [4, 9]]
    for number, name in enumerate(("archive", None, "lighthouse")):
        scheduler.get_num_new_matched_tokens(request_of(name, str(number)), 0)
        scheduler.update_state_after_alloc(request_of(name, str(number)), blocks_of(blocks[number][0]), 0)
    metadata = Metadata(8, torch.tensor([0, 5, 7, 8]), torch.tensor(n_seen), torch.tensor(blocks))
    worker.bind_connector_metadata(scheduler.build_connector_meta(None))
    cache, impl = torch.full((64, 2, 32, 2 * 16), torch.nan), backend.ContextAttentionImpl()
    keys, values = torch.randn(2, sum(n_seen), 2, 16)
    slots = torch.cat(
        [torch.tensor([own[i // 32] * 32 + i % 32 for i in range(n)]) for own, n in zip(blocks, n_seen, strict=True)]
    )
    impl.do_kv_cache_update(None, keys, values, cache, torch.cat([slots, torch.tensor([-1])]))
    query, output = torch.randn(8, 4, 16), torch.full((8, 4, 16), torch.nan)
    assert impl.forward(LAYER, query, None, None, cache, metadata, output) is output
    pool, rows = worker._worker.pool, [int(worker._worker.row_of_block[own[0]]) for own in blocks]
    own = zip(query.split(n_new), keys.split(n_seen), values.split(n_seen), output.split(n_new), rows, strict=True)
    for queries, own_keys, own_values, got, row in own:
        for head in range(2):
            begin, n = int(pool.begins[1, row, head]), int(pool.lengths[1, row, head])
            context = slice(begin, begin + n)
            all_keys, all_values = (
                torch.cat([one[context], own[:, head]])[None, None]
                for one, own in ((pool.keys, own_keys), (pool.values, own_values))
            )
            group = queries[:, 2 * head : 2 * head + 2].transpose(0, 1)[None]
            expected, _ = attention_with_lse(group, all_keys, all_values, causal=True, scaling=0.25)
            torch.testing.assert_close(got[:, 2 * head : 2 * head + 2].transpose(0, 1)[None], expected)


@pytest.mark.parametrize("chosen", ["0", "1", None])
def test_the_model_runner_is_the_users_choice_or_else_that_of_vllm(
    chosen: str | None, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {} if chosen is None else {"VLLM_USE_V2_MODEL_RUNNER": chosen})
    engine_options(str(facts))
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == chosen


def test_the_entry_point_replaces_the_cpu_backend(vllm: Any, facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(requests.FACTS, "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")  # gone again afterwards
    options = engine_options(str(facts))
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"  # a fork of what has looked for GPUs cannot use them
    register()
    assert list(vllm) == ["CPU_ATTN", "FLASH_ATTN"]
    for path in vllm.values():
        module, _, attribute = path.rpartition(".")
        backend = getattr(importlib.import_module(module), attribute)
        assert backend.get_impl_cls().reads_contexts
    assert "logits_processors" not in options, "with any, vLLM takes its older model runner"
    assert options["kv_transfer_config"]["kv_load_failure_policy"] == "fail"
    assert options["kv_transfer_config"]["kv_connector_extra_config"] == {"served_model": str(facts)}
    assert options["enable_prefix_caching"] is False
    connector = importlib.import_module(options["kv_transfer_config"]["kv_connector_module_path"])
    assert hasattr(connector, options["kv_transfer_config"]["kv_connector"])


def test_a_file_that_changes_under_the_worker_ends_the_engine_and_not_the_truth(
    served: ServedModel, folder: Path
) -> None:
    scheduler, worker = pools_of(served)
    assert scheduler.admit("a", "archive")
    path = folder / "archive.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CacheFileError, match="expected a cache that kvzip-press saved, whole"):
        worker.obey(scheduler.take_orders())
