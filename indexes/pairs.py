"""All similar pairs of a pool, behind one interface: exact, or approximate with a recall chosen in advance.

Both yield edges whose similarity (rounded float64 product of the stored float16 rows) is above a floor. Identical rows
are compared once:

- ``self_pairs`` yields a star for each group of identical rows, from its first row to each other one, and for pairs of
  different content the edge between first rows only. Components at any threshold from the floor up to the similarity of
  identical rows (1 but for rounding) are those of all pairs.
- ``cross_pairs`` yields, for left rows of one content and right rows of another, the edges of the first left row to all
  those right rows, and of the first right row to all those left rows. Each row that has a neighbour has an edge as
  similar as its most similar neighbour is.

Every other pair above the floor is yielded (exact), or with the recall that was fitted (approximate): near-identical
rows too, in pieces of bounded size.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from curation.indexes.exact import Edges, cross_join, self_join
from curation.indexes.identical import distinct_rows, identical_rows, pieces, with_copies
from curation.indexes.inverted import InvertedPairs
from curation.indexes.vectors import Vectors, check_shape

__all__ = ["Edges", "ExactPairs", "InvertedPairs", "PairSearch"]

Codes = npt.NDArray[np.uint8]


class PairSearch(Protocol):
    """Finds pairs of rows whose similarity is above a floor.

    Whether a pair is found depends on its two rows and on what was fitted alone: never on blocks, batches, threads or
    other rows. Vectors are L2-normalised float16 (N, dim), arrays or memory maps.
    """

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's code; 0 where vectors are all that is needed."""

    def encode(self, vectors_ND: Vectors, num_threads: int | None = None) -> Codes:
        """Return what a row needs besides its vector to be searched, (N, ``code_bytes``), row by row.

        Raises:
            DimensionError: Not float16 (N, dim).
            VectorError: A row is not finite or not L2-normalised.
        """

    def self_pairs(
        self, vectors_ND: Vectors, codes_NW: Codes, floor: float, num_threads: int | None = None
    ) -> Iterator[Edges]:
        """Yield non-empty edges i < j, each pair once; each piece sorted by (left, right).

        Args:
            vectors_ND: Checked vectors.
            codes_NW: Their codes.
            floor: Exclusive, compared with rounded similarities.
            num_threads: Threads; None: Faiss's setting.

        Raises:
            DimensionError: Vectors or codes of the wrong shape or dtype.
            UsageError: The search was not fitted for so low a floor.
        """

    def cross_pairs(
        self,
        left_ND: Vectors,
        left_codes_NW: Codes,
        right_MD: Vectors,
        right_codes_MW: Codes,
        floor: float,
        num_threads: int | None = None,
    ) -> Iterator[Edges]:
        """Yield non-empty edges (left row, right row), each pair once. Errors are those of ``self_pairs``."""


class ExactPairs:
    """Every pair, by brute force in blocks: see ``exact``. Time is quadratic."""

    code_bytes = 0

    def encode(self, vectors_ND: Vectors, num_threads: int | None = None) -> Codes:
        """Return empty codes, (N, 0)."""
        check_shape(vectors_ND)
        return np.empty((len(vectors_ND), 0), np.uint8)

    def self_pairs(
        self, vectors_ND: Vectors, codes_NW: Codes, floor: float, num_threads: int | None = None
    ) -> Iterator[Edges]:
        """Yield pairs as ``PairSearch`` has it; VectorError too."""
        check_shape(vectors_ND)
        identical = identical_rows(vectors_ND, floor)
        yield from pieces(identical)
        rows = distinct_rows(len(vectors_ND), identical)
        yield from self_join(vectors_ND, floor, num_threads=num_threads, chosen=rows)

    def cross_pairs(
        self,
        left_ND: Vectors,
        left_codes_NW: Codes,
        right_MD: Vectors,
        right_codes_MW: Codes,
        floor: float,
        num_threads: int | None = None,
    ) -> Iterator[Edges]:
        """Yield pairs as ``PairSearch`` has it; VectorError too."""
        check_shape(left_ND)
        check_shape(right_MD, left_ND.shape[1])
        copies = identical_rows(left_ND, floor), identical_rows(right_MD, floor)
        chosen = distinct_rows(len(left_ND), copies[0]), distinct_rows(len(right_MD), copies[1])
        for edges in cross_join(
            left_ND,
            right_MD,
            floor,
            num_threads=num_threads,
            chosen_queries=chosen[0],
            chosen_references=chosen[1],
        ):
            yield from with_copies(edges, *copies)
