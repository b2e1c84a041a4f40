"""Files of a saved index, and what ``index.npz`` says of the others."""

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, CurationError
from curation.indexes import array_files
from curation.indexes.keys import Keys, check_keys
from curation.indexes.npz import UNREADABLE
from curation.indexes.quantizer import GRID, NUM_ENTRIES, Quantizer
from curation.indexes.vectors import Vectors, blocks, check_shape, widen

HEADER_FILE = "index.npz"
LISTS_FILE = "lists.bin"
VECTORS_FILE = "vectors.npy"
KEYS_FILE = "keys.npy"
PROBED_K = 4
_FORMAT = 2
_QUANTIZER = ("rotation", "centroids", "codebook")
_CHECKED_ROWS = 8192


@dataclass(frozen=True)
class Probing:
    """How an index is searched.

    Attributes:
        probes: Lists that are scanned.
        depth: Candidates for ``k`` up to 4; a deeper search takes more in proportion.
        recall: Share of the 4 nearest vectors that was found when this was measured; None: it was not.
        num_queries: It was measured with.
    """

    probes: int
    depth: int
    recall: float | None = None
    num_queries: int = 0

    def for_k(self, k: int) -> "Probing":
        """Return how the ``k`` nearest are searched."""
        return Probing(self.probes, max(k, self.depth * -(-k // PROBED_K)))


@dataclass(frozen=True)
class Header:
    """What a saved index is besides its rows.

    Attributes:
        keys_crc32: Of the file of keys.
        quantizer: None: the index is flat.
        probing: How it is searched; None where it is flat.
        sizes_L: Rows of each list; empty where it is flat.
        crc32: Of the file of lists.
    """

    keys_crc32: int
    quantizer: Quantizer | None = None
    probing: Probing | None = None
    sizes_L: npt.NDArray[np.int64] | None = None
    crc32: int = 0


def write(path: Path, header: Header) -> None:
    """Write a header; the same one gives the same bytes."""
    about: dict[str, Any] = {"format": _FORMAT, "kind": "flat", "keys_crc32": header.keys_crc32}
    arrays: dict[str, npt.NDArray[Any]] = {}
    if header.quantizer is not None and header.probing is not None and header.sizes_L is not None:
        about |= {"kind": "ivf_pq", "probing": asdict(header.probing), "crc32": header.crc32}
        arrays = dict(zip(_QUANTIZER, vars(header.quantizer).values(), strict=True)) | {"sizes": header.sizes_L}
    buffer = io.BytesIO()
    arrays["about"] = np.array(json.dumps(about, sort_keys=True))
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    path.write_bytes(buffer.getvalue())


def read(path: Path) -> Header:
    """Read and check a header.

    Raises:
        CorruptError: The file is missing, damaged, or something else.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"][()]))
            if about["format"] != _FORMAT or about["kind"] not in ("flat", "ivf_pq"):
                raise CorruptError(f"{path}: not the header of an index of format {_FORMAT}: build the index again")
            keys_crc32 = about["keys_crc32"]
            if not isinstance(keys_crc32, int):
                raise CorruptError(f"{path}: not the header of an index: it has no checksum of keys")
            if about["kind"] == "flat":
                return Header(keys_crc32)
            quantizer = Quantizer(*(arrays[name] for name in _QUANTIZER))
            sizes_L = arrays["sizes"]
            probing = Probing(**about["probing"])
            crc32 = about["crc32"]
    except (*UNREADABLE, AttributeError) as error:
        raise CorruptError(f"{path}: not the header of an index: {error}") from error
    if not _fits(quantizer, sizes_L) or not _is_probing(probing) or not isinstance(crc32, int):
        raise CorruptError(f"{path}: not the header of an index: its entries do not fit together")
    return Header(keys_crc32, quantizer, probing, sizes_L, crc32)


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Say of whatever goes wrong inside the block that the folder is not a saved index.

    Raises:
        CorruptError: It is not.
    """
    try:
        yield
    except (OSError, CurationError) as error:
        raise CorruptError(f"{folder}: is not a saved index: {error}") from error


def mapped_rows(folder: Path, header: Header, dim: int | None, verify: bool) -> tuple[Vectors, Keys]:
    """Map the vectors and keys of a saved index into memory.

    Args:
        folder: Where they lie.
        header: Of the index.
        dim: The dimension that they must have; None: any.
        verify: Check every vector and the checksum of keys.

    Raises:
        CorruptError: Files are missing, damaged, or hold something else.
        DimensionError: Wrong shape or dtype.
        VectorError: A row is not finite or not L2-normalised.
    """
    vectors_ND = array_files.mapped(folder / VECTORS_FILE, "<f2")
    keys_N2 = array_files.mapped(folder / KEYS_FILE, "<u8")
    check_shape(vectors_ND, dim)
    check_keys(keys_N2, len(vectors_ND))
    if verify:
        array_files.check(folder / KEYS_FILE, header.keys_crc32)
        for start, stop in blocks(len(vectors_ND), _CHECKED_ROWS):
            widen(vectors_ND[start:stop], first_row=start)
    return vectors_ND, keys_N2


def _fits(quantizer: Quantizer, sizes_L: npt.NDArray[Any]) -> bool:
    arrays = (quantizer.rotation_DE, quantizer.centroids_LE, quantizer.codebook_MSK)
    if not all(array.dtype == np.float32 and array.size and np.isfinite(array).all() for array in arrays):
        return False
    if [array.ndim for array in arrays] != [2, 2, 3] or sizes_L.dtype != np.int64:
        return False
    num_pieces, num_values, num_entries = quantizer.codebook_MSK.shape
    reduced_dim = quantizer.rotation_DE.shape[1]
    on_grid = all((array * GRID == np.rint(array * GRID)).all() for array in arrays[1:])
    return (
        on_grid
        and num_entries == NUM_ENTRIES
        and num_pieces % 2 == 0
        and quantizer.centroids_LE.shape[1] == reduced_dim == num_pieces * num_values
        and sizes_L.shape == (quantizer.num_lists,)
        and bool((sizes_L >= 0).all())
    )


def _is_probing(probing: Probing) -> bool:
    numbers = (probing.probes, probing.depth, probing.num_queries)
    recall = probing.recall
    return (
        all(isinstance(number, int) for number in numbers)
        and min(probing.probes, probing.depth) >= 1
        and (recall is None or (isinstance(recall, float) and math.isfinite(recall)))
    )
