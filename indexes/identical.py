"""Rows with equal bytes, found in linear time, so that thousands of identical images do not make millions of pairs."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from curation.indexes.compiled import compiled
from curation.indexes.exact import Edges
from curation.indexes.vectors import Rows, Vectors, blocks, pair_similarities, widen

_BLOCK_ROWS = 8192
MAX_EDGES = 1 << 18  # in one piece, about


def identical_rows(vectors_ND: Vectors, floor: float) -> Edges:
    """Return an edge from the first of each group of identical rows to each other row of the group: a star.

    Rows whose similarity with themselves is not above ``floor`` are in no group: rounding to float16 allows that for
    floors near 1.
    """
    hashes_N = np.empty(len(vectors_ND), np.uint64)
    factors_D = np.random.default_rng(0).integers(0, 2**64, vectors_ND.shape[1], np.uint64) | np.uint64(1)
    for start, stop in blocks(len(vectors_ND), _BLOCK_ROWS):
        _hash_rows(np.array(vectors_ND[start:stop], order="C").view(np.uint16), factors_D, hashes_N[start:stop])
    order = np.argsort(hashes_N, kind="stable")
    starts = np.flatnonzero(np.append(True, hashes_N[order[1:]] != hashes_N[order[:-1]])[: len(order)])
    first = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    (later,) = np.nonzero(first != order)
    stars = [_identical(vectors_ND, first[part], order[part], floor) for part in _parts(later)]
    left, right, found = (np.concatenate(columns) for columns in zip(*stars, strict=True))
    return in_order(Edges(left, right, found))


def distinct_rows(num_rows: int, identical: Edges) -> Rows:
    """Return the rows that are not to the right of an edge of ``identical``: one of each content."""
    stays = np.ones(num_rows, bool)
    stays[identical.right] = False
    return np.flatnonzero(stays)


def pieces(edges: Edges) -> Iterator[Edges]:
    """Yield edges in pieces of at most ``MAX_EDGES``; nothing if there are none."""
    for start, stop in blocks(len(edges.left), MAX_EDGES):
        yield Edges(edges.left[start:stop], edges.right[start:stop], edges.similarity[start:stop])


def with_copies(edges: Edges, identical_left: Edges, identical_right: Edges) -> Iterator[Edges]:
    """Yield edges of distinct rows, and those between each row and the copies of the other, in bounded pieces.

    For rows a and b with copies: (a, b), all (copy of a, b) and all (a, copy of b), but no (copy of a, copy of b). So
    each row with a neighbour has an edge, and the number of edges is a sum of copies, not a product.
    """
    yield edges
    for column, identical in enumerate((identical_left, identical_right)):
        rows = edges[column]
        starts = np.searchsorted(identical.left, rows, "left")
        counts = np.searchsorted(identical.left, rows, "right") - starts
        (found,) = np.nonzero(counts)
        # As many edges at a time as have MAX_EDGES copies, or a single one that has more.
        batch = np.cumsum(counts[found]) // MAX_EDGES
        for part in np.split(found, np.flatnonzero(np.diff(batch)) + 1):
            of = np.repeat(part, counts[part])
            within = np.arange(len(of)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
            copies = identical.right[starts[of] + within]
            left, right = (copies, edges.right[of]) if column == 0 else (edges.left[of], copies)
            if len(of):
                yield in_order(Edges(left, right, edges.similarity[of]))


def in_order(edges: Edges) -> Edges:
    """Return edges sorted by (left, right)."""
    order = np.lexsort((edges.right, edges.left))
    return Edges(edges.left[order], edges.right[order], edges.similarity[order])


def _parts(later: Rows) -> list[Rows]:
    return [later[start:stop] for start, stop in blocks(len(later), _BLOCK_ROWS)] or [later]


def _identical(vectors_ND: Vectors, left_P: Rows, right_P: Rows, floor: float) -> Edges:
    left_PD = np.array(vectors_ND[left_P], order="C")
    equal = (left_PD.view(np.uint16) == np.array(vectors_ND[right_P], order="C").view(np.uint16)).all(axis=1)
    rows_BD = widen(left_PD)
    pairs = np.arange(len(left_P))
    found = pair_similarities(rows_BD, rows_BD, pairs, pairs)
    kept = equal & (found > floor)
    return Edges(left_P[kept], right_P[kept], found[kept])


@compiled
def _hash_rows(
    bits_BD: npt.NDArray[np.uint16], factors_D: npt.NDArray[np.uint64], hashes_B: npt.NDArray[np.uint64]
) -> None:
    # Multilinear hashing: two different rows meet by chance once in 2^48 or so; all that meet are compared.
    for i in range(bits_BD.shape[0]):
        total = np.uint64(0)
        for j in range(bits_BD.shape[1]):
            total += np.uint64(bits_BD[i, j]) * factors_D[j]
        hashes_B[i] = total
