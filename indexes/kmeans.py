"""Spherical k-means (Dhillon and Modha, 2001) whose result depends on content alone.

An iteration is a sum over shards: ``partial_sums`` of each part with the same centroids, added with
``PartialSums.merge`` in any order, then one ``update``. ``fit`` does it in one process. The result is the same for any
order, sharding, block and thread count, bit for bit:

- sums of stored float16 rows in float64 are exact (see ``vectors``), and so are counts and the summed similarity,
  which is
  counted in whole millionths;
- centroids are float32 multiples of 2^-24, so that similarities with float16 rows are exact too. That moves a value by
  at
  most 2^-25, far below float16;
- the first centroids are the vectors with the smallest hashes of (seed, key); a cluster that has lost all points starts
  again at a vector that is farthest from its centroid. Ties: the smallest centroid number, the smallest key.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError, VectorError
from curation.indexes.compiled import compiled
from curation.indexes.exact import Neighbours, no_neighbours, offer
from curation.indexes.keys import Keys, check_keys
from curation.indexes.sampling import HashSample, SmallestRanks
from curation.indexes.vectors import PER_UNIT, Singles, Vectors, blocks, check_shape, widen

logger = logging.getLogger(__name__)

Shards = Callable[[], Iterable[tuple[Vectors, Keys]]]

BLOCK_ROWS = 8192
MAX_RESEEDED = 1024  # empty clusters that start again in one iteration; more wait for the next
_GRID = 2.0**24
_RANK_ZERO = 1 << 32  # rank of similarity 0 among farthest points; a similarity is a few million millionths at most


@dataclass(frozen=True)
class Iteration:
    """What one iteration saw, before its update.

    Attributes:
        objective: Mean similarity of points with their centroid, in [-1, 1]; more is better.
        num_empty: Clusters without points.
        imbalance: k * sum(n^2) / sum(n)^2 over cluster sizes n: 1 when all are equal, k when one holds everything.
    """

    objective: float
    num_empty: int
    imbalance: float


@dataclass(frozen=True)
class Centroids:
    """A fitted clustering.

    Attributes:
        vectors: float32 (k, dim), L2-normalised, multiples of 2^-24.
        history: One entry an iteration.
        converged: Whether the last update changed nothing.
    """

    vectors: Singles
    history: tuple[Iteration, ...]
    converged: bool


@dataclass
class PartialSums:
    """What a part of the points contributes to an update.

    Attributes:
        sums: float64 (k, dim), exact.
        counts: int64 (k,).
        millionths: Sum of similarities, in whole 1e-6.
        farthest: Distinct vectors by smallest similarity with their centroid, for empty clusters.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    millionths: int = 0
    farthest: SmallestRanks = field(default_factory=lambda: SmallestRanks(MAX_RESEEDED, distinct=True))

    @classmethod
    def empty(cls, num_centroids: int, dim: int) -> "PartialSums":
        """Return the sums of no points."""
        return cls(np.zeros((num_centroids, dim)), np.zeros(num_centroids, np.int64))

    def merge(self, other: "PartialSums") -> None:
        """Add the sums of other points; any order gives the same bits."""
        self.sums += other.sums
        self.counts += other.counts
        self.millionths += other.millionths
        self.farthest.merge(other.farthest)


def fit(shards: Shards, k: int, iterations: int, seed: int, num_threads: int | None = None) -> Centroids:
    """Cluster the points of all shards.

    Args:
        shards: Returns a fresh pass over (vectors, keys): L2-normalised float16 (N, dim) and unique uint64 (N, 2).
        k: Number of clusters; fewer when there are fewer distinct vectors.
        iterations: At most this many passes of assignment; stops when the centroids no longer change.
        seed: Of the first centroids.
        num_threads: Threads; None: Faiss's setting and one for sums.

    Raises:
        DimensionError: ``k`` or ``iterations`` is below 1, or arrays have the wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised, or there is no row at all.
    """
    if iterations < 1:
        raise DimensionError(f"iterations must be at least 1, got {iterations}")
    centroids_KD = initial_centroids(shards, k, seed)
    history: list[Iteration] = []
    converged = False
    while len(history) < iterations and not converged:
        total = PartialSums.empty(*centroids_KD.shape)
        for vectors_ND, keys_N2 in shards():
            add_points(total, vectors_ND, keys_N2, centroids_KD, num_threads)
        updated_KD, iteration = update(centroids_KD, total)
        history.append(iteration)
        logger.info("k-means iteration %d: %s", len(history), iteration)
        converged = np.array_equal(updated_KD, centroids_KD)
        centroids_KD = updated_KD
    return Centroids(centroids_KD, tuple(history), converged)


def initial_centroids(shards: Shards, k: int, seed: int) -> Singles:
    """Return the ``k`` distinct vectors with the smallest hashes of (seed, key) as centroids, or all there are.

    Raises:
        DimensionError: ``k`` is below 1, or arrays have the wrong shape or dtype.
        VectorError: A chosen row is not finite or not L2-normalised, or there is no row at all.
    """
    if k < 1:
        raise DimensionError(f"k must be at least 1, got {k}")
    sample = HashSample(seed, k, distinct=True)
    for vectors_ND, keys_N2 in shards():
        check_shape(vectors_ND)
        sample.add(keys_N2, vectors_ND)
    chosen = sample.result().rows
    if not len(chosen):
        raise VectorError("there is no vector to cluster")
    return _normalised(widen(chosen).astype(np.float64))


def partial_sums(
    vectors_ND: Vectors, keys_N2: Keys, centroids_KD: Singles, num_threads: int | None = None
) -> PartialSums:
    """Assign points to centroids and return what they contribute to ``update``.

    Raises:
        DimensionError: Wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised.
    """
    total = PartialSums.empty(*centroids_KD.shape)
    add_points(total, vectors_ND, keys_N2, centroids_KD, num_threads)
    return total


def add_points(
    total: PartialSums, vectors_ND: Vectors, keys_N2: Keys, centroids_KD: Singles, num_threads: int | None = None
) -> None:
    """Like ``partial_sums``, added to ``total`` in place."""
    check_shape(vectors_ND, centroids_KD.shape[1])
    check_keys(keys_N2, len(vectors_ND))
    for start, stop in blocks(len(vectors_ND), BLOCK_ROWS):
        points_BD = widen(vectors_ND[start:stop], first_row=start)
        found = _nearest_centroids(points_BD, centroids_KD, num_threads)
        millionths_B = np.rint(found.similarities[:, 0] * PER_UNIT).astype(np.int64)
        _sum_by_cluster(total, points_BD, found.rows[:, 0], num_threads or 1)
        total.millionths += int(millionths_B.sum())
        ranks_B = (millionths_B + _RANK_ZERO).astype(np.uint64)
        total.farthest.add(ranks_B, keys_N2[start:stop], vectors_ND[start:stop])


def update(centroids_KD: Singles, total: PartialSums) -> tuple[Singles, Iteration]:
    """Return the centroids of the next iteration, and what this one saw.

    A centroid is the normalised sum of its points; one whose points cancel out stays where it is. Empty clusters take
    the farthest points, the smallest cluster number the farthest one.
    """
    num_points = int(total.counts.sum())
    sums_KD = np.where(total.sums.any(axis=1, keepdims=True), total.sums, centroids_KD.astype(np.float64))
    (empty_E,) = np.nonzero(total.counts == 0)
    if num_points and len(empty_E):
        farthest = total.farthest.result().rows
        reseeded = empty_E[: len(farthest)]
        sums_KD[reseeded] = farthest[: len(reseeded)]
    sizes = total.counts.astype(np.float64)
    iteration = Iteration(
        objective=total.millionths / PER_UNIT / max(1, num_points),
        num_empty=len(empty_E),
        imbalance=float(len(sizes) * (sizes @ sizes) / max(1, num_points) ** 2),
    )
    return _normalised(sums_KD), iteration


def assign(
    vectors_ND: Vectors, centroids_KD: Singles, num_threads: int | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return each point's centroid number and rounded similarity with it, both (N,).

    Raises:
        DimensionError: Wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised.
    """
    check_shape(vectors_ND, centroids_KD.shape[1])
    numbers_N = np.empty(len(vectors_ND), np.int32)
    similarities_N = np.empty(len(vectors_ND), np.float32)
    for start, stop in blocks(len(vectors_ND), BLOCK_ROWS):
        points_BD = widen(vectors_ND[start:stop], first_row=start)
        found = _nearest_centroids(points_BD, centroids_KD, num_threads)
        numbers_N[start:stop] = found.rows[:, 0]
        similarities_N[start:stop] = found.similarities[:, 0]
    return numbers_N, similarities_N


def _nearest_centroids(points_BD: Singles, centroids_KD: Singles, num_threads: int | None) -> Neighbours:
    keys_K2 = np.zeros((len(centroids_KD), 2), np.uint64)
    keys_K2[:, 1] = np.arange(len(centroids_KD))  # ties go to the smallest number
    best = no_neighbours(len(points_BD), 1)
    offer(best, points_BD, centroids_KD, keys_K2, 0, num_threads)
    return best


def _normalised(sums_KD: npt.NDArray[np.float64]) -> Singles:
    norms_K1 = np.sqrt((sums_KD * sums_KD).sum(axis=1, keepdims=True))
    grid_KD: npt.NDArray[np.float64] = np.rint(sums_KD / norms_K1 * _GRID) / _GRID
    return grid_KD.astype(np.float32)


def _sum_by_cluster(total: PartialSums, points_BD: Singles, numbers_B: npt.NDArray[np.int64], num_threads: int) -> None:
    if num_threads == 1:
        _sum_owned(total.sums, total.counts, points_BD, numbers_B, 0, 1)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        # A thread owns every num_threads-th cluster, so that no two write to one.
        done = [
            pool.submit(_sum_owned, total.sums, total.counts, points_BD, numbers_B, owner, num_threads)
            for owner in range(num_threads)
        ]
        for future in done:
            future.result()


@compiled
def _sum_owned(
    sums_KD: npt.NDArray[np.float64],
    counts_K: npt.NDArray[np.int64],
    points_BD: Singles,
    numbers_B: npt.NDArray[np.int64],
    owner: int,
    num_owners: int,
) -> None:
    for i in range(points_BD.shape[0]):
        number = numbers_B[i]
        if number % num_owners == owner:
            counts_K[number] += 1
            for j in range(points_BD.shape[1]):
                sums_KD[number, j] += np.float64(points_BD[i, j])
