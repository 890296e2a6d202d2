"""The storage "k8v4": keys in 8 bits, values in 4, the first values of a row exact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kvzip_press.cache.codecs.held import POSITIONS, Held, NewPairs
from kvzip_press.cache.codecs.row_storage import RowStorage, by_batch_row
from kvzip_press.cache.codecs.storage import Attended, Layout
from kvzip_press.kernels.row_codec import decode_rows, encode_rows

SINKS = 4  # the first tokens of a row, which every later token looks at, whatever they say
KEYS, LOST = "sink_keys", "sink_values_lost"


@dataclass(frozen=True)
class K8V4(RowStorage):
    """Stores a key as int8 and a value in 4 bits: 6 bits a number (LeanKV, arXiv 2412.03131, has the pair of widths).

    Keys need more bits than values, because what is wrong with a key is wrong in an exponent. The first four tokens get
    much of all attention, so what 4 bits lose of their values is kept in a table, and their keys beside it. Attention
    to the codes returns its log-sum-exp; with it, the weights of these four are known, and what their values lost is
    added, weighted. At a position that a head has not kept the table holds 0.
    """

    key_format: ClassVar[str] = "int8"
    value_format: ClassVar[str] = "int4"

    def layout(self) -> Layout:
        """Returns the shapes of codes and scales, of a head's first keys, and of what its first values lose."""
        keys, lost = ((self.exact_dtype, (SINKS, width)) for width in (self.head_dim, self.v_head_dim))
        return replace(super().layout(), tables={KEYS: keys, LOST: lost})

    def tables(self, new: NewPairs) -> dict[str, torch.Tensor]:
        """Returns the keys at the first positions as they come back, and what encoding loses of the values there."""
        keys, values, keep, positions = new.keys, new.values, new.keep, new.positions
        first = [keep & (positions == position).unsqueeze(1) for position in range(SINKS)]
        found = torch.stack([here.any(dim=2) for here in first], dim=2).unsqueeze(-1)
        if not keep.shape[2]:
            keys, values = (x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (keys, values))
            column = found.long()
        else:
            column = torch.stack([here.byte().argmax(dim=2) for here in first], dim=2).unsqueeze(-1)
        exact_keys, exact_values = (
            x.gather(2, column.expand(-1, -1, -1, x.shape[3])).to(self.exact_dtype) for x in (keys, values)
        )
        held_keys = decode_rows(encode_rows(exact_keys, self.key_format), self.exact_dtype)
        lost = exact_values - decode_rows(encode_rows(exact_values, self.value_format), self.exact_dtype)
        tables = {KEYS: held_keys, LOST: lost}
        return {name: torch.where(found, table, 0).flatten(0, 1) for name, table in tables.items()}

    def after_eviction(self, held: Held) -> Held:
        """Returns the same with 0 in the tables at positions that a head no longer has."""
        positions = held.columns[POSITIONS]
        first = positions < SINKS
        left = torch.zeros_like(held.tables[LOST][..., :1], dtype=torch.bool)
        left[held.segments_of_entries()[first], positions[first].long()] = True
        return replace(held, tables={name: torch.where(left, table, 0) for name, table in held.tables.items()})

    def decode(self, held: Held) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values, the first of these as they were but for rounding."""
        key, value = self.codes(held)
        index = held.columns[POSITIONS].long()
        lost = held.tables[LOST][held.segments_of_entries(), index.clamp(max=SINKS - 1)]
        values = decode_rows(value, self.exact_dtype) + torch.where((index < SINKS).unsqueeze(-1), lost, 0)
        return decode_rows(key, self.dtype), values.to(self.dtype)

    def attend(
        self,
        query: torch.Tensor,
        held: Held,
        tail_keys: torch.Tensor | None,
        tail_values: torch.Tensor | None,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Attended:
        """Computes attention to codes, and adds what the first values lost, by their weights."""
        attended = super().attend(query, held, tail_keys, tail_values, return_lse=True, **options)
        assert isinstance(attended, tuple)
        out, lse = attended
        scaling, softcap = options.get("scaling"), options.get("softcap")
        keys, lost = (
            by_batch_row(held.tables[name], query, tail_keys, options.get("row_index")) for name in (KEYS, LOST)
        )
        grouped = query.to(self.exact_dtype).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
        logits = grouped @ keys.transpose(-1, -2) * (self.head_dim**-0.5 if scaling is None else scaling)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        # A weight is at most 1; it may seem more where nothing was kept, and nothing was lost.
        weights = (logits - lse.to(logits.dtype).view(*logits.shape[:3], 1)).clamp_(max=0).exp_()
        out = out + (weights @ lost).view(out.shape).to(out.dtype)
        return (out, lse) if return_lse else out
