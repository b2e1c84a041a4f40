"""Vectors of kept rows, gathered from shards into one memory-mapped file.

A vector that is not finite or all zeros says nothing, so its row counts as one without a vector, and the log tells how
many there were. One that is merely not L2-normalised is a mistake of the stage that wrote it: the search that meets it
raises ``VectorError``.

Memory: one shard at a time, and 20 bytes a gathered row (twice that while the arrays are joined). Scratch disk:
2 * dim bytes a gathered row.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.errors import DimensionError
from curation.indexes.keys import Keys, keys_from_hex
from curation.indexes.vectors import Rows, Vectors
from curation.schema import Table
from curation.stage import ShardView

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """A shard that rows were gathered from."""

    collection: str
    shard: int
    num_rows: int


@dataclass(frozen=True)
class Gathered:
    """Rows that are kept and have a vector, in the order of shards.

    Attributes:
        vectors: float16 (N, dim), mapped from a file.
        keys: Image ids, uint64 (N, 2).
        rows: (N,) row in the shard.
        starts: (len(places) + 1,) where the rows of each shard start, and N.
        places: Each shard that was read.
    """

    vectors: Vectors
    keys: Keys
    rows: npt.NDArray[np.int32]
    starts: Rows
    places: tuple[Place, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def place_of(self, rows_N: Rows) -> Rows:
        """Return the index into ``places`` of gathered rows, (N,)."""
        return np.searchsorted(self.starts, rows_N, side="right") - 1


def matrix(column: pa.ChunkedArray | pa.Array, rows: Rows) -> Vectors:
    """Return rows of a fixed-size-list column, none of them null, as float16 (len(rows), dim).

    Raises:
        DimensionError: The column does not hold float16 vectors of one dimension.
    """
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float16():
        raise DimensionError(f"a column of vectors must be a fixed-size list of float16, got {kind}")
    taken = column.take(pa.array(rows))
    if isinstance(taken, pa.ChunkedArray):
        taken = taken.combine_chunks()
    values: Vectors = taken.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, kind.list_size)


def usable(column: pa.ChunkedArray | pa.Array, kept: npt.NDArray[np.bool_], where: str) -> tuple[Vectors, Rows]:
    """Return the vectors of kept rows that have one, and the numbers of these rows.

    Args:
        column: A fixed-size list of float16, one entry a row.
        kept: Which rows count, (num_rows,).
        where: What the log calls the shard.
    """
    rows = np.flatnonzero(kept & column.is_valid().to_numpy(zero_copy_only=False))
    vectors_ND = matrix(column, rows)
    good = np.isfinite(vectors_ND).all(axis=1) & vectors_ND.any(axis=1)
    if not good.all():
        logger.warning(
            "%s: %d vectors are not finite or all zeros and count as missing", where, np.count_nonzero(~good)
        )
        vectors_ND, rows = vectors_ND[good], rows[good]
    return vectors_ND, rows


def of_shard(view: ShardView, table: Table) -> tuple[Vectors, Keys, Rows]:
    """Return the vectors, keys and row numbers of a shard's kept rows that have a vector."""
    where = f"{table.name} of {view.collection} shard {view.shard:08d}"
    vectors_ND, rows = usable(view.read(table).column(0), view.kept, where)
    ids = view.read(schema.FETCH, ["image_id"]).column(0).take(pa.array(rows)).to_pylist()
    return vectors_ND, keys_from_hex(ids), rows


def gather(views: Iterable[ShardView], table: Table, path: Path) -> Gathered:
    """Gather the vectors of a table.

    Args:
        views: Shards, of one or more collections.
        table: Its first column holds the vectors, all of one dimension.
        path: A new file of this machine, N * dim * 2 bytes.

    Raises:
        DimensionError: Shards disagree on the dimension.
    """
    dim: int | None = None
    keys: list[Keys] = [np.empty((0, 2), np.uint64)]
    rows: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
    starts = [0]
    places: list[Place] = []
    with path.open("wb") as stream:
        for view in views:
            vectors_ND, keys_N2, rows_N = of_shard(view, table)
            if vectors_ND.shape[1] != (dim or vectors_ND.shape[1]):
                raise DimensionError(
                    f"{table.name} of {view.collection} shard {view.shard:08d} has {vectors_ND.shape[1]} dimensions, "
                    f"shards before it have {dim}"
                )
            dim = vectors_ND.shape[1]
            stream.write(np.ascontiguousarray(vectors_ND).data)
            keys.append(keys_N2)
            rows.append(rows_N.astype(np.int32))
            starts.append(starts[-1] + len(rows_N))
            places.append(Place(view.collection, view.shard, view.num_rows))
    shape = (starts[-1], dim or 1)
    vectors: Vectors = np.memmap(path, np.float16, "r", shape=shape) if starts[-1] else np.empty(shape, np.float16)
    return Gathered(
        vectors, np.concatenate(keys), np.concatenate(rows), np.array(starts, dtype=np.int64), tuple(places)
    )
