"""Arrays in files: plain ``.npy`` of two axes, written in pieces and read as memory maps."""

import errno
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, DiskFullError, StoreError
from curation.indexes.vectors import blocks

_BLOCK_ROWS = 4096
_MAX_HEADER_BYTES = 1024
# Version 1.0 of NumPy's format, exactly as ``save`` writes it: magic, version, header length, padded header.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<descr>[<>|]\w\d)', 'fortran_order': False, "
    rb"'shape': \((?P<rows>\d{1,15}), (?P<columns>\d{1,9})\), \} *\n",
    re.DOTALL,
)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a folder, and say clearly when nothing can be written to it.

    Raises:
        DiskFullError: No space left.
        StoreError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
        raise kind(f"{folder}: the index cannot be written: {error.strerror}") from error


def mapped(path: Path, descr: str) -> npt.NDArray[Any]:
    """Map an array of two axes that ``write`` wrote.

    Raises:
        OSError: The file cannot be read.
        CorruptError: It does not hold such an array.
    """
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


def write(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], arrays: Iterable[npt.NDArray[Any]]) -> int:
    """Write arrays of rows, one after another, as one array of ``shape``; return the checksum of the file."""
    with growing(path, dtype, shape) as rows:
        for array in arrays:
            rows.append(array)
    return rows.crc32


class Raw:
    """A stream of bytes and their checksum."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes."""
        self.crc32 = zlib.crc32(data, self.crc32)
        self._stream.write(data)


class Growing:
    """An array that is written row after row, and the checksum of its file."""

    def __init__(self, stream: Raw, dtype: np.dtype[Any]) -> None:
        self._stream = stream
        self._dtype = dtype

    @property
    def crc32(self) -> int:
        """Checksum of what is written by now."""
        return self._stream.crc32

    def append(self, array: npt.NDArray[Any]) -> None:
        """Write rows."""
        for start, stop in blocks(len(array), _BLOCK_ROWS):
            self._stream.write(np.ascontiguousarray(array[start:stop], self._dtype).data)


@contextmanager
def growing(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Iterator[Growing]:
    """Open a new file for an array that will have been written, of ``shape``, at the end."""
    # Not through a memory map: on a full disk that kills the process instead of raising.
    with raw(path) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        yield Growing(stream, dtype)


@contextmanager
def raw(path: Path) -> Iterator[Raw]:
    """Open a new file, which is on the disk at the end."""
    with path.open("wb") as file:
        yield Raw(file)
        file.flush()
        os.fsync(file.fileno())


def crc32(path: Path) -> int:
    """Return the checksum of a file."""
    found = 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            found = zlib.crc32(data, found)
    return found


def check(path: Path, wanted: int) -> None:
    """Check that a file has the checksum it was written with.

    Raises:
        OSError: It cannot be read.
        CorruptError: It is another one.
    """
    if crc32(path) != wanted:
        raise CorruptError(f"{path.name} is not what was written")
