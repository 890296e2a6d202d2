"""Attention to a packed, ragged context and a dense tail, against the formula in fp64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvzip_press.kernels.ragged_attention import ragged_attention, reference

Accurate = Callable[[Tensor, Tensor, Tensor], None]
View = Callable[[Tensor], Tensor]

LAW = settings(deadline=None, max_examples=25, derandomize=True)
CPU_IMPLS = [None, "reference"]
IMPLS = [*CPU_IMPLS, pytest.param("triton", marks=pytest.mark.triton)]
LENGTHS = {
    "empty_and_one": [0, 1, 1, 0],
    "around_a_block": [63, 64, 65, 1],
    "nothing_at_all": [0, 0, 0, 0],
    "one_long": [1500, 7, 7, 7],
    "several_parts": [1024, 1538, 511, 1025],
}


@pytest.fixture(autouse=True)
def _parts_as_for_three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long segments are cut into as many parts as there are threads; three leave a rest of 0, 1 or 2 keys."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@dataclass
class Case:
    """The tensors of a call, and how many context keys each (row, head) has."""

    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: list[int]
    tail_keys: Tensor | None = None
    tail_values: Tensor | None = None

    @property
    def cu_seqlens(self) -> Tensor:
        bounds = torch.tensor([0, *self.lengths]).cumsum(0)
        return bounds.to(self.query.device, torch.int32)

    def run(self, **options: Any) -> Any:
        return ragged_attention(
            self.query, self.keys, self.values, self.cu_seqlens, self.tail_keys, self.tail_values, **options
        )


def case(
    lengths: list[int],
    n_rows: int = 1,
    n_tail: int | None = None,
    *,
    heads: int = 2,
    groups: int = 3,
    head_dim: int = 16,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    batch_size = len(lengths) // heads if batch_size is None else batch_size
    query = 2 * torch.randn(batch_size, heads * groups, n_rows, head_dim)
    tensors: list[Tensor | None] = [query, *torch.randn(2, sum(lengths), head_dim)]
    if n_tail is not None:
        tensors += [*torch.randn(2, batch_size, heads, n_tail, head_dim)]
    query, keys, values, *tail = (tensor.to(device, dtype) for tensor in tensors if tensor is not None)
    return Case(query, keys, values, lengths, *tail)


def formula(
    case: Case,
    *,
    row_index: list[int] | None = None,
    tail_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Each query head by itself over its own keys, straight from the definition, all in ``dtype``."""
    batch_size, num_heads, n_rows, head_dim = case.query.shape
    heads = len(case.lengths) // batch_size if row_index is None or case.tail_keys is None else case.tail_keys.shape[1]
    contexts = list(zip(case.keys.split(case.lengths), case.values.split(case.lengths), strict=True))
    out = torch.zeros(batch_size, num_heads, n_rows, case.values.shape[1], dtype=dtype)
    lse = torch.full((batch_size, num_heads, n_rows), -torch.inf, dtype=dtype)
    for row in range(batch_size):
        for query_head in range(num_heads):
            head = query_head // (num_heads // heads)
            keys, values = contexts[(row if row_index is None else row_index[row]) * heads + head]
            visible = torch.ones(n_rows, keys.shape[0], dtype=torch.bool)
            if case.tail_keys is not None and case.tail_values is not None:
                keys = torch.cat([keys, case.tail_keys[row, head]])
                values = torch.cat([values, case.tail_values[row, head]])
                visible = torch.cat([visible, tail_rule(case.tail_keys, n_rows, tail_mask, row, query_head)], 1)
            logits = (case.query[row, query_head].to(dtype) @ keys.to(dtype).T).cpu()
            logits = logits * (head_dim**-0.5 if scaling is None else scaling)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~visible, -torch.inf)
            seeing = visible.any(1)
            out[row, query_head, seeing] = logits.softmax(-1)[seeing] @ values.to(dtype).cpu()
            lse[row, query_head, seeing] = logits[seeing].logsumexp(-1)
    return out, lse


def tail_rule(tail_keys: Tensor, n_rows: int, tail_mask: Tensor | None, row: int, query_head: int) -> Tensor:
    n_tail = tail_keys.shape[2]
    if tail_mask is not None:
        return tail_mask[row if tail_mask.shape[0] > 1 else 0, query_head if tail_mask.shape[1] > 1 else 0].cpu()
    return torch.arange(n_tail) <= n_tail - n_rows + torch.arange(n_rows)[:, None]


def assert_equals_formula(case: Case, accurate: Accurate, *, impl: str | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns out and lse, for what else a test asks of them."""
    device = case.query.device
    tensors = {n: torch.tensor(value, device=device) if n == "row_index" else value for n, value in options.items()}
    got = case.run(**tensors, return_lse=True, impl=impl)
    exact = formula(case, **options)
    plain = formula(case, **options, dtype=case.query.dtype)
    for one, exact_one, plain_one in zip(got, exact, plain, strict=True):
        accurate(one.cpu(), exact_one, plain_one)
    out, lse = got
    return out, lse


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n_rows", "n_tail"), [(1, None), (1, 0), (1, 1), (1, 65), (3, None), (3, 3), (24, 65)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_it_equals_the_formula_at_every_length(
    lengths: list[int],
    n_rows: int,
    n_tail: int | None,
    impl: str | None,
    device: torch.device,
    assert_accurate: Accurate,
) -> None:
    assert_equals_formula(case(lengths, n_rows, n_tail, device=device), assert_accurate, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [1, 3, 4, 7])
@pytest.mark.parametrize("heads", [1, 4])
def test_it_equals_the_formula_for_every_group(
    heads: int, groups: int, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    ragged = case([33, 0, 5, 700], 2, 9, heads=heads, groups=groups, device=device)
    assert_equals_formula(ragged, assert_accurate, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_long_head_beside_seven_short_ones_is_exact(
    impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    assert_equals_formula(case([4096, *[33] * 7], 1, 20, heads=8, device=device), assert_accurate, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_rows", [1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_precision_errs_no_more_than_a_plain_computation_in_it(
    dtype: torch.dtype, n_rows: int, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    ragged = case([600, 40, 0, 65], n_rows, 50, head_dim=32, dtype=dtype, device=device)
    out, lse = assert_equals_formula(ragged, assert_accurate, impl=impl)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_fp64_stays_fp64(impl: str | None) -> None:
    ragged = case([600, 40, 0, 65], 3, 9, dtype=torch.float64)
    got = ragged.run(return_lse=True, impl=impl)
    torch.testing.assert_close(got, formula(ragged), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mask_shape", [(1, 1), (1, 6), (2, 1), (2, 6)])
def test_a_tail_mask_replaces_the_causal_rule(
    mask_shape: tuple[int, int], impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    tail_mask = (
        torch.rand(*mask_shape, 5, 4, device=device) < 0.5
    )  # fewer tail tokens than rows, which the causal rule refuses
    ragged = case([30, 0, 0, 65], 5, 4, device=device)
    assert_equals_formula(ragged, assert_accurate, impl=impl, tail_mask=tail_mask)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_nothing_gives_zero(impl: str | None, device: torch.device) -> None:
    tail_mask = torch.zeros(1, 1, 1, 4, dtype=torch.bool, device=device)
    out, lse = case([0, 5], 1, 4, device=device).run(tail_mask=tail_mask, return_lse=True, impl=impl)
    assert not out[:, :3].any()
    assert (lse[:, :3] == -torch.inf).all()
    assert out[:, 3:].all()
    assert lse[:, 3:].isfinite().all()


def test_softcap_and_scaling_act_in_this_order(assert_accurate: Accurate) -> None:
    assert_equals_formula(case([70, 3], 3, 9), assert_accurate, impl=None, scaling=0.7, softcap=3.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_scaling_replaces_the_default(impl: str | None, device: torch.device, assert_accurate: Accurate) -> None:
    assert_equals_formula(case([70, 3], 3, 9, device=device), assert_accurate, impl=impl, scaling=0.7)


def test_values_may_have_a_head_dim_of_their_own(assert_accurate: Accurate) -> None:
    ragged = case([70, 3], 3, 9)
    ragged = replace(ragged, values=torch.randn(73, 24), tail_values=torch.randn(1, 2, 9, 24))
    assert_equals_formula(ragged, assert_accurate, impl=None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row_index", [[0, 0, 0], [1, 0, 1], [1, 1, 0]])
def test_rows_may_share_a_context(
    row_index: list[int], impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    ragged = case([33, 0, 5, 700], 1, 9, batch_size=3, device=device)
    assert_equals_formula(ragged, assert_accurate, impl=impl, row_index=row_index)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_shared_row_equals_a_copied_row(impl: str | None, device: torch.device) -> None:
    ragged = case([33, 0, 5, 700], 1, 9, device=device)
    copied = replace(ragged, keys=ragged.keys[33:].repeat(2, 1), values=ragged.values[33:].repeat(2, 1))
    copied.lengths = [5, 700, 5, 700]
    shared = ragged.run(row_index=torch.tensor([1, 1], device=device), impl=impl)
    torch.testing.assert_close(shared, copied.run(impl=impl), rtol=0, atol=0)


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_part_of_the_segments_that_are_stored_together(impl: str | None, n_rows: int, device: torch.device) -> None:
    """A slice of a longer cu_seqlens attends to its own segments and to no other."""
    lengths = [70, 3, 0, 40, 9, 21]
    whole, part = case(lengths, n_rows, 8, device=device), slice(1, 2)
    query, tails = whole.query[part], (x[part] for x in (whole.tail_keys, whole.tail_values) if x is not None)
    options = {"part_of_storage": True, "impl": impl}
    got = ragged_attention(query, whole.keys, whole.values, whole.cu_seqlens[2:5], *tails, **options)
    torch.testing.assert_close(got, whole.run(impl=impl)[part])


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views_are_read_in_their_bounds(impl: str | None, device: torch.device, inside_nan: View) -> None:
    ragged = case([600, 0, 5, 65], 3, 9, device=device)
    expected = ragged.run(impl=impl)
    assert ragged.tail_keys is not None and ragged.tail_values is not None
    padded = replace(
        ragged,
        query=inside_nan(ragged.query),
        keys=inside_nan(ragged.keys),
        values=inside_nan(ragged.values),
        tail_keys=inside_nan(ragged.tail_keys),
        tail_values=inside_nan(ragged.tail_values),
    )
    torch.testing.assert_close(padded.run(impl=impl), expected)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_dimensions_may_lie_in_any_order(impl: str | None) -> None:
    ragged = case([600, 0, 5, 65], 3, 9)
    expected = ragged.run(impl=impl)
    assert ragged.tail_keys is not None and ragged.tail_values is not None
    turned = replace(
        ragged,
        query=ragged.query.transpose(1, 2).contiguous().transpose(1, 2),
        keys=ragged.keys.T.contiguous().T,
        tail_keys=ragged.tail_keys.transpose(1, 2).contiguous().transpose(1, 2),
        tail_values=ragged.tail_values.mT.contiguous().mT,
    )
    torch.testing.assert_close(turned.run(impl=impl), expected)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_batch_neighbour_changes_no_bit(n_rows: int, impl: str | None) -> None:
    together = case([600, 0, 5, 1025, 9, 9], n_rows, 9)
    assert together.tail_keys is not None and together.tail_values is not None
    alone = Case(
        together.query[1:2],
        together.keys[600:1630],
        together.values[600:1630],
        [5, 1025],
        together.tail_keys[1:2],
        together.tail_values[1:2],
    )
    for one, both in zip(alone.run(return_lse=True, impl=impl), together.run(return_lse=True, impl=impl), strict=True):
        torch.testing.assert_close(both[1:2], one, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_lengths_equal_scaled_dot_product_attention(impl: str | None, device: torch.device) -> None:
    ragged = case([70] * 4, 5, 20, device=device)
    assert ragged.tail_keys is not None and ragged.tail_values is not None
    keys = torch.cat([ragged.keys.view(2, 2, 70, 16), ragged.tail_keys], 2)
    values = torch.cat([ragged.values.view(2, 2, 70, 16), ragged.tail_values], 2)
    visible = torch.ones(5, 90, dtype=torch.bool, device=device).tril(85)
    expected = scaled_dot_product_attention(ragged.query, keys, values, visible, enable_gqa=True)
    torch.testing.assert_close(ragged.run(impl=impl), expected)


@LAW
@given(
    lengths=st.lists(st.integers(0, 70), min_size=2, max_size=2),
    n_rows=st.integers(1, 4),
    n_tail=st.integers(0, 5),
    impl=st.sampled_from(CPU_IMPLS),
    seed=st.integers(0, 1000),
)
def test_the_order_of_keys_in_a_segment_changes_nothing(
    lengths: list[int], n_rows: int, n_tail: int, impl: str | None, seed: int
) -> None:
    torch.manual_seed(seed)
    ragged = case(lengths, n_rows, n_tail and n_tail + n_rows)
    order = torch.cat([torch.randperm(lengths[0]), lengths[0] + torch.randperm(lengths[1])])
    permuted = replace(ragged, keys=ragged.keys[order], values=ragged.values[order])
    expected = ragged.run(return_lse=True, impl=impl)
    torch.testing.assert_close(permuted.run(return_lse=True, impl=impl), expected, rtol=1e-5, atol=1e-5)


@LAW
@given(
    n_context=st.integers(0, 70), n_moved=st.integers(0, 70), impl=st.sampled_from(CPU_IMPLS), seed=st.integers(0, 1000)
)
def test_it_does_not_matter_whether_a_key_lies_in_the_context_or_in_the_tail(
    n_context: int, n_moved: int, impl: str | None, seed: int
) -> None:
    torch.manual_seed(seed)
    ragged = case([n_context + n_moved], 1, heads=1)
    keys, values = ragged.keys.split([n_context, n_moved]), ragged.values.split([n_context, n_moved])
    moved = Case(ragged.query, keys[0], values[0], [n_context], keys[1][None, None], values[1][None, None])
    expected = ragged.run(return_lse=True, impl=impl)
    torch.testing.assert_close(moved.run(return_lse=True, impl=impl), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_rows_change_nothing_and_stay_small(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = case([70, 3, 0, 9], 40, 50)
    tail_mask = torch.rand(2, 6, 40, 50) < 0.5 if masked else None
    expected = ragged.run(return_lse=True, tail_mask=tail_mask, impl="reference")
    sizes = []

    def attend(rows: Tensor, parts: Any, softcap: None) -> tuple[Tensor, Tensor]:
        sizes.append(rows.shape[:-1].numel() * sum(part.keys.shape[-2] for part in parts))
        return original(rows, parts, softcap)

    original = reference.attend
    monkeypatch.setattr(reference, "attend", attend)
    monkeypatch.setattr(reference, "MAX_LOGITS", 3000)
    got = ragged.run(return_lse=True, tail_mask=tail_mask, impl="reference")
    torch.testing.assert_close(got, expected)
    assert max(sizes) <= 3000


def test_only_the_output_is_returned_unless_the_lse_is_asked_for() -> None:
    ragged = case([70, 3], 1, 9)
    assert torch.equal(ragged.run(), ragged.run(return_lse=True)[0])


TAIL = torch.zeros(1, 2, 5, 16)
BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": torch.zeros(6, 3, 16)}, ValueError, "query: expected"),
    ({"query": torch.zeros(1, 6, 3, 16, dtype=torch.int32)}, TypeError, "query: expected a floating-point"),
    ({"query": torch.zeros(1, 5, 3, 16)}, ValueError, "query heads: expected a multiple"),
    (
        {"query": torch.zeros(1, 0, 3, 16)},
        ValueError,
        "query heads: expected a multiple of the 2 key-value heads, got 0",
    ),
    ({"keys": torch.zeros(1, 9, 16)}, ValueError, "keys: expected"),
    ({"keys": torch.zeros(9, 8)}, ValueError, "keys: expected"),
    ({"keys": torch.zeros(9, 16, dtype=torch.float64)}, TypeError, "keys: expected the dtype of query"),
    ({"keys": torch.zeros(9, 16, device="meta")}, ValueError, "keys: expected device"),
    ({"values": torch.zeros(8, 16)}, ValueError, "values: expected"),
    ({"values": torch.zeros(9, 16, dtype=torch.float16)}, TypeError, "values: expected the dtype of query"),
    ({"cu_seqlens": [0, 4, 9]}, TypeError, "cu_seqlens: expected a tensor"),
    ({"cu_seqlens": torch.tensor([0, 4, 9])}, TypeError, "cu_seqlens: expected torch.int32"),
    ({"cu_seqlens": torch.tensor([0, 4, 4, 9], dtype=torch.int32)}, ValueError, "cu_seqlens: expected 1 rows"),
    ({"cu_seqlens": torch.tensor([0, 4, 8], dtype=torch.int32)}, ValueError, "cu_seqlens: expected to run from 0 to 9"),
    ({"cu_seqlens": torch.tensor([1, 4, 9], dtype=torch.int32)}, ValueError, "cu_seqlens: expected to run from 0 to 9"),
    ({"cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32), "part_of_storage": True}, ValueError, "to run within"),
    ({"cu_seqlens": torch.tensor([0, 10, 9], dtype=torch.int32)}, ValueError, "cu_seqlens: expected values that never"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens: expected at least"),
    ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "cu_seqlens: expected device"),
    ({"tail_values": None}, ValueError, "tail_keys, tail_values: expected both"),
    ({"tail_keys": TAIL[0]}, ValueError, "tail_keys: expected"),
    ({"tail_keys": TAIL[..., :8]}, ValueError, "tail_keys: expected"),
    ({"tail_keys": TAIL.double()}, TypeError, "tail_keys: expected the dtype of query"),
    ({"tail_values": TAIL[:, :, :4]}, ValueError, "tail_values: expected"),
    ({"tail_values": TAIL.to("meta")}, ValueError, "tail_values: expected device"),
    ({"tail_keys": TAIL[:, :, :2], "tail_values": TAIL[:, :, :2]}, ValueError, "at least query_length = 3 tokens"),
    ({"tail_mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError, "tail_mask: expected"),
    ({"tail_mask": torch.ones(1, 2, 3, 5, dtype=torch.bool)}, ValueError, "tail_mask: expected"),
    ({"tail_mask": torch.ones(1, 1, 3, 5)}, TypeError, "tail_mask: expected torch.bool"),
    ({"row_index": torch.tensor([0, 0])}, ValueError, "row_index: expected"),
    ({"row_index": torch.tensor([0], dtype=torch.int32)}, TypeError, "row_index: expected torch.int64"),
    ({"row_index": torch.tensor([1])}, ValueError, "row_index: expected packed rows 0 .. 0"),
    ({"row_index": torch.tensor([-1])}, ValueError, "row_index: expected packed rows 0 .. 0"),
    (
        {"row_index": torch.tensor([0]), "tail_keys": None, "tail_values": None},
        ValueError,
        "expected tail_keys with it",
    ),
    ({"softcap": -1.0}, ValueError, "softcap: expected"),
    ({"impl": "cuda"}, ValueError, "expected impl to be None or one of"),
    ({"softcap": 1.0, "impl": "aten"}, ValueError, "impl 'aten' can do"),
    ({"values": torch.zeros(16, 9).T, "impl": "aten"}, ValueError, "impl 'aten' can do"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS)
def test_bad_inputs_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 6, 3, 16),
        "keys": torch.zeros(9, 16),
        "values": torch.zeros(9, 16),
        "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32),
        "tail_keys": TAIL,
        "tail_values": TAIL,
    }
    with pytest.raises(error, match=message):
        ragged_attention(**(arguments | change))


def test_segments_that_fill_no_whole_row_are_named() -> None:
    ragged = case([3, 4, 5], 1, 5, batch_size=1)
    with pytest.raises(ValueError, match="cu_seqlens: expected a multiple of 2 segments"):
        ragged.run(row_index=torch.tensor([0]))
