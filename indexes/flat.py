"""An exact index: all vectors, compared with every query.

A saved index is a folder with ``vectors.npy`` (float16, (N, dim)) and ``keys.npy`` (uint64, (N, 2)), in the order of
rows, and ``index.npz``, which says that it is flat.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, DimensionError
from curation.indexes import array_files, index_header
from curation.indexes.exact import BLOCK_ROWS, Neighbours, nearest
from curation.indexes.index_header import HEADER_FILE, KEYS_FILE, VECTORS_FILE, Header
from curation.indexes.keys import Keys, check_keys
from curation.indexes.vectors import Rows, Vectors, blocks, check_shape, widen


class FlatIndex:
    """Vectors with their keys, in memory or mapped from a file.

    What ``search`` finds does not depend on the order of rows, only on keys and vectors (row numbers do, of course).
    """

    def __init__(self, dim: int) -> None:
        """Start empty.

        Raises:
            DimensionError: ``dim`` is below 1.
        """
        if dim < 1:
            raise DimensionError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self._parts: list[tuple[Vectors, Keys]] = []

    def __len__(self) -> int:
        return sum(len(keys_N2) for _, keys_N2 in self._parts)

    def empty(self) -> "FlatIndex":
        """Return an index without rows that can be merged into this one."""
        return FlatIndex(self.dim)

    def add(self, vectors_ND: Vectors, keys_N2: Keys) -> None:
        """Append rows; they are copied.

        Args:
            vectors_ND: L2-normalised float16 (N, dim).
            keys_N2: uint64 (N, 2), unique in the index: equal keys leave ties to the order of rows.

        Raises:
            DimensionError: Wrong shape or dtype.
            VectorError: A row is not finite or not L2-normalised. Nothing is added.
        """
        check_shape(vectors_ND, self.dim)
        check_keys(keys_N2, len(vectors_ND))
        for start, stop in blocks(len(vectors_ND), BLOCK_ROWS):
            widen(vectors_ND[start:stop], first_row=start)
        if len(keys_N2):
            self._parts.append((np.array(vectors_ND, order="C"), np.array(keys_N2, order="C")))

    def merge(self, other: "FlatIndex") -> None:
        """Append the rows of another index, without copying them.

        Raises:
            DimensionError: The other index has another dimension.
        """
        if other.dim != self.dim:
            raise DimensionError(f"an index of dimension {other.dim} cannot be merged into one of {self.dim}")
        self._parts += other._parts

    def search(
        self,
        queries_QD: Vectors,
        k: int,
        block_rows: int = 4 * BLOCK_ROWS,
        num_threads: int | None = None,
        among_N: npt.NDArray[np.bool_] | None = None,
    ) -> Neighbours:
        """Return the ``k`` most similar rows of each query, exactly: see ``exact.nearest``.

        Args:
            queries_QD: L2-normalised float16 (Q, dim).
            k: Places beyond the size of the index are filled with row -1.
            block_rows: Rows compared at a time; bounds memory, changes no result.
            num_threads: Threads; None: Faiss's setting.
            among_N: Rows that may be found; None: all.

        Raises:
            DimensionError: ``k`` is below 1 or the queries have the wrong shape or dtype.
            VectorError: A query is not finite or not L2-normalised.
        """
        check_shape(queries_QD, self.dim)
        self._parts = list(_joined(self._parts, block_rows))
        if among_N is None:
            return nearest(queries_QD, self._parts, k, block_rows, num_threads)
        return nearest_among(queries_QD, self._parts, np.flatnonzero(among_N), k, block_rows, num_threads)

    def save(self, folder: str | Path) -> None:
        """Write the index into a folder, which is made if need be.

        Raises:
            DiskFullError: No space left.
            StoreError: The folder cannot be written.
        """
        folder = Path(folder)
        with array_files.writing(folder):
            shape = (len(self), self.dim)
            array_files.write(folder / VECTORS_FILE, np.dtype("<f2"), shape, [v for v, _ in self._parts])
            crc32 = array_files.write(folder / KEYS_FILE, np.dtype("<u8"), (len(self), 2), [k for _, k in self._parts])
            index_header.write(folder / HEADER_FILE, Header(crc32))

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> "FlatIndex":
        """Map a saved index into memory; pages are read when they are needed.

        Args:
            folder: Where ``save`` wrote.
            verify: Read everything once: every vector, not in the search that meets it, and the checksum of keys.

        Raises:
            CorruptError: Files are missing, damaged, or hold something else.
        """
        folder = Path(folder)
        with index_header.loading(folder):
            header = index_header.read(folder / HEADER_FILE)
            if header.quantizer is not None:
                raise CorruptError(f"{HEADER_FILE} is of an index of another kind")
            vectors_ND, keys_N2 = index_header.mapped_rows(folder, header, None, verify)
        index = cls(vectors_ND.shape[1])
        if len(keys_N2):
            index._parts.append((vectors_ND, keys_N2))
        return index


def nearest_among(
    queries_QD: Vectors,
    parts: Iterable[tuple[Vectors, Keys]],
    rows: Rows,
    k: int,
    block_rows: int = 4 * BLOCK_ROWS,
    num_threads: int | None = None,
) -> Neighbours:
    """Return the ``k`` best of some rows, sorted, of all parts; see ``exact.nearest``."""

    def chosen() -> Iterator[tuple[Vectors, Keys]]:
        first_row = 0
        for vectors_ND, keys_N2 in parts:
            low, high = np.searchsorted(rows, (first_row, first_row + len(keys_N2)))
            for start, stop in blocks(high - low, block_rows):
                mine = rows[low + start : low + stop] - first_row
                yield vectors_ND[mine], keys_N2[mine]
            first_row += len(keys_N2)

    found = nearest(queries_QD, chosen(), k, block_rows, num_threads)
    return found._replace(rows=np.append(rows, -1)[found.rows])


def _joined(parts: list[tuple[Vectors, Keys]], block_rows: int) -> Iterator[tuple[Vectors, Keys]]:
    """Join neighbouring small parts, since a block never spans two."""
    waiting: list[tuple[Vectors, Keys]] = []
    num_waiting = 0
    for part in [*parts, None]:
        if waiting and (part is None or num_waiting + len(part[1]) > block_rows):
            yield (
                waiting[0]
                if len(waiting) == 1
                else (np.concatenate([v for v, _ in waiting]), np.concatenate([k for _, k in waiting]))
            )
            waiting, num_waiting = [], 0
        if part is not None:
            waiting.append(part)
            num_waiting += len(part[1])
