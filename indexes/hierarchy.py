"""Hierarchical k-means with resampling: clusters of clusters, so that a common subject does not own most of a level.

k-means puts centroids where points are dense. The centroids of a level are the points of the next one, each of them
once however many images it stands for, and within a level the clustering is repeated on the ``r`` points nearest to
each centroid, as many for a large cluster as for a small one: with each repetition the centroids lie more evenly over
what there is. The first level is plain ``kmeans`` over the images, and is not repeated. Give the top level more
clusters than there are groups that should have a share each: groups that share a cluster of it share its share.

Source: Vo et al. 2024, "Automatic data curation for self-supervised learning: a clustering-based approach", algorithm 2
(arXiv 2405.15613). They use Euclidean distances; here, as everywhere in this package, cosines.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curation.errors import CorruptError, DimensionError
from curation.indexes import kmeans
from curation.indexes.assignment import Numbers
from curation.indexes.keys import Keys
from curation.indexes.npz import reading
from curation.indexes.seeding import spread
from curation.indexes.vectors import Rows, Singles, Vectors

logger = logging.getLogger(__name__)

# Of the distance in the drawing of first centroids. With 1, as in k-means++, the many points of a heavy head together
# still outweigh a rare group that stands apart: on mixtures of 25 groups with sizes of 1 : 130 (40 clusters at the top)
# balanced shares came out between 0.6 and 3.8 times the mean with 1, and between 0.6 and 2.0 with 4.
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
    levels: Sequence[int],
    iterations: int,
    seed: int,
    rounds: int,
    per_cluster: int | None = None,
    num_threads: int | None = None,
) -> Tree:
    """Return the tree over the clusters of the first level.

    Args:
        centroids_KD: Of the first level, L2-normalised.
        levels: Numbers of clusters above it, from the bottom; a level has fewer where there are fewer different
            centroids below.
        iterations: Of each k-means, at most.
        seed: Of first centroids.
        rounds: How often the clustering of a level is repeated on resampled points.
        per_cluster: Points nearest to each centroid that a repetition sees; None: half of the mean cluster size.
        num_threads: Threads; None: Faiss's setting.

    Raises:
        DimensionError: A number is out of range.
    """
    if rounds < 0 or (per_cluster is not None and per_cluster < 1):
        raise DimensionError("rounds must be at least 0, and resampled points of a cluster at least 1")
    centroids, parents = [centroids_KD], []
    for level, k in enumerate(levels if len(centroids_KD) else (), start=1):
        points_ND = centroids[-1].astype(np.float16)
        keys_N2 = np.zeros((len(points_ND), 2), np.uint64)
        keys_N2[:, 0], keys_N2[:, 1] = level, np.arange(len(points_ND))
        found_KD = resampled(points_ND, keys_N2, k, iterations, seed, rounds, per_cluster, num_threads)
        numbers_N, _ = kmeans.assign(points_ND, found_KD, num_threads)
        used, places_N = np.unique(numbers_N, return_inverse=True)  # points that resampling left out may all lie apart
        centroids.append(found_KD[used])
        parents.append(places_N.astype(np.int32))
        logger.info("level %d: %d clusters of %d", level, len(used), len(points_ND))
    return Tree(tuple(centroids), tuple(parents))


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
