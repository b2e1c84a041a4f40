"""Groups of PCA hashes that are joined by steps of at most a few bits: components over all shards, by distinct hash.

Memory, for n distinct hashes: 16 bytes each for the hashes and their groups, 4 for the union-find (8 above 2^32), twice
8 while they are collected, and one chunk's index (``indexes.binary``). 10^9 of them are 8 GB as numbers and some 30 GB
at the peak, so a run of that size needs a machine of that size for a radius above 0. A radius of 0 needs none of this.
"""

import numpy as np
import numpy.typing as npt

from curation.indexes.binary import pairs_within
from curation.indexes.components import UnionFind

Hashes = npt.NDArray[np.uint64]

_PENDING = 1 << 22


class DistinctHashes:
    """Collects hashes and keeps each once."""

    def __init__(self) -> None:
        self._parts: list[Hashes] = []
        self._num_pending = 0
        self._num_known = 0

    def add(self, hashes_N: Hashes) -> None:
        """Take in hashes; repeats cost no memory for long."""
        self._parts.append(np.unique(hashes_N))
        self._num_pending += len(self._parts[-1])
        if self._num_pending > max(_PENDING, self._num_known // 4):
            self.result()

    def result(self) -> Hashes:
        """Return the hashes, sorted, each once."""
        known = np.unique(np.concatenate([np.empty(0, np.uint64), *self._parts]))
        self._parts, self._num_pending, self._num_known = [known], 0, len(known)
        return known


class HammingGroups:
    """The group of each hash, named by its smallest hash: the same for any order and sharding.

    A group is a connected component, so two of its hashes may differ by more than the radius when others lie between.
    """

    def __init__(self, distinct_N: Hashes, radius: int) -> None:
        """Group the hashes.

        Args:
            distinct_N: Sorted, each once.
            radius: Bits that a step may change, 0 to 8.
        """
        self._distinct_N = distinct_N
        self._names_N = distinct_N
        if radius > 0:
            components = UnionFind(len(distinct_N))
            for left, right in pairs_within(distinct_N, radius):
                components.add(left, right)
            # Rows are sorted by hash and a component's label is its smallest row.
            self._names_N = distinct_N[components.labels()]

    def __call__(self, hashes_M: Hashes) -> Hashes:
        """Return the name of the group of each hash; all must be known."""
        return self._names_N[np.searchsorted(self._distinct_N, hashes_M)]
