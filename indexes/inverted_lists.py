"""Inverted lists of 4-bit codes in a file of ours, mapped into memory and scanned by Faiss.

The file holds, one list after another: codes in blocks of 32 rows, then int64 row numbers, -1 where the last block is
padded. A block holds 32 bytes for each byte of a code: of rows r = 0, 8, 1, 9, ... 7, 15 the low (first 16 bytes) and
the high four bits (last 16 bytes) of that byte, with those of row r + 16 in the upper half. That is how Faiss's fast
scan reads them, so nothing is unpacked or copied to be searched. Sizes of lists come from the caller: Faiss reads no
file of its own format, whose readers trust what they read.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, StoreError
from curation.indexes import array_files
from curation.indexes.preselect import threads
from curation.indexes.quantizer import NUM_ENTRIES, Codes, Quantizer
from curation.indexes.vectors import Rows, Singles

BLOCK = 32
ID_BYTES = 8
_ORDER = np.arange(16).reshape(2, 8).T.ravel()  # 0, 8, 1, 9, ..., 7, 15


class Scored(NamedTuple):
    """Rows of lists with their scores, both (Q, k), best first; row -1 where there are no more."""

    scores: Singles
    rows: Rows


class InvertedLists:
    """Lists that are searched where they lie."""

    def __init__(self, quantizer: Quantizer, path: Path, sizes_L: npt.NDArray[np.int64]) -> None:
        """Map a file.

        Args:
            quantizer: What the codes were made with.
            path: The file; it may be deleted after ``prepare``.
            sizes_L: Rows of each list.

        Raises:
            CorruptError: The file is missing, or has not the size that such lists take.
        """
        self.sizes_L = sizes_L
        self._quantizer = quantizer
        self._code_bytes = quantizer.code_bytes
        self._path = path
        self._starts_L = _starts(sizes_L, quantizer.code_bytes)
        num_bytes = path.stat().st_size if path.is_file() else -1
        if num_bytes != self._starts_L[-1]:
            raise CorruptError(f"{path.name} has {num_bytes} bytes, its lists take {self._starts_L[-1]}")
        # No empty file can be mapped.
        self._bytes: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r") if num_bytes else np.empty(0, np.uint8)
        self._index: Any = None

    def __len__(self) -> int:
        return int(self.sizes_L.sum())

    def prepare(self) -> Any:
        """Return Faiss's view of the lists, made once: parts that are only merged never need it."""
        if self._index is None:
            _check_layout()
            index = _empty_index(self._quantizer)
            self._lists = _mapped(self._path, self.sizes_L, self._starts_L, self._code_bytes)  # Faiss only points to it
            index.replace_invlists(self._lists, False)
            index.ntotal = len(self)
            self._index = index
        return self._index

    def codes(self, number: int) -> Codes:
        """Return the codes of a list, (rows, code_bytes)."""
        start, size = int(self._starts_L[number]), int(self.sizes_L[number])
        num_blocks = -(-size // BLOCK)
        packed = self._bytes[start : start + num_blocks * BLOCK * self._code_bytes]
        return unpack(packed.reshape(num_blocks, self._code_bytes, BLOCK))[:size]

    def search(
        self,
        points_QE: Singles,
        lists_QP: Rows,
        similarities_QP: Singles,
        k: int,
        among_N: npt.NDArray[np.bool_] | None = None,
        num_threads: int | None = None,
    ) -> Scored:
        """Return the rows of the probed lists with the best scores; the order of ties is Faiss's own.

        Args:
            points_QE: Projected queries.
            lists_QP: Lists that each one probes.
            similarities_QP: Of the queries with the centroids of these lists.
            k: At least 1.
            among_N: Rows that may be found; None: all.
            num_threads: Of Faiss.

        Raises:
            CorruptError: A list names a row that does not exist.
        """
        scores = np.full((len(points_QE), k), -np.inf, np.float32)
        rows = np.full((len(points_QE), k), -1)
        if not len(self) or not len(points_QE):
            return Scored(scores, rows)
        selector = None
        if among_N is not None:
            bits = np.packbits(among_N, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(among_N), faiss.swig_ptr(bits))
        parameters = faiss.SearchParametersIVF(  # type: ignore[call-arg]
            nprobe=lists_QP.shape[1], sel=selector
        )
        with threads(num_threads):
            # The method of Faiss's Python class takes no parameters.
            self.prepare().search_preassigned_c(
                len(points_QE),
                faiss.swig_ptr(points_QE),
                k,
                faiss.swig_ptr(lists_QP),
                faiss.swig_ptr(similarities_QP),
                faiss.swig_ptr(scores),
                faiss.swig_ptr(rows),
                False,
                parameters,
            )
        if rows.max(initial=-1) >= len(self):
            raise CorruptError(f"an inverted list names row {rows.max()} of {len(self)}")
        scores[rows < 0] = -np.inf
        return Scored(scores, rows)


def write(stream: array_files.Raw, lists: Iterable[Codes]) -> None:
    """Write lists, given their codes (rows, code_bytes); rows are numbered through."""
    first = 0
    for codes_NB in lists:
        packed = pack(codes_NB)
        rows = np.full(len(packed) * BLOCK, -1, "<i8")
        rows[: len(codes_NB)] = np.arange(first, first + len(codes_NB))
        stream.write(packed.data)
        stream.write(rows.data)
        first += len(codes_NB)


def temporary(quantizer: Quantizer, lists: Iterable[Codes], sizes_L: npt.NDArray[np.int64]) -> InvertedLists:
    """Return lists in a file of the folder for temporary files that is gone when they are.

    Raises:
        StoreError: It cannot be written, for one where the disk is full.
    """
    with (
        array_files.writing(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="curation-lists-") as folder,
    ):
        path = Path(folder) / "lists"
        with array_files.raw(path) as stream:
            write(stream, lists)
        made = InvertedLists(quantizer, path, sizes_L)
        if len(made):
            made.prepare()
        return made


def pack(codes_NB: Codes) -> npt.NDArray[np.uint8]:
    """Return codes as blocks, (blocks, code_bytes, 32)."""
    num_blocks = -(-len(codes_NB) // BLOCK)
    padded = np.zeros((num_blocks * BLOCK, codes_NB.shape[1]), np.uint8)
    padded[: len(codes_NB)] = codes_NB
    rows = padded.reshape(num_blocks, 2, 16, codes_NB.shape[1])[:, :, _ORDER].transpose(
        0, 1, 3, 2
    )  # (blocks, half, byte, row)
    low, high = rows & 15, rows >> 4
    packed = np.concatenate([low[:, 0] | low[:, 1] << 4, high[:, 0] | high[:, 1] << 4], axis=2)
    return np.ascontiguousarray(packed)


def unpack(packed: npt.NDArray[np.uint8]) -> Codes:
    """Return the codes of blocks with their padding, (blocks * 32, code_bytes): the inverse of ``pack``."""
    low, high = packed[..., :16], packed[..., 16:]
    rows = np.stack([(low & 15) | (high & 15) << 4, (low >> 4) | (high & 0xF0)], axis=1)  # (blocks, half, byte, row)
    codes = np.empty((len(packed), 2, 16, packed.shape[1]), np.uint8)
    codes[:, :, _ORDER] = rows.transpose(0, 1, 3, 2)
    return codes.reshape(len(packed) * BLOCK, packed.shape[1])


def _starts(sizes_L: npt.NDArray[np.int64], code_bytes: int) -> Rows:
    padded_L = -(-sizes_L // BLOCK) * BLOCK
    return np.append(0, np.cumsum(padded_L * (code_bytes + ID_BYTES)))


def _empty_index(quantizer: Quantizer) -> Any:
    num_lists, reduced_dim = quantizer.centroids_LE.shape
    coarse = faiss.IndexFlatIP(reduced_dim)  # without vectors: a search is told its lists
    pieces = len(quantizer.codebook_MSK)
    index = faiss.IndexIVFPQFastScan(coarse, reduced_dim, num_lists, pieces, 4, faiss.METRIC_INNER_PRODUCT, BLOCK)
    index.by_residual = True
    faiss.copy_array_to_vector(quantizer.codebook_MSK.transpose(0, 2, 1).ravel(), index.pq.centroids)
    index.is_trained = True
    return index


def _mapped(path: Path, sizes_L: npt.NDArray[np.int64], starts_L: Rows, code_bytes: int) -> Any:
    lists = faiss.OnDiskInvertedLists(len(sizes_L), code_bytes, str(path))
    entries = faiss.OnDiskOneListVector()  # type: ignore[attr-defined]
    for size, start in zip(sizes_L.tolist(), starts_L.tolist(), strict=False):
        entry = faiss.OnDiskOneList()
        entry.size, entry.capacity, entry.offset = size, -(-size // BLOCK) * BLOCK, start
        entries.push_back(entry)
    lists.lists = entries
    lists.read_only = True
    lists.totsize = int(starts_L[-1])
    try:
        lists.do_mmap()
    except RuntimeError as error:
        raise StoreError(f"{path}: cannot be mapped into memory: {error}") from error
    return lists


def _check_layout() -> None:
    """Fail where Faiss has come to pack codes in another way than ``pack``: scores would be wrong without a sign."""
    random = np.random.default_rng(0)
    values_NM = random.integers(0, NUM_ENTRIES, (BLOCK, 4)).astype(np.float32)  # entry k stands for the value k
    entries_MSK = np.tile(np.arange(NUM_ENTRIES, dtype=np.float32), (4, 1, 1))
    index = _empty_index(Quantizer(np.eye(4, dtype=np.float32), np.zeros((1, 4), np.float32), entries_MSK))
    index.quantizer.add(np.zeros((1, 4), np.float32))
    index.add(values_NM)
    codes_NB = (values_NM[:, ::2] + NUM_ENTRIES * values_NM[:, 1::2]).astype(np.uint8)
    packed = faiss.rev_swig_ptr(faiss.downcast_InvertedLists(index.invlists).get_codes(0), codes_NB.size)
    if not np.array_equal(packed, pack(codes_NB).ravel()):
        raise StoreError(f"Faiss {faiss.__version__} packs codes in a way that is not known here; use Faiss 1.15")
