"""Scores a context by replaying it, chunk by chunk, against its own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from kvzip_press.arguments.model import check_tokenizer
from kvzip_press.budget.scores import Scores
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.kv_scoring import kv_scoring
from kvzip_press.model.chat import chat_frame, encode, find_tokenizer
from kvzip_press.model.hidden_states import watching_hidden_states
from kvzip_press.model.structure import dense_weight, full_attention_layers, output_projection
from kvzip_press.prefilling.replay import Replay, ReplayedAttention
from kvzip_press.prefilling.surprisal import Surprisals
from kvzip_press.prefilling.whole import Prefill
from kvzip_press.press import AllocatingPress
from kvzip_press.presses.kvzip.weighting import WEIGHTINGS, RowWeights

FIRST_PROMPT = "\n\nRepeat the previous context exactly."
NEXT_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with "
OVERLAP = 8  # tokens of the previous chunk that tell the model where to continue
LOCAL_BATCH = 4  # chunks of a local replay that run in one forward


@dataclass(frozen=True)
class KVzipPress(AllocatingPress):
    """Scores a pair by the most attention it gets while the model repeats the context.

    The context is replayed in chunks, teacher-forced, against the cache. In each layer the softmax of the replay's
    queries runs over the protected prefix, the chunk's own keys and the replayed tokens (causally), in fp32; the score
    of a pair is the maximum over all replayed rows and the query heads of its group. Scoring costs forwards over the
    context: about as many FLOPs as the prefill without attention, plus twice its attention with ``replay="full"``.

    Args:
        compression_ratio: Fraction of the context's pairs removed, in [0, 1); protected tokens are not counted.
        allocation: "global" (the paper: all pairs of all layers and heads compete), "layer", "head" or "adakv".
        budget: Tokens' worth of pairs to keep, instead of a ratio. This, ``layer_ratios``, ``safeguard`` and
            ``min_kept_per_head`` are explained in :class:`kvzip_press.press.AllocatingPress`; all four are
            keyword-only.
        chunk_size: Number of context tokens replayed at a time.
        replay: "full" (the paper): the replay attends to the whole cache; the cost grows with the square of the
            context. "local" (ours, not in the paper): it attends only to the protected prefix, its own chunk and
            itself, at the same positions; the cost is linear. Its kept sets overlap with those of "full" by about 0.92
            on SmolLM2.
        kvzip_plus: Whether to score as KVzip+ does (kvpress): by probabilities times ``||W_o v||`` over ``||x||``,
            where x is the row's hidden state.
        weighting: What each replayed row's probabilities are multiplied by before the maximum. None (the paper):
            nothing. "surprisal" (ours): by how surprising the token that the row predicts was to the model when it read
            the context, ``-log p`` in nats, at most 6, plus 0.02; "probability": by ``1 - p``, plus 0.02. Both are
            divided by their largest value, so that scores stay in [0, 1]. A row that predicts a token of the replay's
            prompt, or what follows the context, has the least weight; a token that nothing stood before has the most.
            The prefill is watched for it, and its tokens go through the model's head; see
            :class:`kvzip_press.prefilling.surprisal.Surprisals`.
        n_sink: Number of first tokens that are protected if the chat-template prefix is not known
            (``with press(model)``).
        tokenizer: The tokenizer for the replay's prompt. ``compress`` has one; under ``with press(model)`` this one is
            used, or else the one at the model's own path. Without any, the replay runs without a prompt.

    Raises:
        InvalidArgumentError: A value is out of range.
    """

    chunk_size: int = 2048
    replay: str = "full"
    kvzip_plus: bool = False
    weighting: str | None = None
    n_sink: int = 4
    tokenizer: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay not in ("full", "local"):
            raise InvalidArgumentError(f'expected replay to be "full" or "local", got {self.replay!r}')
        if self.weighting not in (None, *WEIGHTINGS):
            raise InvalidArgumentError(
                f'expected weighting to be None, "surprisal" or "probability", got {self.weighting!r}'
            )
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer, f"{type(self).__name__}(tokenizer=...)")
        if self.chunk_size < 1 or self.n_sink < 0:
            raise InvalidArgumentError(
                f"expected chunk_size >= 1 and n_sink >= 0, got {self.chunk_size} and {self.n_sink}"
            )

    def observer(self, model: nn.Module) -> SurprisalObserver | None:
        """Returns what notes surprisals, if rows are weighted; None otherwise, after a look at what else is needed.

        Raises:
            UnsupportedModelError: ``kvzip_plus`` finds no output projection in a layer, or ``weighting`` no head.
        """
        if self.kvzip_plus:
            for layer in full_attention_layers(model):
                output_projection(layer.module)
        return None if self.weighting is None else SurprisalObserver(self, model)

    @torch.no_grad()
    def score(self, prefill: Prefill) -> Scores:
        """Scores every pair of the span by replaying it, row by row; the cache is only read.

        Raises:
            InvalidArgumentError: The prefill has no token ids (``inputs_embeds``), which a replay needs; or rows are
                weighted, nobody watched it, and it cannot be run once more, since it is not a whole context.
        """
        layers = prefill.blank_scores()
        with _hidden_norms(prefill.model, self.kvzip_plus) as norms:

            def look(seen: ReplayedChunks) -> None:
                scores = _score_chunk(seen.attention, norms.get(seen.layer_idx), seen.weights)
                for columns, chunk_scores in zip(seen.columns, scores, strict=True):
                    layers[seen.layer_idx][seen.row, :, columns] = chunk_scores

            self.show_replays(prefill, look)
        plain = not self.kvzip_plus and self.weighting is None  # else scores are no weights of attention
        uniform = prefill.uniform_attention() if plain else None
        return Scores(layers, prefill.protected(self.n_sink), self.policy, uniform=uniform)

    @torch.no_grad()
    def show_replays(self, prefill: Prefill, look: Callable[[ReplayedChunks], None]) -> None:
        """Replays every row of a prefill as scoring does, and shows the attention of each layer in each forward.

        Args:
            prefill: The prefill; the cache is only read.
            look: Called once for each forward and layer, in order.

        Raises:
            InvalidArgumentError: See :meth:`score`.
        """
        if prefill.input_ids is None:
            raise InvalidArgumentError("expected input_ids: KVzip repeats the context's tokens, got inputs_embeds only")
        prompts = _Prompts.of(prefill.tokenizer or self.tokenizer or find_tokenizer(prefill.model))
        protected = prefill.protected(self.n_sink)
        nats = self._nats(prefill)
        for row in range(prefill.valid.shape[0]):
            n_sink = int(protected[row].sum())
            self._replay_row(prefill, row, n_sink, prompts, None if nats is None else nats[row], look)

    def _nats(self, prefill: Prefill) -> list[torch.Tensor] | None:
        """Returns the surprisals ``[n]`` of each row's tokens; None if rows are not weighted.

        They follow from the model and the context alone, so the surprisals that any press watched will do.
        """
        if self.weighting is None:
            return None
        watched = (one for one in prefill.observers.values() if isinstance(one, Surprisals))
        found = next(watched, None) or prefill.observed(self)
        assert isinstance(found, Surprisals)
        valid = prefill.valid.to(found.values.device)
        return [nats[tokens] for nats, tokens in zip(found.values, valid, strict=True)]

    def _replay_row(
        self,
        prefill: Prefill,
        row: int,
        n_sink: int,
        prompts: _Prompts,
        nats: torch.Tensor | None,
        look: Callable[[ReplayedChunks], None],
    ) -> None:
        assert prefill.input_ids is not None
        first = int(prefill.valid[row].nonzero()[0, 0])
        tokens = prefill.input_ids[row][prefill.valid[row]].tolist()
        columns: Sequence[slice] = ()
        of_rows: torch.Tensor | None = None
        weights: torch.Tensor | None = None

        def show(layer_idx: int, attention: ReplayedAttention) -> None:
            look(ReplayedChunks(row, columns, layer_idx, attention, of_rows, weights))

        weighted = (
            ()
            if self.weighting is None or nats is None
            else (RowWeights(pad(nats, (0, 1)), 0.0), RowWeights.of(self.weighting, nats))
        )
        replay = Replay(prefill, row, n_sink, show)
        for batch, input_ids in self._batches(tokens, n_sink, prompts):
            columns = [slice(first + chunk.start, first + chunk.stop) for chunk in batch]
            if weighted:
                of_rows, weights = (rows.of_replays(batch, len(input_ids[0])) for rows in weighted)
            replay.run(input_ids, batch, local=self.replay == "local")

    def _batches(
        self, tokens: list[int], n_sink: int, prompts: _Prompts
    ) -> Iterator[tuple[list[slice], list[list[int]]]]:
        """Yields the replays of a row in order; local ones of the same shape run together."""
        starts = range(n_sink, len(tokens), self.chunk_size)
        chunks = [slice(start, min(start + self.chunk_size, len(tokens))) for start in starts]
        replays = [(chunk, prompts.replay(tokens, chunk, n_sink)) for chunk in chunks]
        size = LOCAL_BATCH if self.replay == "local" else 1
        for _, alike in groupby(replays, key=lambda item: (item[0].stop - item[0].start, len(item[1]))):
            group = list(alike)
            for i in range(0, len(group), size):
                yield [chunk for chunk, _ in group[i : i + size]], [ids for _, ids in group[i : i + size]]


@dataclass(frozen=True)
class _Prompts:
    """Token ids of the replay prompts and of the end of the user's turn; all empty without a tokenizer."""

    first: tuple[int, ...] = ()
    following: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any | None) -> _Prompts:
        if tokenizer is None:
            return cls()
        return cls(encode(tokenizer, FIRST_PROMPT), encode(tokenizer, NEXT_PROMPT), chat_frame(tokenizer).suffix)

    def replay(self, tokens: list[int], chunk: slice, n_sink: int) -> list[int]:
        """Returns the ids of one replay: prompt, the tokens just before the chunk, end of turn, the chunk."""
        if chunk.start <= n_sink:
            return [*self.first, *self.suffix, *tokens[chunk]]
        before = tokens[max(n_sink, chunk.start - OVERLAP) : chunk.start] if self.following else []
        return [*self.following, *before, *self.suffix, *tokens[chunk]]


@dataclass(frozen=True)
class ReplayedChunks:
    """The attention of one layer in one forward of a replay.

    Attributes:
        row: The row of the prefill.
        columns: For each batch row of the forward, the columns of the span that it replays.
        layer_idx: The layer.
        attention: Its tensors.
        nats: fp32 ``[len(columns), n_rows]``, the surprisal of the token that each replayed row predicts; infinite for
            a token that nothing stood before, 0 for one of the prompt and for what follows the context. None if rows
            are not weighted.
        weights: The weights of the rows, like ``nats``.
    """

    row: int
    columns: Sequence[slice]
    layer_idx: int
    attention: ReplayedAttention
    nats: torch.Tensor | None = None
    weights: torch.Tensor | None = None


class SurprisalObserver(Surprisals):
    """Notes the surprisal of the tokens of one prefill for a press that weights rows with them.

    Args:
        press: The press.
        model: The model to watch.
    """

    def __init__(self, press: KVzipPress, model: nn.Module) -> None:
        super().__init__(model)
        self._press = press

    def scores(self, prefill: Prefill) -> Scores:
        """Returns the press's scores of the prefill that was watched."""
        return self._press.score(prefill)


def _score_chunk(
    attention: ReplayedAttention, norms: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    """Returns the scores ``[batch, heads, chunk]``, fp32, of the chunk that was replayed."""
    key_weight, query_weight = None, None if weights is None else weights.to(attention.query.device)
    if norms is not None:
        key_weight = _output_norms(attention.module, attention.chunk_values, attention.query.shape[1])
        query_weight = norms.to(attention.query.device).reciprocal() * (1 if query_weight is None else query_weight)
    return kv_scoring(
        attention.query,
        attention.sink_keys,
        attention.chunk_keys,
        attention.keys,
        scaling=attention.scaling,
        softcap=attention.softcap,
        key_weight=key_weight,
        query_weight=query_weight,
        lse=attention.lse,
    )


def _output_norms(module: nn.Module, values: torch.Tensor, num_attention_heads: int) -> torch.Tensor:
    """Returns ``||W_o v||`` of each value under each query head of its group.

    Returns:
        ``[batch, num_attention_heads, chunk]``, fp32.
    """
    _, heads, _, dim = values.shape
    weight = dense_weight(output_projection(module), values).view(-1, num_attention_heads, dim)
    gram = torch.einsum("ohi,ohj->hij", weight, weight)  # ||W v||^2 = v^T (W^T W) v: no [chunk, hidden_size] tensor
    grouped = values.float().repeat_interleave(num_attention_heads // heads, dim=1)
    return torch.einsum("bhti,hij,bhtj->bht", grouped, gram, grouped).clamp(min=0).sqrt()


@contextmanager
def _hidden_norms(model: nn.Module, wanted: bool) -> Iterator[dict[int, torch.Tensor]]:
    """While open, records the norms of the hidden states that enter attention in the dictionary it yields.

    That is ``layer_idx -> [batch, query_length]``, fp32; it stays empty unless ``wanted``.
    """
    norms: dict[int, torch.Tensor] = {}

    def record(layer_idx: int, hidden_states: torch.Tensor) -> None:
        norms[layer_idx] = hidden_states.float().norm(dim=-1)

    with watching_hidden_states(model, record) if wanted else nullcontext():
        yield norms


def local_press(compression_ratio: float = 0.0, **options: Any) -> KVzipPress:
    """Returns KVzip with local replay, which tables list under a name of its own."""
    return KVzipPress(compression_ratio, replay="local", **options)
