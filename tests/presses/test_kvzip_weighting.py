"""KVzip's rows are weighted by how surprising what they predict was to the model that read the context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from kvzip_press import KVzipPress, RaggedCache, compress, compress_in_chunks, prefill
from kvzip_press.errors import InvalidArgumentError, UnsupportedModelError
from kvzip_press.model.structure import text_decoder
from kvzip_press.prefilling import surprisal
from kvzip_press.prefilling.whole import run_prefill
from kvzip_press.presses.kvzip.weighting import RowWeights
from kvzip_press.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog"


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def by_the_models_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """``-log p`` of each token of one row from one ordinary forward with all logits; infinite for the first."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return torch.cat([nats.new_full((1,), torch.inf), nats]).float()


@pytest.mark.parametrize("at_once", [2**25, 5 * 128])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_surprisals_are_those_of_the_models_own_logits(architecture, at_once, monkeypatch) -> None:
    """Row by row, with padding at either end, a softcap of logits included, in whatever slices."""
    monkeypatch.setattr(surprisal, "LOGITS_AT_ONCE", at_once)
    options = {"final_logit_softcapping": 3.0} if architecture == "gemma2" else {}
    model, ids = tiny_model(architecture, **options), token_ids(3, 23)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :6], valid[2, 1:] = False, False
    if architecture == "gemma2":
        assert model.config.final_logit_softcapping == 3.0
    press = KVzipPress(0.5, weighting="surprisal")
    found = run_prefill(model, ids, valid, observers=[press]).observers[press].values
    assert found.dtype == torch.float32 and not found[~valid].any()
    for row, tokens in enumerate(valid):
        torch.testing.assert_close(found[row, tokens], by_the_models_logits(model, ids[row, tokens]), atol=2e-4, rtol=0)


def test_the_head_gets_slices_and_the_decoder_runs_once(monkeypatch) -> None:
    """A compression is one forward over the context and the replays; the head never makes logits of all tokens."""
    monkeypatch.setattr(surprisal, "LOGITS_AT_ONCE", 8 * 128)
    model, forwards, headed = tiny_model(), [], []
    text_decoder(model).layers[0].register_forward_hook(lambda *_: forwards.append(1))
    model.lm_head.register_forward_hook(lambda _, args, __: headed.append(args[0].shape[1]))
    compress(model, TOKENIZER, TEXT, KVzipPress(0.5, chunk_size=20, weighting="surprisal"))
    assert len(forwards) == 1 + 3
    assert sum(headed) == len(TEXT)  # after one token of the template
    assert max(headed) <= 8


def test_weights_belong_to_the_row_before_the_token() -> None:
    """The last row of the prompt predicts the chunk's first token; without a prompt nothing does."""
    nats = torch.tensor([torch.inf, 1.0, 2.0, 3.0, 4.0])
    rows = RowWeights.of("surprisal", nats)
    least, one, two, three, four = ((torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]) + 0.02) / 6.02).tolist()
    chunks = [slice(1, 3), slice(3, 5)]
    expected = torch.tensor([[least, least, one, two, three], [least, least, three, four, least]])
    torch.testing.assert_close(rows.of_replays(chunks, 5), expected)
    torch.testing.assert_close(rows.of_replays(chunks, 2), expected[:, 3:])
    assert RowWeights.of("probability", nats).predicting.tolist() == pytest.approx(
        [1, *((1 - (-nats[1:]).exp() + 0.02) / 1.02).tolist(), 0.02 / 1.02]
    )


@pytest.mark.parametrize("replay", ["full", "local"])
def test_rows_of_a_padded_batch_score_as_alone(replay) -> None:
    model, press = tiny_model(), KVzipPress(0.5, replay=replay, chunk_size=16, weighting="surprisal")
    ids = token_ids(2, 45)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :14] = False
    together = press.score(run_prefill(model, ids, valid, observers=[press]))
    for row in range(2):
        one = ids[row : row + 1, valid[row]]
        alone = press.score(run_prefill(model, one, torch.ones_like(one, dtype=torch.bool), observers=[press]))
        for layer_idx, values in together.layers.items():
            torch.testing.assert_close(values[row][:, valid[row]], alone.layers[layer_idx][0], atol=1e-5, rtol=1e-4)


def test_inside_with_and_later_turns() -> None:
    """`with press(model):` keeps what `compress` keeps; of a later turn, the first token counts most."""
    model, press = tiny_model(), KVzipPress(0.5, n_sink=4, tokenizer=TOKENIZER, weighting="surprisal")
    seen = []

    class Spy(KVzipPress):
        def score(self, prefill):
            seen.append((prefill.observers[self].values, super().score(prefill).layers))
            return super().score(prefill)

    ids, cache = token_ids(1, 40), DynamicCache()
    spy = Spy(0.5, n_sink=4, tokenizer=TOKENIZER, weighting="surprisal")
    with torch.no_grad(), spy(model):
        model(ids[:, :30], past_key_values=cache)
        model(ids[:, 30:], past_key_values=cache)
    done = run_prefill(model, ids[:, :30], torch.ones(1, 30, dtype=torch.bool), observers=[press])
    done.tokenizer = TOKENIZER
    for layer_idx, values in press.score(done).layers.items():
        torch.testing.assert_close(seen[0][1][layer_idx], values)
    assert seen[1][0].shape == (1, 10)
    assert seen[1][0][0].isinf().tolist() == [True, *[False] * 9]
    assert RaggedCache.of(cache).kept_fraction < 0.7


@pytest.mark.parametrize("rope", [{}, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}])
def test_chunked_prefilling_weighs_each_chunk(rope) -> None:
    """Also where the decoder that reads is a twin, because its frequencies depend on the length."""
    options = {"rope_parameters": rope, "max_position_embeddings": 32} if rope else {}
    model, press = tiny_model(**options), KVzipPress(0.5, chunk_size=16, weighting="surprisal")
    ids = token_ids(1, 30 if rope else 60)[0].tolist()
    cache = compress_in_chunks(model, TOKENIZER, ids, press, chunk_size=20, window_size=4)
    plain = compress_in_chunks(model, TOKENIZER, ids, replace(press, weighting=None), chunk_size=20, window_size=4)
    assert cache.kept_fraction == pytest.approx(plain.kept_fraction)
    assert any(
        not torch.equal(one.packed.positions, two.packed.positions)
        for (_, one), (_, two) in zip(cache.ragged_layers(), plain.ragged_layers(), strict=True)
    )


def test_surprisals_that_another_press_watched_will_do() -> None:
    """They follow from the context; a prefill that nobody watched is run once more, a later turn cannot be."""
    model = tiny_model()
    done = prefill(model, TOKENIZER, TEXT, observers=[KVzipPress(0.3, replay="local", weighting="surprisal")])
    forwards = []
    text_decoder(model).layers[0].register_forward_hook(lambda *_: forwards.append(1))
    press = KVzipPress(0.5, weighting="probability")
    scores = press.score(done).layers
    assert len(forwards) == 1  # the replay
    unwatched = prefill(model, TOKENIZER, TEXT)
    again = press.score(unwatched).layers
    assert all(torch.equal(again[layer_idx], values) for layer_idx, values in scores.items())
    with pytest.raises(InvalidArgumentError, match="has to watch the prefill"):
        press.score(replace(prefill(model, TOKENIZER, TEXT), start=5))


def test_a_decoder_without_a_head_is_refused() -> None:
    decoder = text_decoder(tiny_model())
    with pytest.raises(UnsupportedModelError, match="whose head says how probable"):
        KVzipPress(0.5, weighting="surprisal").observer(decoder)


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match='"surprisal" or "probability", got'):
        KVzipPress(0.5, weighting="entropy")
