"""KVzip's scores are the formula's, whatever the chunks, the replay mode, the batch or the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from kvzip_press import KVzipPress, RaggedCache, compress, prefill
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.model.chat import encode
from kvzip_press.model.structure import attention_layers, full_attention_layers, text_decoder
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.presses.kvzip import FIRST_PROMPT, NEXT_PROMPT
from kvzip_press.testing import ByteTokenizer, tiny_model

PREFIX = 5
TOKENIZER = ByteTokenizer()


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def prefilled(model, ids, valid=None):
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid)
    done.prefix_length, done.tokenizer = PREFIX, TOKENIZER
    return done


def replay_ids(ids: torch.Tensor, start: int, end: int) -> list[int]:
    prompt = FIRST_PROMPT if start == PREFIX else NEXT_PROMPT
    before = [] if start == PREFIX else ids[0, max(PREFIX, start - 8) : start].tolist()
    return [*encode(TOKENIZER, prompt), *before, *encode(TOKENIZER, "\n"), *ids[0, start:end].tolist()]


def visible(n: int, q: int, chunk: tuple[int, int] | None, window: int | None) -> torch.Tensor:
    """Bool ``[n + q, n + q]``: causal, in a window; a replay about one ``chunk`` sees only that and the prefix."""
    i, j = torch.arange(n + q)[:, None], torch.arange(n + q)[None]
    seen = (j <= i) & (i - j < (window or n + q))
    if chunk is None:
        return seen
    about = (j < PREFIX) | ((j >= chunk[0]) & (j < chunk[1])) | (j >= n)
    return seen & (about | (i < n))


def attention_inputs(model, sequence, full_mask, sliding_mask):
    """``layer_idx -> (query, key, value, scaling, softcap, hidden_states)`` of one dense plain-attention forward."""
    inputs, hidden = {}, {}
    full = {layer.layer_idx for layer in full_attention_layers(model)}

    def attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        inputs[module.layer_idx] = (query, key, value, scaling, softcap, hidden[module.layer_idx])
        groups = query.shape[1] // key.shape[1]
        logits = capped(query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling, softcap)
        mask = full_mask if module.layer_idx in full else sliding_mask
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    name = f"kvzip_oracle_{id(attention)}"
    AttentionInterface.register(name, attention)
    for layer in attention_layers(model):
        layer.module.config._attn_implementation = name
        layer.module.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.update({module.layer_idx: kwargs["hidden_states"]}), with_kwargs=True
        )
    with torch.no_grad():
        text_decoder(model)(input_ids=sequence, use_cache=False)
    return {layer_idx: inputs[layer_idx] for layer_idx in sorted(full)}


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def formula(
    inputs, n: int, start: int, end: int, o_proj: torch.Tensor | None = None, of_rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Facts of the paper in one softmax: prefix, chunk and causal replay as keys; the most a chunk's key gets."""
    query, key, value, scaling, softcap, hidden = inputs
    q, groups = query.shape[2] - n, query.shape[1] // key.shape[1]
    columns = torch.cat([torch.arange(PREFIX), torch.arange(start, end), torch.arange(n, n + q)])
    keys = key[:, :, columns].repeat_interleave(groups, 1)
    logits = capped(query[:, :, n:] @ keys.transpose(2, 3) * scaling, softcap)
    logits[..., -q:] += torch.full((q, q), -torch.inf).triu(1)
    weights = logits.softmax(-1)[..., PREFIX : PREFIX + end - start]
    if o_proj is not None:
        per_head = o_proj.view(-1, query.shape[1], value.shape[-1])
        projected = torch.einsum("ohd,bhtd->bhto", per_head, value[:, :, start:end].repeat_interleave(groups, 1))
        weights = weights * projected.norm(dim=-1)[:, :, None] / hidden[:, n:].norm(dim=-1)[:, None, :, None]
    if of_rows is not None:
        weights = weights * of_rows[:, None]
    return weights.unflatten(1, (-1, groups)).amax(dim=(2, 3))


def weights_of_rows(architecture, ids, replayed, start, end) -> torch.Tensor:
    """What each row of a replay predicts, and how surprising that is in one ordinary forward with all logits."""
    with torch.no_grad():
        logits = tiny_model(architecture, initializer_range=0.2)(input_ids=ids).logits[0].double()
    nats = torch.full((replayed.shape[1],), 0.0)
    for row in range(replayed.shape[1]):
        predicted = start + row + 1 - (replayed.shape[1] - (end - start))
        if start <= predicted < ids.shape[1]:
            nats[row] = -logits[predicted - 1].log_softmax(-1)[ids[0, predicted]]
    return (nats.clamp(max=6) + 0.02) / 6.02


def oracle(architecture, ids, chunk_size, *, local=False, plus=False, weighted=False):
    """Scores straight from the formula: for each chunk one dense forward over context and replay."""
    n = ids.shape[1]
    scores: dict[int, torch.Tensor] = {}
    for start in range(PREFIX, n, chunk_size):
        end = min(start + chunk_size, n)
        replayed = torch.tensor([replay_ids(ids, start, end)])
        model, q = tiny_model(architecture, initializer_range=0.2), replayed.shape[1]
        window = getattr(model.config, "sliding_window", None)
        masks = visible(n, q, (start, end) if local else None, None), visible(n, q, None, window)
        for layer_idx, inputs in attention_inputs(model, torch.cat([ids, replayed], 1), *masks).items():
            o_proj = text_decoder(model).layers[layer_idx].self_attn.o_proj.weight if plus else None
            of_rows = weights_of_rows(architecture, ids, replayed, start, end) if weighted else None
            found = formula(inputs, n, start, end, o_proj, of_rows)
            scores.setdefault(layer_idx, torch.zeros(1, 2, n))[:, :, start:end] = found
    return scores


@pytest.mark.parametrize("chunk_size", [16, 1000])
@pytest.mark.parametrize("replay", ["full", "local"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_scores_equal_the_formula(architecture, replay, chunk_size) -> None:
    """Scores equal an fp32 oracle of the formula to 1e-5, one chunk or several, full and local replay."""
    ids = token_ids(1, 45)
    scores = KVzipPress(0.5, replay=replay, chunk_size=chunk_size).score(
        prefilled(tiny_model(architecture, initializer_range=0.2), ids)
    )
    expected = oracle(architecture, ids, chunk_size, local=replay == "local")
    assert set(scores.layers) == set(expected)
    for layer_idx, values in scores.layers.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected[layer_idx], atol=1e-5, rtol=0)


def test_kvzip_plus_equals_the_formula() -> None:
    """KVzip+ multiplies by the norm of the projected value and divides by that of the hidden state."""
    ids = token_ids(1, 45)
    scores = KVzipPress(0.5, kvzip_plus=True, chunk_size=16).score(prefilled(tiny_model(initializer_range=0.2), ids))
    for layer_idx, expected in oracle("llama", ids, 16, plus=True).items():
        torch.testing.assert_close(scores.layers[layer_idx], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("replay", "plus"), [("full", False), ("local", False), ("local", True)])
def test_weighted_scores_equal_the_formula(replay, plus) -> None:
    """Each row's probabilities count by the surprisal of what it predicts, before the maximum; also in KVzip+."""
    ids = token_ids(1, 45)
    press = KVzipPress(0.5, replay=replay, chunk_size=16, kvzip_plus=plus, weighting="surprisal")
    scores = press.score(prefilled(tiny_model(initializer_range=0.2), ids))
    for layer_idx, expected in oracle("llama", ids, 16, local=replay == "local", plus=plus, weighted=True).items():
        torch.testing.assert_close(scores.layers[layer_idx], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("replay", ["full", "local"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_rows_of_a_padded_batch_score_as_alone(architecture, replay) -> None:
    """A row's scores do not depend on its neighbours or its padding."""
    model, press = tiny_model(architecture), KVzipPress(0.5, replay=replay, chunk_size=16)
    ids = token_ids(2, 45)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :14] = False
    together = press.score(prefilled(model, ids, valid))
    for row in range(2):
        alone = press.score(prefilled(model, ids[row : row + 1, valid[row]]))
        for layer_idx, values in together.layers.items():
            torch.testing.assert_close(values[row][:, valid[row]], alone.layers[layer_idx][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("replay", ["full", "local"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_scoring_leaves_the_cache_bit_identical(architecture, replay) -> None:
    """The cache before and after scoring is the same storage with the same content."""
    done = prefilled(tiny_model(architecture), token_ids(1, 45))
    before = [(layer.keys.data_ptr(), layer.keys.clone(), layer.values.clone()) for layer in done.cache.layers]
    KVzipPress(0.5, replay=replay, chunk_size=16).score(done)
    for layer, (pointer, keys, values) in zip(done.cache.layers, before, strict=True):
        assert layer.keys.data_ptr() == pointer
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.get_seq_length() == 45


def test_later_turn_is_scored_against_the_ragged_cache() -> None:
    """With nothing evicted, the scores of a second turn are those its tokens get from a dense cache."""
    model, ids = tiny_model(), token_ids(1, 60)
    cache = DynamicCache()
    scored = []

    class Spy(KVzipPress):
        def score(self, prefill):
            scored.append((prefill, super().score(prefill)))
            return scored[-1][1]

    with torch.no_grad(), Spy(0.0, n_sink=PREFIX, tokenizer=TOKENIZER)(model):
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:], past_key_values=cache)
    second = scored[1][1]
    assert second.protected.sum() == 0
    assert RaggedCache.of(cache).layers[0].n_context == 60 and RaggedCache.of(cache).kept_fraction == 1.0
    replayed = torch.tensor([[*encode(TOKENIZER, FIRST_PROMPT), *encode(TOKENIZER, "\n"), *ids[0, 40:].tolist()]])
    masks = (visible(60, replayed.shape[1], None, None),) * 2
    inputs = attention_inputs(tiny_model(), torch.cat([ids, replayed], 1), *masks)
    for layer_idx, values in second.layers.items():
        torch.testing.assert_close(values, formula(inputs[layer_idx], 60, 40, 60), atol=1e-5, rtol=0)


def test_a_replay_beyond_the_models_positions_is_warned_of_once(caplog) -> None:
    """Of two chunks the second has the longer replay, by its prompt and the tokens before it."""
    ids, middle = token_ids(1, 40), PREFIX + 18
    first, last = (40 + len(replay_ids(ids, *chunk)) for chunk in ((PREFIX, middle), (middle, 40)))
    for limit, said in ((last, []), (last - 1, [last]), (first - 1, [first])):
        caplog.clear()
        KVzipPress(0.5, chunk_size=18).score(prefilled(tiny_model(max_position_embeddings=limit), ids))
        assert [record.args[0] for record in caplog.records] == said


def test_without_a_tokenizer_the_replay_has_no_prompt(caplog) -> None:
    """Where no tokenizer can be had the context alone is replayed, and that is said."""
    model = tiny_model()
    model.config.name_or_path = "a-path-without-a-tokenizer"
    with torch.no_grad(), KVzipPress(0.5)(model):
        cache = model(token_ids(1, 30)).past_key_values
    assert "no tokenizer found" in caplog.text
    assert RaggedCache.of(cache).kept_fraction < 0.6


def test_whole_prefix_is_kept() -> None:
    """Every head keeps the whole chat-template prefix."""
    done = prefilled(tiny_model(), token_ids(1, 45))
    cache = done.evict(KVzipPress(0.9).score(done))
    for layer_idx, _ in cache.ragged_layers():
        for positions in cache.kept_positions(layer_idx)[0]:
            assert positions[:PREFIX].tolist() == list(range(PREFIX))


@pytest.mark.parametrize("kvzip_plus", [False, True])
def test_prefix_is_protected_by_mask_and_not_by_a_score(kvzip_plus) -> None:
    """KVzip+ scores exceed one, so a prefix that only had the score one would be evicted; here no head loses it."""
    done = prefilled(tiny_model(initializer_range=1.0), token_ids(1, 45))
    scores = KVzipPress(0.9, kvzip_plus=kvzip_plus).score(done)
    assert (max(float(v.max()) for v in scores.layers.values()) > 1) == kvzip_plus
    for layer_idx, _ in (cache := done.evict(scores)).ragged_layers():
        assert all(p[:PREFIX].tolist() == list(range(PREFIX)) for p in cache.kept_positions(layer_idx)[0])


def test_replay_computes_no_logits() -> None:
    """Scoring runs the decoder only: the head, as large as the vocabulary, is never called."""
    model = tiny_model()
    done = prefilled(model, token_ids(1, 45))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was called"))
    KVzipPress(0.5, chunk_size=16).score(done)


def test_compress_equals_prefill_score_evict() -> None:
    """The one-call form and the three steps give the same cache."""
    model, press, context = tiny_model(), KVzipPress(0.6, chunk_size=16), "the quick brown fox jumps over it all"
    one = compress(model, TOKENIZER, context, press)
    done = prefill(model, TOKENIZER, context)
    two = done.evict(press.score(done))
    for layer_idx, layer in one.ragged_layers():
        assert torch.equal(layer.packed.columns["keys"], two.layers[layer_idx].packed.columns["keys"])
        assert torch.equal(layer.packed.positions, two.layers[layer_idx].packed.positions)


def test_embeddings_without_ids_are_refused() -> None:
    """KVzip cannot repeat what it has no tokens of; the error says so and nothing is changed."""
    model, cache = tiny_model(), DynamicCache()
    embeds = model.get_input_embeddings()(token_ids(1, 30))
    with pytest.raises(InvalidArgumentError, match="input_ids"), torch.no_grad(), KVzipPress(0.5)(model):
        model(inputs_embeds=embeds, past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 30


@pytest.mark.parametrize(
    "options",
    [
        {"replay": "half"},
        {"weighting": "entropy"},
        {"chunk_size": 0},
        {"allocation": "heads"},
        {"n_sink": -1},
        {"compression_ratio": 1.0},
    ],
)
def test_bad_options_are_refused(options) -> None:
    """Options out of range raise at construction, naming what was expected."""
    with pytest.raises(InvalidArgumentError, match="expected"):
        replace(KVzipPress(), **options)
