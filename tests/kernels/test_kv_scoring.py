"""KVzip's score against its formula over the whole matrix of rows by keys, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip_press.kernels.kv_scoring import kv_scoring, reference

Accurate = Callable[[Tensor, Tensor, Tensor], None]
View = Callable[[Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

LAW = settings(deadline=None, max_examples=25, derandomize=True)


def inputs(
    n_rows: int,
    n_sink: int,
    n_chunk: int,
    *,
    batch_size: int = 1,
    heads: int = 2,
    groups: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Inputs:
    shapes = [(heads * groups, n_rows), (heads, n_sink), (heads, n_chunk), (heads, n_rows)]
    query, *keys = (torch.randn(batch_size, *shape, head_dim).to(device, dtype) for shape in shapes)
    return query * 2, *keys  # type: ignore[return-value]  # four of them


def formula(
    query: Tensor,
    sink: Tensor,
    chunk: Tensor,
    replay: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    key_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """max over rows and group of softmax(query [sink, chunk, causal replay]^T), straight from the definition."""
    heads, n_rows = chunk.shape[1], query.shape[2]
    groups = query.shape[1] // heads
    keys = torch.cat([sink, chunk, replay], 2).to(dtype).repeat_interleave(groups, 1)
    logits = query.to(dtype) @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(n_rows, n_rows, dtype=torch.bool, device=query.device).triu(1)
    future = torch.nn.functional.pad(future, (keys.shape[2] - n_rows, 0))
    shares = logits.masked_fill(future, -torch.inf).softmax(-1)
    shares = shares[..., sink.shape[2] : sink.shape[2] + chunk.shape[2]]
    if key_weight is not None:
        shares = shares * key_weight.to(dtype)[:, :, None]
    if query_weight is not None:
        shares = shares * query_weight.to(dtype)[:, None, :, None]
    return shares.unflatten(1, (heads, groups)).amax((2, 3))


@pytest.mark.parametrize("n_sink", [0, 1, 5])
@pytest.mark.parametrize("n_rows", [1, 7, 65])
@pytest.mark.parametrize("n_chunk", [0, 1, 63, 64, 65])
def test_it_equals_the_formula_at_every_length(
    n_chunk: int, n_rows: int, n_sink: int, device: torch.device, assert_accurate: Accurate
) -> None:
    tensors = inputs(n_rows, n_sink, n_chunk, batch_size=2, device=device)
    scores = kv_scoring(*tensors)
    assert (scores.shape, scores.dtype) == ((2, 2, n_chunk), torch.float32)
    assert_accurate(scores, formula(*tensors), formula(*tensors, dtype=torch.float32))


@pytest.mark.parametrize("groups", [1, 3, 4, 7])
@pytest.mark.parametrize("heads", [1, 3])
def test_it_equals_the_formula_for_every_group(heads: int, groups: int, assert_accurate: Accurate) -> None:
    tensors = inputs(9, 2, 20, heads=heads, groups=groups)
    assert_accurate(kv_scoring(*tensors), formula(*tensors), formula(*tensors, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_fp32(
    dtype: torch.dtype, device: torch.device, assert_accurate: Accurate
) -> None:
    tensors = inputs(40, 3, 65, head_dim=64, dtype=dtype, device=device)
    scores = kv_scoring(*tensors)
    assert scores.dtype == torch.float32
    # The inputs are exact in fp32, so the budget is that of an fp32 computation, far below the inputs' own precision.
    assert_accurate(scores, formula(*tensors), formula(*tensors, dtype=torch.float32))


def test_fp64_stays_fp64() -> None:
    tensors = inputs(9, 2, 20, dtype=torch.float64)
    torch.testing.assert_close(kv_scoring(*tensors), formula(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"scaling": 0.7}, {"softcap": 3.0}, {"scaling": 0.7, "softcap": 3.0}])
def test_softcap_and_scaling_act_in_this_order(options: dict[str, float], assert_accurate: Accurate) -> None:
    tensors = inputs(9, 2, 20)
    exact, plain = (formula(*tensors, **options, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert_accurate(kv_scoring(*tensors, **options), exact, plain)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("names", [["key_weight"], ["query_weight"], ["key_weight", "query_weight"]])
def test_weights_act_before_the_maximum(names: list[str], signed: bool, assert_accurate: Accurate) -> None:
    tensors = inputs(9, 2, 20, batch_size=2)
    weights = {"key_weight": torch.rand(2, 6, 20), "query_weight": torch.rand(2, 9)}
    chosen = {name: weights[name] - 0.5 if signed else weights[name] for name in names}
    exact, plain = (formula(*tensors, **chosen, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert_accurate(kv_scoring(*tensors, **chosen), exact, plain)


def test_weights_of_one_change_nothing() -> None:
    tensors = inputs(9, 2, 20)
    weighted = kv_scoring(*tensors, key_weight=torch.ones(1, 6, 20), query_weight=torch.ones(1, 9))
    assert torch.equal(weighted, kv_scoring(*tensors))


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_rows_change_nothing_and_stay_small(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(50, 4, 70)
    weights = {"key_weight": torch.rand(1, 6, 70), "query_weight": torch.rand(1, 50)} if weighted else {}
    expected = kv_scoring(*tensors, **weights, impl="reference")
    sizes = []

    def shares(rows: Tensor, keys: Tensor, softcap: None) -> Tensor:
        result = original(rows, keys, softcap)
        sizes.append(result.numel())
        return result

    original = reference._shares
    monkeypatch.setattr(reference, "_shares", shares)
    monkeypatch.setattr(reference, "MAX_LOGITS", 3000)
    torch.testing.assert_close(kv_scoring(*tensors, **weights, impl="reference"), expected)
    assert len(sizes) > 5
    assert max(sizes) <= 3000


def log_sum_exp(query: Tensor, sink: Tensor, chunk: Tensor, replay: Tensor, softcap: float | None = None) -> Tensor:
    """The natural log of the sum of exp(logits) over what each row sees, fp64, straight from the definition."""
    keys = torch.cat([sink, chunk, replay], 2).double().repeat_interleave(query.shape[1] // chunk.shape[1], 1)
    logits = query.double() @ keys.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).triu(keys.shape[2] - query.shape[2] + 1)
    return logits.masked_fill(future, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("max_logits", [300, 1 << 20])
def test_a_given_log_sum_exp_stands_for_sink_and_replay_keys(
    softcap: float | None, weighted: bool, max_logits: int, monkeypatch: pytest.MonkeyPatch, assert_accurate: Accurate
) -> None:
    monkeypatch.setattr(reference, "MAX_LOGITS", max_logits)
    tensors = inputs(9, 2, 20, batch_size=2)
    options: dict[str, Any] = {"softcap": softcap}
    if weighted:
        options |= {"key_weight": torch.rand(2, 6, 20) - 0.5, "query_weight": torch.rand(2, 9)}
    lse = log_sum_exp(*tensors, softcap).float()
    query, sink, chunk, replay = tensors
    unread = (query, torch.full_like(sink, torch.nan), chunk, torch.full_like(replay, torch.nan))
    scores = kv_scoring(*unread, **options, lse=lse, impl="reference")
    assert_accurate(scores, formula(*tensors, **options), formula(*tensors, **options, dtype=torch.float32))


def test_a_given_log_sum_exp_of_fp64_inputs_is_fp64() -> None:
    tensors = inputs(9, 2, 20, dtype=torch.float64)
    scores = kv_scoring(*tensors, lse=log_sum_exp(*tensors))
    torch.testing.assert_close(scores, formula(*tensors), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="lse: expected"):
        kv_scoring(*tensors, lse=log_sum_exp(*tensors).float())


def test_a_given_log_sum_exp_of_no_keys_gives_no_scores() -> None:
    tensors = inputs(9, 2, 0)
    assert kv_scoring(*tensors, lse=torch.zeros(1, 6, 9), impl="reference").shape == (1, 2, 0)


def test_strided_views_are_read_in_their_bounds(inside_nan: View) -> None:
    tensors = inputs(9, 2, 20, batch_size=2)
    padded = [inside_nan(tensor) for tensor in tensors]
    torch.testing.assert_close(kv_scoring(*padded), kv_scoring(*tensors))
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    torch.testing.assert_close(kv_scoring(*turned), kv_scoring(*tensors))


def test_a_batch_neighbour_changes_nothing() -> None:
    tensors = inputs(9, 2, 20, batch_size=3)
    alone = [tensor[1:2] for tensor in tensors]
    torch.testing.assert_close(kv_scoring(*tensors)[1:2], kv_scoring(*alone), rtol=1e-6, atol=1e-6)


def test_a_score_is_a_probability_and_more_rows_never_lower_it() -> None:
    query, sink, chunk, replay = inputs(9, 2, 20)
    scores = kv_scoring(query, sink, chunk, replay)
    assert ((scores > 0) & (scores < 1)).all()
    fewer = kv_scoring(query[:, :, :5], sink, chunk, replay[:, :, :5])
    assert (scores >= fewer - 1e-6).all()


@LAW
@given(n_chunk=st.integers(1, 40), n_sink=st.integers(0, 6), n_rows=st.integers(1, 12), seed=st.integers(0, 1000))
def test_scores_move_with_their_keys(n_chunk: int, n_sink: int, n_rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, sink, chunk, replay = inputs(n_rows, n_sink, n_chunk)
    order = torch.randperm(n_chunk)
    moved = kv_scoring(query, sink, chunk[:, :, order], replay)
    torch.testing.assert_close(moved, kv_scoring(query, sink, chunk, replay)[:, :, order], rtol=1e-5, atol=1e-6)


Q, K = (1, 6, 5, 16), (1, 2, 7, 16)
BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": torch.zeros(Q[1:])}, ValueError, "query: expected"),
    ({"query": torch.zeros(Q, dtype=torch.int32)}, TypeError, "query: expected a floating-point"),
    ({"query": torch.zeros(1, 5, 5, 16)}, ValueError, "query heads: expected a multiple"),
    ({"query": torch.zeros(1, 6, 0, 16)}, ValueError, "query: expected at least one row"),
    ({"sink_keys": torch.zeros(1, 3, 4, 16)}, ValueError, "sink_keys: expected"),
    ({"sink_keys": torch.zeros(1, 2, 4, 16).half()}, TypeError, "sink_keys: expected the dtype of query"),
    ({"chunk_keys": torch.zeros(K[1:])}, ValueError, "chunk_keys: expected"),
    ({"chunk_keys": torch.zeros(*K[:3], 8)}, ValueError, "chunk_keys: expected"),
    ({"chunk_keys": torch.zeros(K, device="meta")}, ValueError, "chunk_keys: expected device"),
    ({"replay_keys": torch.zeros(1, 2, 6, 16)}, ValueError, "replay_keys: expected"),
    ({"key_weight": torch.zeros(1, 2, 7)}, ValueError, "key_weight: expected"),
    ({"key_weight": torch.zeros(1, 6, 7, dtype=torch.bool)}, TypeError, "key_weight: expected a floating-point"),
    ({"query_weight": torch.zeros(5)}, ValueError, "query_weight: expected"),
    ({"query_weight": torch.zeros(1, 5, device="meta")}, ValueError, "query_weight: expected device"),
    ({"lse": torch.zeros(1, 2, 5)}, ValueError, "lse: expected"),
    ({"lse": torch.zeros(1, 6, 5).half()}, TypeError, "lse: expected torch.float32"),
    ({"lse": torch.zeros(1, 6, 5, device="meta")}, ValueError, "lse: expected device"),
    ({"softcap": 0.0}, ValueError, "softcap: expected"),
    ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS)
def test_bad_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(Q),
        "sink_keys": torch.zeros(1, 2, 4, 16),
        "chunk_keys": torch.zeros(K),
        "replay_keys": torch.zeros(1, 2, 5, 16),
    }
    with pytest.raises(error, match=message):
        kv_scoring(**(arguments | change))
