"""Maximum spanning forest of edges that stream by, in memory that does not grow with their number.

An edge that closes a cycle in which it is the lightest is in no component's way: at every threshold that it passes, the
rest of the cycle passes too. So the forest has, **at every threshold, the components of all edges that were ever
added**, with fewer edges than rows. The same holds for a union of forests: components of several edge sets are those of
their forests (Kruskal, 1956; cycle property).

Edges are buffered and reduced to a forest whenever the buffer is full: the forest of (forest of what came before, and
what came since) is a forest of everything.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError
from curation.indexes.compiled import compiled
from curation.indexes.components import _root

Places = npt.NDArray[np.int32]

_MIN_BUFFER = 1 << 16


class SpanningForest:
    """Forest of ``num_rows`` rows; of equal weights the pair with the smaller rows stays.

    Memory: about 40 bytes an edge of the buffer, which holds ``num_rows`` edges of the forest and as many again.
    """

    def __init__(self, num_rows: int) -> None:
        """Start without edges.

        Raises:
            DimensionError: ``num_rows`` is negative or does not fit into 31 bits.
        """
        if not 0 <= num_rows < 2**31:
            raise DimensionError(f"num_rows must be in 0..2^31-1, got {num_rows}")
        self.num_rows = num_rows
        self._parts: list[tuple[Places, Places, Places]] = []
        self._num_pending = 0

    def add(self, left_E: Places, right_E: Places, weight_E: Places) -> None:
        """Offer edges between rows, with whole-number weights; larger is better.

        Raises:
            DimensionError: The arrays differ in length, or a row does not exist.
        """
        if not left_E.shape == right_E.shape == weight_E.shape or left_E.ndim != 1:
            raise DimensionError(f"edges must be three arrays (E,), got {left_E.shape}, {right_E.shape}")
        if not len(left_E):
            return
        if min(left_E.min(), right_E.min()) < 0 or max(left_E.max(), right_E.max()) >= self.num_rows:
            raise DimensionError(f"an edge has a row outside 0..{self.num_rows - 1}")
        self._parts.append((left_E.astype(np.int32), right_E.astype(np.int32), weight_E.astype(np.int32)))
        self._num_pending += len(left_E)
        if self._num_pending > max(self.num_rows, _MIN_BUFFER):
            self._reduce()

    def edges(self) -> tuple[Places, Places, Places]:
        """Return left rows, right rows and weights of the forest, heaviest first; fewer than ``num_rows``."""
        self._reduce()
        empty = np.empty(0, np.int32)
        return self._parts[0] if self._parts else (empty, empty, empty)

    def _reduce(self) -> None:
        if not self._num_pending:
            return
        left, right, weight = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((right, left, -weight))
        left, right, weight = left[order], right[order], weight[order]
        joins = np.empty(len(left), np.bool_)
        _grow(np.arange(self.num_rows, dtype=np.int64), left, right, joins)
        self._parts = [(left[joins], right[joins], weight[joins])]
        self._num_pending = 0


@compiled
def _grow(parents: npt.NDArray[Any], left_E: Places, right_E: Places, joins_E: npt.NDArray[np.bool_]) -> None:
    for e in range(left_E.shape[0]):
        left = _root(parents, np.int64(left_E[e]))
        right = _root(parents, np.int64(right_E[e]))
        joins_E[e] = left != right
        if left < right:
            parents[right] = left
        elif right < left:
            parents[left] = right
