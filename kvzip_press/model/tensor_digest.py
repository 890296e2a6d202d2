"""A digest of every byte of a tensor, made where the tensor lies, and made again only when the tensor changed.

The bytes are read as rows of 64-bit words. Each row is summed modulo 2**64, every word times an odd number of its own,
and the sums go through SHA-256. A change of one word always changes its row's sum; other changes miss it with a chance
of about 2**-63. That is one pass of integer sums, the same on every device, and several times as fast as SHA-256 over
all bytes, which would also need every weight to leave a GPU. It guards against accidents, not against a forger.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from kvzip_press.errors import UnsupportedModelError

_WIDTH = 1024  # words of a row
_ROWS = {"cpu": 256}  # rows that are multiplied at once: what a cache of a processor holds
_MANY_ROWS = 16_384  # elsewhere
_SAMPLES = 32


@dataclass(frozen=True)
class _Known:
    """What a tensor was when it was read: where its data lay, its version, some of its values; and its digest."""

    place: tuple[object, ...]
    sample: bytes
    digest: str


_KNOWN = WeakIdKeyDictionary()  # tensor -> _Known


@torch.no_grad()
def digests_of(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Returns a digest of each tensor's dtype, shape and bytes, in hexadecimal.

    A tensor is read once, and again when its version, its place in memory or one of a few values spread over it differ;
    the last finds what was written through ``.data``, which counts no version.

    Args:
        tensors: Plain tensors (see :func:`plain_parts`) with their data in memory, on any device.
    """
    samples = _samples(tensors)
    digests = []
    for tensor, sample in zip(tensors, samples, strict=True):
        place = _place(tensor)
        known: _Known | None = _KNOWN.get(tensor)
        if known is None or place is None or known.place != place or known.sample != sample:
            known = _KNOWN[tensor] = _Known(place or (), sample, _digest(tensor))
        digests.append(known.digest)
    return digests


@torch.no_grad()
def looks_of(tensors: Sequence[torch.Tensor]) -> list[object] | None:
    """Returns what tells a change of each tensor: itself, its place, version and a few values; None if one has none.

    Args:
        tensors: As in :func:`digests_of`.
    """
    places = [_place(tensor) for tensor in tensors]
    if None in places:
        return None
    return [*map(id, tensors), *places, *_samples(tensors)]


def plain_parts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yields the plain tensors that hold a tensor's values, each with the name of the part (empty for itself).

    What else says how they are stored comes as a name without a tensor.

    A subclass that wraps others (torchao's quantised weights) says them by ``__tensor_flatten__``; of one that does
    not, and cannot be read as it lies, what it dequantises to is taken.

    Raises:
        UnsupportedModelError: The values can be read neither way.
    """
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        yield f"<{type(tensor).__name__} {_text_of(context)}>", None
        for name in names:
            for part, inner in plain_parts(getattr(tensor, name)):
                yield f".{name}{part}", inner
        return
    if not tensor.is_quantized and tensor.layout is torch.strided:
        try:
            tensor.detach().reshape(-1)[:1].view(torch.uint8)
        except (NotImplementedError, RuntimeError):
            pass
        else:
            yield "", tensor
            return
    yield f"<{type(tensor).__name__}>", None
    yield "", _dense(tensor)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    try:
        dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor.dequantize()
        dense.detach().reshape(-1)[:1].view(torch.uint8)
    except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"expected weights that can be read, got a {type(tensor).__name__} {tuple(tensor.shape)} that neither says "
            f"what it is stored in (`__tensor_flatten__`) nor dequantises ({type(error).__name__}: {error!s:.80}): a "
            "cache cannot be tied to it"
        ) from error
    return dense


def _text_of(context: object) -> str:
    """Returns the settings of a wrapping tensor as a text, without addresses."""
    if isinstance(context, dict):
        return ",".join(f"{name}={_text_of(value)}" for name, value in context.items())
    if isinstance(context, list | tuple):
        return ",".join(_text_of(value) for value in context)
    return type(context).__name__ if " at 0x" in repr(context) else repr(context)


def _place(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """Returns what changes with a tensor's data; None for a tensor that does not count its versions."""
    if tensor.is_inference():
        return None
    # torch has no public name for the version
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride()  # noqa: SLF001


def _samples(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Returns the bytes of a few values spread over each tensor; one transfer for all of one dtype on one device."""
    samples = [b""] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        values = [_spread(tensors[index]) for index in indices]
        held = torch.cat(values).view(torch.uint8).cpu().numpy().tobytes()
        for index, value in zip(indices, values, strict=True):
            n_bytes = value.shape[0] * dtype.itemsize
            samples[index], held = held[:n_bytes], held[n_bytes:]
    return samples


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Returns some thirty values of a tensor that has any, ``[n]``: one view, for a model has hundreds of weights."""
    flat = tensor if tensor.is_contiguous() else tensor.reshape(-1)
    n_values = flat.numel()
    # An odd step, so that not all values are of one column.
    step = (n_values // _SAMPLES) | 1
    return flat.as_strided((-(-n_values // step),), (step,))


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)}".encode())
    if tensor.numel():
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        whole = data.shape[0] // (8 * _WIDTH) * (8 * _WIDTH)
        words = data[:whole]
        words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64).view(-1, _WIDTH)
        factors, step = _factors(str(data.device)), _ROWS.get(data.device.type, _MANY_ROWS)
        sums = [(words[i : i + step] * factors).sum(dim=1) for i in range(0, words.shape[0], step)]
        if sums:
            digest.update(torch.cat(sums).cpu().numpy().tobytes())
        digest.update(data[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=32)
def _factors(device: str) -> torch.Tensor:
    """Returns a row of odd 64-bit numbers, int64, that look random (splitmix64) and are the same everywhere."""
    state, numbers, mask = 0, [], 2**64 - 1
    for _ in range(_WIDTH):
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        number = (mixed ^ (mixed >> 31)) | 1
        numbers.append(number - 2**64 if number >= 2**63 else number)
    return torch.tensor(numbers, dtype=torch.int64, device=device)
