"""Every pair of 64-bit codes within a Hamming distance, exactly, with Faiss's binary indexes.

Few codes are compared with each other outright. Many go through multi-index hashing: a code is cut into ``m`` pieces,
and of two codes within ``r`` bits at least one piece differs in at most ``r // m`` bits, so looking up each piece with
so many bits flipped finds every pair.

Source:
    Norouzi, Punjani and Fleet 2012, "Fast search in Hamming space with multi-index hashing".
"""

import math
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from curation.errors import DimensionError
from curation.indexes.preselect import threads

CODE_BITS = 64
MAX_RADIUS = 8
_COMPARED = 1 / 250  # a comparison in a flat index, in units of ``_cost``: 1 ns and 0.25 us, measured
_CHUNK_CODES = 1 << 22  # in one index: 0.4 to 1.5 GB of buckets
_MAX_PAIRS = 1 << 22  # aimed at in one piece: 80 MB
_FIRST_QUERIES = 256

Codes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


def pairs_within(
    codes_N: Codes, radius: int, num_threads: int | None = None, chunk_codes: int = _CHUNK_CODES
) -> Iterator[tuple[Rows, Rows]]:
    """Yield (left, right) rows of every pair of codes that differ in at most ``radius`` bits, left < right, each once.

    Memory: the index of ``chunk_codes`` codes, and pieces of about 4 million pairs. Time: each chunk is searched for
    every code behind its start, so it grows with the square of the number of chunks.

    Args:
        codes_N: 64-bit codes; equal ones are pairs too.
        radius: 0 to 8.
        num_threads: Threads of Faiss; None: as it is.
        chunk_codes: Codes in one index.

    Raises:
        DimensionError: Codes that are not uint64 (N,), or another radius.
    """
    if codes_N.ndim != 1 or codes_N.dtype != np.uint64:
        raise DimensionError(f"codes must be uint64 (N,), got {codes_N.dtype} {codes_N.shape}")
    if not 0 <= radius <= MAX_RADIUS:
        raise DimensionError(f"radius must be 0 to {MAX_RADIUS}, got {radius}")
    bytes_NB = np.ascontiguousarray(codes_N).view(np.uint8).reshape(-1, CODE_BITS // 8)
    for start in range(0, len(codes_N), chunk_codes):
        index = _index(bytes_NB[start : start + chunk_codes], radius)
        yield from _search(index, bytes_NB, start, radius, num_threads)


def _search(
    index: Any, bytes_NB: npt.NDArray[np.uint8], start: int, radius: int, num_threads: int | None
) -> Iterator[tuple[Rows, Rows]]:
    query, num_queries = start, _FIRST_QUERIES
    while query < len(bytes_NB):
        with threads(num_threads):  # not around the yield: the caller's own work keeps its setting
            # Faiss returns distances below the bound.
            limits, _, found = index.range_search(bytes_NB[query : query + num_queries], radius + 1)
        counts = np.diff(limits.astype(np.int64))
        right = np.repeat(np.arange(query, query + len(counts), dtype=np.int64), counts)
        left = found.astype(np.int64) + start
        once = left < right
        if once.any():
            yield left[once], right[once]
        query += len(counts)
        # At most doubled: a crowd of similar codes may come next.
        num_queries = min(2 * num_queries, max(1, _MAX_PAIRS * len(counts) // max(1, len(left))), 1 << 16)


def _index(bytes_NB: npt.NDArray[np.uint8], radius: int) -> Any:
    num_pieces = min(range(2, MAX_RADIUS + 1), key=lambda pieces: _cost(len(bytes_NB), radius, pieces))
    if len(bytes_NB) * _COMPARED <= _cost(len(bytes_NB), radius, num_pieces):
        index: Any = faiss.IndexBinaryFlat(CODE_BITS)
    else:
        index = faiss.IndexBinaryMultiHash(CODE_BITS, num_pieces, CODE_BITS // num_pieces)
        index.nflip = radius // num_pieces
    index.add(bytes_NB)
    return index


def _cost(num_codes: int, radius: int, num_pieces: int) -> float:
    """Return the work of a query: a look-up for each flip of each piece, and the codes that it finds."""
    bits = CODE_BITS // num_pieces
    lookups = sum(math.comb(bits, flips) for flips in range(radius // num_pieces + 1))
    return num_pieces * lookups * (1 + num_codes / 2.0**bits)
