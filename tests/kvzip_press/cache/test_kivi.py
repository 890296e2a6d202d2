"""KIVI's groups: where they end, what is left of them when pairs go, and what they are for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kvzip_press.cache.codecs.by_name import storage_named
from kvzip_press.cache.codecs.held import Held
from kvzip_press.cache.packed_pairs import PackedPairs
from kvzip_press.errors import InvalidArgumentError

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, HEADS, ROWS, TOKENS = 16, 2, 2, 70
KIVI = ("kivi4", "kivi2")


def drawn(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, HEADS, n, DIM, generator=generator, dtype=torch.float64)


def positions(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop, dtype=torch.int32).expand(ROWS, -1)


def packed(name: str, lengths: list[int], keys: torch.Tensor | None = None) -> PackedPairs:
    """Heads that keep their first so many tokens."""
    keep = (torch.arange(TOKENS) < torch.tensor(lengths).unsqueeze(1)).view(ROWS, HEADS, TOKENS)
    keys = drawn(TOKENS) if keys is None else keys
    return PackedPairs.pack(keys, drawn(TOKENS, 1), keep, positions(0, TOKENS), storage=storage_named(name))


def groups(pairs: Held) -> list[list[int]]:
    """The members of each group, by segment."""
    held = pairs.parts["groups"]
    counts = held.columns["members"].tolist()
    bounds = held.cu_seqlens.tolist()
    return [counts[start:stop] for start, stop in pairwise(bounds)]


@pytest.mark.parametrize("name", KIVI)
def test_groups_end_inside_a_head_and_the_last_one_may_be_short(name) -> None:
    """None crosses from one head to the next; a head without pairs has none."""
    pairs = packed(name, [70, 33, 0, 7])
    assert groups(pairs) == [[32, 32, 6], [32, 1], [], [7]]
    assert pairs.nbytes(slice(None)) == sum(tensor.nbytes for tensor in pairs.tensors)


@pytest.mark.parametrize(("name", "steps"), [("kivi4", 15), ("kivi2", 3)])
def test_each_number_lies_within_half_a_step_of_its_channel_in_its_group(name, steps) -> None:
    """The formula of the paper, (max - min) / (2^bits - 1), in fp64, over the tokens of one group of one head."""
    lengths = [70, 33, 0, 7]
    keys = drawn(TOKENS)
    keys[..., 5] = 40 * keys[..., 5] + 100
    pairs = packed(name, lengths, keys)
    found = pairs.storage.decode(pairs)[0].split(lengths)
    for segment, length in zip(range(ROWS * HEADS), lengths, strict=True):
        exact = keys.flatten(0, 1)[segment, :length]
        for own, got in zip(exact.split(32), found[segment].split(32), strict=True):
            low, high = (own.min(0), own.max(0)) if length else (own, own)
            step = (high.values - low.values) / steps if length else own
            rounding = own.abs().amax(0) / 256 if length else 0  # scales and zeros are bf16
            assert bool(((got - own).abs() <= 1.05 * step / 2 + rounding).all())


def test_outlier_channels_are_what_groups_are_for() -> None:
    """Two bits a row leave nothing of the small channels beside a large one; two bits a channel do."""
    keys = drawn(TOKENS)
    keys[..., 3] = 50 * keys[..., 3]
    small = [channel for channel in range(DIM) if channel != 3]
    pairs = packed("kivi2", [TOKENS] * 4, keys)
    by_channel, by_row = pairs.storage.decode(pairs)[0], torch.empty(ROWS * HEADS * TOKENS, DIM, dtype=keys.dtype)
    by_row[:] = pairs.storage.decode(packed_values(keys))[1]
    errors = [float((found - keys.view(-1, DIM))[:, small].norm()) for found in (by_channel, by_row)]
    assert errors[0] < errors[1] / 2


def packed_values(values: torch.Tensor) -> PackedPairs:
    """The same numbers as values, which have a scale a row."""
    keep = torch.ones(values.shape[:3], dtype=torch.bool)
    return PackedPairs.pack(drawn(TOKENS), values, keep, positions(0, TOKENS), storage=storage_named("kivi2"))


@pytest.mark.parametrize("name", KIVI)
def test_a_group_keeps_its_scales_for_those_that_stay_and_goes_with_the_last(name) -> None:
    """New pairs open groups of their own, however short the last one was: nothing is encoded again."""
    pairs = packed(name, [70, 33, 0, 7])
    segment = pairs.segments_of_entries()
    gone = ((segment == 0) & (pairs.positions >= 32) & (pairs.positions < 64)) | (pairs.positions % 2 == 1)
    keep = torch.ones(ROWS, HEADS, 3, dtype=torch.bool)
    merged = pairs.merge(drawn(3, 2), drawn(3, 3), positions(70, 73), keep, ~gone)
    assert groups(merged) == [[16, 3, 3], [16, 1, 3], [3], [4, 3]]
    scales, before = (x.parts["groups"].columns["key_scales"] for x in (merged, pairs))
    assert torch.equal(scales[[0, 1]], before[[0, 2]]) and torch.equal(scales[[3, 4]], before[[3, 4]])
    for old, new in zip(pairs.storage.decode(pairs), merged.storage.decode(merged), strict=True):
        assert torch.equal(new[merged.positions < 70], old[~gone])
    none = torch.zeros(pairs.total, dtype=torch.bool)
    assert groups(pairs.merge(drawn(3, 2), drawn(3, 3), positions(70, 73), ~keep, none)) == [[]] * 4


@pytest.mark.parametrize("name", [*KIVI, "tiers", "k8v4", "int4", "model"])
def test_the_first_pairs_are_decoded_alone(name) -> None:
    """What a later turn sees of a prefix."""
    pairs = packed(name, [70, 33, 40, 35])
    keys, values = pairs.storage.decode(pairs)
    for row in range(ROWS):
        for found, whole in zip(pairs.first_pairs(row, 33), (keys, values), strict=True):
            of_row = [whole[pairs.segments_of_entries() == row * HEADS + head][:33] for head in range(HEADS)]
            assert torch.equal(found, torch.stack(of_row).unsqueeze(0))


@pytest.mark.parametrize("name", KIVI)
def test_groups_that_do_not_count_all_pairs_are_refused(name) -> None:
    """A file that says so would be read as other keys."""
    pairs = packed(name, [70, 33, 0, 7])
    pairs.storage.check(pairs)
    held = pairs.parts["groups"]
    for members in ([32, 32, 6, 32, 2, 6], [32, 32, 6, 33, 0, 7]):
        columns = {**held.columns, "members": torch.tensor(members, dtype=torch.uint8)}
        wrong = replace(pairs, parts={"groups": replace(held, columns=columns)})
        with pytest.raises(InvalidArgumentError, match="expected groups with as many members as there are pairs"):
            pairs.storage.check(wrong)
