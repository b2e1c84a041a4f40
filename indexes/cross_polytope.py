"""Row-wise codes of vectors: a sketch of signs, and cross-polytope hashes of pseudo-random rotations.

A rotation is a Hadamard transform after random sign changes. Its outputs are used 512 at a time: their signs are a
*sketch* (one rotation), and in each group of 64 the place and sign of the largest value are a *hash* of 7 bits (all
other rotations, 8 hashes each). For two rows, the chance that a sign or a hash differs depends on their cosine alone,
whatever the data, which is what makes a recall promise possible.

All arithmetic is on whole numbers that a float32 holds exactly, so a row's code is the same on every machine and in any
batch.

Sources:
    Charikar 2002, "Similarity estimation techniques from rounding algorithms";
    Andoni et al. 2015, "Practical and optimal LSH for angular distance".
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError
from curation.indexes.compiled import compiled, intrinsic
from curation.indexes.preselect import thread_count
from curation.indexes.vectors import Singles, Vectors, blocks, check_shape, widen

Words = npt.NDArray[np.uint64]

NUM_OUTPUTS = 512
NUM_GROUPS = 8  # of 64 outputs; one byte of a word each
HASH_BITS = 7
SKETCH_WORDS = NUM_OUTPUTS // 64
HALF_WORDS = SKETCH_WORDS // 2
MAX_DIM = 1 << 14

_MIXING = 2  # rotations before the first that is used: a row of few non-zero values has to be spread
_GRID = 2.0**14  # inputs are rounded to multiples of 2^-14: sums are whole numbers below 2^24 up to MAX_DIM
_TILE = 32  # rows rotated side by side; twice as fast as 8 or 16, although 64 KiB are beyond the first cache
_BLOCK_ROWS = 8192


def random_signs(dim: int, num_rotations: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return the sign changes (True: negative) of a sketch and of ``num_rotations`` rotations, (rounds, outputs).

    Raises:
        DimensionError: ``dim`` is not in 1..``MAX_DIM``.
    """
    if not 1 <= dim <= MAX_DIM:
        raise DimensionError(f"vectors must have 1 to {MAX_DIM} dimensions, got {dim}")
    width = max(NUM_OUTPUTS, 1 << (dim - 1).bit_length())
    return np.random.default_rng(seed).integers(0, 2, (_MIXING + 1 + num_rotations, width)).astype(bool)


def num_rotations(signs_RW: npt.NDArray[np.bool_]) -> int:
    """Return how many rotations the codes of ``signs_RW`` hash."""
    return len(signs_RW) - _MIXING - 1


def encode(vectors_ND: Vectors, signs_RW: npt.NDArray[np.bool_], num_threads: int | None = None) -> Words:
    """Return the sketch (8 words) and a word of 8 hashes for each rotation, (N, 8 + rotations).

    Raises:
        DimensionError: Not float16 (N, dim), or more dimensions than the rotations have.
        VectorError: A row is not finite or not L2-normalised.
    """
    check_shape(vectors_ND)
    if vectors_ND.shape[1] > signs_RW.shape[1]:
        raise DimensionError(f"vectors have {vectors_ND.shape[1]} dimensions, more than {signs_RW.shape[1]}")
    factors_RW = np.where(signs_RW, np.float32(-1), np.float32(1))
    words_NC = np.empty((len(vectors_ND), SKETCH_WORDS + num_rotations(signs_RW)), np.uint64)

    def encode_block(bounds: tuple[int, int]) -> None:
        start, stop = bounds
        _encode(widen(vectors_ND[start:stop], first_row=start), factors_RW, words_NC[start:stop])

    with ThreadPoolExecutor(thread_count(num_threads)) as pool:
        for _ in pool.map(encode_block, blocks(len(vectors_ND), _BLOCK_ROWS)):
            pass
    return words_NC


def compare(left_PC: Words, right_PC: Words) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the number of equal hashes in each rotation, (P, rotations), and of bits that differ, (P, 2).

    Bits are counted in the first half of the sketches, and in all of them.
    """
    equal_PR = np.empty((len(left_PC), left_PC.shape[1] - SKETCH_WORDS), np.uint8)
    distances_P2 = np.zeros((len(left_PC), 2), np.int64)
    _compare(left_PC, right_PC, equal_PR, distances_P2)
    return equal_PR, distances_P2


@intrinsic
def popcount(typingctx: Any, word: Any) -> Any:
    """Return the number of bits set in a uint64; for kernels to call."""
    import numba

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return numba.uint64(numba.uint64), generate


@compiled
def num_equal(left: Any, right: Any) -> Any:
    """Return how many of the 8 hashes of two words are equal; for kernels to call."""
    # A byte of the difference is at most 0x7F, so adding 0x7F sets its high bit unless it is zero, and never carries.
    differs = ((left ^ right) + np.uint64(0x7F7F7F7F7F7F7F7F)) & np.uint64(0x8080808080808080)
    return np.int64(8) - np.int64(popcount(differs))


@compiled
def _compare(left_PC: Words, right_PC: Words, equal_PR: Any, distances_P2: Any) -> None:
    for p in range(left_PC.shape[0]):
        for c in range(SKETCH_WORDS):
            differ = np.int64(popcount(left_PC[p, c] ^ right_PC[p, c]))
            distances_P2[p, 1] += differ
            if c < HALF_WORDS:
                distances_P2[p, 0] += differ
        for r in range(equal_PR.shape[1]):
            equal_PR[p, r] = num_equal(left_PC[p, SKETCH_WORDS + r], right_PC[p, SKETCH_WORDS + r])


@compiled
def _encode(rows_BD: Singles, factors_RW: Singles, words_BC: Words) -> None:
    num_rounds, width = factors_RW.shape
    bits = 0
    while (1 << bits) < width:
        bits += 1
    values_WT = np.empty((width, _TILE), np.float32)
    for first in range(0, rows_BD.shape[0], _TILE):
        num = min(_TILE, rows_BD.shape[0] - first)
        values_WT[:] = 0
        for t in range(num):
            for d in range(rows_BD.shape[1]):
                values_WT[d, t] = np.rint(rows_BD[first + t, d] * np.float32(_GRID))
        for i in range(num_rounds):
            # A transform multiplies norms by 2^(bits / 2); whole powers of two take that back every second time.
            shift = (bits * (i + 1)) // 2 - (bits * i) // 2
            _rotate(values_WT.reshape(-1), factors_RW[i], np.float32(0.5**shift))
            if i == _MIXING:
                _sketch(values_WT, words_BC[first : first + num])
            elif i > _MIXING:
                _hash(values_WT, words_BC[first : first + num, SKETCH_WORDS + i - _MIXING - 1])


@compiled
def _rotate(values_V: Singles, factors_W: Singles, scale: Any) -> None:
    # The first three stages in one pass, with the changes of sign; what is added are whole numbers below 2^24.
    for w in range(0, factors_W.shape[0], 8):
        part, factors = values_V[w * _TILE : (w + 8) * _TILE], factors_W[w : w + 8]
        for t in range(_TILE):
            a = part[t] * factors[0]
            b = part[t + _TILE] * factors[1]
            c = part[t + 2 * _TILE] * factors[2]
            d = part[t + 3 * _TILE] * factors[3]
            e = part[t + 4 * _TILE] * factors[4]
            f = part[t + 5 * _TILE] * factors[5]
            g = part[t + 6 * _TILE] * factors[6]
            h = part[t + 7 * _TILE] * factors[7]
            a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
            a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
            part[t] = a + e
            part[t + _TILE] = b + f
            part[t + 2 * _TILE] = c + g
            part[t + 3 * _TILE] = d + h
            part[t + 4 * _TILE] = a - e
            part[t + 5 * _TILE] = b - f
            part[t + 6 * _TILE] = c - g
            part[t + 7 * _TILE] = d - h
    step = 8 * _TILE
    while step < values_V.shape[0]:
        for start in range(0, values_V.shape[0], 2 * step):
            left_S, right_S = values_V[start : start + step], values_V[start + step : start + 2 * step]
            for k in range(step):
                left, right = left_S[k], right_S[k]
                left_S[k] = left + right
                right_S[k] = left - right
        step *= 2
    for v in range(values_V.shape[0]):
        values_V[v] = np.rint(values_V[v] * scale)


@compiled
def _sketch(values_WT: Singles, words_TC: Words) -> None:
    for t in range(words_TC.shape[0]):
        for c in range(SKETCH_WORDS):
            word = np.uint64(0)
            for b in range(64):
                word |= np.uint64(values_WT[64 * c + b, t] > 0) << np.uint64(b)
            words_TC[t, c] = word


@compiled
def _hash(values_WT: Singles, words_T: Words) -> None:
    largest_T = np.empty(_TILE, np.float32)
    place_T = np.empty(_TILE, np.float32)
    size = NUM_OUTPUTS // NUM_GROUPS
    words_T[:] = 0
    for group in range(NUM_GROUPS):
        largest_T[:] = 0
        place_T[:] = 0
        part_ST = values_WT[group * size : (group + 1) * size]
        for place in range(size):
            number = np.float32(place)
            for t in range(_TILE):
                value = part_ST[place, t]
                larger = abs(value) > abs(largest_T[t])  # ties go to the first place
                largest_T[t] = value if larger else largest_T[t]
                place_T[t] = number if larger else place_T[t]
        for t in range(words_T.shape[0]):
            found = 2 * np.uint64(place_T[t]) + np.uint64(largest_T[t] < 0)
            words_T[t] |= found << np.uint64(8 * group)
