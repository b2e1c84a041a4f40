"""Balanced samples of a tree of clusters: an equal share for each cluster of the top level, and so on below.

``shares`` splits a budget from the top down. What a small cluster cannot use goes to its siblings in equal parts
("water filling"), so the budget is spent exactly and no image is taken twice. ``QuotaSample`` then takes, of each
cluster of the first level, the images with the smallest hashes of (seed, image id).

Source: Vo et al. 2024, arXiv 2405.15613, section 3.3 (hierarchical sampling without replication).
"""

from collections.abc import Sequence

import numpy as np

from curation.errors import DimensionError
from curation.indexes.assignment import Numbers
from curation.indexes.keys import Keys
from curation.indexes.sampling import Ranks, hash_keys
from curation.indexes.vectors import Rows

_MIN_PENDING = 1 << 16


def shares(sizes_K: Rows, parents: Sequence[Numbers], budget: int, seed: int) -> Rows:
    """Return how many images to take of each cluster of the first level, int64 (K,).

    Args:
        sizes_K: Images of each cluster of the first level.
        parents: See ``hierarchy.Tree``; empty: all clusters share alike.
        budget: Images in all; everything where there are fewer.
        seed: Decides who gets what cannot be split evenly.

    Raises:
        DimensionError: ``budget`` is negative, or sizes and parents do not fit together.
    """
    if budget < 0:
        raise DimensionError(f"budget must be at least 0, got {budget}")
    sizes = [sizes_K.astype(np.int64)]
    for level, numbers in enumerate(parents):
        if len(numbers) != len(sizes[-1]):
            raise DimensionError(f"level {level} has {len(sizes[-1])} clusters and {len(numbers)} parents")
        width = len(parents[level + 1]) if level + 1 < len(parents) else int(numbers.max(initial=-1)) + 1
        above = np.zeros(width, np.int64)
        np.add.at(above, numbers, sizes[-1])
        sizes.append(above)
    level = len(sizes) - 1
    taken = fill(sizes[level], budget, _order(len(sizes[level]), level, seed))
    for level in reversed(range(len(parents))):
        ranks = _order(len(sizes[level]), level, seed)
        below = np.zeros(len(sizes[level]), np.int64)
        children = np.argsort(parents[level], kind="stable")
        ends = np.searchsorted(parents[level][children], np.arange(len(taken) + 1))
        for parent in np.flatnonzero(taken):
            mine = children[ends[parent] : ends[parent + 1]]
            below[mine] = fill(sizes[level][mine], int(taken[parent]), ranks[mine])
        taken = below
    return taken


def fill(sizes_K: Rows, budget: int, ranks_K: Ranks) -> Rows:
    """Return equal parts of ``budget`` within sizes, (K,): min(size, level), plus 1 for the smallest ranks."""
    if budget >= sizes_K.sum():
        return sizes_K.copy()
    ordered = np.sort(sizes_K)
    # With the i smallest clusters full, the others get (budget - what these hold) / (K - i) each.
    before = np.concatenate([[0], np.cumsum(ordered)[:-1]])
    levels = (budget - before) // np.arange(len(ordered), 0, -1)
    level = int(levels[np.argmax(levels < ordered)])
    parts: Rows = np.minimum(sizes_K, level)
    (unfilled,) = np.nonzero(sizes_K > level)
    parts[unfilled[np.argsort(ranks_K[unfilled], kind="stable")[: budget - parts.sum()]]] += 1
    return parts


class QuotaSample:
    """Up to ``quotas_K[c]`` images of each cluster c: those with the smallest hashes of (seed, key).

    Memory: 28 bytes a kept row, about three times that while they are cut down.
    """

    def __init__(self, quotas_K: Rows, seed: int) -> None:
        self.quotas = quotas_K
        self.seed = seed
        self._limits = np.where(quotas_K > 0, np.iinfo(np.uint64).max, 0).astype(np.uint64)  # of ranks that may matter
        self._clusters: list[Numbers] = [np.empty(0, np.int32)]
        self._ranks: list[Ranks] = [np.empty(0, np.uint64)]
        self._keys: list[Keys] = [np.empty((0, 2), np.uint64)]
        self._num_pending = 0

    def add(self, clusters_N: Rows, keys_N2: Keys) -> None:
        """Offer rows: numbers of clusters and unique keys."""
        ranks_N = hash_keys(keys_N2, self.seed)
        near = (ranks_N <= self._limits[clusters_N]) & (self.quotas[clusters_N] > 0)
        self._clusters.append(clusters_N[near].astype(np.int32))
        self._ranks.append(ranks_N[near])
        self._keys.append(keys_N2[near])
        self._num_pending += int(near.sum())
        if self._num_pending > max(_MIN_PENDING, int(self.quotas.sum())):
            self._compact()

    def result(self) -> Keys:
        """Return the keys of the sample, by cluster and hash."""
        self._compact()
        return self._keys[0]

    def _compact(self) -> None:
        clusters, ranks = np.concatenate(self._clusters), np.concatenate(self._ranks)
        keys = np.concatenate(self._keys)
        order = np.lexsort((keys[:, 1], keys[:, 0], ranks, clusters))
        sorted_clusters = clusters[order]
        place = np.arange(len(order)) - np.searchsorted(sorted_clusters, sorted_clusters)
        order = order[place < self.quotas[sorted_clusters]]
        kept = clusters[order]
        self._clusters, self._ranks, self._keys = [kept], [ranks[order]], [keys[order]]
        full = np.bincount(kept, minlength=len(self.quotas)) >= self.quotas
        last = np.searchsorted(kept, np.flatnonzero(full & (self.quotas > 0)), side="right") - 1
        self._limits[kept[last]] = ranks[order[last]]
        self._num_pending = 0


def _order(count: int, level: int, seed: int) -> Ranks:
    keys = np.zeros((count, 2), np.uint64)
    keys[:, 0], keys[:, 1] = level, np.arange(count)
    return hash_keys(keys, seed)
