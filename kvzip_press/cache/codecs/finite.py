"""Refuses what no storage of few bits can hold: one NaN or infinity would take its whole row along."""

from __future__ import annotations

import torch

from kvzip_press.errors import InvalidArgumentError


def check_finite(keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor) -> None:
    """Raises InvalidArgumentError, naming row, head and column, if a kept pair holds NaN or an infinity.

    Args:
        keys: ``[batch, num_heads, n, head_dim]``; at pairs that are not kept (padding, say) anything.
        values: ``[batch, num_heads, n, v_head_dim]``.
        keep: ``[batch, num_heads, n]``, bool.
    """
    for name, rows in (("keys", keys), ("values", values)):
        if not rows.numel() or all(bool(torch.isfinite(x)) for x in rows.aminmax()):  # one pass, no memory
            continue
        wrong = (~rows.isfinite().all(dim=-1) & keep).nonzero()
        if len(wrong):
            row, head, column = wrong[0].tolist()
            raise InvalidArgumentError(
                f"expected finite {name} to store in fewer bits, got NaN or an infinity in row {row}, head {head}, "
                f"token {column} of those that were read: take storage='model', or look for what the model computes "
                "there"
            )
