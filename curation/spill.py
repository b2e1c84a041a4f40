"""Rows on scratch disk, by bucket: how a group-by over all shards stays within bounded memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

MAX_BUCKETS = 256  # each is one open file
_BUFFERED_ROWS = 250_000
_BUFFERED_BYTES = 64 << 20


def buckets_for(num_rows: int, rows_a_bucket: int = 500_000) -> int:
    """Return how many buckets keep each near ``rows_a_bucket`` rows, at most ``MAX_BUCKETS``."""
    return max(1, min(MAX_BUCKETS, -(-num_rows // rows_a_bucket)))


class Spill:
    """Append rows to buckets, then read each bucket whole, rows in the order in which they came.

    Args:
        folder: An empty folder of this machine.
        schema: Of the rows.
        num_buckets: Between 1 and ``MAX_BUCKETS``.
    """

    def __init__(self, folder: Path, schema: pa.Schema, num_buckets: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.num_buckets = num_buckets
        self._folder = folder
        self._schema = schema
        self._writers: dict[int, Any] = {}
        self._tables: list[pa.Table] = []
        self._buckets: list[npt.NDArray[np.int64]] = []
        self._buffered = self._buffered_bytes = 0
        self._is_read = False

    def add(self, table: pa.Table, buckets: npt.NDArray[np.int64] | Sequence[int]) -> None:
        """Append the rows of a table, each to the bucket named for it.

        Raises:
            ValueError: After ``read``, when a bucket's file would begin anew.
        """
        if self._is_read:
            raise ValueError("rows cannot be added once a bucket was read")
        self._tables.append(table)
        self._buckets.append(np.asarray(buckets, dtype=np.int64))
        self._buffered += table.num_rows
        self._buffered_bytes += table.nbytes
        if self._buffered >= _BUFFERED_ROWS or self._buffered_bytes >= _BUFFERED_BYTES:
            self._flush()

    def read(self, bucket: int) -> pa.Table:
        """Return the rows of a bucket; nothing can be added afterwards."""
        return pa.concat_tables([self._schema.empty_table(), *self.batches(bucket)])

    def batches(self, bucket: int) -> Iterator[pa.Table]:
        """Yield the rows of a bucket as they were written; nothing can be added afterwards."""
        self.close()
        self._is_read = True
        path = self._path(bucket)
        if path.exists():
            # Not by its path: that would map it, and pages that were read would count as memory in use.
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])

    def forget(self, bucket: int) -> None:
        """Delete the rows of a bucket."""
        self._path(bucket).unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is buffered and close the files."""
        self._flush()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._tables:
            return
        buckets = np.concatenate(self._buckets)
        order = np.argsort(buckets, kind="stable")
        # Taken at once and from one chunk: bucket by bucket from many chunks takes ten times as long.
        table = pa.concat_tables(self._tables).combine_chunks().take(pa.array(order))
        starts = np.searchsorted(buckets[order], np.arange(self.num_buckets + 1)).tolist()
        for bucket in np.unique(buckets).tolist():
            self._writer(bucket).write_table(table.slice(starts[bucket], starts[bucket + 1] - starts[bucket]))
        self._tables, self._buckets, self._buffered, self._buffered_bytes = [], [], 0, 0

    def _writer(self, bucket: int) -> Any:
        if bucket not in self._writers:
            self._writers[bucket] = pa.ipc.new_stream(self._path(bucket), self._schema)
        return self._writers[bucket]

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:04d}.arrow"
