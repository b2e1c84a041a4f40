"""Average linkage: the two most similar clusters become one, again and again; similar is the mean over pairs of points.

Every point counts once and density counts for nothing, so a group whose points are many takes no more clusters than
one of the same width whose points are few. k-means puts more centroids where points are many.

Sources: Sokal and Michener 1958 (UPGMA); Lance and Williams 1967 (the update); Murtagh 1983 (chains of nearest
neighbours, O(n^2)).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.indexes.assignment import Numbers
from curation.indexes.compiled import compiled
from curation.indexes.vectors import PER_UNIT, Rows, Vectors, blocks, widen

MAX_POINTS = 10_000
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Merges:
    """How points became one cluster, the most similar clusters first.

    Attributes:
        pairs: A point of each of the two clusters, int64 (N - 1, 2).
        similarities: Mean similarity of their points, float64 (N - 1,), falling.
    """

    pairs: Rows
    similarities: npt.NDArray[np.float64]

    def cut(self, count: int) -> Numbers:
        """Return the cluster of each point, int32 (N,), where ``count`` are left, numbered by their first points.

        Clusters of a smaller count are unions of those of a larger one.
        """
        num_points = len(self.pairs) + 1
        labels_N = np.arange(num_points)
        _unite(labels_N, self.pairs[: max(0, num_points - count)])
        _, numbers_N = np.unique(labels_N, return_inverse=True)  # a label is the cluster's first point
        return numbers_N.astype(np.int32)

    def widest_gap(self) -> int:
        """Return the number of clusters, at least 2, before the merge whose similarity falls most below the last one's.

        Where groups stand apart it is their number; where there are none it says nothing.
        """
        if len(self.pairs) < 2:
            return len(self.pairs) + 1
        return len(self.pairs) - int(np.argmax(-np.diff(self.similarities)))


def average_linkage(points_ND: Vectors) -> Merges:
    """Return the merges of points.

    Sums of similarities in whole 1e-6 are exact, so the result depends on the points and their order alone; of equal
    ones the cluster with the smallest first point is taken.

    Memory: 8 * N^2 bytes.

    Args:
        points_ND: L2-normalised float16 (N, dim), at least one.

    Raises:
        DimensionError: Wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised.
    """
    doubles_ND = widen(points_ND).astype(np.float64)
    sums_NN = np.empty((len(points_ND), len(points_ND)))
    for start, stop in blocks(len(points_ND), _BATCH_ROWS):
        np.rint(doubles_ND[start:stop] @ doubles_ND.T * PER_UNIT, out=sums_NN[start:stop])
    pairs = np.empty((len(points_ND) - 1, 2), np.int64)
    means = np.empty(len(points_ND) - 1)
    _link(sums_NN, pairs, means)
    order = np.argsort(-means, kind="stable")
    return Merges(pairs[order], means[order] / PER_UNIT)


@compiled
def _link(sums_NN: Any, pairs: Any, means: Any) -> None:
    # Clusters are slots of their first points. A cluster's nearest neighbour is followed until two are each other's.
    num_points = sums_NN.shape[0]
    sizes_N = np.ones(num_points, np.int64)  # 0: merged into another one
    chain = np.empty(num_points + 1, np.int64)
    length, first = 0, 0
    done = 0
    while done < num_points - 1:
        if length == 0:
            while sizes_N[first] == 0:
                first += 1
            chain[0] = first
            length = 1
        last = chain[length - 1]
        best, most = -1, -np.inf
        if length > 1:  # wins ties, or equal ones could be followed round and round
            best = chain[length - 2]
            most = sums_NN[last, best] / (sizes_N[last] * sizes_N[best])
        for other in range(num_points):
            if sizes_N[other] > 0 and other != last:
                mean = sums_NN[last, other] / (sizes_N[last] * sizes_N[other])
                if mean > most:
                    best, most = other, mean
        if length == 1 or best != chain[length - 2]:
            chain[length] = best
            length += 1
            continue
        length -= 2
        kept, gone = min(last, best), max(last, best)
        pairs[done, 0], pairs[done, 1], means[done] = kept, gone, most
        done += 1
        sizes_N[kept] += sizes_N[gone]
        sizes_N[gone] = 0
        for other in range(num_points):
            if sizes_N[other] > 0 and other != kept:
                total = sums_NN[kept, other] + sums_NN[gone, other]
                sums_NN[kept, other] = total
                sums_NN[other, kept] = total


@compiled
def _unite(labels_N: Any, pairs: Any) -> None:
    for p in range(pairs.shape[0]):
        left, right = pairs[p, 0], pairs[p, 1]
        while labels_N[left] != left:
            left = labels_N[left]
        while labels_N[right] != right:
            right = labels_N[right]
        labels_N[max(left, right)] = min(left, right)
    for i in range(labels_N.shape[0]):
        labels_N[i] = labels_N[labels_N[i]]  # labels point backwards, to what is settled
