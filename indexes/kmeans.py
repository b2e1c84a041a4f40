"""Spherical k-means (Dhillon and Modha, 2001) whose result depends on content alone.

An iteration is a sum over shards: ``partial_sums`` of each part with the same centroids, added with
``PartialSums.merge`` in any order, then one ``advance``. ``fit`` does it in one process, ``curation.pipelines`` on many
machines; both can save the state after each iteration and go on from it. The result is the same for any order,
sharding, block and thread count, bit for bit:

- sums of stored float16 rows in float64 are exact (see ``vectors``), and so are counts and the summed similarity, which
  is counted in whole millionths;
- centroids are float32 multiples of 2^-24, so that similarities with float16 rows are exact too. That moves a value by
  at most 2^-25, far below float16;
- the first centroids come from a sample by hashes, see ``seeding``; a cluster that has lost all points starts again at
  a vector that is farthest from its centroid. Ties: the smallest centroid number, the smallest key.

Memory: 8 * dim bytes a cluster for sums and 4 * dim for centroids, 6 * dim bytes each of ``BATCH_ROWS`` points, and
32 MiB a thread.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError
from curation.indexes.assignment import Numbers, Workers, nearest_centroids, widened, workers
from curation.indexes.compiled import compiled
from curation.indexes.keys import Keys, check_keys
from curation.indexes.npz import reading
from curation.indexes.sampling import SmallestRanks
from curation.indexes.seeding import initial_centroids, on_grid
from curation.indexes.vectors import PER_UNIT, Singles, Vectors, blocks, check_shape, widen

logger = logging.getLogger(__name__)

Shards = Callable[[], Iterable[tuple[Vectors, Keys]]]

BATCH_ROWS = 16_384
MAX_RESEEDED = 1024  # empty clusters that start again in one iteration; more wait for the next
_RANK_ZERO = 1 << 32  # rank of similarity 0 among farthest points; a similarity is a few million millionths at most


@dataclass(frozen=True)
class Iteration:
    """What one iteration saw, before its update.

    Attributes:
        objective: Mean similarity of points with their centroid, in [-1, 1]; more is better.
        num_empty: Clusters without points.
        num_reseeded: Of these, clusters that start again at a far point.
        imbalance: k * sum(n^2) / sum(n)^2 over cluster sizes n: 1 when all are equal, k when one holds everything.
    """

    objective: float
    num_empty: int
    num_reseeded: int
    imbalance: float


@dataclass(frozen=True)
class Centroids:
    """A clustering after some iterations: all that the next one needs besides the points.

    Attributes:
        vectors: float32 (k, dim), L2-normalised, multiples of 2^-24.
        history: One entry an iteration.
        converged: Whether the last update changed nothing.
    """

    vectors: Singles
    history: tuple[Iteration, ...] = ()
    converged: bool = False

    def save(self, path: Path) -> None:
        """Write an .npz file."""
        seen = np.array([astuple(iteration) for iteration in self.history], np.float64).reshape(-1, 4)
        with path.open("wb") as stream:
            np.savez(stream, vectors=self.vectors, history=seen, converged=np.array(self.converged))

    @classmethod
    def load(cls, path: Path) -> "Centroids":
        """Read what ``save`` wrote.

        Raises:
            CorruptError: The file is missing, cut short or something else.
        """
        with reading(path, "a clustering") as found:
            history = tuple(Iteration(row[0], int(row[1]), int(row[2]), row[3]) for row in found["history"].tolist())
            return cls(found["vectors"], history, bool(found["converged"]))


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

    def save(self, path: Path) -> None:
        """Write an .npz file: 8 * k * dim bytes and at most ``MAX_RESEEDED`` vectors."""
        ranks, keys, rows = self.farthest.result()
        with path.open("wb") as stream:
            np.savez(
                stream,
                sums=self.sums,
                counts=self.counts,
                millionths=np.array(self.millionths),
                ranks=ranks,
                keys=keys,
                rows=rows,
            )

    @classmethod
    def load(cls, path: Path) -> "PartialSums":
        """Read what ``save`` wrote.

        Raises:
            CorruptError: The file is missing, cut short or something else.
        """
        with reading(path, "partial sums") as found:
            loaded = cls(found["sums"], found["counts"], int(found["millionths"]))
            if len(found["keys"]):
                loaded.farthest.add(found["ranks"], found["keys"], found["rows"])
            return loaded


def fit(
    shards: Shards,
    k: int,
    iterations: int,
    seed: int,
    num_threads: int | None = None,
    resume: Centroids | None = None,
    on_iteration: Callable[[Centroids], None] = lambda state: None,
) -> Centroids:
    """Cluster the points of all shards.

    Args:
        shards: Returns a fresh pass over (vectors, keys): L2-normalised float16 (N, dim) and unique uint64 (N, 2).
        k: Number of clusters; fewer when there are fewer distinct vectors.
        iterations: At most this many passes of assignment; stops when the centroids no longer change.
        seed: Of the first centroids.
        num_threads: Threads; None: Faiss's setting.
        resume: Go on from here, to the same result.
        on_iteration: Told of the state after each iteration, such as to save it.

    Raises:
        DimensionError: ``k`` or ``iterations`` is below 1, or arrays have the wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised, or there is no row at all.
    """
    if iterations < 1:
        raise DimensionError(f"iterations must be at least 1, got {iterations}")
    state = resume or Centroids(initial_centroids(shards, k, seed, num_threads))
    while len(state.history) < iterations and not state.converged:
        total = PartialSums.empty(*state.vectors.shape)
        with workers(num_threads) as threads:
            for vectors_ND, keys_N2 in shards():
                _add_points(total, vectors_ND, keys_N2, state.vectors, threads)
        state = advance(state, total)
        on_iteration(state)
    return state


def advance(state: Centroids, total: PartialSums) -> Centroids:
    """Return the state after one more iteration, from the sums of all points."""
    updated_KD, iteration = update(state.vectors, total)
    history = (*state.history, iteration)
    logger.info("k-means iteration %d: %s", len(history), asdict(iteration))
    return Centroids(updated_KD, history, np.array_equal(updated_KD, state.vectors))


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
    with workers(num_threads) as threads:
        _add_points(total, vectors_ND, keys_N2, centroids_KD, threads)


def _add_points(
    total: PartialSums, vectors_ND: Vectors, keys_N2: Keys, centroids_KD: Singles, threads: Workers
) -> None:
    check_shape(vectors_ND, centroids_KD.shape[1])
    check_keys(keys_N2, len(vectors_ND))
    for start, stop in blocks(len(vectors_ND), BATCH_ROWS):
        points_BD = widened(vectors_ND[start:stop], keys_N2[start:stop], threads)
        numbers_B, millionths_B = nearest_centroids(points_BD, centroids_KD, threads)
        _sum_by_cluster(total, points_BD, numbers_B, threads)
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
    num_reseeded = 0
    if num_points and len(empty_E):
        farthest = total.farthest.result().rows
        num_reseeded = min(len(empty_E), len(farthest))
        sums_KD[empty_E[:num_reseeded]] = farthest[:num_reseeded]
    sizes = total.counts.astype(np.float64)
    iteration = Iteration(
        objective=total.millionths / PER_UNIT / max(1, num_points),
        num_empty=len(empty_E),
        num_reseeded=num_reseeded,
        imbalance=float(len(sizes) * (sizes @ sizes) / max(1, num_points) ** 2),
    )
    return on_grid(sums_KD), iteration


def assign(
    vectors_ND: Vectors, centroids_KD: Singles, num_threads: int | None = None
) -> tuple[Numbers, npt.NDArray[np.float32]]:
    """Return each point's centroid number and rounded similarity with it, both (N,).

    Raises:
        DimensionError: Wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised.
    """
    check_shape(vectors_ND, centroids_KD.shape[1])
    numbers_N = np.empty(len(vectors_ND), np.int32)
    similarities_N = np.empty(len(vectors_ND), np.float32)
    with workers(num_threads) as threads:
        for start, stop in blocks(len(vectors_ND), BATCH_ROWS):
            points_BD = widen(vectors_ND[start:stop], first_row=start)
            numbers_N[start:stop], millionths_B = nearest_centroids(points_BD, centroids_KD, threads)
            similarities_N[start:stop] = millionths_B / PER_UNIT
    return numbers_N, similarities_N


def _sum_by_cluster(total: PartialSums, points_BD: Singles, numbers_B: Numbers, threads: Workers) -> None:
    """Add points to the sums; a thread owns every n-th cluster, so that no two write to one."""

    def work(owner: int) -> None:
        _sum_owned(total.sums, total.counts, points_BD, numbers_B, owner, threads.num_threads)

    threads.each(work, threads.num_threads)


@compiled
def _sum_owned(
    sums_KD: npt.NDArray[np.float64],
    counts_K: npt.NDArray[np.int64],
    points_BD: Singles,
    numbers_B: Numbers,
    owner: int,
    num_owners: int,
) -> None:
    for i in range(points_BD.shape[0]):
        number = numbers_B[i]
        if number % num_owners == owner:
            counts_K[number] += 1
            for j in range(points_BD.shape[1]):
                sums_KD[number, j] += np.float64(points_BD[i, j])
