"""Makes a cache whose decode steps read a part of what is kept, and one that reads everything again."""

from __future__ import annotations

from kvzip_press.cache.ragged_cache import RaggedCache
from kvzip_press.cache.recall.policy import Recall
from kvzip_press.cache.recall.recalled_pairs import RecalledPairs
from kvzip_press.errors import InvalidArgumentError


def with_recall(cache: RaggedCache, recall: Recall, *, offload: bool = False) -> RaggedCache:
    """Returns a cache of the same pairs whose decode steps read only those that each query ranks first.

    Nothing is evicted: what a step does not read, another one may. Pairs that a press has evicted are gone, so both can
    be combined. Forwards of more than one token, as questions are, read everything.

    Args:
        cache: A compressed cache (``get_press("none")`` makes one that keeps everything). It stays as it is, and shares
            its pairs; one that recalls already gets the other recall.
        recall: What a step reads: :class:`kvzip_press.ClusterRecall` or :class:`kvzip_press.PageRecall`.
        offload: Whether the pairs of layers that recall go to host memory. A step then moves what it reads to the
            device, without a CUDA graph; a forward of several tokens moves the pairs of one layer after another.
            ``resident_bytes`` counts what stays on the device, ``host_bytes`` the rest. The memory of ``cache`` is free
            once nothing refers to it any more.

    Returns:
        The new cache. It goes through generation, turns, rows and forks as any other; it is neither saved nor restored
        to another ratio, and no press evicts from it while the model writes: see :func:`without_recall`.

    Raises:
        CacheMismatchError: The cache is not compressed.
        InvalidArgumentError: ``recall`` or ``offload`` is something else, or no layer is left to recall in.
        UnsupportedCacheError: Pairs are stored in a way that needs the others of their head ("int4", "k8v4", "kivi4",
            "kivi2", "tiers").

    Example::

        cache = compress(model, tokenizer, context, KVzipPress(0.5))
        cache = with_recall(cache, ClusterRecall(budget=1024))
        text = answer(model, tokenizer, cache, question)
    """
    if not isinstance(recall, Recall):
        raise InvalidArgumentError(f"expected a recall, as ClusterRecall(budget=1024), got {recall!r:.80}")
    if not isinstance(offload, bool):
        raise InvalidArgumentError(f"expected offload=True or offload=False, got {offload!r:.80}")
    grown = without_recall(cache)
    chosen = [layer for index, layer in grown.ragged_layers() if index >= recall.full_layers]
    if not chosen:
        n_layers = len(grown.layers)
        raise InvalidArgumentError(
            f"expected full_layers to leave layers to recall in, got {recall.full_layers} of {n_layers} layers"
        )
    for layer in chosen:
        layer.packed = RecalledPairs.made_of(layer.packed, recall, offload=offload)
    return grown


def without_recall(cache: RaggedCache) -> RaggedCache:
    """Returns a cache of the same pairs whose decode steps read all of them; pairs in host memory come back.

    Args:
        cache: A compressed cache, which stays as it is.

    Raises:
        CacheMismatchError: The cache is not compressed.
    """
    grown = RaggedCache.of(cache).fork()
    for _, layer in grown.ragged_layers():
        if isinstance(layer.packed, RecalledPairs):
            layer.packed = layer.packed.everything(layer.packed.device)
    return grown
