"""The nearest centroid of each point: float32 scores by matrix multiplication, exact rounded similarities decide.

Scores come from NumPy's BLAS, a block at a time, and a compiled scan keeps only centroids whose score is within the
error bound of the best (see ``preselect.score_error``); of those the exact similarity is taken, in ascending order of
centroid numbers, so that ties go to the smallest. Threads take blocks of points, each with a BLAS of one thread: all of
the work scales with them. (Measured, two iterations on 60,000 x 256 points with 1,000 centroids, one thread:
``faiss.Kmeans`` 0.72 s, ``kmeans.fit`` with this 0.72 s. ``faiss.knn`` is as fast only where it is asked for one
result, and one result does not tell whether another centroid is within the error.)

Where a GPU build of Faiss sees a GPU, the scores are its own, and the same exact similarities decide.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from curation.indexes.compiled import compiled
from curation.indexes.keys import Keys
from curation.indexes.preselect import best, default_threads, gpu_knn, score_error
from curation.indexes.vectors import PER_UNIT, ROUNDING, Singles, Vectors, blocks, pair_similarities, similarity, widen

Numbers = npt.NDArray[np.int32]
Millionths = npt.NDArray[np.int64]

_POINT_ROWS = 2048
_CENTROID_ROWS = 4096  # scores of a block: 32 MiB at most for each thread


@contextmanager
def workers(num_threads: int | None = None) -> Iterator["Workers"]:
    """Give threads for the block inside; None: as many as Faiss is set to.

    BLAS has one thread meanwhile. That setting belongs to the process, so concurrent calls share it; no result depends
    on it.
    """
    num_threads = num_threads or default_threads()  # before: to limit a BLAS on OpenMP is to limit Faiss as well
    with blas_of_one_thread(), Workers(num_threads) as found:
        yield found


@contextmanager
def blas_of_one_thread() -> Iterator[None]:
    """Give BLAS, and LAPACK with it, one thread inside the block: with more, last bits of its results may differ."""
    with _blas().limit(limits=1, user_api="blas"):
        yield


class Workers:
    """Threads that share the blocks of one job."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = max(1, num_threads)
        self._pool = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def each(self, work: Callable[[int], None], count: int) -> None:
        """Call ``work`` with every number below ``count``."""
        if self._pool is None or count == 1:
            for number in range(count):
                work(number)
        else:
            list(self._pool.map(work, range(count)))  # raises what a call raised


def widened(vectors_BD: Vectors, keys_B2: Keys, threads: Workers) -> Singles:
    """Return checked vectors as float32, see ``vectors.widen``; the first bad row is the one that is named."""
    points_BD = np.empty(vectors_BD.shape, np.float32)
    spans = list(blocks(len(points_BD), _POINT_ROWS))

    def work(number: int) -> None:
        start, stop = spans[number]
        points_BD[start:stop] = widen(vectors_BD[start:stop], keys_N2=keys_B2[start:stop])

    threads.each(work, len(spans))
    return points_BD


def nearest_centroids(points_BD: Singles, centroids_KD: Singles, threads: Workers) -> tuple[Numbers, Millionths]:
    """Return the number of each point's nearest centroid and its rounded similarity in whole 1e-6, both (B,).

    Args:
        points_BD: Widened points.
        centroids_KD: float32, K >= 1, multiples of 2^-24.
        threads: From ``workers``.
    """
    if gpu_knn() is not None:
        return _of_best(points_BD, centroids_KD)
    numbers_B = np.zeros(len(points_BD), np.int32)
    millionths_B = np.zeros(len(points_BD), np.int64)
    margin = np.float32(2 * score_error(points_BD.shape[1]) + 2 * ROUNDING)
    spans = list(blocks(len(points_BD), _POINT_ROWS))

    def work(number: int) -> None:
        start, stop = spans[number]
        _assign(points_BD[start:stop], centroids_KD, margin, numbers_B[start:stop], millionths_B[start:stop])

    threads.each(work, len(spans))
    return numbers_B, millionths_B


def _of_best(points_BD: Singles, centroids_KD: Singles) -> tuple[Numbers, Millionths]:
    """As ``nearest_centroids``, from the centroids whose scores are among the best, see ``preselect.best``."""
    numbers_B = np.zeros(len(points_BD), np.int32)
    millionths_B = np.zeros(len(points_BD), np.int64)
    for point_P, number_P in best(points_BD, centroids_KD, 1, np.full(len(points_BD), -np.inf)):
        found_P = np.rint(pair_similarities(points_BD, centroids_KD, point_P, number_P) * PER_UNIT).astype(np.int64)
        order_P = np.lexsort((number_P, -found_P, point_P))  # all pairs of a point are in one piece
        chosen_P = order_P[np.unique(point_P[order_P], return_index=True)[1]]
        numbers_B[point_P[chosen_P]] = number_P[chosen_P]
        millionths_B[point_P[chosen_P]] = found_P[chosen_P]
    return numbers_B, millionths_B


def _assign(
    points_BD: Singles, centroids_KD: Singles, margin: np.float32, numbers_B: Numbers, millionths_B: Millionths
) -> None:
    best_B = np.full(len(points_BD), -np.inf, np.float32)
    buffer = np.empty(len(points_BD) * min(len(centroids_KD), _CENTROID_ROWS), np.float32)
    for start, stop in blocks(len(centroids_KD), _CENTROID_ROWS):
        scores_BC = buffer[: len(points_BD) * (stop - start)].reshape(len(points_BD), stop - start)
        np.matmul(points_BD, centroids_KD[start:stop].T, out=scores_BC)
        _scan(
            scores_BC, scores_BC.view(np.int32), points_BD, centroids_KD, start, margin, best_B, numbers_B, millionths_B
        )


@compiled
def _scan(
    scores_BC: Singles,
    bits_BC: npt.NDArray[np.int32],
    points_BD: Singles,
    centroids_KD: Singles,
    first: int,
    margin: np.float32,
    best_B: Singles,
    numbers_B: Numbers,
    millionths_B: Millionths,
) -> None:
    # best_B: best score so far. A centroid below it by more than the margin cannot be nearest, here or in later blocks.
    for i in range(scores_BC.shape[0]):
        row = scores_BC[i]
        # As integers, floats that are not negative keep their order, and LLVM vectorises an integer maximum (10x).
        top_bits = np.int32(-1)
        for j in range(row.shape[0]):
            top_bits = max(top_bits, bits_BC[i, j])
        top = np.int32(top_bits).view(np.float32) if top_bits >= 0 else row.max()
        if top < best_B[i] - margin:
            continue
        is_first = best_B[i] == -np.inf
        best_B[i] = max(top, best_B[i])
        cut = best_B[i] - margin
        num_near, last = np.int32(0), np.int32(0)
        for j in range(row.shape[0]):  # without a branch, so that it is vectorised too
            is_near = row[j] >= cut
            num_near += np.int32(is_near)
            last = max(last, np.int32(j) if is_near else np.int32(0))
        for j in range(last if num_near == 1 else 0, last + 1):
            if row[j] >= cut:
                found = np.int64(np.rint(similarity(points_BD[i], centroids_KD[first + j]) * PER_UNIT))
                if is_first or found > millionths_B[i]:
                    is_first = False
                    millionths_B[i] = found
                    numbers_B[i] = first + j


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
