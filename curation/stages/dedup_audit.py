"""The audit of ``dedup``: each image that references or seeds drop, what it copies, and through which component.

One row an image, with its final decision; a pool image that copies a reference and a seed is a ``reference_copy``. The
similarity is that of this image with what its component copies most closely, so a member that is far from it but in the
same component shows a low one.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation import schema
from curation.indexes.keys import hex_from_keys
from curation.indexes.vectors import Rows, blocks
from curation.stages.vectors import Gathered

AUDIT_FILE = "audit.parquet"
AUDIT = pa.schema(
    [
        schema.IMAGE_ID,  # pool or seed image
        pa.field("collection", pa.string()),  # of that image
        pa.field("copy_of", pa.string()),  # reference or seed image id
        pa.field("copy_of_collection", pa.string()),
        schema.SIMILARITY,
        schema.COMPONENT_ID,  # null for seeds: they are not grouped
        schema.COMPONENT_SIZE,
        pa.field("decision", pa.string()),  # reference_copy | seed_copy
    ]
)
_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class Components:
    """Connected components of N pool rows.

    Attributes:
        labels: (N,) the smallest row of each row's component.
        sizes: (N,) members of the component with a label.
        smallest: (N,) its row with the smallest image id.
        best: (N,) its row that represents it.
    """

    labels: Rows
    sizes: Rows
    smallest: Rows
    best: Rows

    def of(self, pool: Gathered, rows: Rows) -> tuple[pa.Array, pa.Array]:
        """Return ``component_id`` and ``component_size`` of some rows."""
        labels = self.labels[rows]
        ids = hex_from_keys(pool.keys[self.smallest[labels]])
        return pa.array(ids, pa.string()), pa.array(self.sizes[labels].astype(np.int32))


class Audit:
    """An audit that is being written, a block of rows at a time."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, AUDIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(
        self,
        decision: str,
        images: Gathered,
        rows: Rows,
        of: Gathered,
        of_rows: Rows,
        similarity: npt.NDArray[np.float32],
        components: Components | None = None,
    ) -> None:
        """Write rows.

        Args:
            decision: Why all of them are dropped.
            images: What ``rows`` (M,) are rows of.
            rows: The dropped images.
            of: What ``of_rows`` (M,) are rows of.
            of_rows: What each is dropped for.
            similarity: (M,) of both.
            components: Of ``images``; None: they have none.
        """
        for start, stop in blocks(len(rows), _BLOCK_ROWS):
            mine, of_mine = rows[start:stop], of_rows[start:stop]
            empty = pa.nulls(len(mine), pa.string()), pa.nulls(len(mine), pa.int32())
            columns = [
                pa.array(hex_from_keys(images.keys[mine])),
                _collections(images, mine),
                pa.array(hex_from_keys(of.keys[of_mine])),
                _collections(of, of_mine),
                pa.array(similarity[start:stop]),
                *(empty if components is None else components.of(images, mine)),
                pa.array([decision] * len(mine)),
            ]
            self._writer.write_table(pa.table(columns, schema=AUDIT))


def _collections(images: Gathered, rows: Rows) -> pa.Array:
    names = pa.array([place.collection for place in images.places], pa.string())
    return names.take(pa.array(images.place_of(rows)))
