"""Recall: a step reads what its query ranks first, up to the budget and nothing else; a cache does all it ever did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import (
    ClusterRecall,
    DecodeStep,
    KVzipPress,
    PageRecall,
    RaggedCache,
    RandomPress,
    answer,
    compress,
    generate,
    get_press,
    with_recall,
    without_recall,
)
from kvzip_press.cache.recall.clusters import k_means
from kvzip_press.cache.recall.ranking import listed
from kvzip_press.cache.recall.recalled_pairs import RecalledPairs
from kvzip_press.decoding import step as decoding
from kvzip_press.decoding.forward import read
from kvzip_press.decoding.step import _StaticStep
from kvzip_press.errors import CacheMismatchError, InvalidArgumentError, UnsupportedCacheError
from kvzip_press.testing import ByteTokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = ByteTokenizer()
MODEL = tiny_model(num_layers=2).requires_grad_(False)
TEXT = "The key of the red box is under the mat, and the mat is at the door of the house."
SMALL: dict[str, Any] = {"n_sink": 4, "full_layers": 1, "batch": 0}
CLUSTERS = ClusterRecall(budget=24, cluster_size=7, new_cluster_size=3, **SMALL)
RECALLS = {
    "clusters": CLUSTERS,
    "clusters_by_query_head": replace(CLUSTERS, per_query_head=True),
    "pages": PageRecall(budget=24, page_size=5, **SMALL),
    "pages_by_query_head": PageRecall(budget=24, page_size=5, per_query_head=True, **SMALL),
}
EVERYTHING = {name: replace(recall, budget=10**6) for name, recall in RECALLS.items()}
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def packed_of(cache: RaggedCache, layer_idx: int = 1) -> RecalledPairs:
    packed = dict(cache.ragged_layers())[layer_idx].packed
    assert isinstance(packed, RecalledPairs)
    return packed


def segment(packed: RecalledPairs, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and positions of a (row, head)."""
    where = slice(int(packed.cu_seqlens[number]), int(packed.cu_seqlens[number + 1]))
    keys, values = packed.storage.decode(packed)
    return keys[where], values[where], packed.positions[where]


# What a step reads ------------------------------------------------------------------------------------------------


def products(recall: Any, keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What each query of a group is taken to give with a key of a group of pairs."""
    if isinstance(recall, ClusterRecall):
        return query @ keys.mean(0)
    return torch.maximum(query * keys.amax(0), query * keys.amin(0)).sum(-1)


def pairs_read(recall: Any, packed: RecalledPairs, number: int, queries: torch.Tensor) -> list[list[int]]:
    """The lists of a head's queries ``[group, head_dim]``, group by group and pair by pair, as the docstrings say."""
    keys, _, positions = segment(packed, number)
    first = [i for i, position in enumerate(positions.tolist()) if position < recall.n_sink]
    rest = keys[len(first) :]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(recall.groups(rest, are_new=False).tolist() if len(rest) else ()):
        members.setdefault(group, []).append(len(first) + i)
    found = [one for _, one in sorted(members.items())]
    worth = torch.stack([products(recall, keys[one].double(), queries.double()) for one in found], -1) / 16**0.5
    if not recall.per_query_head:
        sizes = torch.tensor([len(one) for one in found])
        expected = worth.exp() / (worth.exp() * sizes).sum(-1, keepdim=True)
        worth = expected.mean(0, keepdim=True)
    lists = []
    for own in worth:
        ranked = [pair for group in own.argsort(descending=True).tolist() for pair in found[group]]
        lists.append([*first, *ranked][: recall.budget])
    return lists


def attended(packed: RecalledPairs, query: torch.Tensor, keys: Any, values: Any, **options: Any) -> torch.Tensor:
    """A step by these lists, in fp64: query head by query head, the listed pairs and then the tail that may be seen."""
    batch, heads = query.shape[:2]
    members, row_index, mask = heads // packed.num_heads, options.get("row_index"), options.get("tail_mask")
    out = torch.empty(batch, heads, 1, values.shape[-1], dtype=torch.float64)
    for row in range(batch):
        for head in range(packed.num_heads):
            own = slice(head * members, (head + 1) * members)
            number = (row if row_index is None else int(row_index[row])) * packed.num_heads + head
            own_keys, own_values, _ = segment(packed, number)
            lists = pairs_read(packed.recall, packed, number, query[row, own, 0])
            for i, pairs in enumerate(lists * (members // len(lists))):
                seen = slice(None) if mask is None else mask[row if len(mask) > 1 else 0, 0, 0]
                all_keys = torch.cat([own_keys[pairs], keys[row, head][seen]]).double()
                all_values = torch.cat([own_values[pairs], values[row, head][seen]]).double()
                logits = all_keys @ query[row, head * members + i, 0].double() / 16**0.5
                out[row, head * members + i, 0] = logits.softmax(-1) @ all_values
    return out.to(query.dtype)


@pytest.mark.parametrize("name", RECALLS)
def test_a_whole_step_is_that_of_lists_made_pair_by_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different length, heads of different length (some shorter than the budget), and tokens after them."""
    cache = compress(MODEL, TOKENIZER, [TEXT, TEXT[:50], TEXT[:20]], RandomPress(0.4, seed=2))
    recalling = with_recall(cache, RECALLS[name])
    lengths = packed_of(recalling).seqlens
    assert lengths.min() < CLUSTERS.budget < lengths.max()
    padding = torch.tensor([0, 2, 1])
    forks = [recalling.fork(), recalling.fork()]
    for fork in forks:
        read(MODEL, fork, torch.tensor([[5, 6, 7], [0, 0, 8], [0, 9, 10]]), padding=padding)
    got = [read(MODEL, forks[0], torch.tensor([[20 + i], [30 + i], [40 + i]])) for i in range(2)]

    original = RecalledPairs.attend

    def slow(self: RecalledPairs, query: torch.Tensor, keys: Any, values: Any, **options: Any) -> Any:
        step = query.shape[2] == 1
        return (attended if step else original)(self, query, keys, values, **options)

    monkeypatch.setattr(RecalledPairs, "attend", slow)
    expected = [read(MODEL, forks[1], torch.tensor([[20 + i], [30 + i], [40 + i]])) for i in range(2)]
    torch.testing.assert_close(got, expected, **TOLERANCE)
    full = read(MODEL, without_recall(forks[1]), torch.tensor([[22], [32], [42]]))
    assert not torch.allclose(full, read(MODEL, forks[1], torch.tensor([[22], [32], [42]])), **TOLERANCE)


@pytest.mark.parametrize("storage", ["model", "int8"])
@pytest.mark.parametrize("name", RECALLS)
def test_a_step_lists_exactly_its_budget_and_reads_no_other_pair(name: str, storage: str) -> None:
    """The first tokens first, each pair once; whatever is not listed is NaN."""
    recall = RECALLS[name]
    cache = with_recall(compress(MODEL, TOKENIZER, [TEXT, TEXT[:15]], get_press("none"), storage=storage), recall)
    packed, query = packed_of(cache), torch.randn(2, 4, 1, 16)
    index, bounds = listed(recall, packed.groups, query, 2, width=packed.width)
    n_lists = 4 if recall.per_query_head else 2
    assert bounds.diff().tolist() == [24] * n_lists + [16] * n_lists
    for number, own in enumerate(index[: int(bounds[-1])].split(bounds.diff().tolist())):
        start = int(packed.cu_seqlens[number * 2 // n_lists])
        assert own[:4].tolist() == list(range(start, start + 4))
        assert len(set(own.tolist())) == len(own)
        assert own.min() >= start and own.max() < int(packed.cu_seqlens[number * 2 // n_lists + 1])
    tail = torch.randn(2, 2, 2, 3, 16)
    expected = packed.attend(query, *tail)
    hidden = torch.ones(packed.total, dtype=torch.bool)
    hidden[index[: int(bounds[-1])].long()] = False
    poisoned = {
        key: column.masked_fill(hidden.view(-1, *[1] * (column.dim() - 1)), torch.nan)
        if column.is_floating_point()
        else column
        for key, column in packed.columns.items()
    }
    assert bool(hidden.any()) and torch.equal(replace(packed, columns=poisoned).attend(query, *tail), expected)


@pytest.mark.parametrize("storage", ["model", "int8", "fp8"])
@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("offload", [False, True])
def test_with_a_budget_for_all_pairs_nothing_changes(name: str, storage: str, offload: bool) -> None:
    """Every storage that is allowed, on the device and in host memory, after KVzip has evicted half."""
    cache = compress(MODEL, TOKENIZER, TEXT, KVzipPress(0.5), storage=storage)
    recalling = with_recall(cache, EVERYTHING[name], offload=offload)
    assert recalling.kept_fraction == cache.kept_fraction
    for _ in range(3):
        token = torch.tensor([[9]])
        torch.testing.assert_close(read(MODEL, recalling, token), read(MODEL, cache, token), **TOLERANCE)


def test_questions_read_everything() -> None:
    """A forward of several tokens is exact, bit for bit, also from host memory."""
    cache = compress(MODEL, TOKENIZER, TEXT, get_press("none"))
    question = torch.arange(5, 12)[None]
    expected = read(MODEL, cache.fork(), question)
    for offload in (False, True):
        assert torch.equal(read(MODEL, with_recall(cache, CLUSTERS, offload=offload), question), expected)


def test_layers_that_are_left_out_stay_as_they_are() -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, get_press("none"))
    kinds = [type(layer.packed).__name__ for _, layer in with_recall(cache, CLUSTERS).ragged_layers()]
    assert kinds == ["PackedPairs", "RecalledPairs"]
    assert not any(isinstance(layer.packed, RecalledPairs) for _, layer in cache.ragged_layers())


# Groups -----------------------------------------------------------------------------------------------------------


def test_k_means_is_the_one_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the cosine, means of the keys as they are; whatever the tiles, and in another process, the same."""
    keys = torch.randn(60, 8) * torch.rand(60, 1)
    first = keys[torch.randperm(60, generator=torch.Generator().manual_seed(3))[:6].sort().values]
    means = [one.double() for one in first]
    for iteration in range(21):
        near = [
            max(range(6), key=lambda c, k=key: float(torch.cosine_similarity(k, means[c], 0))) for key in keys.double()
        ]
        if iteration < 20:
            for c in range(6):
                own = [key for key, nearest in zip(keys.double(), near, strict=True) if nearest == c]
                means[c] = torch.stack(own).mean(0) if own else means[c]
    assert k_means(keys, 6, n_iterations=20, seed=3).tolist() == near
    monkeypatch.setattr("kvzip_press.cache.recall.clusters._tile", lambda n: 7)
    assert k_means(keys, 6, n_iterations=20, seed=3).tolist() == near
    assert k_means(keys, 6, n_iterations=20, seed=4).tolist() != near


def test_directions_that_are_apart_become_clusters() -> None:
    """And a query finds the ones that it points to, where neighbours are mixed and pages cannot tell them apart."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=-1)
    kinds = torch.arange(400) % 8
    keys = 4 * directions[kinds] + 0.3 * torch.randn(400, 16, generator=generator)
    found = k_means(keys, 16, n_iterations=20, seed=0)
    assert all(len(set(kinds[found == c].tolist())) == 1 for c in found.unique().tolist())
    top = set((keys @ directions[3]).topk(50).indices.tolist())
    shares = []
    for recall in (ClusterRecall(budget=50, cluster_size=25, n_sink=0), PageRecall(budget=50, n_sink=0)):
        groups = recall.groups(keys, are_new=False).unique(return_inverse=True)[1]
        n_groups = int(groups.max()) + 1
        marks = torch.stack([products(recall, keys[groups == group], directions[3]) for group in range(n_groups)])
        ranked = [i for group in marks.argsort(descending=True) for i in (groups == group).nonzero()[:, 0].tolist()]
        shares.append(len(top & set(ranked[:50])) / 50)
    assert shares[0] > 0.9 and shares[1] < 0.5


# New tokens -------------------------------------------------------------------------------------------------------


def steps(model: Any, cache: RaggedCache, n: int) -> torch.Tensor:
    """Reads a question, then single tokens; returns the logits of each step, and leaves the cache grown."""
    read(model, cache, torch.tensor([[5, 6]] * cache.batch_size))
    with DecodeStep(model, cache, max_new_tokens=n) as step:
        return torch.stack([step(torch.tensor([7 + i] * cache.batch_size)).clone() for i in range(n)])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", ["clusters", "pages_by_query_head"])
def test_new_tokens_are_grouped_in_batches(name: str, offload: bool) -> None:
    """The pairs are those that were there, groups that were there stay, and the budget holds for all of them."""
    cache = compress(MODEL, TOKENIZER, TEXT, get_press("none"))
    recall = replace(RECALLS[name], batch=5)
    recalling = with_recall(cache, recall, offload=offload)
    before = packed_of(recalling)
    got = steps(MODEL, recalling, 9)
    expected = steps(MODEL, cache, 9)
    assert [layer.tail.length for _, layer in recalling.ragged_layers()] == [1, 1]
    assert recalling.get_seq_length() == cache.get_seq_length() and recalling.n_seen == 82 + 11
    after = packed_of(recalling)
    assert after.positions.view(2, -1).tolist() == [list(range(92))] * 2
    n_groups = before.groups.tables["sizes"].shape[1]
    assert torch.equal(after.groups.tables["sizes"][:, :n_groups], before.groups.tables["sizes"])
    orders = after.groups.columns["order"].view(2, -1)
    assert torch.equal(orders[:, :82], before.groups.columns["order"].view(2, -1))
    assert [sorted(own) for own in orders[:, 82:].tolist()] == [list(range(82, 92))] * 2
    assert_groups_are_noted(after)
    query = torch.randn(1, 4, 1, 16)
    index, bounds = listed(recall, after.groups, query, 2, width=after.width)
    assert set(bounds.diff().tolist()) == {24} and int(index[: int(bounds[-1])].max()) < 184
    assert not torch.allclose(got, expected, **TOLERANCE)
    everything = with_recall(
        compress(MODEL, TOKENIZER, TEXT, get_press("none")), replace(recall, budget=10**6), offload=offload
    )
    torch.testing.assert_close(steps(MODEL, everything, 9), expected, **TOLERANCE)


def assert_groups_are_noted(packed: RecalledPairs) -> None:
    """What is noted of each group is that of the keys that are in it."""
    order, sizes = packed.groups.columns["order"], packed.groups.tables["sizes"]
    for number, own in enumerate(sizes.tolist()):
        keys, *_ = segment(packed, number)
        members = order[int(packed.cu_seqlens[number]) :][: len(keys)].long().split(own)
        for mark, group in zip(packed.groups.tables["marks"][number], members[1:], strict=True):
            if len(group):
                expected = packed.recall.marks(keys[group], torch.zeros_like(group), 1)[0]
                torch.testing.assert_close(mark, expected)


def test_a_layer_in_host_memory_that_was_grouped_again_is_there_again() -> None:
    """Also where pairs go: a press compresses a later turn, and what was kept of the first stays."""
    press = RandomPress(0.5, seed=1)
    with press(MODEL):
        cache = DynamicCache()
        MODEL(input_ids=torch.arange(3, 60)[None], past_key_values=cache, use_cache=True)
    plain = RaggedCache.of(cache)
    for recalling in (with_recall(plain, EVERYTHING["clusters"], offload=offload) for offload in (False, True)):
        other = plain.fork()
        with press(MODEL):
            for one in (recalling, other):
                MODEL(input_ids=torch.arange(5, 25)[None], past_key_values=one, use_cache=True)
        assert packed_of(recalling).seqlens.tolist() == dict(other.ragged_layers())[1].packed.seqlens.tolist()
        token = torch.tensor([[9]])
        torch.testing.assert_close(read(MODEL, recalling, token), read(MODEL, other, token), **TOLERANCE)


@pytest.mark.parametrize("name", ["clusters", "clusters_by_query_head"])
def test_static_steps_rank_anew_each_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a captured graph, which is captured anew when new tokens are grouped."""

    def trial(self: _StaticStep, compiled: bool = False) -> None:
        start = self.positions.clone()
        self.run()
        self._rewind(start)

    recall = replace(RECALLS[name], batch=5)
    caches = [with_recall(compress(MODEL, TOKENIZER, [TEXT] * 2, RandomPress(0.3)), recall) for _ in range(2)]
    eager = steps(MODEL, caches[0], 12)
    captures: list[int] = []
    monkeypatch.setattr(decoding, "_reason_against", lambda model, cache, device: decoding.reason_against(cache))
    monkeypatch.setattr(_StaticStep, "capture", lambda *given: captures.append(1) or trial(*given))
    torch.testing.assert_close(steps(MODEL, caches[1], 12), eager, **TOLERANCE)
    assert len(captures) == 3
    offloaded = with_recall(caches[1], recall, offload=True)
    with DecodeStep(MODEL, offloaded, max_new_tokens=2) as step:
        assert not step.captured and "host memory" in str(step.reason)


# Memory, rows, forks ----------------------------------------------------------------------------------------------


def test_what_lies_in_host_memory_is_counted_there() -> None:
    """Bytes on the device are those of groups, bounds, tails and layers that read everything."""
    cache = compress(MODEL, TOKENIZER, TEXT * 3, get_press("none"))
    recalling = with_recall(cache, CLUSTERS, offload=True)
    plain = [layer.packed for _, layer in cache.ragged_layers()]
    assert recalling.host_bytes == sum(column.nbytes for column in plain[1].columns.values())
    groups = sum(tensor.nbytes for tensor in packed_of(recalling).groups.tensors)  # bounds are the pairs' own
    assert recalling.resident_bytes == sum(tensor.nbytes for tensor in plain[0].tensors) + groups
    assert (cache.host_bytes, with_recall(cache, CLUSTERS).host_bytes) == (0, 0)
    assert "MB in host memory" in repr(recalling) and "a step reads by ClusterRecall(budget=24" in repr(recalling)
    recalling.move_to("cpu")
    back = without_recall(recalling)
    assert (back.host_bytes, back.resident_bytes) == (0, cache.resident_bytes)


def test_forks_rows_and_beams_recall_what_each_would_alone() -> None:
    """Rows that share a context list pairs of it each for itself."""
    texts = [TEXT, TEXT[:60]]
    alone = [with_recall(compress(MODEL, TOKENIZER, one, get_press("none")), CLUSTERS) for one in texts]
    both = with_recall(compress(MODEL, TOKENIZER, texts, get_press("none")), CLUSTERS)
    tokens = torch.tensor([[9], [11]])
    expected = torch.cat([read(MODEL, one.fork(), tokens[i : i + 1]) for i, one in enumerate(alone)])
    torch.testing.assert_close(read(MODEL, both.fork(), tokens), expected, **TOLERANCE)
    beams = both.fork()
    beams.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(read(MODEL, beams, tokens.flip(0)), expected.flip(0), **TOLERANCE)
    beams.batch_select_indices(torch.tensor([1]))
    beams.truncate(82)
    torch.testing.assert_close(read(MODEL, beams, tokens[:1]), expected[:1], **TOLERANCE)
    shared = alone[0].fork()
    shared.batch_repeat_interleave(2)
    single = torch.cat([read(MODEL, alone[0].fork(), token[None]) for token in tokens])
    torch.testing.assert_close(read(MODEL, shared, tokens), single, **TOLERANCE)


def test_answers_are_asked_for_as_ever_and_hybrid_models_keep_their_windows() -> None:
    model = tiny_model("gemma3_text")
    cache = compress(model, TOKENIZER, TEXT, KVzipPress(0.3))
    recalling = with_recall(cache, replace(EVERYTHING["clusters"], batch=4))
    questions = ["Where is the key?", "Whose?"]
    asked = {"max_new_tokens": 9}
    assert answer(model, TOKENIZER, recalling, questions, **asked) == answer(
        model, TOKENIZER, cache, questions, **asked
    )
    said = [answer(model, TOKENIZER, one, questions[0], **asked, keep=True) for one in (cache, recalling)]
    assert said[0] == said[1] and cache.n_seen == recalling.n_seen
    less = with_recall(cache, CLUSTERS)
    rows = [generate(model, one.fork(), [5, 6, 7], 8) for one in (less, less, cache)]
    assert rows[0] == rows[1]


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c: with_recall(c, "clusters"), InvalidArgumentError, "expected a recall, as ClusterRecall"),
        (lambda c: with_recall(DynamicCache(), CLUSTERS), CacheMismatchError, "expected a compressed cache"),
        (lambda c: with_recall(c, replace(CLUSTERS, full_layers=2)), InvalidArgumentError, "got 2 of 2 layers"),
        (lambda c: with_recall(c, CLUSTERS).restore(), UnsupportedCacheError, r"without recall to restore"),
        (lambda c: with_recall(c, CLUSTERS).save("x"), UnsupportedCacheError, r"call without_recall\(cache\) first"),
        (lambda c: replace(CLUSTERS, budget=4), InvalidArgumentError, "budget of more pairs than n_sink"),
        (lambda c: replace(CLUSTERS, cluster_size=0), InvalidArgumentError, "sizes of clusters"),
        (lambda c: replace(CLUSTERS, cluster_size=2.5), InvalidArgumentError, "expected cluster_size as int, got 2.5"),
        (lambda c: replace(CLUSTERS, budget=float("nan")), InvalidArgumentError, "expected budget as int, got nan"),
        (lambda c: replace(CLUSTERS, per_query_head=1), InvalidArgumentError, "expected per_query_head as bool, got 1"),
        (lambda c: with_recall(c, CLUSTERS, offload="no"), InvalidArgumentError, "offload=True or offload=False"),
        (lambda c: PageRecall(budget=24, page_size=0), InvalidArgumentError, "page_size of 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(compress(MODEL, TOKENIZER, TEXT, RandomPress(0.5)))


@pytest.mark.parametrize("storage", ["k8v4", "int4", "kivi4", "tiers"])
def test_storages_in_which_pairs_depend_on_each_other_are_refused(storage: str) -> None:
    cache = compress(MODEL, TOKENIZER, TEXT, RandomPress(0.5), storage=storage)
    with pytest.raises(UnsupportedCacheError, match="stored by themselves"):
        with_recall(cache, CLUSTERS)


def test_a_press_that_evicts_while_the_model_writes_refuses_it() -> None:
    press = get_press("streaming_llm_decode", budget=40, buffer=4)
    with press(MODEL):
        cache = DynamicCache()
        MODEL(input_ids=torch.arange(3, 60)[None], past_key_values=cache, use_cache=True)
    recalling = with_recall(RaggedCache.of(cache), CLUSTERS)
    with press(MODEL), pytest.raises(UnsupportedCacheError, match=r"call without_recall\(cache\) first"):
        MODEL(input_ids=torch.tensor([[5]]), past_key_values=recalling, use_cache=True)


# On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["clusters", "clusters_by_query_head", "pages"])
def test_a_graph_ranks_anew_in_each_replay(name: str) -> None:
    """And is captured again when new tokens were grouped: tokens and logits are those of eager steps."""
    model = tiny_model(num_layers=2).requires_grad_(False).to("cuda")
    cache = compress(model, TOKENIZER, [TEXT, TEXT[:60]], RandomPress(0.3))
    recalling = with_recall(cache, replace(RECALLS[name], batch=20))
    rows = [generate(model, recalling.fork(), [[5, 6, 7]] * 2, 50, graph=graph) for graph in (True, False)]
    assert rows[0] == rows[1]
    shared = with_recall(compress(model, TOKENIZER, TEXT, get_press("none")), RECALLS[name])
    rows = [answer(model, TOKENIZER, shared, ["Where?", "Who has the key?"], max_new_tokens=20) for _ in range(2)]
    assert rows[0] == rows[1]


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["model", "int8"])
def test_host_memory_holds_what_a_step_reads_on_the_gpu(storage: str) -> None:
    """The logits are those of a cache on the GPU, whose memory is free when it has gone."""
    model = tiny_model(num_layers=3).requires_grad_(False).to("cuda")
    cache = compress(model, TOKENIZER, TEXT * 20, get_press("none"), storage=storage)
    near = with_recall(cache, replace(CLUSTERS, batch=5))
    away = with_recall(cache, replace(CLUSTERS, batch=5), offload=True)
    token = torch.tensor([[5]], device="cuda")
    for _ in range(3):
        torch.testing.assert_close(read(model, away, token), read(model, near, token), **TOLERANCE)
    torch.testing.assert_close(steps_on(model, away), steps_on(model, near), **TOLERANCE)
    assert all(column.device.type == "cpu" for column in packed_of(away).columns.values())
    assert away.resident_bytes + away.host_bytes < near.resident_bytes + 1000
    held = torch.cuda.memory_allocated()
    size = packed_of(near).total * packed_of(near).pair_bytes
    del cache, near
    assert torch.cuda.memory_allocated() < held - size


def steps_on(model: Any, cache: RaggedCache) -> torch.Tensor:
    with DecodeStep(model, cache, max_new_tokens=7, graph=False) as step:
        return torch.stack([step(torch.tensor([7 + i], device="cuda")).clone() for i in range(7)])
