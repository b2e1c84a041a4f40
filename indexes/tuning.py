"""How many lists and candidates a search of an index takes to find what an exact search finds."""

import logging

import numpy as np

from curation.indexes.exact import nearest
from curation.indexes.index_header import PROBED_K, Probing
from curation.indexes.ivfpq import IvfPqIndex
from curation.indexes.keys import Keys
from curation.indexes.vectors import Rows, Vectors, blocks

logger = logging.getLogger(__name__)

NUM_QUERIES = 500  # that recall is measured on
MIN_DEPTH = 16
MAX_DEPTH = 2048
_BATCH = 128
# Nanoseconds, measured: an opened list, a byte of a scanned code, a candidate, a dimension of one.
_LIST, _BYTE, _CANDIDATE, _VALUE = 150.0, 0.05, 80.0, 0.35


def tune(
    index: IvfPqIndex,
    queries_QD: Vectors,
    keys_Q2: Keys,
    recall: float,
    probes: int | None = None,
    depth: int | None = None,
    num_threads: int | None = None,
    drawn_from: str = "images of the pool",
) -> Probing:
    """Return the cheapest search of an index that reaches a recall on queries.

    It holds for queries like these: others may lie elsewhere and take many more probes. Where codes are too coarse for
    any, it is an exact search, unless numbers are given: then the best there is.

    Time: one exact search of the queries and a few approximate ones.

    Args:
        index: With its rows.
        queries_QD: L2-normalised float16; best rows of the pool that the index was not trained on.
        keys_Q2: Theirs; no query counts as its own neighbour.
        recall: Share of the 4 nearest vectors that must be found.
        probes: A number of probes that is given; None: find it.
        depth: A number of candidates that is given; None: find it.
        num_threads: Of Faiss.
        drawn_from: What the log calls the queries.

    Raises:
        VectorError: A query or a row is not finite or not L2-normalised.
    """
    if not len(index) or not len(queries_QD):
        return Probing(probes or 1, depth or MIN_DEPTH)
    wanted_QK = _neighbours(index, queries_QD, keys_Q2, num_threads)
    depths = [depth] if depth else _steps(MIN_DEPTH, max(MIN_DEPTH, min(MAX_DEPTH, len(index))))
    tried: list[tuple[bool, float, float, Probing]] = []
    for num_probes in [probes] if probes else _steps(1, index.quantizer.num_lists):
        if any(enough and cost <= _cost(index, num_probes, depths[0]) for enough, _, cost, _ in tried):
            break
        place_QK = _places(index, queries_QD, wanted_QK, Probing(num_probes, depths[-1]), num_threads)
        for size in depths:
            found = float((place_QK < size)[wanted_QK >= 0].mean()) if (wanted_QK >= 0).any() else 1.0
            cost = _cost(index, num_probes, size)
            tried.append((found >= recall, found, cost, Probing(num_probes, size, found, len(queries_QD))))
    # The cheapest that is enough, or else the one that finds most.
    enough, found, _, best = min(tried, key=lambda one: (not one[0], 0.0 if one[0] else -one[1], one[2]))
    if not enough and probes is None and depth is None:
        logger.info(
            "recall@%d on %d %s: %.4f at most with %d candidates, %.4f was asked for: the search is exact",
            PROBED_K,
            len(queries_QD),
            drawn_from,
            found,
            best.depth,
            recall,
        )
        return Probing(index.quantizer.num_lists, len(index), 1.0, len(queries_QD))
    logger.log(
        logging.INFO if enough else logging.WARNING,
        "recall@%d on %d %s: %.4f with %d of %d lists and %d candidates; %.4f was asked for",
        PROBED_K,
        len(queries_QD),
        drawn_from,
        found,
        best.probes,
        index.quantizer.num_lists,
        best.depth,
        recall,
    )
    return best


def _steps(first: int, last: int) -> list[int]:
    """Return numbers from first to last, two an octave."""
    steps = {last}
    while first < last:
        steps |= {first, min(last, first + first // 2)}
        first *= 2
    return sorted(steps)


def _cost(index: IvfPqIndex, probes: int, depth: int) -> float:
    row = _BYTE * index.quantizer.code_bytes
    rows = len(index) / index.quantizer.num_lists
    return probes * (_LIST + row * rows) + depth * (_CANDIDATE + _VALUE * index.dim)


def _neighbours(index: IvfPqIndex, queries_QD: Vectors, keys_Q2: Keys, num_threads: int | None) -> Rows:
    """Return the rows of the nearest others, (Q, PROBED_K), -1 where there are fewer."""
    found = nearest(queries_QD, index.vectors(), PROBED_K + 1, num_threads=num_threads)
    is_other = (found.keys != keys_Q2[:, None]).any(axis=2)
    order = np.argsort(~is_other, axis=1, kind="stable")[:, :PROBED_K]
    rows = np.take_along_axis(found.rows, order, axis=1)
    return np.where(np.take_along_axis(is_other, order, axis=1), rows, -1)


def _places(index: IvfPqIndex, queries_QD: Vectors, wanted_QK: Rows, probing: Probing, num_threads: int | None) -> Rows:
    """Return how many candidates score as well as each wanted row, (Q, PROBED_K), less one; many if it is none."""
    place_QK = np.full(wanted_QK.shape, np.iinfo(np.int64).max)
    for start, stop in blocks(len(queries_QD), _BATCH):
        query_P, row_P, score_P = index.candidates(queries_QD[start:stop], probing, num_threads)
        is_last_P = np.ones(len(query_P), bool)  # of a run of equal scores
        is_last_P[:-1] = (query_P[1:] != query_P[:-1]) | (score_P[1:] != score_P[:-1])
        (ends,) = np.nonzero(is_last_P)
        end_P = ends[np.searchsorted(ends, np.arange(len(query_P)))]
        hit_P, which_P = np.nonzero(row_P[:, None] == wanted_QK[start:stop][query_P])
        queries = query_P[hit_P]
        place_QK[start + queries, which_P] = end_P[hit_P] - np.searchsorted(query_P, queries)
    return place_QK
