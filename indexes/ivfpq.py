"""An index of inverted lists and product codes, whose candidates are re-ranked exactly.

A search projects the queries, scans the codes of the lists nearest to each (the probes), takes the ``depth`` best rows
by score as candidates, ties by key, and ranks these by the similarity of their stored vectors, ties by key. Scores are
exact functions of query, vector and quantizer (see ``quantizer``), so what is found does not depend on how rows were
added, cut into parts, merged or batched, nor on threads.

A saved index is a folder with ``vectors.npy`` (float16, (N, dim)) and ``keys.npy`` (uint64, (N, 2)), both in the order
of lists and of keys in a list, ``lists.bin`` (see ``inverted_lists``) and ``index.npz`` (the quantizer, sizes of lists,
what was measured, and checksums of lists and keys). Its bytes depend on content alone.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, DimensionError
from curation.indexes import array_files, index_header, inverted_lists, quantizer
from curation.indexes.exact import Neighbours, nearest, no_neighbours
from curation.indexes.flat import nearest_among
from curation.indexes.index_header import HEADER_FILE, KEYS_FILE, LISTS_FILE, VECTORS_FILE, Header, Probing
from curation.indexes.inverted_lists import InvertedLists
from curation.indexes.keys import Keys, check_keys
from curation.indexes.parameters import Parameters
from curation.indexes.preselect import EXTRA
from curation.indexes.quantizer import Codes, Quantizer, nearest_lists
from curation.indexes.rerank import offer_rows
from curation.indexes.vectors import Rows, Singles, Vectors, blocks, check_shape, widen

_QUERIES = 1024
_MAX_SCORES = 1 << 22  # and rows, fetched at a time: 48 MiB


class _Part(NamedTuple):
    vectors: Vectors  # in the order of lists, and of keys in a list
    keys: Keys
    lists: InvertedLists


class _Added(NamedTuple):
    vectors: Vectors
    keys: Keys
    numbers: npt.NDArray[np.int32]
    codes: Codes


class IvfPqIndex:
    """Vectors with their keys, searched approximately.

    Attributes:
        dim: Of the vectors.
        probing: How a search is done.
    """

    def __init__(self, trained: Quantizer, probing: Probing | None = None) -> None:
        """Start empty.

        Args:
            trained: From ``quantizer.train``.
            probing: None: every list, until ``tune`` finds how many it takes.
        """
        self.dim = trained.dim
        self.quantizer = trained
        self.probing = probing or Probing(trained.num_lists, 64)
        self._parts: list[_Part] = []
        self._added: list[_Added] = []

    def __len__(self) -> int:
        return sum(len(part.keys) for part in self._parts) + sum(len(added.keys) for added in self._added)

    @classmethod
    def train(cls, sample_ND: Vectors, parameters: Parameters, num_threads: int | None = None) -> "IvfPqIndex":
        """Return an empty index that was trained on a sample, see ``quantizer.train``."""
        return cls(
            quantizer.train(sample_ND, parameters.num_lists, parameters.code_bytes, parameters.coded_dim, num_threads)
        )

    def empty(self) -> "IvfPqIndex":
        """Return an index without rows that can be merged into this one."""
        return IvfPqIndex(self.quantizer, self.probing)

    def add(self, vectors_ND: Vectors, keys_N2: Keys) -> None:
        """Append rows; they are copied.

        Args:
            vectors_ND: L2-normalised float16 (N, dim).
            keys_N2: uint64 (N, 2), unique in the index.

        Raises:
            DimensionError: Wrong shape or dtype.
            VectorError: A row is not finite or not L2-normalised. Nothing is added.
        """
        check_shape(vectors_ND, self.dim)
        check_keys(keys_N2, len(vectors_ND))
        if len(keys_N2):
            numbers_N, codes_NB = self.quantizer.encode(vectors_ND)
            self._added.append(_Added(np.array(vectors_ND, order="C"), np.array(keys_N2), numbers_N, codes_NB))

    def merge(self, other: "IvfPqIndex") -> None:
        """Append the rows of another index, without copying them.

        Raises:
            DimensionError: The other index was trained on another sample, or with other parameters.
        """
        if other.quantizer != self.quantizer:
            raise DimensionError("indexes that were trained apart cannot be merged: their codes mean different things")
        self._parts += other._sealed()

    def search(
        self,
        queries_QD: Vectors,
        k: int,
        *,
        num_threads: int | None = None,
        among_N: npt.NDArray[np.bool_] | None = None,
    ) -> Neighbours:
        """Return about the ``k`` most similar rows of each query, never fewer than there are.

        Rows are numbered as a saved index numbers them, part by part.

        Args:
            queries_QD: L2-normalised float16 (Q, dim).
            k: Places beyond the size of the index are filled with row -1.
            num_threads: Threads; None: Faiss's setting.
            among_N: Rows that may be found; None: all.

        Raises:
            DimensionError: ``k`` is below 1 or the queries have the wrong shape or dtype.
            VectorError: A query or a candidate is not finite or not L2-normalised.
            CorruptError: A list names a row that does not exist.
        """
        check_shape(queries_QD, self.dim)
        if k < 1:
            raise DimensionError(f"k must be at least 1, got {k}")
        if among_N is not None and among_N.shape != (len(self),):
            raise DimensionError(f"among must have one entry a row, {len(self)}, got {among_N.shape}")
        best = no_neighbours(len(queries_QD), k)
        wanted = min(k, len(self) if among_N is None else int(np.count_nonzero(among_N)))
        if not wanted:
            return best
        every = Probing(self.quantizer.num_lists, k)
        probing = self.probing.for_k(k)
        if probing.probes >= every.probes and probing.depth >= len(self):  # all are candidates: codes only cost time
            return self._exact(queries_QD, k, num_threads, among_N)
        for start, stop in blocks(len(queries_QD), _QUERIES):
            part, queries_BD = best.part(start, stop), queries_QD[start:stop]
            self._offer(part, queries_BD, probing, num_threads, among_N)
            (short,) = np.nonzero(part.rows[:, wanted - 1] < 0)  # the probed lists hold too few
            if len(short):
                again = no_neighbours(len(short), k)
                self._offer(again, queries_BD[short], every, num_threads, among_N)
                _replace(part, short, again)
            (short,) = np.nonzero(part.rows[:, wanted - 1] < 0)
            if len(short):  # a row with the lowest score there can be is never a candidate of Faiss's
                _replace(part, short, self._exact(queries_BD[short], k, num_threads, among_N))
        return best

    def candidates(
        self,
        queries_QD: Vectors,
        probing: Probing,
        num_threads: int | None = None,
        among_N: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[Rows, Rows, Singles]:
        """Return the candidates of queries: (query, row, score), sorted by query.

        They are the ``probing.depth`` rows with the best scores of each query, ties by key.
        """
        points_QE = self.quantizer.project(queries_QD)
        probes = min(probing.probes, self.quantizer.num_lists)
        lists_QP, similarities_QP = nearest_lists(points_QE, self.quantizer.centroids_LE, probes, num_threads)
        found = []
        first_row = 0
        for part in self._sealed():
            among = None if among_N is None else among_N[first_row : first_row + len(part.keys)]
            query_P, row_P, score_P = _best(
                part, points_QE, lists_QP, similarities_QP, probing.depth, among, num_threads
            )
            found.append((query_P, row_P + first_row, score_P))
            first_row += len(part.keys)
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        query_P, row_P, score_P = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        if len(found) > 1:
            order = np.lexsort((-score_P, query_P))
            query_P, row_P, score_P = query_P[order], row_P[order], score_P[order]
        return _cut(query_P, row_P, score_P, probing.depth, self._keys)

    def save(self, folder: str | Path) -> None:
        """Write the index into a folder, which is made if need be, list by list: parts are merged.

        Raises:
            DiskFullError: No space left.
            StoreError: The folder cannot be written.
        """
        folder = Path(folder)
        with array_files.writing(folder):
            parts = self._sealed()
            sizes_L = np.zeros(self.quantizer.num_lists, np.int64)
            for part in parts:
                sizes_L += part.lists.sizes_L
            with (
                array_files.raw(folder / LISTS_FILE) as lists,
                array_files.growing(folder / VECTORS_FILE, np.dtype("<f2"), (len(self), self.dim)) as vectors,
                array_files.growing(folder / KEYS_FILE, np.dtype("<u8"), (len(self), 2)) as keys,
            ):
                inverted_lists.write(lists, _merged(parts, self.quantizer, vectors.append, keys.append))
            header = Header(keys.crc32, self.quantizer, self.probing, sizes_L, lists.crc32)
            index_header.write(folder / HEADER_FILE, header)

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> "IvfPqIndex":
        """Map a saved index into memory; pages are read when they are needed.

        Args:
            folder: Where ``save`` wrote.
            verify: Read everything once: every vector, and the checksums of lists and keys.

        Raises:
            CorruptError: Files are missing, damaged, or hold something else.
        """
        folder = Path(folder)
        with index_header.loading(folder):
            header = index_header.read(folder / HEADER_FILE)
            if header.quantizer is None or header.probing is None or header.sizes_L is None:
                raise CorruptError(f"{HEADER_FILE} is of an index of another kind")
            vectors_ND, keys_N2 = index_header.mapped_rows(folder, header, header.quantizer.dim, verify)
            if header.sizes_L.max() > len(keys_N2) or header.sizes_L.sum() != len(keys_N2):
                raise CorruptError(f"{HEADER_FILE} is of {header.sizes_L.sum()} rows, {KEYS_FILE} has {len(keys_N2)}")
            lists = InvertedLists(header.quantizer, folder / LISTS_FILE, header.sizes_L)
            if verify:
                array_files.check(folder / LISTS_FILE, header.crc32)
        index = cls(header.quantizer, header.probing)
        if len(keys_N2):
            index._parts.append(_Part(vectors_ND, keys_N2, lists))
        return index

    def vectors(self) -> Iterator[tuple[Vectors, Keys]]:
        """Yield vectors and keys, part by part."""
        for part in self._sealed():
            yield part.vectors, part.keys

    def _sealed(self) -> list[_Part]:
        """Return the parts, after making one of what was added."""
        if self._added:
            added = _Added(*(np.concatenate(arrays) for arrays in zip(*self._added, strict=True)))
            order = np.lexsort((added.keys[:, 1], added.keys[:, 0], added.numbers))
            sizes_L = np.bincount(added.numbers, minlength=self.quantizer.num_lists).astype(np.int64)
            codes = np.split(added.codes[order], np.cumsum(sizes_L)[:-1])
            lists = inverted_lists.temporary(self.quantizer, codes, sizes_L)
            self._parts.append(_Part(added.vectors[order], added.keys[order], lists))
            self._added = []
        return self._parts

    def _exact(
        self, queries_QD: Vectors, k: int, num_threads: int | None, among_N: npt.NDArray[np.bool_] | None
    ) -> Neighbours:
        if among_N is None:
            return nearest(queries_QD, self.vectors(), k, num_threads=num_threads)
        return nearest_among(queries_QD, self.vectors(), np.flatnonzero(among_N), k, num_threads=num_threads)

    def _offer(
        self,
        best: Neighbours,
        queries_QD: Vectors,
        probing: Probing,
        num_threads: int | None,
        among_N: npt.NDArray[np.bool_] | None,
    ) -> None:
        query_P, row_P, _ = self.candidates(queries_QD, probing, num_threads, among_N)
        widened_QD = widen(queries_QD)
        first_row = 0
        for part in self._parts:
            mine = slice(None) if len(self._parts) == 1 else (row_P >= first_row) & (row_P < first_row + len(part.keys))
            starts = np.searchsorted(query_P[mine], np.arange(len(queries_QD) + 1))
            rows = row_P[mine] - first_row
            offer_rows(best, widened_QD, part.vectors, part.keys, starts, rows, first_row, num_threads)
            first_row += len(part.keys)

    def _keys(self, rows: Rows) -> Keys:
        keys = np.empty((len(rows), 2), np.uint64)
        first_row = 0
        for part in self._parts:
            mine = (rows >= first_row) & (rows < first_row + len(part.keys))
            keys[mine] = part.keys[rows[mine] - first_row]
            first_row += len(part.keys)
        return keys


def _replace(best: Neighbours, queries: Rows, found: Neighbours) -> None:
    for ours, theirs in zip(best, found, strict=True):
        ours[queries] = theirs


def _cut(
    query_P: Rows, row_P: Rows, score_P: Singles, depth: int, keys_of: Callable[[Rows], Keys]
) -> tuple[Rows, Rows, Singles]:
    """Return the ``depth`` best of each query, ties by key, of pairs sorted by query and falling score."""
    counts_Q = np.bincount(query_P, minlength=1)
    starts_Q = np.cumsum(counts_Q) - counts_Q
    last_Q = starts_Q + np.minimum(depth, counts_Q) - 1
    (tied,) = np.nonzero((score_P == score_P[last_Q[query_P]]) & (counts_Q > depth)[query_P])
    keys_T2 = keys_of(row_P[tied])
    order_P = np.arange(len(query_P))
    order_P[tied] = tied[np.lexsort((keys_T2[:, 1], keys_T2[:, 0], query_P[tied]))]
    kept = order_P[np.arange(len(query_P)) - starts_Q[query_P] < depth]
    return query_P[kept], row_P[kept], score_P[kept]


def _best(
    part: _Part,
    points_QE: Singles,
    lists_QP: Rows,
    similarities_QP: Singles,
    depth: int,
    among_N: npt.NDArray[np.bool_] | None,
    num_threads: int | None,
) -> tuple[Rows, Rows, Singles]:
    """Return (query, row, score), sorted by query and falling score: the ``depth`` best of each, ties by key.

    At most ``_MAX_SCORES`` scores are in memory at a time, or those of one query where they are more.
    """
    found = []
    todo_Q = np.arange(len(points_QE))
    fetched = depth + EXTRA
    while len(todo_Q):
        fetched = min(fetched, len(part.keys))
        left = []
        for start, stop in blocks(len(todo_Q), max(1, _MAX_SCORES // max(1, fetched))):
            some_Q = todo_Q[start:stop]
            scores_QF, rows_QF = part.lists.search(
                points_QE[some_Q], lists_QP[some_Q], similarities_QP[some_Q], fetched, among_N, num_threads
            )
            floor_Q = scores_QF[:, min(depth, fetched) - 1]
            # Faiss cuts ties as it likes, so where the last score that it gave is still as good as the one at ``depth``
            # more are fetched: copies of one image are many.
            undecided_Q = (scores_QF[:, -1] == floor_Q) & (rows_QF[:, -1] >= 0) & (fetched < len(part.keys))
            kept_QF = (rows_QF >= 0) & (scores_QF >= floor_Q[:, None]) & ~undecided_Q[:, None]
            query_P, place_P = np.nonzero(kept_QF)
            row_P, score_P = rows_QF[query_P, place_P], scores_QF[query_P, place_P]
            found.append(_cut(some_Q[query_P], row_P, score_P, depth, lambda rows: part.keys[rows]))
            left.append(some_Q[undecided_Q])
        todo_Q, fetched = np.concatenate(left), 4 * fetched
    query_P, row_P, score_P = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    if len(found) > 1:
        order = np.argsort(query_P, kind="stable")
        query_P, row_P, score_P = query_P[order], row_P[order], score_P[order]
    return query_P, row_P, score_P


def _merged(
    parts: list[_Part],
    trained: Quantizer,
    write_vectors: Callable[[npt.NDArray[Any]], None],
    write_keys: Callable[[npt.NDArray[Any]], None],
) -> Iterator[Codes]:
    """Yield the codes of each list over all parts, by key, after writing its vectors and keys."""
    starts = [np.cumsum(part.lists.sizes_L) - part.lists.sizes_L for part in parts]
    for number in range(trained.num_lists):
        vectors, keys, codes = [], [], [np.empty((0, trained.code_bytes), np.uint8)]
        for part, starts_L in zip(parts, starts, strict=True):
            if size := int(part.lists.sizes_L[number]):
                rows = slice(int(starts_L[number]), int(starts_L[number]) + size)
                vectors.append(part.vectors[rows])
                keys.append(part.keys[rows])
                codes.append(part.lists.codes(number))
        if len(keys) == 1:
            write_vectors(vectors[0])
            write_keys(keys[0])
            yield codes[1]
        elif keys:
            every = np.concatenate(keys)
            order = np.lexsort((every[:, 1], every[:, 0]))
            write_vectors(np.concatenate(vectors)[order])
            write_keys(every[order])
            yield np.concatenate(codes)[order]
        else:
            yield codes[0]
