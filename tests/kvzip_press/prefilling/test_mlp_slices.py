"""MLPs a slice of tokens at a time."""

from __future__ import annotations

import pytest
import torch

from kvzip_press.model.structure import text_decoder
from kvzip_press.model.twin import twin_of
from kvzip_press.prefilling.mlp_slices import slice_mlps
from kvzip_press.testing import ARCHITECTURES, tiny_model


def _sliced(decoder, **options):
    twin = twin_of(decoder)
    slice_mlps(twin, **options)
    return twin


def _rows_seen(decoder, input_ids, **options):
    """The rows of every call of the first layer's last projection, and what the decoder with slices returns."""
    seen = []
    twin = _sliced(decoder, **options)
    twin.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    with torch.no_grad():
        return seen, twin(input_ids).last_hidden_state


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_slices_compute_what_the_whole_computes(architecture):
    decoder = text_decoder(tiny_model(architecture, attn_implementation="eager"))  # Gemma 2 knows no other everywhere
    input_ids = torch.randint(3, 128, (3, 33))
    with torch.no_grad():
        whole = decoder(input_ids).last_hidden_state
    seen, sliced = _rows_seen(decoder, input_ids, min_rows=20)
    assert seen == [33, 33, 33]
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "expected"), [(39, [39]), (40, [20, 20]), (59, [30, 29]), (90, [30, 30, 30])])
def test_no_slice_is_shorter_than_asked(rows, expected):
    decoder = text_decoder(tiny_model())
    seen, _ = _rows_seen(decoder, torch.ones(1, rows, dtype=torch.long), min_rows=20)
    assert seen == expected


def test_a_forward_that_covers_the_class_s_is_sliced_too():
    decoder = text_decoder(tiny_model())
    lengths = []
    decoder.layers[1].mlp.forward = lambda x: lengths.append(x.shape[-2]) or x  # as accelerate covers a forward
    with torch.no_grad():
        _sliced(decoder, min_rows=8)(torch.ones(1, 24, dtype=torch.long))
    assert lengths == [8, 8, 8]


def test_the_decoder_itself_stays_as_it_was():
    decoder = text_decoder(tiny_model())
    before = [dict(vars(layer.mlp)) for layer in decoder.layers]
    _sliced(decoder)
    assert [dict(vars(layer.mlp)) for layer in decoder.layers] == before


def test_what_returns_more_than_a_tensor_runs_as_it_is():
    decoder = text_decoder(tiny_model())
    mlp = decoder.layers[0].mlp
    mlp.forward = lambda hidden_states: (hidden_states, "router logits")
    hidden_states = torch.randn(1, 50, 64)
    returned, _ = _sliced(decoder, min_rows=8).layers[0].mlp(hidden_states)
    assert returned is hidden_states
