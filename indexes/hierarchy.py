"""Clusters of clusters, so that a common subject does not own most of a level.

k-means puts centroids where points are dense. The centroids of a level are the points of the next one, each of them
once however many images it stands for. The first level is plain ``kmeans`` over the images; above it

- ``average``: the most similar clusters are merged (``linkage``), whatever their number, which is bounded by memory;
- ``kmeans``: k-means, repeated on the ``r`` points nearest to each centroid, as many for a large cluster as for a small
  one: with each repetition the centroids lie more evenly over what there is (the paper).

An equal share for each cluster of the top level is one for each group of images as far as groups and clusters are the
same. With as many clusters as groups, shares on 21 mixtures of 20 and 50 groups with sizes of up to 1 : 300 were equal,
with 1.2 times as many up to 2.05 times the mean, with twice as many up to 3.3; with too few, groups share a share.
k-means gave common groups up to 5 clusters of 32, hence 3.2 times the mean. ``auto`` found the number of groups in all
of them: it looks for the widest gap between similarities of merges. Images that are like no other count as groups too.
Where groups do not stand apart the gap means nothing; then the number of subjects that should have a share is the
user's to say.

Source: Vo et al. 2024, "Automatic data curation for self-supervised learning: a clustering-based approach", algorithm 2
(arXiv 2405.15613). They use Euclidean distances; here, as everywhere in this package, cosines.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from curation.errors import CorruptError, DimensionError
from curation.indexes import kmeans, linkage
from curation.indexes.assignment import Numbers
from curation.indexes.keys import Keys
from curation.indexes.npz import reading
from curation.indexes.seeding import on_grid, spread
from curation.indexes.vectors import Rows, Singles, Vectors

logger = logging.getLogger(__name__)

AUTO: Literal["auto"] = "auto"
Level = int | Literal["auto"]
Method = Literal["average", "kmeans"]

# Of the distance in the drawing of first centroids. With 1, as in k-means++, the many points of a heavy head together
# still outweigh a rare group that stands apart: on mixtures of 25 groups with sizes of 1 : 130 (40 clusters at the top)
# balanced shares by k-means came out up to 3.8 times the mean with 1, and up to 2.8 with 4 (8 seeds).
POWER = 4.0


@dataclass(frozen=True)
class Tree:
    """Clusters of clusters.

    Attributes:
        centroids: float32 (K_t, dim) of each level, the first level's first.
        parents: For each level but the last, the cluster of the next level that a cluster belongs to, int32 (K_t,).
    """

    centroids: tuple[Singles, ...]
    parents: tuple[Numbers, ...]

    def __post_init__(self) -> None:
        """Check that levels fit together.

        Raises:
            DimensionError: They do not.
        """
        if len(self.parents) != len(self.centroids) - 1:
            raise DimensionError(f"{len(self.centroids)} levels need {len(self.centroids) - 1} arrays of parents")
        for level, parents in enumerate(self.parents):
            below, above = len(self.centroids[level]), len(self.centroids[level + 1])
            if parents.shape != (below,) or (below and not 0 <= parents.min() <= parents.max() < above):
                raise DimensionError(f"level {level} has {below} clusters, whose parents must be below {above}")

    def ancestors(self, numbers_N: Numbers) -> Numbers:
        """Return the cluster of each level above that clusters of the first level lie in, int32 (N, levels - 1)."""
        found = []
        for parents in self.parents:
            numbers_N = parents[numbers_N]
            found.append(numbers_N)
        return np.stack(found, axis=1) if found else np.empty((len(numbers_N), 0), np.int32)

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        arrays: dict[str, Any] = {f"centroids_{level}": array for level, array in enumerate(self.centroids)}
        arrays |= {f"parents_{level}": array for level, array in enumerate(self.parents)}
        with path.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Tree":
        """Read what ``save`` wrote.

        Raises:
            CorruptError: The file is missing, cut short or something else.
        """
        with reading(path, "a tree of clusters") as found:
            num_levels = sum(name.startswith("centroids_") for name in found.files)
            centroids = tuple(found[f"centroids_{level}"] for level in range(num_levels))
            parents = tuple(found[f"parents_{level}"] for level in range(num_levels - 1))
        if any(array.dtype != np.float32 or array.ndim != 2 or not np.isfinite(array).all() for array in centroids):
            raise CorruptError(f"{path}: not a tree of clusters: float32 rows of finite numbers are needed")
        try:
            return cls(centroids, parents)
        except DimensionError as error:
            raise CorruptError(f"{path}: not a tree of clusters: {error}") from error


def grow(
    centroids_KD: Singles,
    levels: Sequence[Level],
    iterations: int,
    seed: int,
    rounds: int,
    per_cluster: int | None = None,
    num_threads: int | None = None,
    method: Method = "average",
) -> Tree:
    """Return the tree over the clusters of the first level.

    Args:
        centroids_KD: Of the first level, L2-normalised.
        levels: Numbers of clusters above it, from the bottom; a level has fewer where there are fewer (with k-means:
            fewer different) centroids below. The last may be ``auto``: see ``linkage.Merges.widest_gap``.
        iterations: Of each k-means, at most.
        seed: Of first centroids.
        rounds: How often the k-means of a level is repeated on resampled points.
        per_cluster: Points nearest to each centroid that a repetition sees; None: half of the mean cluster size.
        num_threads: Threads; None: Faiss's setting.
        method: How levels are made; with ``average`` too, levels of ``linkage.MAX_POINTS`` clusters or more are made by
            k-means, and a smaller one above more centroids than that is made of that many clusters of them.

    Raises:
        DimensionError: A number is out of range.
    """
    if rounds < 0 or (per_cluster is not None and per_cluster < 1):
        raise DimensionError("rounds must be at least 0, and resampled points of a cluster at least 1")
    if AUTO in levels[:-1] or (AUTO in levels and method == "kmeans"):
        raise DimensionError(f"{AUTO} is for the last level, and k-means cannot say how many clusters there are")
    if any(count != AUTO and int(count) < 1 for count in levels):
        raise DimensionError(f"a level needs at least 1 cluster, got {list(levels)}")
    centroids, parents = [centroids_KD], []
    for level, count in enumerate(levels if len(centroids_KD) else (), start=1):
        points_ND = centroids[-1].astype(np.float16)

        def clustered(k: int, points_ND: Vectors = points_ND, level: int = level) -> tuple[Numbers, Singles]:
            keys_N2 = np.zeros((len(points_ND), 2), np.uint64)
            keys_N2[:, 0], keys_N2[:, 1] = level, np.arange(len(points_ND))
            found_KD = resampled(points_ND, keys_N2, k, iterations, seed, rounds, per_cluster, num_threads)
            numbers_N, _ = kmeans.assign(points_ND, found_KD, num_threads)
            used, places_N = np.unique(
                numbers_N, return_inverse=True
            )  # points left out by resampling may all lie apart
            return places_N.astype(np.int32), found_KD[used]

        if method == "kmeans" or (count != AUTO and int(count) >= linkage.MAX_POINTS):
            numbers_N, found_KD = clustered(int(count))
        else:
            numbers_N = np.arange(len(points_ND), dtype=np.int32)
            if len(points_ND) > linkage.MAX_POINTS:
                numbers_N, found_KD = clustered(linkage.MAX_POINTS)
                points_ND = found_KD.astype(np.float16)
            tops_M, found_KD = _linked(points_ND, count)
            numbers_N = tops_M[numbers_N]
        centroids.append(found_KD)
        parents.append(numbers_N)
        logger.info("level %d: %d clusters of %d", level, len(found_KD), len(numbers_N))
    return Tree(tuple(centroids), tuple(parents))


def _linked(points_ND: Vectors, count: Level) -> tuple[Numbers, Singles]:
    """Return the cluster of each point and centroids, made by average linkage."""
    merges = linkage.average_linkage(points_ND)
    widest = merges.widest_gap()
    logger.info("the similarity of merges falls most below %d clusters", widest)
    numbers_N = merges.cut(widest if count == AUTO else int(count))
    singles_ND = points_ND.astype(np.float64)
    sums_KD = np.zeros((int(numbers_N.max()) + 1, points_ND.shape[1]))
    np.add.at(sums_KD, numbers_N, singles_ND)
    _, first_K = np.unique(numbers_N, return_index=True)
    cancelled_K1 = ~sums_KD.any(axis=1, keepdims=True)
    return numbers_N, on_grid(np.where(cancelled_K1, singles_ND[first_K], sums_KD))


def resampled(
    points_ND: Vectors,
    keys_N2: Keys,
    k: int,
    iterations: int,
    seed: int,
    rounds: int,
    per_cluster: int | None = None,
    num_threads: int | None = None,
) -> Singles:
    """Return centroids (k, dim) of points that fit into memory, fitted again ``rounds`` times on resampled points.

    Arguments and errors are those of ``grow`` and ``kmeans.fit``.
    """
    wanted = per_cluster or max(1, len(points_ND) // (2 * k))
    centroids_KD = _fitted(points_ND, keys_N2, k, iterations, seed, num_threads)
    for number in range(1, rounds + 1):
        rows = _nearest_of_each(points_ND, keys_N2, centroids_KD, wanted, num_threads)
        centroids_KD = _fitted(points_ND[rows], keys_N2[rows], k, iterations, seed + number, num_threads)
    return centroids_KD


def _fitted(points_ND: Vectors, keys_N2: Keys, k: int, iterations: int, seed: int, num_threads: int | None) -> Singles:
    start = kmeans.Centroids(spread(points_ND, keys_N2, k, seed, num_threads, POWER))
    return kmeans.fit(lambda: [(points_ND, keys_N2)], k, iterations, seed, num_threads, start).vectors


def _nearest_of_each(
    points_ND: Vectors, keys_N2: Keys, centroids_KD: Singles, count: int, num_threads: int | None
) -> Rows:
    """Return the rows of the ``count`` points of each cluster that are nearest to its centroid; ties by key."""
    numbers_N, similarities_N = kmeans.assign(points_ND, centroids_KD, num_threads)
    order = np.lexsort((keys_N2[:, 1], keys_N2[:, 0], -similarities_N, numbers_N))
    first = np.searchsorted(numbers_N[order], numbers_N[order])
    rows: Rows = order[np.arange(len(order)) - first < count]
    return rows
