"""MLPs a slice of tokens at a time."""

from __future__ import annotations

import pytest
import torch

from kvzip_press.model.structure import text_decoder
from kvzip_press.prefilling.mlp_slices import mlps_in_slices
from kvzip_press.testing import ARCHITECTURES, tiny_model


def _rows_seen(decoder, run, **options):
    """The rows of every call of the first layer's last projection, and what ``run`` returns."""
    seen = []
    with mlps_in_slices(decoder, **options):
        handle = decoder.layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].shape[-2])
        )
        try:
            with torch.no_grad():
                return seen, run()
        finally:
            handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_slices_compute_what_the_whole_computes(architecture):
    decoder = text_decoder(tiny_model(architecture, attn_implementation="eager"))  # Gemma 2 knows no other everywhere
    input_ids = torch.randint(3, 128, (3, 33))
    with torch.no_grad():
        whole = decoder(input_ids).last_hidden_state
        seen, sliced = _rows_seen(decoder, lambda: decoder(input_ids).last_hidden_state, min_rows=20)
    assert seen == [33, 33, 33]
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "expected"), [(39, [39]), (40, [20, 20]), (59, [30, 29]), (90, [30, 30, 30])])
def test_no_slice_is_shorter_than_asked(rows, expected):
    decoder = text_decoder(tiny_model())
    seen, _ = _rows_seen(decoder, lambda: decoder(torch.ones(1, rows, dtype=torch.long)), min_rows=20)
    assert seen == expected


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_afterwards_the_modules_are_as_they_were(error):
    decoder = text_decoder(tiny_model())
    decoder.layers[1].mlp.forward = own = lambda hidden_states: hidden_states  # as accelerate covers a forward
    before = [dict(vars(layer.mlp)) for layer in decoder.layers]
    try:
        with mlps_in_slices(decoder):
            assert decoder.layers[1].mlp.forward is not own
            if error is not None:
                raise error
    except RuntimeError:
        pass
    assert [dict(vars(layer.mlp)) for layer in decoder.layers] == before


def test_what_returns_more_than_a_tensor_runs_as_it_is():
    decoder = text_decoder(tiny_model())
    mlp = decoder.layers[0].mlp
    mlp.forward = lambda hidden_states: (hidden_states, "router logits")
    hidden_states = torch.randn(1, 50, 64)
    with mlps_in_slices(decoder, min_rows=8):
        returned, _ = mlp(hidden_states)
    assert returned is hidden_states
