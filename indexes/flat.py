"""An exact index: all vectors, compared with every query.

A saved index is a folder with ``vectors.npy`` (float16, (N, dim)) and ``keys.npy`` (uint64, (N, 2)), in the order of
rows.
"""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, CurationError, DimensionError, DiskFullError, StoreError
from curation.indexes.exact import BLOCK_ROWS, Neighbours, nearest
from curation.indexes.keys import Keys, check_keys
from curation.indexes.vectors import Vectors, blocks, check_shape, widen

VECTORS_FILE = "vectors.npy"
KEYS_FILE = "keys.npy"

_MAX_HEADER_BYTES = 1024
# Version 1.0 of NumPy's format, exactly as ``save`` writes it: magic, version, header length, padded header.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<descr>[<>|]\w\d)', 'fortran_order': False, "
    rb"'shape': \((?P<rows>\d{1,15}), (?P<columns>\d{1,9})\), \} *\n",
    re.DOTALL,
)


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

    def add(self, vectors_ND: Vectors, keys_N2: Keys) -> None:
        """Append rows; they are copied.

        Args:
            vectors_ND: L2-normalised float16 (N, dim).
            keys_N2: uint64 (N, 2), unique in the index: equal keys leave ties to the order of rows.

        Raises:
            DimensionError: Wrong shape or dtype.
            VectorError: A row is not finite or not L2-normalised. Nothing is added.
        """
        _check(vectors_ND, keys_N2, self.dim)
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
        self, queries_QD: Vectors, k: int, block_rows: int = 4 * BLOCK_ROWS, num_threads: int | None = None
    ) -> Neighbours:
        """Return the ``k`` most similar rows of each query, exactly: see ``exact.nearest``.

        Args:
            queries_QD: L2-normalised float16 (Q, dim).
            k: Places beyond the size of the index are filled with row -1.
            block_rows: Rows compared at a time; bounds memory, changes no result.
            num_threads: Threads; None: Faiss's setting.

        Raises:
            DimensionError: ``k`` is below 1 or the queries have the wrong shape or dtype.
            VectorError: A query is not finite or not L2-normalised.
        """
        check_shape(queries_QD, self.dim)
        self._parts = list(_joined(self._parts, block_rows))
        return nearest(queries_QD, self._parts, k, block_rows, num_threads)

    def save(self, folder: str | Path) -> None:
        """Write the index into a folder, which is made if need be.

        Raises:
            DiskFullError: No space left.
            StoreError: The folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / VECTORS_FILE, np.dtype("<f2"), (len(self), self.dim), [v for v, _ in self._parts])
            _write(folder / KEYS_FILE, np.dtype("<u8"), (len(self), 2), [k for _, k in self._parts])
        except OSError as error:
            kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
            raise kind(f"{folder}: the index cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> "FlatIndex":
        """Map a saved index into memory; pages are read when they are needed.

        Args:
            folder: Where ``save`` wrote.
            verify: Read everything once and check every vector now, not in the search that meets it.

        Raises:
            CorruptError: Files are missing, damaged, or hold something else.
        """
        folder = Path(folder)
        try:
            vectors_ND = _mapped(folder / VECTORS_FILE, "<f2")
            keys_N2 = _mapped(folder / KEYS_FILE, "<u8")
            check_shape(vectors_ND)
            check_keys(keys_N2, len(vectors_ND))
            if verify:
                _check(vectors_ND, keys_N2, vectors_ND.shape[1])
        except (OSError, CurationError) as error:
            raise CorruptError(f"{folder}: is not a saved index: {error}") from error
        index = cls(vectors_ND.shape[1])
        if len(keys_N2):
            index._parts.append((vectors_ND, keys_N2))
        return index


def _check(vectors_ND: Vectors, keys_N2: Keys, dim: int) -> None:
    check_shape(vectors_ND, dim)
    check_keys(keys_N2, len(vectors_ND))
    for start, stop in blocks(len(vectors_ND), BLOCK_ROWS):
        widen(vectors_ND[start:stop], first_row=start)


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


def _mapped(path: Path, descr: str) -> npt.NDArray[Any]:
    # numpy.load would do, but opens archives too and lets Python's tokenizer fail on damaged headers in its own ways.
    with path.open("rb") as file:
        start = file.read(_MAX_HEADER_BYTES)
        num_bytes = os.fstat(file.fileno()).st_size
    header = _HEADER.match(start)
    if (
        header is None
        or header["descr"].decode() != descr
        or header.end() != 10 + int.from_bytes(start[8:10], "little")
    ):
        raise CorruptError(f"{path.name} does not start as an array of {descr} with two axes")
    shape = int(header["rows"]), int(header["columns"])
    dtype = np.dtype(descr)
    if num_bytes != header.end() + shape[0] * shape[1] * dtype.itemsize:
        raise CorruptError(f"{path.name} has {num_bytes} bytes, which do not hold an array of shape {shape}")
    if not shape[0]:  # nothing to map
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", header.end(), shape)


def _write(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], arrays: list[npt.NDArray[Any]]) -> None:
    # Not through a memory map: on a full disk that kills the process instead of raising.
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            for start, stop in blocks(len(array), BLOCK_ROWS):
                file.write(np.ascontiguousarray(array[start:stop], dtype).data)
        file.flush()
        os.fsync(file.fileno())
