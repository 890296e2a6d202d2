"""A gate's scores against the paper's formula, written anew, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvzip_press.kernels.gate_scores import gate_scores, reference

Accurate = Callable[[Tensor, Tensor, Tensor], None]
View = Callable[[Tensor], Tensor]
IMPLS = [None, "reference", pytest.param("triton", marks=pytest.mark.triton)]
BLOCK = 64  # tokens of a program of the kernel, where heads are not wide


def inputs(
    n_tokens: int,
    *,
    heads: int = 2,
    groups: int = 3,
    dim: int = 16,
    n_sink: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Queries and keys in ``dtype``; weights, bias and sinks in fp32."""
    parameters = [(dim,), (dim,), (heads, groups), (heads, n_sink, dim)]
    tokens = [torch.randn(n_tokens, heads, groups, dim) * 3, torch.randn(n_tokens, heads, dim) * 3]
    return [x.to(device, dtype) for x in tokens] + [torch.randn(*shape).to(device) for shape in parameters]


def formula(tensors: list[Tensor], eps: float = 1e-6, dtype: torch.dtype = torch.float64) -> Tensor:
    """[heads, n_tokens]: of the softmax over a token itself and the sinks, its own share, mean over the group."""
    queries, keys, q_weight, k_weight, bias, sinks = (tensor.to(dtype) for tensor in tensors)
    queries = queries / (queries.square().mean(-1, keepdim=True) + eps).sqrt() * q_weight
    keys = keys / (keys.square().mean(-1, keepdim=True) + eps).sqrt() * k_weight
    own = torch.einsum("nhgd,nhd->nhg", queries, keys) / queries.shape[-1] ** 0.5 + bias
    others = torch.einsum("nhgd,hsd->nhgs", queries, sinks) / queries.shape[-1] ** 0.5
    return torch.cat([own.unsqueeze(-1), others], -1).softmax(-1)[..., 0].mean(-1).T


@pytest.fixture
def assert_equals_formula(assert_accurate: Accurate) -> Callable[..., Tensor]:
    """Asserts that an implementation gives the scores of the formula, within the budget of fp32."""

    def check(tensors: list[Tensor], impl: str | None, **options: Any) -> Tensor:
        scores = gate_scores(*tensors, **options, impl=impl)
        assert (scores.shape, scores.dtype) == (tensors[1].shape[1::-1], torch.float32)
        assert scores.is_contiguous()
        assert_accurate(scores, formula(tensors, **options), formula(tensors, **options, dtype=torch.float32))
        return scores

    return check


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_tokens", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 200])
def test_it_equals_the_formula_at_every_length(
    n_tokens: int, impl: str | None, device: torch.device, assert_equals_formula: Callable[..., Tensor]
) -> None:
    assert_equals_formula(inputs(n_tokens, device=device), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "n_sink"),
    [(1, 1, 16, 16), (3, 3, 6, 16), (8, 4, 16, 16), (4, 7, 16, 32), (2, 16, 16, 1), (1, 2, 1, 3), (2, 5, 100, 4)],
)
def test_it_equals_the_formula_of_every_shape(
    heads: int,
    groups: int,
    dim: int,
    n_sink: int,
    impl: str | None,
    device: torch.device,
    assert_equals_formula: Callable[..., Tensor],
) -> None:
    assert_equals_formula(inputs(70, heads=heads, groups=groups, dim=dim, n_sink=n_sink, device=device), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_fp32(
    dtype: torch.dtype, impl: str | None, device: torch.device, assert_equals_formula: Callable[..., Tensor]
) -> None:
    # The inputs are exact in fp32, so the budget is that of an fp32 computation, far below the inputs' own precision.
    tensors = inputs(70, dtype=dtype, device=device)
    assert_equals_formula(tensors, impl)
    assert_equals_formula([tensor.to(dtype) for tensor in tensors], impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [6, 16])
def test_views_of_one_projection_are_read_where_they_lie(
    dim: int, impl: str | None, device: torch.device, assert_equals_formula: Callable[..., Tensor], inside_nan: View
) -> None:
    queries, keys, *parameters = inputs(70, dim=dim, dtype=torch.bfloat16, device=device)
    projected = inside_nan(torch.cat([queries.flatten(1), keys.flatten(1)], dim=1))
    split = projected.split([queries[0].numel(), keys[0].numel()], dim=1)
    views = [split[0].unflatten(1, queries.shape[1:]), split[1].unflatten(1, keys.shape[1:])]
    assert all(view.untyped_storage().data_ptr() == projected.untyped_storage().data_ptr() for view in views)
    scores = assert_equals_formula([*views, *(inside_nan(parameter) for parameter in parameters)], impl)
    torch.testing.assert_close(scores, gate_scores(queries, keys, *parameters, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_heads_may_lie_before_the_tokens(
    impl: str | None, device: torch.device, assert_equals_formula: Callable[..., Tensor]
) -> None:
    queries, keys, *parameters = inputs(70, device=device)
    turned = queries.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3), keys.transpose(0, 1).contiguous()
    assert_equals_formula([turned[0], turned[1].transpose(0, 1), *parameters], impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_eps_counts_where_vectors_are_short(
    impl: str | None, device: torch.device, assert_equals_formula: Callable[..., Tensor]
) -> None:
    queries, keys, *parameters = inputs(9, device=device)
    scores = assert_equals_formula([queries * 1e-3, keys * 1e-3, *parameters], impl, eps=1e-3)
    assert not torch.allclose(scores, gate_scores(queries * 1e-3, keys * 1e-3, *parameters, impl=impl), atol=0.01)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_give_scores_of_zero_and_one(impl: str | None, device: torch.device) -> None:
    queries, keys, q_weight, k_weight, bias, sinks = inputs(9, groups=1, n_sink=1, device=device)
    scores = gate_scores(queries, keys, q_weight, k_weight, bias, sinks * 1e6, impl=impl)
    away = torch.einsum("nhgd,hsd->hn", queries * q_weight, sinks) < 0  # the sign of the sink's logit
    assert torch.equal(scores, away.float()) and 0 < int(away.sum()) < away.numel()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_nan_and_in_its_place(impl: str | None, device: torch.device) -> None:
    tensors = inputs(9, device=device)
    clean = gate_scores(*tensors, impl=impl)
    tensors[0][3, 1, 2, 5] = tensors[1][6, 0, 0] = torch.nan
    scores = gate_scores(*tensors, impl=impl)
    expected = torch.zeros(2, 9, dtype=torch.bool, device=device)
    expected[1, 3] = expected[0, 6] = True
    assert torch.equal(scores.isnan(), expected)
    assert torch.equal(scores[~expected], clean[~expected])


def test_fp64_stays_fp64() -> None:
    tensors = [tensor.double() for tensor in inputs(9)]
    torch.testing.assert_close(gate_scores(*tensors), formula(tensors), rtol=1e-12, atol=1e-12)


def test_blocks_of_tokens_change_nothing_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, sizes, original = inputs(50), [], reference._scores

    def scores(queries: Tensor, *rest: Tensor, eps: float) -> Tensor:
        sizes.append(len(queries))
        return original(queries, *rest, eps=eps)

    expected = gate_scores(*tensors, impl="reference")
    monkeypatch.setattr(reference, "_scores", scores)
    monkeypatch.setattr(reference, "MAX_LOGITS", 8 * 2 * 3 * 5)
    torch.testing.assert_close(gate_scores(*tensors, impl="reference"), expected)
    assert sizes == [8] * 6 + [2]


def test_the_reference_has_the_gradient_of_the_formula() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in inputs(9)]
    got = torch.autograd.grad(gate_scores(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(formula(tensors).square().sum(), tensors)
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


@pytest.mark.triton
def test_where_a_gradient_is_wanted_the_kernel_is_not_taken(triton_device: torch.device) -> None:
    tensors = inputs(9, device=triton_device)
    tensors[5].requires_grad_()
    assert gate_scores(*tensors).requires_grad
    with pytest.raises(ValueError, match="a gradient is wanted"):
        gate_scores(*tensors, impl="triton")
    with torch.no_grad():
        gate_scores(*tensors, impl="triton")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "the dtype is torch.float64"),
        ({"groups": 40, "dim": 32}, "groups x dim is 1280"),
    ],
)
def test_what_the_kernel_cannot_do_it_refuses_and_the_reference_does(
    change: dict[str, Any], message: str, triton_device: torch.device
) -> None:
    tensors = inputs(3, **change, device=triton_device)
    with pytest.raises(ValueError, match=message):
        gate_scores(*tensors, impl="triton")
    assert torch.equal(gate_scores(*tensors), gate_scores(*tensors, impl="reference"))


@pytest.mark.triton
def test_the_kernel_wants_the_numbers_of_a_head_side_by_side(triton_device: torch.device) -> None:
    queries, *rest = inputs(3, device=triton_device)
    with pytest.raises(ValueError, match="do not lie side by side"):
        gate_scores(queries.mT.contiguous().mT, *rest, impl="triton")


BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"queries": torch.zeros(7, 2, 16)}, ValueError, "queries: expected"),
    ({"queries": torch.zeros(7, 2, 3, 16, dtype=torch.int32)}, TypeError, "queries: expected a floating-point"),
    ({"queries": torch.zeros(7, 2, 0, 16)}, ValueError, "all but the first at least 1"),
    ({"keys": torch.zeros(6, 2, 16)}, ValueError, "keys: expected"),
    ({"keys": torch.zeros(7, 2, 16).half()}, TypeError, "keys: expected the dtype of queries"),
    ({"keys": torch.zeros(7, 2, 16, device="meta")}, ValueError, "keys: expected device"),
    ({"q_weight": torch.zeros(15)}, ValueError, "q_weight: expected"),
    ({"k_weight": torch.zeros(1, 16)}, ValueError, "k_weight: expected"),
    ({"bias": torch.zeros(2, 1, 3)}, ValueError, "bias: expected"),
    ({"bias": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "bias: expected a floating-point"),
    ({"sinks": torch.zeros(2, 16)}, ValueError, "sinks: expected"),
    ({"sinks": torch.zeros(3, 5, 16)}, ValueError, "sinks: expected"),
    ({"sinks": torch.zeros(2, 5, 16, device="meta")}, ValueError, "sinks: expected device"),
    ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS)
def test_bad_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("queries", "keys", "q_weight", "k_weight", "bias", "sinks")
    arguments = dict(zip(names, inputs(7), strict=True))
    with pytest.raises(error, match=message):
        gate_scores(**(arguments | change))
