"""Files as a disk or a forger leaves them: seeded mutations of bytes, for the readers of every format.

for change, data in mutations(whole, seed=1, count=200):
    ...  # `change` says what was done, for the message of an assertion
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Iterator

NUMBERS = ["-1", "0", "1e999", "-1e999", "NaN", "null", "true", '"x"', "[]", "{}", "1" * 5000, "[" * 50_000]
NUMBERS += [str(2**power + offset) for power in (31, 32, 63, 64) for offset in (-1, 0)] + ["99999999999", "0.5"]
LENGTHS = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def mutations(whole: bytes, *, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields ``count`` descriptions and mutations of a file, the same for the same seed; none is the file itself.

    All kinds take turns. Half of the places lie in the first 2000 bytes, where most formats say what follows.
    """
    drawn, kinds = random.Random(seed), list(_KINDS.items())
    made = 0
    while made < count:
        name, kind = kinds[made % len(kinds)]
        at = drawn.randrange(min(len(whole), 2000) if drawn.random() < 0.5 else len(whole))
        changed = kind(drawn, whole, at)
        if changed == whole:
            changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        yield f"{name} at {at} (number {made} of seed {seed})", changed
        made += 1


def _flip(drawn: random.Random, whole: bytes, at: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ (1 << drawn.randrange(8))]) + whole[at + 1 :]


def _byte(drawn: random.Random, whole: bytes, at: int) -> bytes:
    return whole[:at] + drawn.randbytes(1) + whole[at + 1 :]


def _block(drawn: random.Random, whole: bytes, at: int) -> bytes:
    """A block of a disk that was never written, or holds something else."""
    size = drawn.choice([4, 64, 512])
    block = drawn.choice([bytes(size), b"\xff" * size, drawn.randbytes(size)])
    return whole[:at] + block + whole[at + size :]


def _delete(drawn: random.Random, whole: bytes, at: int) -> bytes:
    return whole[:at] + whole[at + drawn.choice([1, 2, 8, 100]) :]


def _duplicate(drawn: random.Random, whole: bytes, at: int) -> bytes:
    size = drawn.choice([1, 8, 100, 1000])
    return whole[: at + size] + whole[at : at + size] * drawn.choice([1, 1, 50]) + whole[at + size :]


def _swap(drawn: random.Random, whole: bytes, at: int) -> bytes:
    size, other = drawn.choice([1, 8, 64]), drawn.randrange(len(whole))
    first, second = sorted((at, other))
    if first + size > second:
        return whole
    one, two = whole[first : first + size], whole[second : second + size]
    return whole[:first] + two + whole[first + size : second] + one + whole[second + size :]


def _cut(drawn: random.Random, whole: bytes, at: int) -> bytes:
    return whole[:at] + drawn.choice([b"", b"", bytes(len(whole) - at)])


def _grow(drawn: random.Random, whole: bytes, _: int) -> bytes:
    return whole + drawn.choice([b"\0", b" ", whole[:100], bytes(10_000)])


def _number(drawn: random.Random, whole: bytes, at: int) -> bytes:
    """Another number where a text has one."""
    found = re.compile(rb"-?\d+(\.\d+)?").search(whole, at)
    if found is None:
        return whole
    return whole[: found.start()] + drawn.choice(NUMBERS).encode() + whole[found.end() :]


def _length(drawn: random.Random, whole: bytes, at: int) -> bytes:
    """Another binary number; the first place is where safetensors has the length of its header."""
    at, width = drawn.choice([0, at - at % 8, at - at % 4]), drawn.choice(["<Q", "<I"])
    return (
        whole[:at]
        + struct.pack(width, drawn.choice(LENGTHS) & (2 ** (8 * struct.calcsize(width)) - 1))
        + (whole[at + struct.calcsize(width) :])
    )


def _name(drawn: random.Random, whole: bytes, at: int) -> bytes:
    """A letter of a name, changed; or the name of a dtype, made another's."""
    dtypes = [b'"F32"', b'"BF16"', b'"F64"', b'"I64"', b'"I32"', b'"F8_E4M3"', b'"C64"', b'"BOOL"', b'"F4"']
    there = [name for name in dtypes if name in whole]
    if there and drawn.random() < 0.5:
        return whole.replace(drawn.choice(there), drawn.choice(dtypes), 1)
    found = re.compile(rb"[a-z_]{3,}").search(whole, at)
    if found is None:
        return whole
    place = drawn.randrange(found.start(), found.end())
    return whole[:place] + bytes([drawn.randrange(97, 123)]) + whole[place + 1 :]


_KINDS: dict[str, Callable[[random.Random, bytes, int], bytes]] = {
    "a bit flipped": _flip,
    "a byte changed": _byte,
    "a block overwritten": _block,
    "bytes deleted": _delete,
    "bytes written twice": _duplicate,
    "blocks swapped": _swap,
    "the end cut off": _cut,
    "something behind the end": _grow,
    "a number of a text": _number,
    "a binary length": _length,
    "a name": _name,
}
