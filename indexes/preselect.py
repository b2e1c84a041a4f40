"""Float32 scores with a proven error, to find the few pairs that deserve an exact similarity. All Faiss calls are here.

A float32 dot product of ``dim`` terms in any order differs from the exact one by at most ``dim * 2^-24 / (1 - dim *
2^-24)`` times the sum of absolute products (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), which is at
most ~1 for normalised rows. ``score_error`` is twice that, and covers fused multiply-adds.

Where a GPU build of Faiss sees a GPU (on Ray: where the settings give the worker one), scores are computed there, in
float32 too. They only preselect, so what is found is the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from curation.indexes.vectors import ROUNDING, Rows, Singles

# Scores fetched beyond k. Rows whose k-th place is still undecided after that are scored once more, in full.
EXTRA = 3
MAX_SCORES = 1 << 22  # scores in memory at a time: 16 MiB, and at most this many candidate pairs at a time
GPU_NEIGHBOURS = 256  # of a query that a GPU, which has no search by radius, is asked for; Faiss allows 2,048

Knn = Callable[..., tuple[npt.NDArray[np.float32], Rows]]


def score_error(dim: int) -> float:
    """Return how far a float32 score may be from the exact similarity of normalised rows."""
    return (dim + 16) * 2.0**-23


def thread_count(num_threads: int | None) -> int:
    """Return ``num_threads``, at least 1; None: as many as Faiss would use."""
    return max(1, faiss.omp_get_max_threads() if num_threads is None else num_threads)


@contextmanager
def threads(num_threads: int | None) -> Iterator[None]:
    """Let Faiss use ``num_threads`` threads inside the block; None: leave it as it is.

    The setting belongs to the process, so concurrent calls with different numbers share one of them. No result depends
    on it.
    """
    before = faiss.omp_get_max_threads()
    if num_threads is not None:
        faiss.omp_set_num_threads(max(1, num_threads))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def default_threads() -> int:
    """Return how many threads Faiss is set to use."""
    return int(faiss.omp_get_max_threads())


@cache
def gpu_knn() -> Knn | None:
    """Return Faiss's search on a GPU, which is called like ``faiss.knn``; None without a GPU."""
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return None
    resources = faiss.StandardGpuResources()

    def knn(queries_QD: Singles, references_ND: Singles, k: int, metric: int) -> Any:
        return faiss.knn_gpu(resources, queries_QD, references_ND, k, metric=metric)

    return knn


def above(
    queries_QD: Singles, references_ND: Singles, threshold: float, num_threads: int | None = None
) -> Iterator[tuple[Rows, Rows]]:
    """Yield (query, reference) rows of every pair whose rounded similarity can be above ``threshold``.

    Pairs come in pieces of at most ``MAX_SCORES``; by query, but on a GPU those of queries with many pairs last.
    """
    if not len(queries_QD) or not len(references_ND):
        return
    radius = threshold - score_error(references_ND.shape[1]) - ROUNDING
    knn = gpu_knn()
    if knn is None:
        yield from _in_radius(queries_QD, references_ND, radius, num_threads)
        return
    num_fetched = min(GPU_NEIGHBOURS, len(references_ND))
    many = []
    step = max(1, MAX_SCORES // len(references_ND))
    for start in range(0, len(queries_QD), step):
        scores, found = knn(
            queries_QD[start : start + step], references_ND, num_fetched, metric=faiss.METRIC_INNER_PRODUCT
        )
        is_cut_Q = (scores[:, -1] >= radius) & (num_fetched < len(references_ND))  # there may be more of them
        many.append(start + np.flatnonzero(is_cut_Q))
        query_P, place_P = np.nonzero((scores >= radius) & ~is_cut_Q[:, None])
        yield start + query_P, found[query_P, place_P]
    again = np.concatenate(many)
    for query_P, reference_P in _in_radius(queries_QD[again], references_ND, radius, num_threads):
        yield again[query_P], reference_P


def _in_radius(
    queries_QD: Singles, references_ND: Singles, radius: float, num_threads: int | None
) -> Iterator[tuple[Rows, Rows]]:
    """Yield the pairs whose score is above ``radius``, by query."""
    index = faiss.IndexFlatIP(references_ND.shape[1])
    index.add(references_ND)
    step = max(1, MAX_SCORES // len(references_ND))
    for start in range(0, len(queries_QD), step):
        with threads(num_threads):  # not around the yield: the caller's own work keeps its setting
            limits, _, found = index.range_search(queries_QD[start : start + step], radius)
        limits = limits.astype(np.int64)
        counts = limits[1:] - limits[:-1]
        yield np.repeat(np.arange(start, start + len(counts), dtype=np.int64), counts), found


def best(
    queries_QD: Singles,
    references_ND: Singles,
    k: int,
    floor_Q: npt.NDArray[np.float64],
    num_threads: int | None = None,
) -> Iterator[tuple[Rows, Rows]]:
    """Yield (query, reference) rows of every pair that may be among its query's ``k`` best by rounded similarity.

    Args:
        queries_QD: Widened queries.
        references_ND: Widened references, N >= 1.
        k: At least 1.
        floor_Q: A rounded similarity that a pair must reach to matter, such as the k-th best so far; -inf for none.
        num_threads: Threads of Faiss; None: as it is.
    """
    error = score_error(references_ND.shape[1])
    num_fetched = min(k + EXTRA, len(references_ND))
    knn = gpu_knn() if num_fetched <= GPU_NEIGHBOURS else None
    with threads(num_threads):
        scores, found = (knn or faiss.knn)(queries_QD, references_ND, num_fetched, metric=faiss.METRIC_INNER_PRODUCT)
    # The k best scores are exact to the error, so the k-th best similarity is at least kth - error; a pair that reaches
    # it after rounding has at least that minus ROUNDING, and its score at least another error less.
    cut_Q = np.maximum(
        scores[:, min(k, num_fetched) - 1].astype(np.float64) - 2 * error - ROUNDING, floor_Q - error - ROUNDING
    )
    undecided_Q = (scores[:, -1] >= cut_Q) & (num_fetched < len(references_ND))
    query_P, place_P = np.nonzero((scores >= cut_Q[:, None]) & ~undecided_Q[:, None])
    yield np.ascontiguousarray(query_P), found[query_P, place_P]

    (again,) = np.nonzero(undecided_Q)  # many near-ties, such as thousands of copies of one image
    if len(again):
        # One more dimension subtracts each query's own cut, so that one threshold serves them all. It doubles the sum
        # of absolute products, which score_error allows for.
        shifted_QE = np.hstack([queries_QD[again], -cut_Q[again, None].astype(np.float32)])
        ones_N1 = np.ones((len(references_ND), 1), np.float32)
        for query_P, reference_P in above(shifted_QE, np.hstack([references_ND, ones_N1]), 0.0, num_threads):
            yield again[query_P], reference_P
