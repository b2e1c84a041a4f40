"""Exact re-ranking of candidates from stored vectors."""

from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import numpy.typing as npt

from curation.errors import VectorError
from curation.indexes.compiled import compiled
from curation.indexes.exact import Neighbours, insert
from curation.indexes.keys import Keys
from curation.indexes.vectors import NORM_TOLERANCE, PER_UNIT, Rows, Similarities, Singles, Vectors

_MAX_SIMILARITY = (1 + NORM_TOLERANCE) ** 2


def offer_rows(
    best: Neighbours,
    queries_QD: Singles,
    vectors_ND: Vectors,
    keys_N2: Keys,
    starts_Q1: Rows,
    rows_P: Rows,
    first_row: int,
    num_threads: int | None = None,
) -> None:
    """Improve ``best`` in place with candidates.

    Args:
        best: Of the queries so far.
        queries_QD: Widened.
        vectors_ND: Stored vectors, an array or a memory map.
        keys_N2: Theirs.
        starts_Q1: (Q + 1,) where the candidates of each query start, and their number.
        rows_P: Candidates, rows of ``vectors_ND``.
        first_row: What the first row is numbered in ``best``.
        num_threads: Threads; None: Faiss's setting.

    Raises:
        VectorError: A candidate is not finite or not L2-normalised.
    """
    num_threads = num_threads or faiss.omp_get_max_threads()
    # Read-only arrays of the plain class, whatever they come from: one compilation serves all.
    bits_ND = np.asarray(vectors_ND).view(np.uint16)
    keys_N2 = np.asarray(keys_N2).view()
    bits_ND.flags.writeable = keys_N2.flags.writeable = False

    def part(start: int, stop: int) -> int:
        return int(
            _offer(
                queries_QD[start:stop],
                bits_ND,
                keys_N2,
                starts_Q1[start : stop + 1],
                rows_P,
                first_row,
                *best.part(start, stop),
            )
        )

    cuts = np.linspace(0, len(queries_QD), num_threads + 1).astype(int).tolist()
    if num_threads == 1:
        bad = [part(*cuts)]
    else:
        with ThreadPoolExecutor(num_threads) as pool:
            bad = list(pool.map(part, cuts[:-1], cuts[1:]))
    if max(bad) >= 0:
        raise VectorError(f"vector of row {first_row + max(bad)} is not finite or not L2-normalised: index again")


@compiled
def _offer(
    queries_QD: Singles,
    bits_ND: npt.NDArray[np.uint16],
    keys_N2: Keys,
    starts_Q1: Rows,
    rows_P: Rows,
    first_row: int,
    best_keys_QK2: Keys,
    best_rows_QK: Rows,
    best_QK: Similarities,
) -> int:
    dim = queries_QD.shape[1]
    wide_D = np.empty(dim, np.uint32)
    values_D = wide_D.view(np.float32)
    for q in range(queries_QD.shape[0]):
        for p in range(starts_Q1[q], starts_Q1[q + 1]):
            row = rows_P[p]
            for j in range(dim):  # see vectors.widen; the missing 2^112 is exact as well
                half = np.uint32(bits_ND[row, j])
                sign = (half & np.uint32(0x8000)) << np.uint32(16)
                wide_D[j] = ((half & np.uint32(0x7FFF)) << np.uint32(13)) | sign
            total = 0.0
            for j in range(dim):
                total += np.float64(queries_QD[q, j]) * (np.float64(values_D[j]) * 2.0**112)
            if not abs(total) <= _MAX_SIMILARITY:
                return int(row)
            found = np.rint(total * PER_UNIT) / PER_UNIT
            insert(q, found, keys_N2[row, 0], keys_N2[row, 1], first_row + row, best_keys_QK2, best_rows_QK, best_QK)
    return -1
