"""Samples that depend on content alone: the rows with the smallest hashes of (seed, key).

Any order, batching or sharding of the same rows gives the same sample, and a sample of a union can be made from the
samples of its parts.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError
from curation.indexes.keys import Keys, check_keys

Ranks = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
_MASK = (1 << 64) - 1
MIN_PENDING = 4096


class Sample(NamedTuple):
    """Rows in order of (rank, key)."""

    ranks: Ranks  # (n,)
    keys: Keys  # (n, 2)
    rows: npt.NDArray[Any]  # (n, ...)


def hash_keys(keys_N2: Keys, seed: int) -> Ranks:
    """Return a 64-bit hash of (seed, key) for each key, (N,).

    With ``mix`` the finaliser of splitmix64 (Steele, Lea and Flood, 2014), ``g = 0x9E3779B97F4A7C15`` and arithmetic
    modulo 2^64: ``half = mix(mix(seed + g) ^ first)`` and the hash is ``mix(mix(half + g) ^ second)``. It is fixed:
    samples of old runs stay what they are.
    """
    check_keys(keys_N2, len(keys_N2))
    start = _mix(np.array([(seed + _GOLDEN) & _MASK], np.uint64))
    first = _mix(start ^ keys_N2[:, 0])
    return _mix(_mix(first + np.uint64(_GOLDEN)) ^ keys_N2[:, 1])


def _mix(values: Ranks) -> Ranks:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SmallestRanks:
    """Keeps the ``size`` rows with the smallest (rank, key) of all that are added.

    With ``distinct``, of rows with equal values only the one with the smallest (rank, key) counts. Memory: at most
    ``2 * size + MIN_PENDING`` rows, and as many while they are cut down.
    """

    def __init__(self, size: int, distinct: bool = False) -> None:
        """Start empty.

        Raises:
            DimensionError: ``size`` is negative.
        """
        if size < 0:
            raise DimensionError(f"size must be at least 0, got {size}")
        self.size = size
        self.distinct = distinct
        self._parts: list[Sample] = []
        self._num_pending = 0
        self._limit: np.uint64 | None = None  # rank of the last kept row once ``size`` rows are kept

    def add(self, ranks_N: Ranks, keys_N2: Keys, rows: npt.NDArray[Any]) -> None:
        """Offer rows.

        Args:
            ranks_N: uint64, smaller is better.
            keys_N2: Keys, unique among all rows ever added.
            rows: Payload (N, ...), of the same dtype and shape but for N in every call.

        Raises:
            DimensionError: Shapes that do not fit together.
        """
        check_keys(keys_N2, len(rows))
        if ranks_N.dtype != np.uint64 or ranks_N.shape != (len(rows),):
            raise DimensionError(f"ranks must be uint64 ({len(rows)},), got {ranks_N.dtype} {ranks_N.shape}")
        if self._parts:
            wanted = self._parts[0].rows
            if (rows.dtype, rows.shape[1:]) != (wanted.dtype, wanted.shape[1:]):
                raise DimensionError(f"rows were {wanted.dtype} {wanted.shape[1:]}, now {rows.dtype} {rows.shape[1:]}")
        block_rows = max(self.size, MIN_PENDING)  # once the first of them are kept, few of the others matter
        for start in range(0, max(1, len(rows)), block_rows):
            near = np.arange(start, min(start + block_rows, len(rows)))
            if self._limit is not None:
                near = near[ranks_N[near] <= self._limit]
                if not len(near):
                    continue
            self._parts.append(_take(Sample(ranks_N, keys_N2, rows), near))  # a copy: the caller may reuse its arrays
            self._num_pending += len(near)
            if self._num_pending > block_rows:
                self._compact()

    def merge(self, other: "SmallestRanks") -> None:
        """Offer the rows that ``other`` keeps."""
        for part in other._parts:
            self.add(*part)

    def result(self) -> Sample:
        """Return the kept rows in order of (rank, key); an empty payload of shape (0,) if nothing was ever added."""
        if not self._parts:
            return Sample(np.empty(0, np.uint64), np.empty((0, 2), np.uint64), np.empty(0))
        self._compact()
        return self._parts[0]

    def _compact(self) -> None:
        both = Sample(
            np.concatenate([part.ranks for part in self._parts]),
            np.concatenate([part.keys for part in self._parts]),
            np.concatenate([part.rows for part in self._parts]),
        )
        order = np.lexsort((both.keys[:, 1], both.keys[:, 0], both.ranks))
        if self.distinct:
            # Comparing rows costs more than all else: where enough of the first ones differ, the others do not matter.
            head = order[: 2 * self.size]
            distinct = head[_first_of_each(both.rows[head])]
            order = distinct if len(distinct) >= self.size else order[_first_of_each(both.rows[order])]
        kept = _take(both, order[: self.size])
        self._parts, self._num_pending = [kept], 0
        if len(kept.rows) == self.size:
            self._limit = kept.ranks[-1] if self.size else np.uint64(0)


class HashSample:
    """The ``size`` rows with the smallest hashes of (seed, key); see ``SmallestRanks`` for memory and ``distinct``."""

    def __init__(self, seed: int, size: int, distinct: bool = False) -> None:
        self.seed = seed
        self._smallest = SmallestRanks(size, distinct)

    def add(self, keys_N2: Keys, rows: npt.NDArray[Any]) -> None:
        """Offer rows with their keys: (N, 2) uint64, unique, and a payload (N, ...)."""
        self._smallest.add(hash_keys(keys_N2, self.seed), keys_N2, rows)

    def merge(self, other: "HashSample") -> None:
        """Offer the rows of another sample.

        Raises:
            DimensionError: It was drawn with another seed.
        """
        if other.seed != self.seed:
            raise DimensionError(f"samples of seeds {self.seed} and {other.seed} cannot be merged")
        self._smallest.merge(other._smallest)

    def result(self) -> Sample:
        """Return the sample in order of (hash, key)."""
        return self._smallest.result()


def _take(sample: Sample, order: npt.NDArray[np.int64]) -> Sample:
    return Sample(*(array[order] for array in sample))


def _first_of_each(rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if not len(rows):
        return np.empty(0, np.int64)
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    if flat.dtype.kind == "f":  # -0 becomes 0, so that equal values have equal bytes; float16 arithmetic is 20x slower
        bits = flat.view(f"u{flat.dtype.itemsize}")
        flat = np.where(bits == 1 << (8 * flat.dtype.itemsize - 1), bits.dtype.type(0), bits)
    as_bytes = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1])))[:, 0]
    _, first = np.unique(as_bytes, return_index=True)
    return np.sort(first)
