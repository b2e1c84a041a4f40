"""Images that are already here: bytes of files, tar members and Parquet rows, read front to back."""

import os
import stat
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from curation.config import RunConfig
from curation.crawl.blocked import blocked_images
from curation.crawl.img2dataset import IMAGE_COLUMNS
from curation.crawl.links import Fetched, Link
from curation.crawl.verify import refused, verify
from curation.errors import ImageError, LinkError

_ROWS_PER_BATCH = 16


def read_local(links: Sequence[Link], config: RunConfig) -> Iterator[tuple[int, bytes | None, str | None, str]]:
    """Yield ``(index, bytes, reason, detail)`` for each link in order; bytes are None where there is a reason.

    Args:
        links: Of local sets. Fastest in the order in which the set was listed.
        config: ``fetch.max_bytes`` limits each image; the inputs say which column of a Parquet file holds it.
    """
    with ExitStack() as stack:
        path, source = "", None
        for index, link in enumerate(links):
            try:
                if source is None or link.source_path != path:
                    stack.close()
                    source, path = None, link.source_path or ""
                    source = stack.enter_context(_open(link, config))
                yield index, source.read(link), None, ""
            except LinkError as error:
                yield index, None, error.reason, error.detail
            except FileNotFoundError:
                yield index, None, "missing_file", f"{path} does not exist any more"
            except (OSError, pa.ArrowException) as error:
                yield index, None, "unreadable", f"{path}: {error}"[:300]


def load_local(links: Sequence[Link], config: RunConfig) -> Iterator[Fetched]:
    """Read and verify local images; yield one result for each link, in order."""
    with ThreadPoolExecutor(config.images.decode_threads, thread_name_prefix="verify") as pool:
        waiting: deque[Future[Fetched]] = deque()
        try:
            for index, data, reason, detail in read_local(links, config):
                waiting.append(pool.submit(_verified, index, data, reason, detail, config))
                if len(waiting) > 2 * config.images.decode_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _verified(index: int, data: bytes | None, reason: str | None, detail: str, config: RunConfig) -> Fetched:
    if data is None:
        return Fetched(index, None, None, reason, detail=detail)
    if not data:
        return Fetched(index, None, None, "empty", detail="no bytes")
    try:
        found = verify(data, config.images, blocked_images(config.fetch, config.images))
        return Fetched(index, data, found.info, None, image_id=found.image_id, stored_id=found.stored_id)
    except ImageError as error:
        return refused(index, error)


class _Source(Protocol):
    """An open file that images are read from."""

    def read(self, link: Link) -> bytes:
        """Return the bytes of one image; raises LinkError or OSError."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def _open(link: Link, config: RunConfig) -> _Source:
    if link.source_path is None:
        raise LinkError("unreadable", f"{link.url} names no file")
    path = Path(link.source_path)
    if link.source_kind == "parquet":
        return _ParquetRows(path, config.fetch.max_bytes, _image_columns(path, config))
    return _FileSlices(path, config.fetch.max_bytes)


def _image_columns(path: Path, config: RunConfig) -> list[str]:
    """Return the columns that may hold the images of a file: those of the inputs that name it first."""
    inputs = list(config.pool.inputs)
    for seeds in config.seeds.values():
        inputs.extend(seeds.inputs)
    for references in config.references.values():
        inputs.extend(references.inputs)
    inputs = [source for source in inputs if source.kind == "parquet"]
    inputs.sort(key=lambda source: not _names(source.path, path))
    return list(dict.fromkeys([*(source.image_column for source in inputs), "image", *IMAGE_COLUMNS]))


def _names(pattern: str, path: Path) -> bool:
    absolute = Path(pattern).expanduser().absolute()
    return path == absolute or path.is_relative_to(absolute) or fnmatch(str(path), str(absolute))


class _FileSlices:
    """A file, or the members of a tar at known offsets."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        # Non-blocking, so that a pipe with an image's name cannot hold up the run.
        self._file: BinaryIO = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        self._max_bytes = max_bytes
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, link: Link) -> bytes:
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise LinkError("unreadable", f"{self._path} is not a regular file")
        is_member = link.source_kind == "tar"
        size = link.source_bytes if is_member and link.source_bytes is not None else status.st_size
        if size > self._max_bytes:
            raise LinkError("too_large", f"{size} bytes")
        self._file.seek(link.source_offset or 0 if is_member else 0)
        data = self._file.read(size)
        if len(data) < size:
            raise LinkError("unreadable", f"{self._path} ends before the image does")
        return data


class _ParquetRows:
    """Rows of a Parquet file. A cursor moves forward in small batches; only going back reads a row group again."""

    def __init__(self, path: Path, max_bytes: int, image_columns: Sequence[str]) -> None:
        # A stream buffer: without one the whole column chunk is held as well, 1,161 instead of 590 MiB for 3,000
        # images of 200 kB in one row group. What is left are pages, into which writers put up to 1,024 values.
        self._file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        self._path = path
        self._max_bytes = max_bytes
        names = self._file.schema_arrow.names
        self._column = next((name for name in image_columns if name in names), None)
        if self._column is None:
            self._file.close()
            raise LinkError("unreadable", f"{path} has none of the columns {', '.join(image_columns)}")
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first = self._end = 0  # rows of the batch
        self._values: pa.Array | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, link: Link) -> bytes:
        row = link.source_offset
        if row is None or not 0 <= row < self._starts[-1]:
            raise LinkError("missing_file", f"{self._path} has no row {row}")
        self._move_to(row)
        value: Any = None if self._values is None else self._values[row - self._first]
        if isinstance(value, pa.StructScalar):
            value = value["bytes"] if value.is_valid else None
        if value is None or not value.is_valid:
            raise LinkError("missing_file", f"row {row} of {self._path} holds no bytes")
        buffer = value.as_buffer()
        if buffer.size > self._max_bytes:
            raise LinkError("too_large", f"{buffer.size} bytes")
        return bytes(buffer.to_pybytes())

    def _move_to(self, row: int) -> None:
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._group = group
            self._batches = self._file.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=[self._column])
            self._first = self._end = self._starts[group]
        while row >= self._end:
            batch = next(self._batches, None)
            if batch is None:
                self._group = -1
                raise LinkError("unreadable", f"{self._path} ends before row {row}")
            self._first, self._end = self._end, self._end + batch.num_rows
            self._values = batch.column(0)
