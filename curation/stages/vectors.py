"""Vectors of kept rows, gathered from shards into one memory-mapped file."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.indexes.keys import Keys, keys_from_hex
from curation.schema import Table
from curation.stage import ShardView


@dataclass(frozen=True)
class Gathered:
    """Rows that are kept and have a vector, in the order of shards.

    Attributes:
        vectors: float16 (N, dim), mapped from a file.
        keys: Image ids, uint64 (N, 2).
        shards: (N,) index into ``places``.
        rows: (N,) row in the shard.
        places: ``(collection, shard)`` of each shard that was read.
    """

    vectors: npt.NDArray[np.float16]
    keys: Keys
    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    places: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.keys)


def matrix(column: pa.ChunkedArray | pa.Array, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
    """Return rows of a fixed-size-list column, none of them null, as float16 (len(rows), dim)."""
    taken = column.take(pa.array(rows))
    if isinstance(taken, pa.ChunkedArray):
        taken = taken.combine_chunks() if taken.num_chunks != 1 else taken.chunk(0)
    dim = column.type.list_size
    values: npt.NDArray[np.float16] = taken.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, dim)


def of_shard(view: ShardView, table: Table) -> tuple[npt.NDArray[np.float16], Keys, npt.NDArray[np.int64]]:
    """Return the vectors, keys and row numbers of a shard's kept rows that have a vector."""
    column = view.read(table).column(0)
    rows = np.flatnonzero(view.kept & column.is_valid().to_numpy())
    ids = view.read(schema.FETCH, ["image_id"]).column(0).take(pa.array(rows)).to_pylist()
    return matrix(column, rows), keys_from_hex(ids), rows


def gather(views: Iterable[ShardView], table: Table, path: Path) -> Gathered:
    """Gather the vectors of a table.

    Args:
        views: Shards, of one or more collections.
        table: Its first column holds the vectors, all of one dimension.
        path: A new file of this machine, N * dim * 2 bytes.
    """
    dim = 1
    keys: list[Keys] = [np.empty((0, 2), np.uint64)]
    rows: list[npt.NDArray[Any]] = [np.empty(0, np.int32)]
    sizes: list[int] = []
    places: list[tuple[str, int]] = []
    with path.open("wb") as stream:
        for view in views:
            vectors_ND, keys_N2, rows_N = of_shard(view, table)
            dim = vectors_ND.shape[1]
            stream.write(vectors_ND.tobytes())
            keys.append(keys_N2)
            rows.append(rows_N.astype(np.int32))
            sizes.append(len(rows_N))
            places.append((view.collection, view.shard))
    num_rows = sum(sizes)
    vectors: npt.NDArray[np.float16] = (
        np.memmap(path, np.float16, "r", shape=(num_rows, dim)) if num_rows else np.empty((0, dim), np.float16)
    )
    return Gathered(
        vectors,
        np.concatenate(keys),
        np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        np.concatenate(rows),
        tuple(places),
    )
