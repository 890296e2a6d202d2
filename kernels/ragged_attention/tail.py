"""Attention to the tail alone, which is dense: what implementations merge with that of the packed pairs."""

from torch import Tensor

from kvzip_press.kernels.dense_attention.api import unchecked
from kvzip_press.kernels.ragged_attention.inputs import RaggedInputs


def tail_attention(inputs: RaggedInputs, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor] | None:
    """Returns out and lse over the tail, by the best implementation of dense attention; None if there is no tail.

    Args:
        inputs: Arguments of ragged attention, the tail cut to its live tokens.
        scaling: As in ragged attention.
        softcap: As in ragged attention.
    """
    if inputs.tail_keys is None or inputs.tail_values is None or inputs.tail_length == 0:
        return None
    mask = inputs.tail_mask
    return unchecked(
        inputs.query,
        inputs.tail_keys,
        inputs.tail_values,
        causal=mask is None,
        mask=mask,
        scaling=scaling,
        softcap=softcap,
    )
