"""The storage "k8v4": keys in 8 bits, values in 4, the first values of a row exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.row_storage import RowStorage, by_batch_row
from kvzip_press.cache.codecs.storage import POSITIONS, Attended, Shapes
from kvzip_press.kernels.row_codec import decode_rows, encode_rows

SINKS = 4  # the first tokens of a row, which every later token looks at, whatever they say
LOST = "lost_of_sinks"


@dataclass(frozen=True)
class K8V4(RowStorage):
    """Stores a key as int8 and a value in 4 bits: 6 bits a number (LeanKV, arXiv 2412.03131, has the pair of widths).

    Keys need more bits than values, because what is wrong with a key is wrong in an exponent. The first four tokens get
    much of all attention, so what 4 bits lose of their values is kept in a table, ``[4, v_head_dim]`` a head in the
    model's dtype, and added to what attention returns, with the weights that these tokens have.
    """

    key_format: ClassVar[str] = "int8"
    value_format: ClassVar[str] = "int4"

    def table_shapes(self) -> Shapes:
        """Returns the shape of what a head's first values lose."""
        return {LOST: (self.dtype, (SINKS, self.v_head_dim))}

    def tables(
        self, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns what encoding loses of the values at the first positions, and 0 where these are not kept."""
        lost = values.new_zeros(*values.shape[:2], SINKS, values.shape[3])
        for position in range(SINKS):
            here = keep & (positions == position).unsqueeze(1)
            if not here.shape[2]:
                break
            column = here.byte().argmax(dim=2)[..., None, None].expand(-1, -1, 1, values.shape[3])
            exact = values.gather(2, column)
            left = exact.to(self.exact_dtype) - decode_rows(encode_rows(exact, self.value_format), self.exact_dtype)
            lost[:, :, position : position + 1] = torch.where(here.any(dim=2)[..., None, None], left, 0).to(self.dtype)
        return {LOST: lost.flatten(0, 1)}

    def decode(
        self, columns: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values, the first of these as they were but for rounding."""
        key, value = self.codes(columns)
        lost = _of_pairs(tables[LOST], columns[POSITIONS])
        return decode_rows(key, self.dtype), (decode_rows(value, self.exact_dtype) + lost).to(self.dtype)

    def attend(
        self,
        query: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
        tables: Mapping[str, torch.Tensor],
        cu_seqlens: torch.Tensor,
        tail_keys: torch.Tensor | None,
        tail_values: torch.Tensor | None,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Attended:
        """Computes attention to codes, and adds what the first values lost, by their weights."""
        attended = super().attend(
            query, columns, tables, cu_seqlens, tail_keys, tail_values, return_lse=True, **options
        )
        assert isinstance(attended, tuple)
        out, lse = attended
        if len(columns[POSITIONS]):
            out = out + self._lost(query, lse, columns, tables, cu_seqlens, tail_keys, **options).to(out.dtype)
        return (out, lse) if return_lse else out

    def _lost(
        self,
        query: torch.Tensor,
        lse: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
        tables: Mapping[str, torch.Tensor],
        cu_seqlens: torch.Tensor,
        tail_keys: torch.Tensor | None,
        *,
        row_index: torch.Tensor | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Returns the weighted sum of what each head's first values lost, in the shape of the output.

        A head's first pairs are those at its first positions, as far as it kept them.
        """
        index = cu_seqlens[:-1, None].long() + torch.arange(SINKS, device=query.device)
        inside = index < cu_seqlens[1:, None]
        index = index.clamp(max=len(columns[POSITIONS]) - 1)
        codes, _ = self.codes({name: column[index] for name, column in columns.items()})
        positions = columns[POSITIONS][index].where(inside, SINKS)
        found = (decode_rows(codes, self.exact_dtype), _of_pairs(tables[LOST], positions), positions < SINKS)
        keys, lost, live = (by_batch_row(tensor, query, tail_keys, row_index) for tensor in found)
        grouped, peaks = (x.to(self.exact_dtype).unflatten(1, (keys.shape[1], -1)) for x in (query, lse))
        logits = grouped @ keys.unsqueeze(2).transpose(-1, -2) * (self.head_dim**-0.5 if scaling is None else scaling)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        weights = torch.where(live[:, :, None, None], logits - peaks.unsqueeze(-1), -torch.inf).exp()
        return (weights @ lost.to(self.exact_dtype).unsqueeze(2)).flatten(1, 2)


def _of_pairs(lost: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns what the values at some positions lost: 0 behind the first ones.

    Args:
        lost: ``[segments, SINKS, v_head_dim]``.
        positions: ``[segments, n]``.

    Returns:
        ``[segments, n, v_head_dim]``.
    """
    index = positions.long().clamp(max=SINKS - 1).unsqueeze(-1).expand(-1, -1, lost.shape[2])
    return torch.where((positions < SINKS).unsqueeze(-1), lost.gather(1, index), 0)
