"""The Triton kernels of KVzip's score against the formula over the whole matrix of rows by keys, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.kv_scoring import kv_scoring

pytest.importorskip("triton")

Accurate = Callable[[Tensor, Tensor, Tensor], None]
View = Callable[[Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

pytestmark = pytest.mark.triton
HEADS = 2


def inputs(
    n_rows: int,
    n_sink: int,
    n_chunk: int,
    device: torch.device,
    *,
    batch_size: int = 1,
    groups: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    shapes = [(HEADS * groups, n_rows), (HEADS, n_sink), (HEADS, n_chunk), (HEADS, n_rows)]
    query, *keys = (torch.randn(batch_size, *shape, head_dim).to(device, dtype) for shape in shapes)
    return query * 2, *keys  # type: ignore[return-value]  # four of them


def logits_of(
    query: Tensor, sink: Tensor, chunk: Tensor, replay: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """[batch, kv heads, groups, rows, sink + chunk + replay], -inf where a row must not look."""
    keys = torch.cat([sink, chunk, replay], 2)
    logits = query.unflatten(1, (chunk.shape[1], -1)) @ keys.mT.unsqueeze(2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).triu(1)
    future = torch.nn.functional.pad(future, (keys.shape[2] - query.shape[2], 0))
    return logits.masked_fill(future, -torch.inf)


def formula(
    tensors: Inputs,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    key_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    lse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """max over rows and group of softmax(query [sink, chunk, causal replay]^T), straight from the definition.

    A log-sum-exp that is given is taken as the number that it is: its rounding is the input's, not the kernel's.
    """
    query, sink, chunk, replay = (tensor.to(dtype) for tensor in tensors)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = logits_of(query, sink, chunk, replay, scale, softcap)
    shares = logits.softmax(-1) if lse is None else (logits - lse.to(dtype).reshape(*logits.shape[:-1], 1)).exp()
    shares = shares[..., sink.shape[2] : sink.shape[2] + chunk.shape[2]]
    if key_weight is not None:
        shares = shares * key_weight.to(dtype).unflatten(1, shares.shape[1:3]).unsqueeze(3)
    if query_weight is not None:
        shares = shares * query_weight.to(dtype)[:, None, None, :, None]
    return shares.amax((2, 3))


def log_sum_exp(tensors: Inputs, softcap: float | None = None) -> Tensor:
    wide = [tensor.double() for tensor in tensors]
    return logits_of(*wide, tensors[0].shape[-1] ** -0.5, softcap).logsumexp(-1).flatten(1, 2).float()  # type: ignore[misc]


@pytest.fixture
def assert_equals_formula(assert_accurate: Accurate) -> Callable[..., None]:
    """Asserts that the kernels give the scores of the formula, within the budget of the inputs' own precision."""

    def check(tensors: Inputs, *, lse: Tensor | None = None, **options: Any) -> None:
        scores = kv_scoring(*tensors, **options, lse=lse, impl="triton")
        assert (scores.shape, scores.dtype) == (tensors[2].shape[:3], torch.float32)
        exact, plain = formula(tensors, **options, lse=lse), formula(tensors, **options, dtype=tensors[0].dtype)
        assert_accurate(scores, exact, plain.float())
        # Half precision is read, never computed in: whatever that budget is, the error is that of sums in fp32.
        torch.testing.assert_close(scores.double(), exact, rtol=2e-5, atol=2e-6)

    return check


# Lengths around a block of 64 or 128, so that each occurs with several of the others; (n_rows, n_sink, n_chunk).
LENGTHS = [
    (1, 0, 1),
    (1, 5, 300),
    (7, 0, 63),
    (7, 1, 0),
    (7, 64, 64),
    (65, 1, 65),
    (65, 5, 127),
    (130, 0, 128),
    (130, 1, 129),
    (130, 70, 300),
    (128, 0, 1),
    (257, 5, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "n_sink", "n_chunk"), LENGTHS)
def test_it_equals_the_formula_at_every_length(
    n_rows: int,
    n_sink: int,
    n_chunk: int,
    dtype: torch.dtype,
    triton_device: torch.device,
    assert_equals_formula: Callable[..., None],
) -> None:
    groups = 1 if n_rows > 100 else 3
    assert_equals_formula(inputs(n_rows, n_sink, n_chunk, triton_device, groups=groups, dtype=dtype))


@pytest.mark.parametrize(("groups", "batch_size"), [(1, 2), (3, 2), (4, 1), (7, 1)])
def test_it_equals_the_formula_for_every_group(
    groups: int, batch_size: int, triton_device: torch.device, assert_equals_formula: Callable[..., None]
) -> None:
    tensors = inputs(9, 2, 20, triton_device, groups=groups, batch_size=batch_size, dtype=torch.bfloat16)
    assert_equals_formula(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 16, 64, 80, 96, 128, 256])
def test_it_equals_the_formula_for_every_head_dim(
    head_dim: int, dtype: torch.dtype, triton_device: torch.device, assert_equals_formula: Callable[..., None]
) -> None:
    assert_equals_formula(inputs(65, 3, 66, triton_device, groups=2, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{"scaling": 0.7}, {"scaling": -0.2}, {"softcap": 3.0}, {"scaling": 0.7, "softcap": 50.0}]
)
def test_softcap_and_scaling_act_in_this_order(
    options: dict[str, float],
    dtype: torch.dtype,
    triton_device: torch.device,
    assert_equals_formula: Callable[..., None],
) -> None:
    assert_equals_formula(inputs(70, 3, 66, triton_device, groups=1, dtype=dtype), **options)


@pytest.mark.parametrize("kind", ["positive", "signed", "negative"])
@pytest.mark.parametrize("names", [["key_weight"], ["query_weight"], ["key_weight", "query_weight"]])
def test_weights_act_before_the_maximum(
    names: list[str], kind: str, triton_device: torch.device, assert_equals_formula: Callable[..., None]
) -> None:
    tensors = inputs(70, 2, 66, triton_device, groups=2, batch_size=2)  # three blocks of rows, the last not whole
    drawn = {"key_weight": torch.rand(2, 4, 66), "query_weight": torch.rand(2, 70)}
    shift = {"positive": 0.0, "signed": 0.5, "negative": 1.1}[kind]
    assert_equals_formula(tensors, **{name: (drawn[name] - shift).to(triton_device) for name in names})


def test_a_lone_negative_row_gives_negative_scores(
    triton_device: torch.device, assert_equals_formula: Callable[..., None]
) -> None:
    weight = -torch.ones(1, 1, dtype=torch.bfloat16, device=triton_device)
    assert_equals_formula(inputs(1, 0, 20, triton_device), query_weight=weight)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_log_sum_exp_stands_for_sink_and_replay_keys(
    dtype: torch.dtype,
    softcap: float | None,
    triton_device: torch.device,
    inside_nan: View,
    assert_equals_formula: Callable[..., None],
) -> None:
    tensors = inputs(70, 5, 66, triton_device, batch_size=2, groups=2, dtype=dtype)
    lse = inside_nan(log_sum_exp(tensors, softcap))
    weight = torch.rand(2, 4, 66, device=triton_device) - 0.5
    assert_equals_formula(tensors, lse=lse, softcap=softcap)
    assert_equals_formula(tensors, lse=lse, softcap=softcap, key_weight=weight)
    query, sink, chunk, replay = tensors
    unread = (query, torch.full_like(sink, torch.nan), chunk, torch.full_like(replay, torch.nan))
    given = kv_scoring(*unread, lse=lse, softcap=softcap, impl="triton")
    torch.testing.assert_close(given, kv_scoring(*tensors, softcap=softcap, impl="triton"), rtol=1e-5, atol=1e-6)


def test_the_first_pass_gives_the_log_sum_exp(triton_device: torch.device) -> None:
    from kvzip_press.kernels.kv_scoring.triton import LOG2_E, row_lse

    tensors = inputs(130, 5, 66, triton_device)
    lse = row_lse(*tensors, scaling=0.25, softcap=None) / LOG2_E
    torch.testing.assert_close(lse, log_sum_exp(tensors), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_splits", [1, 2, 5, 100])
def test_programs_that_share_rows_change_nothing(n_splits: int, triton_device: torch.device) -> None:
    from kvzip_press.kernels.kv_scoring.triton import Config, column_max

    query, _, chunk, _ = tensors = inputs(40, 2, 20, triton_device)
    lse = log_sum_exp(tensors) * 1.4426950408889634
    config = Config(block_m=16, block_n=16, num_warps=4, num_stages=2)
    scores = column_max(query, chunk, lse, scaling=0.25, softcap=None, config=config, n_splits=n_splits)
    torch.testing.assert_close(scores.double(), formula(tensors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (32, 32)])
def test_tiles_of_any_shape_see_the_same_keys(block_m: int, block_n: int, triton_device: torch.device) -> None:
    from kvzip_press.kernels.kv_scoring.triton import LOG2_E, Config, row_lse

    tensors = inputs(70, 5, 33, triton_device, groups=1)
    config = Config(block_m, block_n, num_warps=4, num_stages=2)
    lse = row_lse(*tensors, scaling=0.25, softcap=None, config=config) / LOG2_E
    torch.testing.assert_close(lse, log_sum_exp(tensors), rtol=1e-6, atol=1e-6)


def test_strided_views_are_read_in_their_bounds(triton_device: torch.device, inside_nan: View) -> None:
    tensors = inputs(70, 3, 66, triton_device, batch_size=2, head_dim=20)
    weights = {
        "key_weight": torch.rand(2, 6, 66, device=triton_device),
        "query_weight": torch.rand(2, 70, device=triton_device),
    }
    padded = [inside_nan(tensor) for tensor in tensors]
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    for options in ({}, weights):
        expected = kv_scoring(*tensors, **options, impl="triton")
        strided = {name: inside_nan(weight) for name, weight in options.items()}
        torch.testing.assert_close(kv_scoring(*padded, **strided, impl="triton"), expected)
        torch.testing.assert_close(kv_scoring(*turned, **options, impl="triton"), expected)


def test_every_score_is_written(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    tensors = inputs(70, 3, 66, triton_device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
        scores = kv_scoring(*tensors, impl="triton")
    assert scores.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_strides_beyond_32_bits_are_followed(dim: int, triton_device: torch.device) -> None:
    tensors = inputs(3, 0, 3, triton_device, batch_size=2, groups=1, dtype=torch.bfloat16)
    far = []
    for tensor in tensors:
        stride = list(tensor.contiguous().stride())
        stride[dim] = 2**31 // max(1, tensor.shape[dim] - 1) + 64
        span = sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True) if size) + 1
        buffer = torch.empty(span, dtype=tensor.dtype, device=triton_device)
        far.append(buffer.as_strided(tensor.shape, stride).copy_(tensor))
    torch.testing.assert_close(kv_scoring(*far, impl="triton"), kv_scoring(*tensors, impl="triton"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lse": torch.zeros(1, 6, 4)}, ValueError, "lse: expected"),
        ({"lse": torch.zeros(1, 2, 5)}, ValueError, "lse: expected"),
        ({"lse": torch.zeros(1, 6, 5).double()}, TypeError, "lse: expected torch.float32"),
        ({"lse": torch.zeros(1, 6, 5).half()}, TypeError, "lse: expected torch.float32"),
        ({"lse": torch.zeros(1, 6, 5, device="meta")}, ValueError, "lse: expected device"),
        ({"replay_keys": torch.zeros(1, 2, 6, 16)}, ValueError, "replay_keys: expected"),
        ({"query": torch.zeros(1, 6, 16, 5).mT}, ValueError, "side by side"),
        ({"chunk_keys": torch.zeros(1, 2, 16, 7).mT}, ValueError, "side by side"),
    ],
)
def test_bad_inputs_raise_before_a_launch(
    change: dict[str, Any], error: type[Exception], message: str, triton_device: torch.device
) -> None:
    shapes = {"query": (6, 5), "sink_keys": (2, 4), "chunk_keys": (2, 7), "replay_keys": (2, 5)}
    arguments = {name: torch.zeros(1, *shape, 16) for name, shape in shapes.items()} | change
    on_device = {name: value if value.is_meta else value.to(triton_device) for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        kv_scoring(**on_device, impl="triton")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"), [(torch.float64, 16, "float64"), (torch.float32, 257, "head_dim is 257")]
)
def test_what_the_kernels_cannot_do_goes_to_the_reference(
    dtype: torch.dtype, head_dim: int, reason: str, triton_device: torch.device
) -> None:
    tensors = inputs(3, 1, 4, triton_device, head_dim=head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        kv_scoring(*tensors, impl="triton")
    assert torch.equal(kv_scoring(*tensors), kv_scoring(*tensors, impl="reference"))


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = inputs(3, 1, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="the device is cpu"):
        kv_scoring(*tensors, impl="triton")
    assert torch.equal(kv_scoring(*tensors), kv_scoring(*tensors, impl="reference"))


@pytest.mark.parametrize("where", ["query", "chunk", "replay", "key_weight", "query_weight"])
def test_nan_is_not_taken_for_a_small_score(where: str, triton_device: torch.device) -> None:
    """A KV head that meets a NaN gives NaN, as the reference does, which no budget accepts; the other is as it was."""
    tensors = inputs(70, 3, 40, triton_device, groups=2)
    weights = {
        "key_weight": torch.rand(1, 4, 40, device=triton_device),
        "query_weight": torch.rand(1, 70, device=triton_device),
    }
    options = weights if where in weights else {}
    clean = kv_scoring(*tensors, **options, impl="triton")
    broken = {"query": tensors[0], "chunk": tensors[2], "replay": tensors[3], **weights}[where]
    broken[(0, 5) if where == "query_weight" else (0, 0, 5)] = torch.nan
    scores = kv_scoring(*tensors, **options, impl="triton")
    assert scores[0, 0].isnan().any()
    if where != "query_weight":
        assert torch.equal(scores[0, 1], clean[0, 1])
