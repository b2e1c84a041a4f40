"""Pairs of rows whose codes collide: equal hashes in some table, and sketches that differ in few bits.

A *table* is a rotation and ``size`` of its 8 groups; rows meet in it when those hashes are all equal. A pair is given
by the first table where it meets and by no other, so every pair comes once. Whether it comes depends on its two codes
alone. See ``cross_polytope`` for codes.
"""

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from curation.indexes.compiled import compiled
from curation.indexes.cross_polytope import HALF_WORDS, HASH_BITS, NUM_GROUPS, SKETCH_WORDS, Words, num_equal, popcount

_TILE = 512  # sketches compared with one at a time: 16 KiB of their halves
MAX_SIZE = 3  # groups of a table: 2^21 buckets

Cursor = tuple[int, int, int]
START: Cursor = (0, -1, -1)


class Table(NamedTuple):
    """Which hashes must be equal."""

    rotation: int
    groups: tuple[int, ...]


class Buckets(NamedTuple):
    """Rows by their hashes in one table: ``order[starts[b] : starts[b + 1]]`` is bucket b, ascending."""

    order: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]


class Coded(NamedTuple):
    """Codes of rows, and the first halves of their sketches once more: those are read in any order, for each table."""

    words: Words  # (N, 8 + rotations)
    halves: Words  # (N, 4)

    @classmethod
    def of(cls, words_NC: Words) -> "Coded":
        """Copy the halves."""
        return cls(words_NC, np.ascontiguousarray(words_NC[:, :HALF_WORDS]))


def tables(num_rotations: int, size: int) -> list[Table]:
    """Return all tables of the first rotations, in the order in which they claim pairs."""
    return [
        Table(rotation, groups) for rotation in range(num_rotations) for groups in combinations(range(NUM_GROUPS), size)
    ]


def buckets(words_NC: Words, table: Table) -> Buckets:
    """Sort rows into the buckets of a table."""
    starts = np.zeros((1 << HASH_BITS * len(table.groups)) + 1, np.int32)
    order = np.empty(len(words_NC), np.int32)
    _sort(words_NC[:, SKETCH_WORDS + table.rotation], np.array(table.groups), order, starts)
    return Buckets(order, starts)


def collisions(
    left: Coded,
    left_buckets: Buckets,
    right: Coded,
    right_buckets: Buckets,
    table: Table,
    max_distances: tuple[int, int],
    cursor: Cursor,
    limit: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Cursor | None]:
    """Return pairs that meet in ``table`` first and whose sketches differ in few bits.

    With ``left is right`` pairs are left < right.

    Args:
        left: Codes of the left rows.
        left_buckets: Their buckets in the table.
        right: Codes of the right rows.
        right_buckets: Their buckets.
        table: The table.
        max_distances: Bits in which first halves of sketches, and whole ones, may differ.
        cursor: ``START``, or what the call before returned.
        limit: Pairs to stop at, more than 512.

    Returns:
        Left and right rows, and where to go on, None at the end.
    """
    out_2P = np.empty((2, limit), np.int32)
    position = np.array(cursor, np.int64)
    num = _collide(
        *(*left, *left_buckets, *right, *right_buckets, left is right),
        *(table.rotation, len(table.groups), table.groups[-1], *max_distances, position, out_2P),
    )
    done = position[0] == len(left_buckets.starts) - 1
    return out_2P[0, :num], out_2P[1, :num], None if done else (int(position[0]), int(position[1]), int(position[2]))


@compiled
def _sort(column_N: Words, groups_S: Any, order_N: Any, starts_B: Any) -> None:
    # A counting sort. Starts are shifted by one place until rows have been placed.
    num_rows = column_N.shape[0]
    keys_N = np.empty(num_rows, np.int32)
    for i in range(num_rows):
        key = np.uint64(0)
        for s in range(groups_S.shape[0]):
            key = (key << np.uint64(HASH_BITS)) | ((column_N[i] >> np.uint64(8 * groups_S[s])) & np.uint64(0x7F))
        keys_N[i] = np.int32(key)
        starts_B[key + np.uint64(1)] += 1
    for b in range(1, starts_B.shape[0]):
        starts_B[b] += starts_B[b - 1]
    for i in range(num_rows - 1, -1, -1):
        key = np.uint64(keys_N[i])
        starts_B[key + np.uint64(1)] -= 1
        order_N[starts_B[key + np.uint64(1)]] = i
    for b in range(starts_B.shape[0] - 1):
        starts_B[b] = starts_B[b + 1]
    starts_B[starts_B.shape[0] - 1] = num_rows


@compiled
def _collide(
    words_MC: Words,
    halves_MH: Words,
    left_order: Any,
    left_starts: Any,
    words_NC: Words,
    halves_NH: Words,
    right_order: Any,
    right_starts: Any,
    is_self: bool,
    rotation: int,
    size: int,
    last: int,
    max_half: int,
    max_whole: int,
    cursor: Any,
    out_2P: Any,
) -> int:
    halves_HT = np.empty((HALF_WORDS, _TILE), np.uint64)
    distances_T = np.empty(_TILE, np.int64)
    # Bytes of the groups up to the last one of the table: the pair is its own if no other of them is equal.
    others = (
        ~(np.uint64(0xFFFFFFFFFFFFFFFF) << np.uint64(8 * (last + 1))) if last < 7 else np.uint64(0xFFFFFFFFFFFFFFFF)
    )
    num = 0
    for bucket in range(cursor[0], left_starts.shape[0] - 1):
        left_start, left_stop = left_starts[bucket], left_starts[bucket + 1]
        right_start, right_stop = right_starts[bucket], right_starts[bucket + 1]
        if left_start == left_stop or right_start == right_stop or (is_self and left_stop - left_start == 1):
            continue
        first_tile = right_start
        if cursor[1] >= 0:
            first_tile = cursor[1]
            cursor[1] = -1
        for tile in range(first_tile, right_stop, _TILE):
            width = min(_TILE, right_stop - tile)
            for t in range(width):
                row = right_order[tile + t]
                for h in range(HALF_WORDS):
                    halves_HT[h, t] = halves_NH[row, h]
            first = left_start
            if cursor[2] >= 0:
                first = cursor[2]
                cursor[2] = -1
            for place in range(first, left_stop):
                begin = 0
                if is_self:
                    begin = max(0, place + 1 - tile)
                    if begin >= width:
                        break
                if num + width > out_2P.shape[1]:
                    cursor[0], cursor[1], cursor[2] = bucket, tile, place
                    return num
                left = left_order[place]
                if _half_distances(halves_MH[left], halves_HT, begin, distances_T[begin:width]) > max_half:
                    continue
                for t in range(begin, width):
                    if distances_T[t] > max_half:
                        continue
                    right = right_order[tile + t]
                    distance = distances_T[t]
                    for c in range(HALF_WORDS, SKETCH_WORDS):
                        distance += np.int64(popcount(words_MC[left, c] ^ words_NC[right, c]))
                    if distance <= max_whole and _meets_first(words_MC[left], words_NC[right], rotation, size, others):
                        out_2P[0, num] = left
                        out_2P[1, num] = right
                        num += 1
    cursor[0] = left_starts.shape[0] - 1
    return num


@compiled
def _half_distances(half_H: Words, halves_HT: Words, begin: int, distances_T: Any) -> Any:
    # Fills distances and returns the smallest. Slices of one axis are contiguous to Numba; two would be gathered.
    end = begin + distances_T.shape[0]
    first, second = halves_HT[0][begin:end], halves_HT[1][begin:end]
    third, fourth = halves_HT[2][begin:end], halves_HT[3][begin:end]
    a, b, c, d = half_H[0], half_H[1], half_H[2], half_H[3]
    nearest = np.int64(512)
    for t in range(distances_T.shape[0]):
        found = np.int64(
            popcount(a ^ first[t]) + popcount(b ^ second[t]) + popcount(c ^ third[t]) + popcount(d ^ fourth[t])
        )
        distances_T[t] = found
        nearest = min(nearest, found)
    return nearest


@compiled
def _meets_first(left_C: Words, right_C: Words, rotation: int, size: int, others: Any) -> Any:
    for r in range(rotation):
        if num_equal(left_C[SKETCH_WORDS + r], right_C[SKETCH_WORDS + r]) >= size:
            return False
    column = SKETCH_WORDS + rotation
    # Groups behind the last one of the table do not count: made unequal.
    differs = ((left_C[column] ^ right_C[column]) & others) | (~others & np.uint64(0x7F7F7F7F7F7F7F7F))
    return num_equal(differs, np.uint64(0)) == size
