"""Attention of many requests' tokens to a pool of contexts, against the formula in fp64 and ragged attention."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvzip_press.kernels.context_attention import ContextPlan, Turn, context_attention, plan_contexts
from kvzip_press.kernels.context_attention.sharing import share, shared_by_steps
from kvzip_press.kernels.context_attention.sizes import MIN_ITEM, Sizes
from kvzip_press.kernels.context_attention.tuning import Sharing
from kvzip_press.kernels.dense_attention import attention_with_lse, merge_attention
from kvzip_press.kernels.ragged_attention import ragged_attention
from kvzip_press.kernels.row_codec import Codes, decode_rows, encode_rows

Accurate = Callable[[Tensor, Tensor, Tensor], None]
View = Callable[[Tensor], Tensor]

LAW = settings(deadline=None, max_examples=40, derandomize=True)
CPU_IMPLS = [None, "reference"]
IMPLS = [*CPU_IMPLS, pytest.param("triton", marks=pytest.mark.triton)]
HEADS = 2
GAP = 5  # pairs of NaN between two segments: what must not be read is seen
CONTEXTS = {  # pairs of each head of each context; row 0, the empty context, comes before them
    "around_a_block": [[63, 64], [65, 1]],
    "some_empty": [[0, 7], [0, 0], [130, 0]],
    "very_uneven": [[700, 1], [2, 300]],
    "none": [],
}


@pytest.fixture(autouse=True)
def _parts_as_for_three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long segments are cut into as many parts as there are threads; three leave a rest of 0, 1 or 2 keys."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@dataclass
class Case:
    """A pool of two layers, of which the second is attended to, and the tokens of a step."""

    query: Tensor
    keys: Tensor
    values: Tensor
    begins: Tensor
    lengths: Tensor
    context_of_token: Tensor

    @property
    def plan(self) -> ContextPlan:
        return plan_contexts(self.context_of_token, self.begins, self.lengths, num_attention_heads=self.query.shape[1])

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        return context_attention(self.query, self.keys, self.values, self.plan, 1, **options)


@pytest.fixture(autouse=True)
def _heads_merged_together_by_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token's heads are merged by a program each, those of more tokens by one for each group."""
    if importlib.util.find_spec("triton") is not None:
        monkeypatch.setattr("kvzip_press.kernels.context_attention.triton.MANY_MERGED", 8)


def case(
    contexts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    groups: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    heads = len(contexts[0]) if contexts else HEADS
    lengths = torch.zeros(2, len(contexts) + 1, heads, dtype=torch.int32)
    lengths[0, 1:] = 1
    lengths[1, 1:] = torch.tensor(contexts, dtype=torch.int32).view(-1, heads)
    sizes = (lengths + GAP).flatten()
    begins = (sizes.cumsum(0, dtype=torch.int32) - lengths.flatten()).view_as(lengths)
    pool = torch.full((2, int(sizes.sum()) + GAP, head_dim), torch.nan)
    for begin, length in zip(begins.flatten().tolist(), lengths.flatten().tolist(), strict=True):
        pool[:, begin : begin + length] = torch.randn(2, length, head_dim)
    query = 2 * torch.randn(len(tokens), heads * groups, head_dim)
    floats = (tensor.to(device, dtype) for tensor in (query, *pool))
    numbers = (tensor.to(device) for tensor in (begins, lengths, torch.tensor(tokens, dtype=torch.int32)))
    return Case(*floats, *numbers)


def formula(
    case: Case, *, scaling: float | None = None, softcap: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Each token's head by itself over its own keys, straight from the definition, all in ``dtype``."""
    n_tokens, n_heads, head_dim = case.query.shape
    groups = n_heads // case.begins.shape[2]
    out = torch.zeros(n_tokens, n_heads, head_dim, dtype=dtype)
    lse = torch.full((n_tokens, n_heads), -torch.inf, dtype=dtype)
    for token, context in enumerate(case.context_of_token.tolist()):
        for head in range(n_heads):
            begin, length = (int(table[1, context, head // groups]) for table in (case.begins, case.lengths))
            if length == 0:
                continue
            keys, values = (pool[begin : begin + length].to(dtype).cpu() for pool in (case.keys, case.values))
            logits = keys @ case.query[token, head].to(dtype).cpu()
            logits = logits * (head_dim**-0.5 if scaling is None else scaling)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            out[token, head], lse[token, head] = logits.softmax(0) @ values, logits.logsumexp(0)
    return out, lse


def assert_equals_formula(case: Case, accurate: Accurate, *, impl: str | None, **options: Any) -> None:
    got, exact, plain = (
        case.run(**options, impl=impl),
        formula(case, **options),
        formula(case, **options, dtype=case.query.dtype),
    )
    for one, exact_one, plain_one in zip(got, exact, plain, strict=True):
        accurate(one.cpu(), exact_one, plain_one)


def mixed_tokens(n_tokens: int, contexts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that read every context, and the empty one, in no order."""
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randint(len(contexts) + 1, (n_tokens,), generator=generator).tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_tokens", [1, 2, 23])
@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS)
def test_it_equals_the_formula_whatever_tokens_read(
    contexts: list[list[int]], n_tokens: int, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    assert_equals_formula(case(contexts, mixed_tokens(n_tokens, contexts), device=device), assert_accurate, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [1, 4, 7, 71])
def test_it_equals_the_formula_for_every_group(
    groups: int, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    """71 query heads of one key-value head are more rows than a tile has."""
    tokens = [1, 0, 2] if groups > 64 else [1, 1, 0, 2, 1, 2, 1, 1, 1]
    made = case([[40], [90]], tokens, groups=groups, device=device)
    assert_equals_formula(made, assert_accurate, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"scaling": 0.07}, {"softcap": 3.0}, {"scaling": 0.5, "softcap": 20.0}], ids=str)
def test_scaling_and_softcap(
    options: dict[str, float], impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    made = case([[100, 20], [3, 65]], mixed_tokens(9, [[], []]), device=device)
    assert_equals_formula(made, assert_accurate, impl=impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, torch.bfloat16), (80, torch.float16), (128, torch.float16), (256, torch.bfloat16)],
    ids=str,
)
def test_half_precision_is_as_exact_as_its_inputs(
    head_dim: int, dtype: torch.dtype, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    made = case([[90, 5], [33, 0]], [1, 2, 1, 0, 1, 2], head_dim=head_dim, dtype=dtype, device=device)
    assert_equals_formula(made, assert_accurate, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_may_be_a_view(
    impl: str | None, device: torch.device, inside_nan: View, assert_accurate: Accurate
) -> None:
    made = case([[30, 70]], [1, 0, 1, 1, 1], device=device)
    assert_equals_formula(replace(made, query=inside_nan(made.query)), assert_accurate, impl=impl)


def test_the_reference_in_fp64_is_the_formula() -> None:
    """Blocks of few tokens, too: a step of the reference holds a bounded number of logits."""
    made = case([[50, 9]], [1] * 12, dtype=torch.float64)
    for got, exact in zip(made.run(), formula(made), strict=True):
        torch.testing.assert_close(got, exact)


def test_long_contexts_are_attended_to_in_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvzip_press.kernels.context_attention import reference

    made = case([[50, 9]], [1] * 7)
    whole = made.run(impl="reference")
    monkeypatch.setattr(reference, "MAX_LOGITS", 2 * 3 * 50)
    torch.testing.assert_close(made.run(impl="reference"), whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_equals_ragged_attention_of_each_row(impl: str | None, device: torch.device) -> None:
    """Tokens as rows of a batch, which share packed rows: what a cache of this package computes."""
    contexts, tokens = [[0, 0], [120, 7], [64, 200]], [2, 0, 1, 2, 2, 1]
    made = case(contexts[1:], tokens, device=device)
    packed = [
        torch.cat([pool[b : b + n] for b, n in zip(made.begins[1].flatten(), made.lengths[1].flatten(), strict=True)])
        for pool in (made.keys, made.values)
    ]
    bounds = torch.tensor([0, *(n for pair in contexts for n in pair)]).cumsum(0).int().to(device)
    no_tail = made.query.new_empty(len(tokens), HEADS, 0, 16)
    rows = torch.tensor(tokens, device=device)
    expected = ragged_attention(
        made.query.unsqueeze(2), *packed, bounds, no_tail, no_tail, row_index=rows, return_lse=True
    )
    out, lse = made.run(impl=impl)
    torch.testing.assert_close((out.unsqueeze(2), lse.unsqueeze(2)), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_merged_with_a_tail_it_is_one_attention(impl: str | None, device: torch.device) -> None:
    """Context and tail by themselves, merged, against both under one softmax; a request without a context too."""
    made = case([[120, 7]], [1, 0, 1], device=device)
    tail_keys, tail_values = torch.randn(2, 3, HEADS, 9, 16, device=device)
    query = made.query.unsqueeze(2)
    out, lse = made.run(impl=impl)
    tail, tail_lse = attention_with_lse(query, tail_keys, tail_values, causal=False)
    merged, _ = merge_attention(out.unsqueeze(2), lse.unsqueeze(2), tail, tail_lse)
    segments = [slice(int(b), int(b + n)) for b, n in zip(made.begins[1, 1], made.lengths[1, 1], strict=True)]
    for row, context in enumerate(made.context_of_token.tolist()):
        for head in range(6):
            keys, values = tail_keys[row, head // 3], tail_values[row, head // 3]
            if context:
                keys, values = (
                    torch.cat([pool[segments[head // 3]], own])
                    for pool, own in ((made.keys, keys), (made.values, values))
                )
            weights = (keys @ made.query[row, head] * 16**-0.5).softmax(0)
            torch.testing.assert_close(merged[row, head, 0], weights @ values)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tail_that_is_given_is_merged_where_it_lies(impl: str | None, device: torch.device) -> None:
    """Its log-sum-exp head by head, as engines give it; one token has nothing in its pages, one nothing in the pool."""
    made = case([[120, 7]], [1, 0, 1], device=device)
    plain = made.run(impl=impl)
    tail, lse = torch.randn(3, 6, 16, device=device), torch.randn(6, 3, device=device).t()
    tail[0], lse[0] = 0.0, -torch.inf
    expected = merge_attention(plain[0][None], plain[1][None], tail[None], lse.contiguous()[None])
    wide = torch.full((3, 6, 20), torch.nan, device=device)
    out = wide[..., :16].copy_(tail)
    before = lse.clone()
    got, got_lse = made.run(impl=impl, tail=(out, lse), out=out)
    assert got is out and torch.equal(lse, before)
    torch.testing.assert_close((got[None], got_lse[None]), expected)
    assert torch.equal(got[1], tail[1]), "without a context, pages alone answer"
    torch.testing.assert_close(made.run(impl=impl, tail=(tail, before)), (got, got_lse))


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_tail_of_nothing_leaves_behind_is_not_a_result(impl: str | None, device: torch.device) -> None:
    """Neither the pool nor the pages have a pair: the answer is 0, whatever lay where it is written."""
    made = case([[7, 7]], [0, 1], device=device)
    out, lse = torch.full((2, 6, 16), 3.0, device=device), torch.full((2, 6), -torch.inf, device=device)
    got, got_lse = made.run(impl=impl, tail=(out, lse), out=out)
    assert not got[0].any() and got_lse[0].eq(-torch.inf).all()
    assert got[1].any() and got_lse[1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [1, 7, 32])
def test_each_query_head_of_a_group_has_its_own_tail(groups: int, impl: str | None, device: torch.device) -> None:
    """Beside a head whose pages have nothing, the others' tails stay; a kernel may merge them all in one program."""
    made = case([[120, 0]], [1, 0, 1], groups=groups, device=device)
    n_heads = HEADS * groups
    tail, lse = torch.randn(3, n_heads, 16, device=device), torch.randn(3, n_heads, device=device)
    lse[0, 0] = lse[1, groups // 2] = lse[2, -1] = -torch.inf  # the pool has pairs only for the first of these
    plain = made.run(impl=impl)
    expected = merge_attention(plain[0][None], plain[1][None], tail[None], lse[None])
    out = tail.clone()
    got, got_lse = made.run(impl=impl, tail=(out, lse), out=out)
    torch.testing.assert_close((got[None], got_lse[None]), expected)
    for token, heads in ((1, slice(0, n_heads)), (2, slice(groups, n_heads))):
        own, own_lse = tail[token, heads], lse[token, heads]
        kept = own_lse.isfinite()
        assert torch.equal(got[token, heads], own.where(kept[:, None], 0.0))
        assert torch.equal(got_lse[token, heads], own_lse)


@pytest.mark.triton
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("tokens", [[1, 1], [0, 0]], ids=["context", "none"])
def test_nothing_is_written_beside_the_heads_of_a_group(
    tokens: list[int], in_place: bool, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile has room for 8 heads of 16 channels where a group has 7 of 12: behind the last one of all, it is seen."""
    made = case([[9, 9]], tokens, groups=7, head_dim=12, device=triton_device)
    plan, empty, behind = made.plan, torch.empty, []

    def with_room(*shape: Any, **options: Any) -> Tensor:
        wanted = empty(*shape, **options)
        flat = torch.full((wanted.numel() + 64,), torch.nan, dtype=wanted.dtype, device=wanted.device)
        behind.append(flat[wanted.numel() :])
        return flat[: wanted.numel()].view_as(wanted)

    wide = torch.full((2, 16, 16), torch.nan, device=triton_device)
    out = wide[:, :14, :12].normal_()
    lse = torch.randn(2, 14, device=triton_device)
    lse[:, [0, 13]] = -torch.inf
    tail = (out if in_place else out.clone(), lse)
    monkeypatch.setattr(torch, "empty", with_room)
    got, got_lse = context_attention(made.query, made.keys, made.values, plan, 1, impl="triton", tail=tail, out=out)
    assert got.isfinite().all() and got_lse[lse.isfinite()].isfinite().all()
    assert wide[:, 14:].isnan().all() and wide[..., 12:].isnan().all()
    assert len(behind) == 3, "two partial results and the log-sum-exp"
    assert all(one.isnan().all() for one in behind)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_log_sum_exp_a_tail_in_place_stays_where_the_pool_has_no_pair(
    impl: str | None, device: torch.device
) -> None:
    """Whatever its log-sum-exp says, which is not even read; elsewhere, a tail of nothing is none."""
    made = case([[7, 0]], [0, 1, 1], device=device)
    tail, lse = torch.randn(3, 6, 16, device=device), torch.randn(3, 6, device=device)
    lse[:2] = -torch.inf
    tail[0], lse[0, 0] = torch.nan, torch.nan  # as behind the last request of a captured graph
    out = tail.clone()
    got = made.run(impl=impl, tail=(out, lse), out=out, return_lse=False)
    assert got is out
    torch.testing.assert_close(got[0], tail[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1:, 3:], tail[1:, 3:]), "the second head has no pair, nor has its tail for the second token"
    expected, _ = made.run(impl=impl, tail=(tail[:], lse))
    torch.testing.assert_close(got[1:, :3], expected[1:, :3])
    assert not expected[1, 3:].any(), "in new memory, nothing to attend to gives 0"
    assert torch.equal(made.run(impl=impl, tail=(tail, lse), return_lse=False)[1:], expected[1:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [[1, 0, 2, 1], [0, 0, 0, 0]], ids=["contexts", "none"])
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "codes"])
def test_without_a_log_sum_exp_the_answer_is_the_same(
    coded: bool, tokens: list[int], impl: str | None, device: torch.device
) -> None:
    made = case([[7, 0], [70, 130]], tokens, device=device)
    pool: list[Any] = [made.keys, made.values]
    if coded:
        pool = [encode_rows(one.nan_to_num(3.0), "int8") for one in pool]
    tail = torch.randn(4, 6, 16, device=device), torch.randn(4, 6, device=device)
    for has_tail, in_place in ((False, False), (True, False), (True, True)):
        outs = [tail[0].clone() for _ in range(2)]
        options: list[dict[str, Any]] = [
            {"impl": impl, "tail": (out, tail[1]) if has_tail else None, "out": out if in_place else None}
            for out in outs
        ]
        expected, lse = context_attention(made.query, *pool, made.plan, 1, **options[0])
        got = context_attention(made.query, *pool, made.plan, 1, **options[1], return_lse=False)
        assert lse.shape == (4, 6) and isinstance(got, Tensor)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_tables_may_have_any_strides(impl: str | None, device: torch.device) -> None:
    """They are copied when the plan is made: a kernel reads them before it waits for what was launched before it."""
    made = case([[30, 70]], [1, 0, 1], device=device)
    tables = {name: getattr(made, name).repeat_interleave(2, 2)[..., ::2] for name in ("begins", "lengths")}
    assert not any(table.is_contiguous() for table in tables.values())
    torch.testing.assert_close(replace(made, **tables).run(impl=impl), made.run(impl=impl))


class Launches:
    """Stands in for a kernel, and notes which launches may begin before those in front of them have ended."""

    def __init__(self) -> None:
        self.early: list[bool] = []
        self.error: Exception | None = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: Any, USE_PDL: bool, launch_pdl: bool = False, **__: Any) -> None:  # noqa: N803  # Triton's
        if self.error is not None:
            raise self.error
        assert USE_PDL
        self.early.append(launch_pdl)


def test_the_first_launch_that_reads_a_plan_begins_when_the_plan_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones read it before they wait. So each stream has a first one, and so has what is captured there."""
    pytest.importorskip("triton")
    from kvzip_press.kernels.context_attention import triton as kernels

    attend, merge = Launches(), Launches()
    reader = [(0, False)]
    monkeypatch.setattr(kernels, "_attend_kernel", attend)
    monkeypatch.setattr(kernels, "_merge_kernel", merge)
    monkeypatch.setattr(kernels, "_reader", lambda _: reader[0])
    monkeypatch.setattr(kernels, "early_launch", lambda _: {"USE_PDL": True, "launch_pdl": True})
    made = case([[30, 70]], [1, 0, 1])

    def early(plan: ContextPlan, *layers: int) -> list[bool]:
        del attend.early[:]
        for layer in layers:
            kernels.context_attention(made.query, made.keys, made.values, plan, layer, scaling=1.0, softcap=None)
        return attend.early

    plan = replace(made.plan, work=share(made.plan))
    attend.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        early(plan, 0)
    attend.error = None
    assert early(plan, 0, 1, 1) == [False, True, True]
    assert early(replace(plan, work=share(plan)), 1, 0) == [False, True]
    assert plan.work is not None
    assert early(replace(plan, work=replace(plan.work)), 1) == [False]
    reader[0] = 7, False
    assert early(plan, 1, 1) == [False, True]
    reader[0] = 7, True
    assert early(plan, 1, 1) == [False, True]
    reader[0] = 0, False
    assert early(plan, 1) == [True]
    assert merge.early == [True] * 11, "they begin behind a launch that does"


def turn_of(case: Case, by: Sequence[int], n: int, layout: str = "halves") -> Turn:
    angles = torch.tensor(by)[:, None] / 10 ** torch.linspace(0, 2, n)
    device = case.query.device
    return Turn(angles.cos().float().to(device), angles.sin().float().to(device), layout)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "layout"), [(8, "halves"), (3, "halves"), (5, "neighbours")])
def test_queries_are_turned_before_they_meet_the_pool(
    n: int, layout: str, impl: str | None, device: torch.device
) -> None:
    made = case([[70, 7]], [1, 0, 1, 1], device=device)
    turn = turn_of(made, [5, 9, 0, 40], n, layout)
    turned = made.query.clone()
    for token in range(4):
        for i in range(n):
            x, y = (i, n + i) if layout == "halves" else (2 * i, 2 * i + 1)
            c, s = turn.cos[token, i], turn.sin[token, i]
            turned[token, :, x] = made.query[token, :, x] * c - made.query[token, :, y] * s
            turned[token, :, y] = made.query[token, :, y] * c + made.query[token, :, x] * s
    expected = replace(made, query=turned).run(impl="reference")
    torch.testing.assert_close(made.run(impl=impl, turn=turn), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_read_as_they_lie(
    dtype: torch.dtype, impl: str | None, device: torch.device, assert_accurate: Accurate
) -> None:
    contexts = [[90, 5], [33, 0]]
    made = case(contexts, [1, 2, 1, 0, 2], dtype=dtype, device=device)
    rows = [one.nan_to_num(3.0) for one in (made.keys, made.values)]  # codes of NaN are none
    codes = [encode_rows(one, "int8") for one in rows]
    decoded = replace(made, keys=decode_rows(codes[0], torch.float32), values=decode_rows(codes[1], torch.float32))
    options = {"scaling": 0.3, "softcap": 5.0}
    exact, plain = formula(decoded, **options), formula(decoded, **options, dtype=dtype)
    got = context_attention(made.query, *codes, made.plan, 1, **options, impl=impl)
    for one, exact_one, plain_one in zip(got, exact, plain, strict=True):
        assert_accurate(one.cpu(), exact_one, plain_one)


def test_what_cannot_be_read_as_codes_or_merged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case([[3, 2]], [0, 1])
    codes = encode_rows(made.keys.nan_to_num(), "int8")
    out, lse = torch.zeros(2, 6, 16), torch.zeros(2, 6)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "expected both as codes or none", {"keys": codes}),
        (ValueError, "keys.scales: expected", {"keys": replace(codes, scales=codes.scales[:2]), "values": codes}),
        (ValueError, "keys: expected codes of 16 numbers, got 8", {"keys": encode_rows(torch.ones(9, 8), "int8")}),
        (ValueError, "tail's lse: expected", {"tail": (out, lse[:1])}),
        (TypeError, "tail's lse: expected torch.float32", {"tail": (out, lse.half())}),
        (TypeError, "out: expected the dtype of query", {"out": out.half()}),
        (ValueError, "out: expected a contiguous last", {"out": torch.zeros(2, 16, 6).transpose(1, 2)}),
        (ValueError, "turn: expected a layout out of", {"turn": replace(turn_of(made, [0, 1], 2), layout="thirds")}),
        (ValueError, "turn: expected at most 8 pairs of channels, got 9", {"turn": turn_of(made, [0, 1], 9)}),
        (ValueError, "turn.cos: expected", {"turn": turn_of(made, [0, 1, 2], 2)}),
        (ValueError, "keys and values are codes", {"keys": codes, "values": codes, "impl": "aten"}),
    ]
    for error, message, options in cases:
        pool = {"keys": made.keys, "values": codes if "16 numbers" in message else made.values, **options}
        with pytest.raises(error, match=message):
            context_attention(made.query, plan=made.plan, layer_idx=1, **pool)
    from kvzip_press.kernels.context_attention import support

    monkeypatch.setattr(support.triton_support, "reason_against_triton", lambda _: None)
    fp8 = encode_rows(made.keys.nan_to_num(), "fp8")
    assert support.reason_against_triton(made.query, codes, codes, None) is None
    assert "fp8, of which the kernel reads only int8" in str(support.reason_against_triton(made.query, fp8, fp8, None))
    assert isinstance(codes, Codes)


@pytest.mark.parametrize("impl", IMPLS)
def test_neighbours_and_their_order_change_nothing(impl: str | None, device: torch.device) -> None:
    contexts = [[90, 3], [2, 150]]
    made = case(contexts, mixed_tokens(12, contexts), groups=2, device=device)
    out, lse = made.run(impl=impl)
    order = torch.randperm(12, device=device)
    shuffled = replace(made, query=made.query[order], context_of_token=made.context_of_token[order])
    torch.testing.assert_close(shuffled.run(impl=impl), (out[order], lse[order]))
    for token in (0, 11):
        alone = replace(made, query=made.query[token, None], context_of_token=made.context_of_token[token, None])
        torch.testing.assert_close(alone.run(impl=impl), (out[token, None], lse[token, None]))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_give_nothing(impl: str | None, device: torch.device) -> None:
    out, lse = case([[5, 5]], [], device=device).run(impl=impl)
    assert (out.shape, lse.shape) == ((0, 6, 16), (0, 6))


@LAW
@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    lengths=st.lists(st.integers(0, 3000), min_size=8, max_size=8),
    groups=st.sampled_from([1, 3, 4, 70]),
    block_m=st.sampled_from([16, 64]),
    programs_per_sm=st.integers(1, 9),
)
def test_every_pair_of_a_tile_is_one_programs(
    tokens: list[int], lengths: list[int], groups: int, block_m: int, programs_per_sm: int
) -> None:
    """Each token is in one tile of its context; each segment's items are numbered through; no pair is read twice."""
    table = torch.zeros(1, 5, 2, dtype=torch.int32)
    table[0, 1:] = torch.tensor(lengths).view(4, 2)
    plan = ContextPlan(torch.tensor(tokens, dtype=torch.int32), torch.zeros_like(table), table, 2 * groups)
    work = share(plan, Sharing(block_m, programs_per_sm))
    assert work.tokens_per_tile == max(1, block_m // groups)
    order = work.order.tolist()
    assert sorted(order) == list(range(len(tokens))) and int(work.tile_counts.sum()) == len(tokens)
    tiles = zip(work.tile_contexts.tolist(), work.tile_firsts.tolist(), work.tile_counts.tolist(), strict=True)
    for context, first, count in tiles:
        assert count <= work.tokens_per_tile
        assert all(tokens[token] == context for token in order[first : first + count])
    n_live = int((work.tile_counts > 0).sum())
    assert n_live == sum(-(-tokens.count(context) // work.tokens_per_tile) for context in set(tokens))
    owners = work.segments[0].tolist()
    n_segments = work.n_items.shape[1]
    longest = []
    for segment, (first, n_items) in enumerate(
        zip(work.first_items[0].tolist(), work.n_items[0].tolist(), strict=True)
    ):
        tile = segment // 2
        length = int(table[0, work.tile_contexts[tile], segment % 2]) if int(work.tile_counts[tile]) else 0
        assert [n for n, owner in enumerate(owners) if owner == segment] == list(range(first, first + n_items))
        assert (n_items == 0) == (length == 0)
        if length:
            piece = -(-length // n_items)
            assert (n_items - 1) * piece < length, "no item is empty"
            longest.append(piece)
    assert all(owner == n_segments for owner in owners[int(work.n_items.sum()) :])
    if longest:  # no program reads much more than its share
        total = int((table[0, work.tile_contexts] * (work.tile_counts > 0)[:, None]).sum())
        assert max(longest) <= max(MIN_ITEM, -(-total // max(1, len(owners) - n_segments)))


@pytest.mark.triton
@pytest.mark.parametrize("groups", [1, 4, 71])
@pytest.mark.parametrize("n_tokens", [1, 5, 64, 150])
def test_two_launches_share_pairs_as_many_steps_do(n_tokens: int, groups: int, triton_device: torch.device) -> None:
    from kvzip_press.kernels.context_attention.triton_sharing import shared

    generator = torch.Generator().manual_seed(n_tokens)
    for longest, n_contexts in ((1, 3), (90, 1), (5000, 9), (2**31 - 1, 40)):
        lengths = torch.randint(longest, (3, n_contexts, 2), generator=generator).int()
        lengths[:, 0] = 0
        tokens = torch.randint(n_contexts, (n_tokens,), generator=generator).int()
        tables = (table.to(triton_device) for table in (tokens, torch.zeros_like(lengths), lengths))
        plan = ContextPlan(*tables, num_attention_heads=2 * groups)
        sizes = Sizes.of(plan, Sharing(32, 2))
        torch.testing.assert_close(shared(plan, sizes, 256), shared_by_steps(plan, sizes), rtol=0, atol=0)


def test_a_context_that_all_tokens_read_is_read_once() -> None:
    """64 tokens of 4 query heads a head: 4 tiles of 16 tokens, not 64 of one."""
    made = case([[500, 500], [500, 500]], [1] * 64, groups=4)
    work = share(made.plan)
    assert int((work.tile_counts > 0).sum()) == 4
    assert int((work.n_items[1] > 0).sum()) == 4 * HEADS


@pytest.mark.triton
@pytest.mark.parametrize("programs_per_sm", [1, 4, 12])
def test_the_number_of_programs_changes_only_rounding(programs_per_sm: int, triton_device: torch.device) -> None:
    contexts = [[300, 0], [17, 90], [0, 0]]
    made = case(contexts, mixed_tokens(11, contexts), device=triton_device)
    plan = replace(made.plan, work=share(made.plan, Sharing(32, programs_per_sm)))
    got = context_attention(made.query, made.keys, made.values, plan, 1, impl="triton")
    torch.testing.assert_close(got, made.run(impl="reference"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(2, 6, 8)}, ValueError, "keys: expected"),
        ({"query": torch.randn(3, 6, 16)}, ValueError, "query: expected"),
        ({"query": torch.randn(2, 5, 16)}, ValueError, "query heads: expected a multiple"),
        ({"query": torch.randn(2, 6, 16).half()}, TypeError, "keys: expected the dtype of query"),
        ({"query": torch.ones(2, 6, 16, dtype=torch.int32)}, TypeError, "query: expected a floating-point"),
        ({"values": torch.randn(3, 16)}, ValueError, "values: expected"),
        ({"keys": torch.randn(12, 16), "values": torch.randn(12, 16)}, ValueError, "within the 12 pairs"),
        ({"context_of_token": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, "expected rows 0 .. 1, got 0 to 2"),
        ({"context_of_token": torch.tensor([0, -1], dtype=torch.int32)}, ValueError, "got -1 to 0"),
        ({"context_of_token": torch.tensor([0, 1])}, TypeError, "context_of_token: expected torch.int32"),
        ({"lengths": torch.ones(2, 2, 2, dtype=torch.int32)}, ValueError, "an empty context in row 0"),
        ({"lengths": torch.zeros(2, 1, 2, dtype=torch.int32)}, ValueError, "lengths: expected"),
        ({"begins": torch.full((2, 2, 2), -1, dtype=torch.int32)}, ValueError, "got a negative one"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else None,
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(case([[3, 2]], [0, 1]), **change).run()


def test_options_that_do_not_fit_are_refused() -> None:
    made = case([[3, 2]], [0, 1])
    with pytest.raises(ValueError, match=r"layer_idx: expected 0 \.\. 1, got 2"):
        context_attention(made.query, made.keys, made.values, made.plan, 2)
    with pytest.raises(ValueError, match="softcap"):
        made.run(softcap=0.0)
    with pytest.raises(ValueError, match="expected impl to be None or one of"):
        made.run(impl="fast")
    with pytest.raises(ValueError, match="a softcap is given"):
        made.run(impl="aten", softcap=1.0)
    no_contexts = torch.zeros(2, 0, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="at least the empty context"):
        plan_contexts(made.context_of_token, no_contexts, no_contexts, num_attention_heads=2)


def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = case([[3, 2]], [0, 1])
    assert made.plan.work is None
    with pytest.raises(ValueError, match=r"impl 'triton' can do, got one that it cannot: the (device is cpu|package)"):
        made.run(impl="triton")


@pytest.mark.gpu
def test_a_captured_graph_follows_what_tokens_read(captured: Callable[..., Any]) -> None:
    """One graph, plan included, replayed for other tokens, contexts and tables."""
    contexts = [[3000, 10], [0, 700], [64, 64]]
    made = case(contexts, mixed_tokens(48, contexts), groups=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    got, replay = captured(lambda: made.run(impl="triton"))
    for change in (torch.zeros(48), torch.ones(48), torch.arange(48) % 4):
        made.context_of_token.copy_(change)
        made.query.normal_()
        replay()
        torch.testing.assert_close(got, made.run(impl="reference"), rtol=2e-2, atol=2e-2)
    made.lengths[1, 1] = 5
    replay()
    torch.testing.assert_close(got, made.run(impl="reference"), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [1, 64, 700])
def test_long_contexts_equal_fp64(n_tokens: int, assert_accurate: Accurate) -> None:
    """The sizes that the interpreter is too slow for."""
    contexts = [[32768, 1024, 9000, 1], [5, 20000, 0, 63]]
    tokens = mixed_tokens(n_tokens, contexts)
    made = case(contexts, tokens, groups=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    exact = replace(made, **{name: getattr(made, name).double() for name in ("query", "keys", "values")}).run()
    for got, plain, one in zip(made.run(impl="triton"), made.run(impl="reference"), exact, strict=True):
        assert_accurate(got, one, plain)
