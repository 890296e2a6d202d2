"""Several presses as one keep what all of them keep, each at its own ratio of what was left."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvzip_press import ComposedPress, KVzipPress, RaggedCache, RandomPress, Scores, compress
from kvzip_press.budget.allocators import Decided
from kvzip_press.budget.amount import Ratio
from kvzip_press.budget.policy import Policy
from kvzip_press.budget.selection import select
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.structure import text_decoder
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.press import ObservingPress, Press
from kvzip_press.testing import ByteTokenizer, tiny_model

N, SINK = 40, 4
LAYERS, HEADS = 3, 2
laws = settings(deadline=None, max_examples=40, derandomize=True)


def token_ids(batch: int = 1, length: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def prefilled(model=None, ids=None, valid=None, **options):
    ids = token_ids() if ids is None else ids
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    return run_prefill(model or tiny_model(), ids, valid, **options)


def kvzip(ratio: float = 0.5, **options) -> KVzipPress:
    return KVzipPress(ratio, tokenizer=ByteTokenizer(), chunk_size=16, **options)


def best_of(values: torch.Tensor, left: torch.Tensor, n_kept: int) -> torch.Tensor:
    """The ``n_kept`` best pairs of ``left``, the slow way: by score, then position, layer and head."""
    pairs = sorted((-float(values[l, h, p]), p, l, h) for l, h, p in left.nonzero().tolist())  # noqa: E741
    mask = torch.zeros_like(left)
    for _, p, layer, h in pairs[:n_kept]:
        mask[layer, h, p] = True
    return mask


def by_hand(done, presses) -> torch.Tensor:
    """``[layers, heads, n]``: global budgets of presses, one after another."""
    keep = torch.ones(LAYERS, HEADS, done.valid.shape[1], dtype=torch.bool)
    for press in presses:
        scores = press.score(done)
        free = keep & ~scores.protected[0]
        values = torch.stack([layer[0] for layer in scores.layers.values()])
        n_kept = round((1 - press.compression_ratio) * int(free.sum()))
        keep = best_of(values, free, n_kept) | (keep & scores.protected[0])
    return keep


def kept_by(press: Press, done) -> torch.Tensor:
    return torch.stack([mask[0] for mask in select(press.score(done), done.valid).values()])


@pytest.mark.parametrize(
    "presses",
    [
        [RandomPress(0.5), RandomPress(0.5, seed=1)],
        [RandomPress(0.3), RandomPress(0.6, seed=1), RandomPress(0.2, seed=2)],
        [kvzip(0.5), RandomPress(0.4)],
        [RandomPress(0.4), kvzip(0.5), kvzip(0.2, kvzip_plus=True)],
    ],
)
def test_kept_pairs_equal_those_found_by_hand(presses) -> None:
    """The kept set is the one of masks applied one after another, slowly."""
    done = prefilled()
    assert torch.equal(kept_by(ComposedPress(presses), done), by_hand(done, presses))


@pytest.fixture(scope="module")
def contexts():
    model = tiny_model()
    return {length: prefilled(model, token_ids(length=length)) for length in (1, 2, 5, 17, 40, 64)}


@laws
@given(
    ratios=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
    allocation=st.sampled_from(["global", "layer", "head", "adakv"]),
    length=st.sampled_from([1, 2, 5, 17, 40, 64]),
    min_kept=st.integers(0, 4),
)
def test_a_composition_keeps_less_with_each_press(contexts, ratios, allocation, length, min_kept) -> None:
    """One press more keeps a part of what those before keep; no layer is empty, ratio 0 is the identity."""
    done = contexts[length]
    presses = [
        RandomPress(ratio, allocation, seed=i, n_sink=0, min_kept_per_head=min_kept) for i, ratio in enumerate(ratios)
    ]
    before = torch.ones(LAYERS, HEADS, length, dtype=torch.bool)
    for i in range(1, len(presses) + 1):
        kept = kept_by(ComposedPress(presses[:i]), done)
        assert not (kept & ~before).any()
        assert (kept.sum(dim=(1, 2)) >= 1).all()
        if ratios[i - 1] == 0:
            assert torch.equal(kept, before)
        before = kept
    assert kept_by(ComposedPress(presses[:1]), done).equal(kept_by(presses[0], done))


def test_a_composition_holds_the_bytes_of_its_masks() -> None:
    """Evicted for real, the cache holds exactly the kept pairs."""
    done = prefilled()
    press = ComposedPress([RandomPress(0.5), kvzip(0.5)])
    cache = done.evict(press.score(done))
    assert int(sum(layer.packed.seqlens.sum() for _, layer in cache.ragged_layers())) == int(kept_by(press, done).sum())
    free = LAYERS * HEADS * (N - SINK)
    assert int(kept_by(press, done).sum()) == LAYERS * HEADS * SINK + round(0.5 * round(0.5 * free))


def test_a_budget_after_a_ratio_is_filled_as_far_as_pairs_are_left() -> None:
    """A budget in tokens, floors and layer ratios of a later press are those among survivors."""
    done = prefilled()
    half = RandomPress(0.5, "head", n_sink=0)
    for budget, expected in ((7, 7), (100, N // 2)):
        kept = kept_by(ComposedPress([half, RandomPress(allocation="head", budget=budget, n_sink=0, seed=1)]), done)
        assert (kept.sum(-1) == expected).all()
    per_layer = RandomPress(allocation="layer", layer_ratios=[0.0, 0.5, 0.75], n_sink=0, seed=1)
    assert kept_by(ComposedPress([half, per_layer]), done).sum((1, 2)).tolist() == [40, 20, 10]


def test_what_no_head_may_lose_is_what_all_protect() -> None:
    """Positions protected by one press only can be lost to the other."""
    done = prefilled()
    scores = ComposedPress([RandomPress(0.9, n_sink=6), RandomPress(0.9, n_sink=3)]).score(done)
    assert scores.protected[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert all(mask[..., :3].all() for mask in select(scores, done.valid).values())
    assert all(values.isfinite().all() for values in scores.layers.values())


def test_another_ratio_is_refused() -> None:
    """The result is decided: asking for another budget raises."""
    done = prefilled()
    scores = ComposedPress([RandomPress(0.5), RandomPress(0.5, seed=1)]).score(done)
    assert scores.policy.compression_ratio == 0.75
    for asked in ({"compression_ratio": 0.5}, {"budget": 9}, {"allocation": "head"}):
        with pytest.raises(InvalidArgumentError, match="decides its own budget"):
            done.evict(scores, **asked)


def test_rows_of_a_padded_batch_keep_what_they_keep_alone() -> None:
    """Each row has its own budgets over its own survivors."""
    model, ids = tiny_model(), token_ids(2)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :13] = False
    press = ComposedPress([RandomPress(0.5), RandomPress(0.4, "adakv", seed=1)])
    together = select(press.score(prefilled(model, ids, valid)), valid)
    for row in range(2):
        alone = prefilled(model, ids[row : row + 1, valid[row]])
        for layer_idx, mask in select(press.score(alone), alone.valid).items():
            assert torch.equal(together[layer_idx][row][:, valid[row]], mask[0])
            assert not together[layer_idx][row][:, ~valid[row]].any()


@pytest.mark.parametrize("budget", [None, 20])
def test_under_a_context_manager_and_in_later_turns(budget) -> None:
    """Both turns are compressed by the whole composition; a budget of one press counts the first turn."""
    model, cache = tiny_model(), DynamicCache()
    last = RandomPress(0.5, seed=1) if budget is None else RandomPress(budget=budget, seed=1)
    with torch.no_grad(), ComposedPress([RandomPress(0.5), last])(model):
        model(token_ids(), past_key_values=cache)
        model(token_ids(length=30, seed=1), past_key_values=cache)
    kept = int(sum(layer.packed.seqlens.sum() for _, layer in RaggedCache.of(cache).ragged_layers()))
    first = round(0.5 * 6 * (N - SINK))
    expected = round(0.5 * first) + round(0.5 * 90) if budget is None else 6 * budget
    assert kept == 6 * SINK + expected


@dataclass(frozen=True)
class Watching(ObservingPress):
    """Scores by the norm of the embeddings that the decoder's first norm saw; it counts the forwards it watched."""

    name: str = ""

    def observer(self, model):
        return _Watch(self, model)


class _Watch:
    forwards = 0

    def __init__(self, press, model) -> None:
        self._press, self._decoder = press, text_decoder(model)

    def __enter__(self):
        self._handle = self._decoder.layers[0].register_forward_pre_hook(self._look)
        return self

    def __exit__(self, *exc) -> None:
        self._handle.remove()

    def _look(self, module, args) -> None:
        _Watch.forwards += 1
        self._norms = args[0].float().norm(dim=-1)

    def scores(self, prefill) -> Scores:
        layers = {i: zeros + self._norms[:, None] for i, zeros in prefill.blank_scores().items()}
        return Scores(layers, prefill.protected(0), Policy.of(self._press.compression_ratio, "head"))


def test_observers_of_presses_watch_the_one_forward() -> None:
    """Every press that needs it sees the prefill that is compressed, in compress, a context manager and observers=."""
    model = tiny_model()
    press = ComposedPress([Watching(0.5, name="a"), RandomPress(0.5), Watching(0.25, name="b")])
    expected = kept_by(press, prefilled(model))  # watched again
    for run in ("observers", "compress", "with"):
        _Watch.forwards = 0
        if run == "observers":
            done = prefilled(model, observers=[press])
            assert torch.equal(kept_by(press, done), expected)
            assert torch.equal(torch.stack([m[0] for m in select(done.observed(press).scores(done), done.valid).values()]), expected)  # fmt: skip  # noqa: E501
        elif run == "compress":
            compress(model, ByteTokenizer(), "a context of several tokens", press)
        else:
            with torch.no_grad(), press(model):
                cache = RaggedCache.of(model(token_ids()).past_key_values)
            kept = torch.stack([layer.packed.seqlens[0] for _, layer in cache.ragged_layers()])
            assert torch.equal(kept.long(), expected.sum(-1))
        assert _Watch.forwards == 2  # two presses, one forward


def test_observers_end_when_one_cannot_begin() -> None:
    """An observer that raises at its start leaves no hook of those before it."""

    class Broken(Watching):
        def observer(self, model):
            watch = _Watch(self, model)
            watch._decoder = None
            return watch

    model = tiny_model()
    with pytest.raises(AttributeError):
        prefilled(model, observers=[ComposedPress([Watching(0.5), Broken(0.5)])])
    assert not text_decoder(model).layers[0]._forward_pre_hooks


def test_nested_compositions_are_flat() -> None:
    """A composition inside another is the same press as its presses in its place."""
    a, b, c = (RandomPress(0.5, seed=i) for i in range(3))
    flat = ComposedPress([a, b, c])
    assert ComposedPress([ComposedPress([a, b]), c]) == flat == ComposedPress([a, ComposedPress((b, c))])
    assert hash(ComposedPress([a, ComposedPress([b, c])])) == hash(flat)
    assert flat.presses == (a, b, c) and flat.compression_ratio == 1 - 0.5**3


@pytest.mark.parametrize("presses", [[], (), None, 3, "kvzip", RandomPress(0.5), [RandomPress(0.5), "random"], [0.5]])
def test_what_cannot_be_composed_is_refused(presses) -> None:
    """Nothing, something else than presses, and a press alone raise at once."""
    with pytest.raises(InvalidArgumentError, match="expected"):
        ComposedPress(presses)


class Deciding(RandomPress):
    """It fixes its counts without saying so before."""

    def score(self, prefill) -> Scores:
        layers = prefill.blank_scores()
        counts = {i: torch.full(values.shape[:2], 10) for i, values in layers.items()}
        return Scores(layers, prefill.protected(0), Policy(Ratio(0.5), Decided(per_head=counts)))


class SaysSo(Deciding):
    is_scorer = False


def test_a_press_that_decides_its_counts_comes_first() -> None:
    """After another press its counts would mean nothing: it raises when made, or, if it did not say so, when scored."""
    with pytest.raises(InvalidArgumentError, match="put it first"):
        ComposedPress([RandomPress(0.5), SaysSo()])
    done = prefilled()
    assert int(kept_by(ComposedPress([SaysSo(), RandomPress(0.5, n_sink=0)]), done).sum()) == 30
    with pytest.raises(InvalidArgumentError, match="decided over all pairs"):
        ComposedPress([RandomPress(0.5), Deciding()]).score(done)


@pytest.mark.kvpress
@pytest.mark.skipif(find_spec("kvpress") is None, reason="needs the package kvpress")
def test_presses_of_kvpress_can_be_composed(kvpress) -> None:
    """Those that score may stand anywhere, those that decide (AdaKV) come first; they watch the one forward."""
    from kvzip_press import RaggedPress

    done = prefilled()
    knorm = RaggedPress(kvpress.KnormPress(0.5))
    adakv = RaggedPress(kvpress.AdaKVPress(kvpress.KnormPress(0.5)))
    assert int(kept_by(ComposedPress([RandomPress(0.5, "head", n_sink=0), knorm]), done).sum()) == 6 * N // 4
    first = kept_by(adakv, done)
    both = kept_by(ComposedPress([adakv, RandomPress(0.5, n_sink=0)]), done)
    assert not (both & ~first).any() and int(both.sum()) == round(0.5 * int(first.sum()))
    with pytest.raises(InvalidArgumentError, match="put it first"):
        ComposedPress([RandomPress(0.5), adakv])
