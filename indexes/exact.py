"""Exact neighbours by brute force in blocks: float32 scores preselect, exact rounded similarities decide.

``self_join`` and ``cross_join`` give *all* pairs above a threshold. There is no k to outgrow, so a hub with more true
copies than any k loses none of them; memory is bounded by blocks, not by the number of edges. Time is quadratic.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from curation.errors import DimensionError
from curation.indexes import preselect
from curation.indexes.compiled import compiled
from curation.indexes.keys import NO_KEY, Keys, check_keys
from curation.indexes.vectors import (
    Rows,
    Similarities,
    Singles,
    Vectors,
    blocks,
    check_shape,
    pair_similarities,
    similarity,
    widen,
)

BLOCK_ROWS = 4096


class Edges(NamedTuple):
    """Pairs of rows and their rounded similarity, sorted by (left, right)."""

    left: Rows
    right: Rows
    similarity: Similarities


class Neighbours(NamedTuple):
    """The ``k`` best references of each query, best first; ties by smaller key.

    Where there are fewer than ``k``: row -1, similarity -inf, and a key of ones.
    """

    keys: Keys  # (Q, k, 2)
    rows: Rows  # (Q, k), numbered through all references
    similarities: Similarities  # (Q, k), rounded

    def part(self, start: int, stop: int) -> "Neighbours":
        """Return views of the queries from ``start`` to ``stop``."""
        return Neighbours(self.keys[start:stop], self.rows[start:stop], self.similarities[start:stop])


def self_join(
    vectors_ND: Vectors,
    threshold: float,
    block_rows: int = BLOCK_ROWS,
    num_threads: int | None = None,
    chosen: Rows | None = None,
) -> Iterator[Edges]:
    """Yield all pairs of rows i < j whose rounded similarity is above ``threshold``.

    Args:
        vectors_ND: L2-normalised float16 rows, an array or a memory map.
        threshold: Exclusive, compared with similarities rounded to 1e-6.
        block_rows: Rows compared at a time: a few times ``block_rows * dim * 4`` bytes of memory, plus at most about
            4 million pairs.
        num_threads: Threads; None: Faiss's setting.
        chosen: Only these rows, ascending; None: all.

    Yields:
        Non-empty edges, each pair once. The set of pairs does not depend on blocks or threads.

    Raises:
        DimensionError: The array is not float16 (N, dim).
        VectorError: A row is not finite or not L2-normalised; found before the first edge.
    """
    check_shape(vectors_ND)
    for start, stop in blocks(len(vectors_ND), block_rows):
        widen(vectors_ND[start:stop], first_row=start)
    rows_P = np.arange(len(vectors_ND)) if chosen is None else chosen
    for left_start, left_stop in blocks(len(rows_P), block_rows):
        left_B = rows_P[left_start:left_stop]
        left_BD = widen(vectors_ND[left_B])
        for start, stop in blocks(len(rows_P), block_rows):
            if start < left_start:
                continue
            right_B = rows_P[start:stop]
            right_BD = left_BD if start == left_start else widen(vectors_ND[right_B])
            yield from _join(left_BD, right_BD, left_B, right_B, threshold, num_threads)


def cross_join(
    queries_QD: Vectors,
    references_ND: Vectors,
    threshold: float,
    block_rows: int = BLOCK_ROWS,
    num_threads: int | None = None,
    chosen_queries: Rows | None = None,
    chosen_references: Rows | None = None,
) -> Iterator[Edges]:
    """Yield all (query, reference) rows whose rounded similarity is above ``threshold``.

    Arguments, order and errors are those of ``self_join``; left rows are queries, right rows are references.
    """
    check_shape(queries_QD)
    check_shape(references_ND, queries_QD.shape[1])
    for start, stop in blocks(len(references_ND), block_rows):
        widen(references_ND[start:stop], first_row=start)
    for start, stop in blocks(len(queries_QD), block_rows):
        widen(queries_QD[start:stop], first_row=start)
    queries_P = np.arange(len(queries_QD)) if chosen_queries is None else chosen_queries
    references_P = np.arange(len(references_ND)) if chosen_references is None else chosen_references
    for query_start, query_stop in blocks(len(queries_P), block_rows):
        queries_B = queries_P[query_start:query_stop]
        queries_BD = widen(queries_QD[queries_B])
        for start, stop in blocks(len(references_P), block_rows):
            references_B = references_P[start:stop]
            references_BD = widen(references_ND[references_B])
            yield from _join(queries_BD, references_BD, queries_B, references_B, threshold, num_threads)


def nearest(
    queries_QD: Vectors,
    references: Iterable[tuple[Vectors, Keys]],
    k: int,
    block_rows: int = 4 * BLOCK_ROWS,
    num_threads: int | None = None,
) -> Neighbours:
    """Return the ``k`` best references of each query.

    Args:
        queries_QD: L2-normalised float16 rows.
        references: Vectors and keys, shard by shard; read once.
        k: May be larger than the number of references.
        block_rows: References compared at a time; queries go in a quarter of that.
        num_threads: Threads; None: Faiss's setting.

    Raises:
        DimensionError: ``k`` is below 1, or an array has the wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised.
    """
    if k < 1:
        raise DimensionError(f"k must be at least 1, got {k}")
    check_shape(queries_QD)
    best = no_neighbours(len(queries_QD), k)
    query_rows = max(1, block_rows // 4)
    for start, stop in blocks(len(queries_QD), query_rows):
        widen(queries_QD[start:stop], first_row=start)
    first_row = 0
    for vectors_ND, keys_N2 in references:
        check_shape(vectors_ND, queries_QD.shape[1])
        check_keys(keys_N2, len(vectors_ND))
        for start, stop in blocks(len(vectors_ND), block_rows):
            references_BD = widen(vectors_ND[start:stop], first_row=first_row + start)
            for query_start, query_stop in blocks(len(queries_QD), query_rows):
                part = best.part(query_start, query_stop)
                queries_BD = widen(queries_QD[query_start:query_stop])
                offer(part, queries_BD, references_BD, np.array(keys_N2[start:stop]), first_row + start, num_threads)
        first_row += len(vectors_ND)
    return best


def best_match(
    queries_QD: Vectors,
    references_ND: Vectors,
    reference_keys_N2: Keys,
    block_rows: int = 4 * BLOCK_ROWS,
    num_threads: int | None = None,
) -> tuple[Rows, Similarities]:
    """Return the row of each query's most similar reference and that rounded similarity, both (Q,).

    Ties go to the smaller key. Without references: -1 and -inf. Errors are those of ``nearest``.
    """
    found = nearest(queries_QD, [(references_ND, reference_keys_N2)], 1, block_rows, num_threads)
    return found.rows[:, 0], found.similarities[:, 0]


def offer(
    best: Neighbours,
    queries_QD: Singles,
    references_ND: Singles,
    reference_keys_N2: Keys,
    first_row: int,
    num_threads: int | None = None,
) -> None:
    """Improve ``best`` in place with widened references whose first row is ``first_row``."""
    k = best.rows.shape[1]
    for query_P, reference_P in preselect.best(queries_QD, references_ND, k, best.similarities[:, -1], num_threads):
        _insert(queries_QD, references_ND, query_P, reference_P, reference_keys_N2, first_row, *best)


def no_neighbours(num_queries: int, k: int) -> Neighbours:
    """Return neighbours of queries that have seen no reference yet."""
    return Neighbours(
        np.full((num_queries, k, 2), NO_KEY),
        np.full((num_queries, k), -1, np.int64),
        np.full((num_queries, k), -np.inf),
    )


def _join(
    left_MD: Singles, right_ND: Singles, left_M: Rows, right_N: Rows, threshold: float, num_threads: int | None
) -> Iterator[Edges]:
    for left_P, right_P in preselect.above(left_MD, right_ND, threshold, num_threads):
        if left_MD is right_ND:  # a block with itself: each pair once
            once = left_P < right_P
            left_P, right_P = left_P[once], right_P[once]
        found_P = pair_similarities(left_MD, right_ND, left_P, right_P)
        (kept,) = np.nonzero(found_P > threshold)
        if len(kept):
            kept = kept[np.lexsort((right_P[kept], left_P[kept]))]
            yield Edges(left_M[left_P[kept]], right_N[right_P[kept]], found_P[kept])


@compiled
def insert(
    q: int,
    found: float,
    high: np.uint64,
    low: np.uint64,
    row: int,
    best_keys_QK2: Keys,
    best_rows_QK: Rows,
    best_QK: Similarities,
) -> None:
    """Insert a reference into the k places of query ``q``, by similarity, then key, then row; for other kernels."""
    place = best_QK.shape[1]
    while place > 0:
        j = place - 1
        other = best_QK[q, j]
        if other > found:
            break
        if other == found:
            other_high, other_low = best_keys_QK2[q, j, 0], best_keys_QK2[q, j, 1]
            if other_high < high or (other_high == high and other_low < low):
                break
            if other_high == high and other_low == low and best_rows_QK[q, j] < row:
                break
        if place < best_QK.shape[1]:
            best_QK[q, place] = other
            best_rows_QK[q, place] = best_rows_QK[q, j]
            best_keys_QK2[q, place] = best_keys_QK2[q, j]
        place = j
    if place < best_QK.shape[1]:
        best_QK[q, place] = found
        best_rows_QK[q, place] = row
        best_keys_QK2[q, place, 0] = high
        best_keys_QK2[q, place, 1] = low


@compiled
def _insert(
    queries_QD: Singles,
    references_ND: Singles,
    query_P: Rows,
    reference_P: Rows,
    keys_N2: Keys,
    first_row: int,
    best_keys_QK2: Keys,
    best_rows_QK: Rows,
    best_QK: Similarities,
) -> None:
    for p in range(query_P.shape[0]):
        q = query_P[p]
        r = reference_P[p]
        found = similarity(queries_QD[q], references_ND[r])
        insert(q, found, keys_N2[r, 0], keys_N2[r, 1], first_row + r, best_keys_QK2, best_rows_QK, best_QK)
