"""Dense attention with its log-sum-exp, and the merge of two such results, against the formula in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvzip_press.kernels.dense_attention import attention_with_lse, merge_attention, reference

Accurate = Callable[[Tensor, Tensor, Tensor], None]
View = Callable[[Tensor], Tensor]

LAW = settings(deadline=None, max_examples=25, derandomize=True)
LENGTHS = [0, 1, 63, 64, 65, 300]
IMPLS = [None, "reference"]


def inputs(
    n_rows: int,
    n_keys: int,
    *,
    batch_size: int = 1,
    kv_heads: int = 2,
    groups: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(kv_heads * groups, n_rows), (kv_heads, n_keys), (kv_heads, n_keys)]
    query, keys, values = (torch.randn(batch_size, *shape, head_dim).to(device, dtype) for shape in shapes)
    return query * 2, keys, values


def formula(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """softmax(query keys^T) values, and the log-sum-exp, straight from their definitions, all in ``dtype``."""
    groups = query.shape[1] // keys.shape[1]
    query = query.to(dtype)
    keys, values = (tensor.to(dtype).repeat_interleave(groups, 1) for tensor in (keys, values))
    logits = query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    if logits.shape[-1] == 0:
        return query.new_zeros(*query.shape[:3], values.shape[-1]), query.new_full(query.shape[:3], -torch.inf)
    shares = logits.softmax(-1).masked_fill(logits.isinf().all(-1, keepdim=True), 0.0)
    return shares @ values, logits.logsumexp(-1)


def lower_right(n_rows: int, n_keys: int) -> Tensor:
    """Row i sees key j if and only if j <= n_keys - n_rows + i."""
    rows, keys = torch.arange(n_rows)[:, None], torch.arange(n_keys)
    return keys <= n_keys - n_rows + rows


def assert_both(got: tuple[Tensor, Tensor], exact: Any, plain: Any, accurate: Accurate) -> None:
    for one, exact_one, plain_one in zip(got, exact, plain, strict=True):
        accurate(one, exact_one, plain_one)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 4, 7])
@pytest.mark.parametrize("n_keys", LENGTHS)
def test_it_equals_the_formula_at_every_length_and_group(
    n_keys: int, groups: int, causal: bool, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    query, keys, values = inputs(5, n_keys, groups=groups, batch_size=2, device=device)
    visible = lower_right(5, n_keys).to(device) if causal else None
    got = attention_with_lse(query, keys, values, causal=causal, impl=impl)
    plain = formula(query, keys, values, visible, dtype=torch.float32)
    assert_both(got, formula(query, keys, values, visible), plain, assert_accurate)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 130])
def test_each_precision_errs_no_more_than_a_plain_computation_in_it(
    n_rows: int, dtype: torch.dtype, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    query, keys, values = inputs(n_rows, 130, head_dim=32, dtype=dtype, device=device)
    visible = lower_right(n_rows, 130).to(device)
    out, lse = attention_with_lse(query, keys, values, causal=True, impl=impl)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    exact, plain = (formula(query, keys, values, visible, dtype=kind) for kind in (torch.float64, dtype))
    assert_both((out, lse), exact, plain, assert_accurate)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True])
def test_fp64_stays_fp64(causal: bool, impl: str | None) -> None:
    query, keys, values = inputs(9, 70, dtype=torch.float64)
    out, lse = attention_with_lse(query, keys, values, causal=causal, impl=impl)
    exact = formula(query, keys, values, lower_right(9, 70) if causal else None)
    torch.testing.assert_close((out, lse), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask_shape", [(1, 1), (1, 6), (2, 1), (2, 6)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_narrows_what_rows_see_and_a_blind_row_gives_zero(
    mask_shape: tuple[int, int], causal: bool, assert_accurate: Accurate
) -> None:
    query, keys, values = inputs(9, 40, batch_size=2)
    mask = torch.rand(*mask_shape, 9, 40) < 0.3
    mask[:, :, 4] = False
    visible = (mask & lower_right(9, 40) if causal else mask).expand(2, 6, -1, -1)
    out, lse = attention_with_lse(query, keys, values, causal=causal, mask=mask)
    assert not out[:, :, 4].any()
    assert (lse[:, :, 4] == -torch.inf).all()
    plain = formula(query, keys, values, visible, dtype=torch.float32)
    assert_both((out, lse), formula(query, keys, values, visible), plain, assert_accurate)


def test_more_causal_rows_than_keys_leave_the_first_rows_blind(assert_accurate: Accurate) -> None:
    query, keys, values = inputs(9, 4)
    out, lse = attention_with_lse(query, keys, values, causal=True)
    assert not out[:, :, :5].any()
    assert (lse[:, :, :5] == -torch.inf).all()
    plain = formula(query, keys, values, lower_right(9, 4), dtype=torch.float32)
    assert_both((out, lse), formula(query, keys, values, lower_right(9, 4)), plain, assert_accurate)


@pytest.mark.parametrize("causal", [False, True])
def test_softcap_and_scaling_act_in_this_order(causal: bool, assert_accurate: Accurate) -> None:
    query, keys, values = inputs(9, 70)
    visible = lower_right(9, 70) if causal else None
    got = attention_with_lse(query, keys, values, causal=causal, scaling=0.7, softcap=3.0)
    exact = formula(query, keys, values, visible, scaling=0.7, softcap=3.0)
    plain = formula(query, keys, values, visible, scaling=0.7, softcap=3.0, dtype=torch.float32)
    assert_both(got, exact, plain, assert_accurate)


def test_values_may_have_a_head_dim_of_their_own(assert_accurate: Accurate) -> None:
    query, keys, _ = inputs(9, 70)
    values = torch.randn(1, 2, 70, 24)
    got = attention_with_lse(query, keys, values, causal=True)
    plain = formula(query, keys, values, lower_right(9, 70), dtype=torch.float32)
    assert_both(got, formula(query, keys, values, lower_right(9, 70)), plain, assert_accurate)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True])
def test_strided_views_are_read_in_their_bounds(causal: bool, impl: str | None, inside_nan: View) -> None:
    tensors = inputs(9, 70, batch_size=2)
    expected = attention_with_lse(*tensors, causal=causal, impl=impl)
    query, keys, values = (inside_nan(tensor) for tensor in tensors)
    torch.testing.assert_close(attention_with_lse(query, keys, values, causal=causal, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)])
def test_dimensions_may_lie_in_any_order(order: tuple[int, ...], impl: str | None) -> None:
    tensors = inputs(9, 70, batch_size=2)
    expected = attention_with_lse(*tensors, causal=True, impl=impl)
    back = sorted(range(4), key=order.__getitem__)
    query, keys, values = (tensor.permute(order).contiguous().permute(back) for tensor in tensors)
    torch.testing.assert_close(attention_with_lse(query, keys, values, causal=True, impl=impl), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_rows_change_nothing_and_stay_small(
    causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, keys, values = inputs(50, 70)
    mask = torch.rand(1, 6, 50, 70) < 0.5 if masked else None
    expected = attention_with_lse(query, keys, values, causal=causal, mask=mask, impl="reference")
    sizes = []

    def attend(rows: Tensor, parts: Any, softcap: None) -> tuple[Tensor, Tensor]:
        sizes.append(rows.shape[:-1].numel() * sum(part.keys.shape[-2] for part in parts))
        return original(rows, parts, softcap)

    original = reference.attend
    monkeypatch.setattr(reference, "attend", attend)
    monkeypatch.setattr(reference, "MAX_LOGITS", 3000)
    got = attention_with_lse(query, keys, values, causal=causal, mask=mask, impl="reference")
    torch.testing.assert_close(got, expected)
    assert len(sizes) > 5
    assert max(sizes) <= 3000


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_neighbour_changes_nothing(impl: str | None) -> None:
    query, keys, values = inputs(9, 70, batch_size=3)
    together = attention_with_lse(query, keys, values, causal=True, impl=impl)
    alone = attention_with_lse(query[1:2], keys[1:2], values[1:2], causal=True, impl=impl)
    torch.testing.assert_close(tuple(tensor[1:2] for tensor in together), alone, rtol=1e-6, atol=1e-6)


def test_it_equals_scaled_dot_product_attention() -> None:
    query, keys, values = inputs(9, 70)
    expected = scaled_dot_product_attention(query, keys, values, lower_right(9, 70), enable_gqa=True)
    torch.testing.assert_close(attention_with_lse(query, keys, values, causal=True)[0], expected)


@LAW
@given(
    n_keys=st.integers(1, 80),
    n_first=st.integers(0, 80),
    groups=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 1000),
)
def test_attention_to_two_sets_of_keys_merges_to_attention_to_both(
    n_keys: int, n_first: int, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    query, keys, values = inputs(4, n_keys, groups=groups)
    parts = [
        attention_with_lse(query, keys[:, :, part], values[:, :, part], causal=False)
        for part in (slice(None, n_first), slice(n_first, None))
    ]
    merged = merge_attention(*parts[0], *parts[1])
    torch.testing.assert_close(merged, attention_with_lse(query, keys, values, causal=False), rtol=1e-5, atol=1e-5)


def test_a_merge_with_what_saw_nothing_changes_nothing() -> None:
    query, keys, values = inputs(4, 30)
    seen = attention_with_lse(query, keys, values, causal=False)
    nothing = attention_with_lse(query, keys[:, :, :0], values[:, :, :0], causal=False)
    torch.testing.assert_close(merge_attention(*seen, *nothing), seen, rtol=0, atol=0)
    torch.testing.assert_close(merge_attention(*nothing, *seen), seen, rtol=0, atol=0)
    torch.testing.assert_close(merge_attention(*nothing, *nothing), nothing, rtol=0, atol=0)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 5, 16), (2, 3, 17, 80), (1, 1, 1, 128)])
def test_the_triton_merge_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device, inside_nan: View
) -> None:
    out_a, out_b = (inside_nan(torch.randn(shape, device=triton_device).to(dtype)) for _ in range(2))
    lse_a, lse_b = 3 * torch.randn(2, *shape[:3], device=triton_device)
    lse_a[0, 0, 0] = lse_b[0, -1, -1] = -torch.inf
    ours = merge_attention(out_a, lse_a, out_b, lse_b, impl="triton")
    theirs = merge_attention(out_a, lse_a, out_b, lse_b, impl="reference")
    torch.testing.assert_close(ours, theirs)


def test_a_merge_survives_logits_that_overflow_exp() -> None:
    out = torch.ones(1, 1, 1, 4)
    lse = torch.full((1, 1, 1), 500.0)
    merged_out, merged_lse = merge_attention(out, lse, 3 * out, lse)
    torch.testing.assert_close(merged_out, 2 * out)
    torch.testing.assert_close(merged_lse, lse + torch.tensor(2.0).log())


def test_a_merge_of_low_precision_sums_in_fp32() -> None:
    out_a, out_b = torch.randn(2, 1, 2, 5, 8).bfloat16()
    lse_a, lse_b = torch.randn(2, 1, 2, 5)
    merged, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    weights = torch.stack([lse_a, lse_b]).softmax(0).unsqueeze(-1)
    expected = (weights * torch.stack([out_a, out_b]).float()).sum(0).bfloat16()
    torch.testing.assert_close(merged, expected)
    assert lse.dtype == torch.float32


Q, K = (1, 6, 5, 16), (1, 2, 7, 16)
BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": torch.zeros(Q[1:])}, ValueError, "query: expected"),
    ({"query": [[1.0]]}, TypeError, "query: expected a tensor"),
    ({"query": torch.zeros(Q, dtype=torch.int32)}, TypeError, "query: expected a floating-point"),
    ({"query": torch.zeros(1, 5, 5, 16)}, ValueError, "query heads: expected a multiple"),
    ({"keys": torch.zeros(K[1:])}, ValueError, "keys: expected"),
    ({"keys": torch.zeros(2, *K[1:])}, ValueError, "keys: expected batch 1"),
    ({"keys": torch.zeros(*K[:3], 8)}, ValueError, "keys: expected batch 1, head_dim 16"),
    ({"keys": torch.zeros(K, dtype=torch.float64)}, TypeError, "keys: expected the dtype of query"),
    ({"keys": torch.zeros(K, device="meta")}, ValueError, "keys: expected device"),
    ({"values": torch.zeros(1, 2, 8, 16)}, ValueError, "values: expected"),
    ({"values": torch.zeros(K, dtype=torch.float16)}, TypeError, "values: expected the dtype of query"),
    ({"mask": torch.ones(5, 7, dtype=torch.bool)}, ValueError, "mask: expected"),
    ({"mask": torch.ones(1, 2, 5, 7, dtype=torch.bool)}, ValueError, "mask: expected"),
    ({"mask": torch.ones(1, 1, 5, 7)}, TypeError, "mask: expected torch.bool"),
    ({"mask": torch.ones(1, 1, 5, 7, dtype=torch.bool, device="meta")}, ValueError, "mask: expected device"),
    ({"softcap": 0.0}, ValueError, "softcap: expected"),
    ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS)
def test_bad_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query": torch.zeros(Q), "keys": torch.zeros(K), "values": torch.zeros(K), "causal": False}
    with pytest.raises(error, match=message):
        attention_with_lse(**(arguments | change))


CANNOT: list[dict[str, Any]] = [
    {"mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)},
    {"softcap": 1.0},
    {"keys": torch.zeros(1, 2, 0, 16), "values": torch.zeros(1, 2, 0, 16)},
    {"keys": torch.zeros(1, 2, 3, 16), "values": torch.zeros(1, 2, 3, 16), "causal": True},
    {"values": torch.zeros(1, 2, 7, 8)},
    {"keys": torch.zeros(1, 2, 16, 7).mT},
]


@pytest.mark.parametrize("change", CANNOT)
def test_a_named_implementation_raises_rather_than_fall_back(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"query": torch.zeros(Q), "keys": torch.zeros(K), "values": torch.zeros(K)}
    arguments = arguments | {"causal": False} | change
    attention_with_lse(**arguments)
    with pytest.raises(ValueError, match="impl 'aten' can do"):
        attention_with_lse(**arguments, impl="aten")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"out_a": torch.zeros(6, 5, 16)}, ValueError),
        ({"out_b": torch.zeros(1, 6, 5, 8)}, ValueError),
        ({"out_b": torch.zeros(Q, dtype=torch.float16)}, TypeError),
        ({"lse_a": torch.zeros(1, 6, 4)}, ValueError),
        ({"lse_b": torch.zeros(1, 6)}, ValueError),
        ({"lse_b": torch.zeros(1, 6, 5, dtype=torch.float64)}, TypeError),
    ],
)
def test_a_merge_names_bad_inputs(change: dict[str, Tensor], error: type[Exception]) -> None:
    out, lse = torch.zeros(Q), torch.zeros(1, 6, 5)
    arguments = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | change
    with pytest.raises(error, match=f"{next(iter(change))}: expected|out_b: expected"):
        merge_attention(**arguments)
