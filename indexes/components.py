"""Connected components of edges that stream by: one array of parents, nothing else.

The smaller root becomes the parent, so every parent is at most its child and each component's root is its smallest row,
whatever the order of edges. Paths are halved while they are walked (Tarjan and van Leeuwen, 1984).
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, DimensionError
from curation.indexes.compiled import compiled


class UnionFind:
    """Components of ``num_rows`` rows.

    Memory: 4 bytes a row below 2^32 rows, else 8.
    """

    def __init__(self, num_rows: int) -> None:
        """Start with every row alone.

        Raises:
            DimensionError: ``num_rows`` is negative.
        """
        if num_rows < 0:
            raise DimensionError(f"num_rows must be at least 0, got {num_rows}")
        dtype = np.uint32 if num_rows < 2**32 else np.int64
        self._parents: npt.NDArray[np.uint32 | np.int64] = np.arange(num_rows, dtype=dtype)
        self._is_flat = True

    def __len__(self) -> int:
        return len(self._parents)

    def add(self, left_E: npt.NDArray[np.integer], right_E: npt.NDArray[np.integer]) -> None:
        """Join the components of each pair of rows.

        Raises:
            DimensionError: The arrays are not whole numbers of one length, or a row does not exist.
        """
        if left_E.shape != right_E.shape or left_E.ndim != 1:
            raise DimensionError(f"edges must be two arrays (E,), got {left_E.shape} and {right_E.shape}")
        if not len(left_E):
            return
        for rows_E in (left_E, right_E):
            if rows_E.dtype.kind not in "iu":
                raise DimensionError(f"rows of edges must be whole numbers, got {rows_E.dtype}")
            if rows_E.min() < 0 or rows_E.max() >= len(self):
                raise DimensionError(f"an edge has row {rows_E.min()} or {rows_E.max()}, outside 0..{len(self) - 1}")
        self._is_flat = False
        _unite(self._parents, np.array(left_E, np.int64), np.array(right_E, np.int64))

    def save(self, path: str | Path) -> None:
        """Write what has been joined so far to an ``.npy`` file, for ``load`` to go on from.

        Adding edges again changes nothing, so a checkpoint need not say exactly which edges it holds.
        """
        with Path(path).open("wb") as file:
            np.save(file, self._parents, allow_pickle=False)

    @classmethod
    def load(cls, path: str | Path, num_rows: int) -> "UnionFind":
        """Return the components that ``save`` wrote.

        Raises:
            CorruptError: The file is missing, damaged, or of another number of rows.
        """
        result = cls(num_rows)
        try:
            with Path(path).open("rb") as file:
                parents = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CorruptError(f"{path}: is not a checkpoint of components: {error}; start again without it") from error
        wanted = result._parents
        if parents.dtype != wanted.dtype or parents.shape != wanted.shape or (parents > wanted).any():
            raise CorruptError(f"{path}: is no checkpoint of components of {num_rows} rows; start again without it")
        result._parents, result._is_flat = parents, False
        return result

    def labels(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Return the smallest row of each row's component, for the rows from ``start`` to ``stop`` (None: all)."""
        if not self._is_flat:
            _flatten(self._parents)
            self._is_flat = True
        return self._parents[start:stop].astype(np.int64)


@compiled
def _root(parents: npt.NDArray[Any], row: Any) -> Any:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = np.int64(parents[row])
    return row


@compiled
def _unite(parents: npt.NDArray[Any], left_E: npt.NDArray[Any], right_E: npt.NDArray[Any]) -> None:
    for e in range(left_E.shape[0]):
        left = _root(parents, left_E[e])
        right = _root(parents, right_E[e])
        if left < right:
            parents[right] = left
        elif right < left:
            parents[left] = right


@compiled
def _flatten(parents: npt.NDArray[Any]) -> None:
    # A parent is never larger than its child, so it is a root already when its child's turn comes.
    for row in range(parents.shape[0]):
        parents[row] = parents[parents[row]]
