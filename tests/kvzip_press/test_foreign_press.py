"""Whatever a press of someone else returns: one error that names it, or a cache that is evicted as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvzip_press import RaggedCache, RandomPress, compress
from kvzip_press.budget.allocators import Allocation, Decided
from kvzip_press.budget.amount import Ratio
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.scores import Scores
from kvzip_press.cache.ragged_layer import RaggedLayer
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import Prefill, run_prefill
from kvzip_press.press import ObservingPress, Press
from kvzip_press.presses.composed import ComposedPress
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = tiny_model(num_layers=3)
CONTEXT = torch.randint(3, 120, (1, 40), generator=torch.Generator().manual_seed(0))
N, HEADS, LAYERS = CONTEXT.shape[1], 2, (0, 1, 2)
POLICY = Policy(Ratio(0.5))


@dataclass(frozen=True)
class MyPress(Press):
    """Returns what it is told to."""

    made: Callable[[Prefill], Any] = lambda prefill: None

    def score(self, prefill: Prefill) -> Any:
        return self.made(prefill)


def layers(**changed: Any) -> dict[Any, Any]:
    """Good scores of all layers, but for those named ``layer<index>``."""
    drawn = {i: torch.rand(1, HEADS, N, generator=torch.Generator().manual_seed(i)) for i in LAYERS}
    return {**drawn, **{int(name[5:]): value for name, value in changed.items()}}


def scores(by_layer: Any = None, protected: Any = None, policy: Any = POLICY, **rest: Any) -> Scores:
    protected = torch.zeros(1, N, dtype=torch.bool) if protected is None else protected
    return Scores(layers() if by_layer is None else by_layer, protected, policy, **rest)


def decided(**changed: Any) -> Scores:
    counts = {**dict.fromkeys(LAYERS, torch.full((1, HEADS), 5)), **{int(k[5:]): v for k, v in changed.items()}}
    return scores(policy=Policy(Ratio(0.5), Decided(per_head=counts)))


class Odd(Allocation):
    """An allocation whose counts are someone else's code."""

    def counts(self, row: Any, amount: Any) -> Any:
        return {0: torch.tensor([1, 1]), 1: torch.tensor([1, 1]), 2: torch.tensor(ODD_COUNTS[0])}


ODD_COUNTS: list[Any] = [[1, 1]]
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: None, "expected Scores, got NoneType"),
    "a dict": (layers, "expected Scores, got dict"),
    "a list as layers": (lambda: scores([torch.rand(1, HEADS, N)]), "layers as a mapping"),
    "a name as layer": (lambda: scores({"model.layers.0": torch.rand(1, HEADS, N)}), "layers as a mapping"),
    "no layers": (lambda: scores({}), r"layers \[0, 1, 2\]"),
    "a layer is missing": (lambda: scores({i: v for i, v in layers().items() if i != 2}), r"layers \[0, 1, 2\]"),
    "a layer too many": (lambda: scores(layers(layer3=torch.rand(1, HEADS, N))), r"got layers \[0, 1, 2, 3\]"),
    "a layer is None": (lambda: scores(layers(layer2=None)), "scores of layer 2 .* got NoneType"),
    "float64": (lambda: scores(layers(layer1=torch.rand(1, HEADS, N).double())), "scores of layer 1 as a float32"),
    "int64": (lambda: scores(layers(layer2=torch.ones(1, HEADS, N).long())), "scores of layer 2 as a float32"),
    "another device": (lambda: scores(layers(layer2=torch.rand(1, HEADS, N, device="meta"))), "layer 2 .* on meta"),
    "another span": (lambda: scores(layers(layer2=torch.rand(1, HEADS, N - 1))), "layer 2"),
    "another batch": (lambda: scores(layers(layer2=torch.rand(2, HEADS, N))), "layer 2"),
    "two dimensions": (lambda: scores(layers(layer2=torch.rand(HEADS, N))), "layer 2"),
    "heads of the queries": (lambda: scores(layers(layer2=torch.rand(1, 2 * HEADS, N))), r"layer 2 .* \(4, device"),
    "NaN": (lambda: scores(layers(layer2=torch.full((1, HEADS, N), torch.nan))), "NaN or infinity in layer 2"),
    "of another span": (
        lambda: scores({i: v[:, :, 1:] for i, v in layers().items()}, torch.zeros(1, N - 1, dtype=torch.bool)),
        "made for another prefill",
    ),
    "numbers as mask": (lambda: scores(protected=torch.zeros(1, N)), "protected as a bool tensor"),
    "a list as mask": (lambda: scores(protected=[[False] * N]), "protected as a bool tensor .* got list"),
    "a mask of one row": (lambda: scores(protected=torch.zeros(N, dtype=torch.bool)), "protected as a bool tensor"),
    "no policy": (lambda: scores(policy=None), "expected a Policy .* got None"),
    "a ratio as policy": (lambda: scores(policy=0.5), "expected a Policy .* got 0.5"),
    "a word as count": (lambda: scores(protected_count="all"), "protected_count"),
    "a short mask as count": (lambda: scores(protected_count=torch.ones(1, 3, dtype=torch.bool)), "protected_count"),
    "carried": (lambda: scores(carried=None), "carried"),
    "counts of other heads": (lambda: decided(layer2=torch.tensor([[1, 1, 1]])), "decided counts"),
    "counts of a layer": (lambda: decided(layer2=torch.tensor(3)), "decided counts"),
    "no counts": (lambda: scores(policy=Policy(Ratio(0.5), Decided(per_head=None))), "decided counts"),
    "negative counts": (lambda: decided(layer2=torch.tensor([[1, -1]])), "layer 2, got -1"),
}  # fmt: skip


def dense() -> Prefill:
    return run_prefill(MODEL, CONTEXT, torch.ones_like(CONTEXT, dtype=torch.bool))


def is_untouched(cache: Any, before: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(
        not isinstance(layer, RaggedLayer) and torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        for layer, (keys, values) in zip(cache.layers, before, strict=True)
    )


@pytest.mark.parametrize("what", WRONG)
def test_what_a_press_returns_wrongly_is_one_error_that_names_it_and_evicts_nothing(what) -> None:
    """By ``score`` itself, inside ``with press(model):``, and composed."""
    make, match = WRONG[what]
    press, done = MyPress(made=lambda _: make()), dense()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in done.cache.layers]
    with pytest.raises(InvalidArgumentError, match=rf"^MyPress\.score: .*{match}"):
        done.evict_in_place(press.score(done))
    assert is_untouched(done.cache, before)
    cache = replace(dense()).cache.__class__()
    with pytest.raises(InvalidArgumentError, match=r"^MyPress\.score: "), torch.no_grad(), press(MODEL):
        MODEL(CONTEXT, past_key_values=cache)
    torch.testing.assert_close(cache.layers[2].keys, before[2][0])
    with pytest.raises(InvalidArgumentError, match=r"MyPress\.score: "):
        ComposedPress([RandomPress(0.3), press]).score(done)


class Plain:
    """A scorer that is no Press."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def observer(self, model: Any) -> None:
        return None

    def score(self, prefill: Prefill) -> Any:
        return self.found


@pytest.mark.parametrize("found", [None, {}, layers()], ids=["nothing", "empty", "dict"])
def test_a_scorer_that_is_no_press_is_checked_where_its_scores_enter(found) -> None:
    with pytest.raises(InvalidArgumentError, match=f"expected Scores, got {type(found).__name__}"):
        compress(MODEL, ByteTokenizer(), "a context", Plain(found))


@pytest.mark.parametrize("counts", [[1, -1], [1, N + 1], [1], [1.0, 1.0], [[1, 1]]], ids=str)
def test_counts_of_an_allocation_of_ones_own_are_checked_before_anything_is_evicted(counts) -> None:
    """Too many pairs would otherwise be padding; a negative number would silently be none."""
    done = dense()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in done.cache.layers]
    ODD_COUNTS[0] = counts
    with pytest.raises(InvalidArgumentError, match=r"Odd\.counts"):
        done.evict_in_place(scores(policy=Policy(Ratio(0.5), Odd())))
    assert is_untouched(done.cache, before)


@settings(max_examples=60, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(
    shapes=st.lists(st.sampled_from([(1, 2, N), (1, 4, N), (1, 1, N), (1, 2, N + 1)]), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.float32] * 3 + [torch.float16, torch.int32]),
    decides=st.booleans(),
    counts=st.lists(st.integers(-1, N + 1), min_size=2, max_size=3),
)
def test_whatever_a_press_returns_the_cache_is_evicted_as_a_whole_or_not_at_all(shapes, dtype, decides, counts) -> None:
    done = dense()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in done.cache.layers]

    def made(prefill: Prefill) -> Scores:
        by_layer = {i: torch.rand(shape).to(dtype) for i, shape in enumerate(shapes)}
        allocation = Decided(per_head=dict.fromkeys(by_layer, torch.tensor([counts]))) if decides else Allocation()
        return scores(by_layer, policy=Policy(Ratio(0.5), allocation) if decides else POLICY)

    try:
        done.evict_in_place(MyPress(made=made).score(done))
    except InvalidArgumentError:
        assert is_untouched(done.cache, before)
    else:
        assert all(isinstance(layer, RaggedLayer) for layer in done.cache.layers)
        assert RaggedCache.of(done.cache).kept_fraction <= 1


@dataclass(frozen=True)
class Watching(ObservingPress):
    """Hands over what it is told to as its observer."""

    made: Any = None

    def observer(self, model: Any) -> Any:
        return self.made


class Half:
    """An observer without scores."""

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("found", [None, object(), Half()], ids=["nothing", "object", "half"])
def test_an_observer_without_its_methods_is_named_with_its_press_before_the_model_runs(found) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^Watching\.observer: expected a context manager .* scores"):
        compress(MODEL, ByteTokenizer(), "a context", Watching(made=found))


@pytest.mark.parametrize("ratio", [None, "0.5", 1.0, float("nan"), True])
def test_a_ratio_that_is_none_names_the_press_and_the_field(ratio) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^MyPress: expected compression_ratio"):
        MyPress(ratio)


def test_a_policy_of_another_kind_names_the_press_and_the_field() -> None:
    """Both where a press is made, and where one that did not ask for that is composed."""

    @dataclass(frozen=True)
    class Odd(MyPress):
        @property
        def policy(self) -> Any:
            return 0.5

    class Unchecked(MyPress):
        def __post_init__(self) -> None: ...

    with pytest.raises(InvalidArgumentError, match=r"Odd\.policy to be a Policy .* float"):
        Odd()
    with pytest.raises(InvalidArgumentError, match=r"Unchecked\.compression_ratio"):
        ComposedPress([Unchecked(None)])
