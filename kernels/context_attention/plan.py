"""Which tokens of a step read which context, noted once and read by every layer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvzip_press.kernels.checks import check_device, check_dtype, check_groups, check_rank, check_shape


@dataclass(frozen=True)
class Work:
    """How programs of the Triton kernel share the pairs of a step; made by ``sharing.py``.

    The tokens of a context are cut into tiles, whose query rows read a segment together: a (tile, key-value head).
    There is room for as many tiles as there may be; those behind the last one have no tokens. A segment is cut into
    items, one for each program that reads a part of it.

    Nothing writes a plan once it is made. Kernels read it before they wait for the kernel in front of them, which is
    safe only behind a launch that began when all before it had ended. The first launch that reads a plan is such a one,
    on each stream, and is noted here; a captured one orders nothing outside of its graph, so it is noted apart. As with
    any tensor, a stream other than the one on which the plan was made has to wait for that one first.

    Attributes:
        block_m: query rows of a tile, at most: a power of two.
        tokens_per_tile: tokens of a tile, at most; more than ``block_m`` rows if the group alone has more.
        order: int32 [tokens], the tokens, sorted by their context.
        tile_contexts: int32 [tiles], the context that a tile reads.
        tile_firsts: int32 [tiles], where a tile's tokens begin in ``order``.
        tile_counts: int32 [tiles], how many they are.
        token_tiles: int32 [tokens], the tile of each token.
        token_slots: int32 [tokens], its place in the tile.
        n_items: int32 [layers, tiles * num_key_value_heads], items of each segment; 0 if it has no pairs.
        first_items: int32, likewise, the number of its first item, which is the number of a program.
        segments: int32 [layers, programs], the segment that a program reads; behind the last one if it reads none.
        read_on: the streams of launches that have read it, and whether these were captured. One is noted after it was
            launched: whoever finds it here, in whichever thread, launches behind it.
    """

    block_m: int
    tokens_per_tile: int
    order: Tensor
    tile_contexts: Tensor
    tile_firsts: Tensor
    tile_counts: Tensor
    token_tiles: Tensor
    token_slots: Tensor
    n_items: Tensor
    first_items: Tensor
    segments: Tensor
    read_on: set[tuple[int, bool]] = field(default_factory=set, init=False, compare=False, repr=False)


@dataclass(frozen=True)
class ContextPlan:
    """What :func:`kvzip_press.kernels.context_attention.plan_contexts` returns; its arguments are documented there.

    Attributes:
        context_of_token: int32 [tokens].
        begins: int32 [layers, contexts, num_key_value_heads].
        lengths: int32, as ``begins``.
        num_attention_heads: query heads.
        work: how the Triton kernel shares the pairs among programs; None where that kernel cannot run.
    """

    context_of_token: Tensor
    begins: Tensor
    lengths: Tensor
    num_attention_heads: int
    work: Work | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the step."""
        return self.context_of_token.shape[0]

    @property
    def num_key_value_heads(self) -> int:
        """Number of key-value heads."""
        return self.begins.shape[2]

    @property
    def groups(self) -> int:
        """Query heads of a key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def tokens_of_contexts(self) -> list[tuple[int, list[int]]]:
        """Returns each context that is read and its tokens, ascending; read from the device."""
        tokens: dict[int, list[int]] = {}
        for token, context in enumerate(self.context_of_token.tolist()):
            tokens.setdefault(context, []).append(token)
        return sorted(tokens.items())

    def segments(self, layer_idx: int, context: int) -> list[slice]:
        """Returns where the pairs of each key-value head of a context lie in one layer; read from the device."""
        begins, lengths = (table[layer_idx, context].tolist() for table in (self.begins, self.lengths))
        return [slice(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]

    def check(self) -> None:
        """Raises ValueError (shapes, devices, values) or TypeError (dtypes) for parts that do not fit together."""
        dims = "layers, contexts, num_key_value_heads"
        check_rank("begins", self.begins, dims)
        check_shape("lengths", self.lengths, self.begins.shape, dims)
        check_rank("context_of_token", self.context_of_token, "tokens")
        for name in ("begins", "lengths", "context_of_token"):
            check_dtype(name, getattr(self, name), torch.int32)
            check_device(name, getattr(self, name), self.begins.device)
        if self.begins.shape[1] < 1:
            raise ValueError("begins: expected at least the empty context, row 0, got no contexts")
        check_groups(self.num_attention_heads, self.num_key_value_heads)
        if self.begins.device.type == "cpu":
            self._check_values()

    def _check_values(self) -> None:
        n_contexts = self.begins.shape[1]
        if self.lengths[:, 0].any():
            raise ValueError(f"lengths: expected an empty context in row 0, got {self.lengths[:, 0].tolist()!r:.80}")
        if self.begins.numel() and min(int(self.begins.min()), int(self.lengths.min())) < 0:
            raise ValueError("begins, lengths: expected numbers of 0 and more, got a negative one")
        if self.num_tokens:
            least, most = (int(bound) for bound in self.context_of_token.aminmax())
            if least < 0 or most >= n_contexts:
                raise ValueError(f"context_of_token: expected rows 0 .. {n_contexts - 1}, got {least} to {most}")
