"""ClusterKV (arXiv 2412.03213): groups are clusters of keys that point the same way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvzip_press.cache.recall.policy import Recall
from kvzip_press.errors import InvalidArgumentError
from kvzip_press.kernels.numerics import MAX_LOGITS, accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class ClusterRecall(Recall):
    """Groups the keys of each head by k-means, and ranks a cluster by the query's product with its mean key.

    The defaults are those of ClusterKV's code (400 clusters for 32768 tokens; 8 for 320 new ones), but for
    ``per_query_head``. Distance is the cosine, means are those of the keys as they are. All sums are fp32, in an order
    that the device does not change from run to run.

    Args:
        cluster_size: Mean number of pairs of a cluster of the context.
        new_cluster_size: The same for tokens that came later.
        n_iterations: Most iterations of k-means.
        seed: Seed of the keys that the clusters begin with; every head has the same, whatever stands beside it.
    """

    cluster_size: int = 80
    new_cluster_size: int = 40
    n_iterations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.cluster_size, self.new_cluster_size, self.n_iterations) < 1:
            raise InvalidArgumentError(f"expected sizes of clusters and n_iterations of 1 or more, got {self!r}")

    def groups(self, keys: torch.Tensor, *, are_new: bool) -> torch.Tensor:
        """Returns the cluster of each pair."""
        size = self.new_cluster_size if are_new else self.cluster_size
        return k_means(keys, max(1, round(len(keys) / size)), n_iterations=self.n_iterations, seed=self.seed)

    def marks(self, keys: torch.Tensor, groups: torch.Tensor, n_groups: int) -> torch.Tensor:
        """Returns the mean key of each cluster."""
        wide = keys.to(accumulation_dtype(keys.dtype))
        return _means(wide, groups, wide.new_zeros(n_groups, keys.shape[1])).to(keys.dtype)


def k_means(keys: torch.Tensor, n_clusters: int, *, n_iterations: int, seed: int) -> torch.Tensor:
    """Assigns keys to clusters by the cosine to their means, which follow until no key changes its cluster.

    Args:
        keys: ``[n, head_dim]``, n >= n_clusters.
        n_clusters: Number of clusters; some may end up empty.
        n_iterations: Most iterations.
        seed: Seed of the keys that are the first means.

    Returns:
        int64 ``[n]``, the cluster of each key.
    """
    keys = keys.to(accumulation_dtype(keys.dtype))
    directions = torch.nn.functional.normalize(keys, dim=-1)
    chosen = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))[:n_clusters]
    centres = keys[chosen.sort().values.to(keys.device)]
    nearest = _nearest(directions, centres)
    for _ in range(n_iterations):
        centres = _means(keys, nearest, centres)
        before, nearest = nearest, _nearest(directions, centres)
        if torch.equal(before, nearest):
            break
    return nearest


def _nearest(directions: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    towards = torch.nn.functional.normalize(centres, dim=-1).mT
    return torch.cat([(tile @ towards).argmax(-1) for tile in directions.split(_tile(len(centres)))])


def _means(keys: torch.Tensor, groups: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Returns the mean key of each group; that of an empty one is taken from ``otherwise`` ``[groups, head_dim]``.

    Sums are matrix products: adding in place has no fixed order on a GPU.
    """
    numbers = torch.arange(len(otherwise), device=keys.device)
    sums, counts = torch.zeros_like(otherwise), otherwise.new_zeros(len(otherwise), 1)
    size = _tile(len(otherwise))
    for tile, own in zip(keys.split(size), groups.split(size), strict=True):
        member = (own == numbers[:, None]).to(keys.dtype)
        sums.addmm_(member, tile)
        counts += member.sum(1, keepdim=True)
    return torch.where(counts > 0, sums / counts.clamp(min=1), otherwise)


def _tile(n_clusters: int) -> int:
    """Returns how many keys are compared with all clusters at a time."""
    return max(1, 16 * MAX_LOGITS // n_clusters)
