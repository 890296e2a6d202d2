"""Every press that kvpress exports is shown to keep what kvpress keeps, or refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvzip_press import RaggedPress
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.prefilling.whole import run_prefill

pytestmark = pytest.mark.kvpress

SCORERS = [
    "CURPress",
    "CapPress",
    "ExpectedAttentionPress",
    "ExpectedAttentionStatsPress",
    "KVzapPress",
    "KeyDiffPress",
    "KnormPress",
    "LagKVPress",
    "LeverageScorePress",
    "NonCausalAttnPress",
    "ObservedAttentionPress",
    "QFilterPress",
    "RandomPress",
    "SnapKVPress",
    "TOVAPress",
]
SCORERS_OF_ONE_RATIO = ["CompactorPress", "CriticalKVPress", "StreamingLLMPress"]
GATHERING = [
    "BlockPress",
    "ChunkKVPress",
    "ChunkPress",
    "ComposedPress",
    "EntropyGatedChunkKVPress",
    "PerLayerCompressionPress",
    "PyramidKVPress",
    "SimLayerKVPress",
]
MASKING = ["AdaKVPress", "CriticalAdaKVPress", "DMSPress", "DuoAttentionPress", "LUKVPress"]
IN_THEIR_OWN_CONTEXT = ["FastKVzipPress", "KVComposePress", "KVComposePress structured", "KVgradPress", "KVzipPress"]
WHILE_DECODING = ["CompressionRatioDecodingPress", "DecodingPress", "PrefillDecodingPress"]  # test_while_decoding.py
SHOWN = [*SCORERS, *SCORERS_OF_ONE_RATIO, *GATHERING, *MASKING, *IN_THEIR_OWN_CONTEXT]
REFUSED = {
    "BasePress": "NotImplementedError",
    "ScorerPress": "NotImplementedError",
    "CAMPress": "while tokens are generated",
    "FinchPress": "takes a token out of the prompt",
    "KeyRerotationPress": "moves keys to new positions",
    "MergingPress": "merges",
    "RestoreKVPress": "adds learned pairs",
    "ThinKPress": "zeroes channels",
}


def test_no_press_of_kvpress_is_forgotten(kvpress: Any) -> None:
    known = {name.split()[0] for name in SHOWN} | set(WHILE_DECODING) | set(REFUSED)
    assert set(kvpress.__all__) - known == {"KVPressTextGenerationPipeline"}


@pytest.mark.parametrize("name", SHOWN)
def test_keeps_what_kvpress_keeps(
    name: str, tiny_model: Callable[..., Any], make_press: Callable[..., Any], context: Any, native: Any, keep_of: Any
) -> None:
    model = tiny_model("eager" if name == "ObservedAttentionPress" else "sdpa")
    press, ids = make_press(name), context()
    expected = native(model, press, ids)
    torch.manual_seed(7)
    done = run_prefill(model, ids, torch.ones_like(ids, dtype=torch.bool), observers=[ragged := RaggedPress(press)])
    cache = done.evict(ragged.score(done))
    if expected.kept is None:
        lengths = [[[layer.keys.shape[2]] * 2] for layer in expected.cache.layers]
        assert [cache.seqlens(layer_idx).tolist() for layer_idx in range(3)] == lengths
    else:
        assert [mask.tolist() for mask in keep_of(cache)] == [mask.tolist() for mask in expected.kept]
    with torch.no_grad():
        logits = model(torch.tensor([[11]]), past_key_values=cache, position_ids=torch.tensor([[150]])).logits[0, -1]
    assert 0.05 < cache.kept_fraction < 0.95
    torch.testing.assert_close(logits, expected.logits(11), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_eviction_is_refused_with_its_reason(
    name: str, kvpress: Any, tiny_model: Callable[..., Any], context: Any
) -> None:
    scorer = kvpress.KnormPress(0.5)
    arguments = {
        "CAMPress": {"base_press": scorer},
        "KeyRerotationPress": {"press": scorer},
        "MergingPress": {"press": scorer},
    }
    press = getattr(kvpress, name)(**arguments.get(name, {}))
    ids = context()
    done = run_prefill(tiny_model(), ids, torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match=re.escape(REFUSED[name])):
        RaggedPress(press).score(done)
