"""The audit of ``dedup``: each image that references or seeds drop, what it copies, and through which component.

One row an image, with its final decision; a pool image that copies a reference and a seed is a ``reference_copy``. An
image that copies something itself (``match`` is ``direct``) is shown with what it copies most closely. One that is only
in a component with such an image (``component``) is shown with what that component copies most closely, and may be
unlike it: the similarity is always that of the two images of the row.
"""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation import schema
from curation.indexes.keys import hex_from_keys
from curation.indexes.vectors import Rows, blocks
from curation.stages.dedup_groups import Groups
from curation.stages.dedup_rows import Known, Numbered

AUDIT_FILE = "audit.parquet"
AUDIT = pa.schema(
    [
        schema.IMAGE_ID,  # pool or seed image
        pa.field("collection", pa.string()),  # of that image
        schema.URL,  # of that image
        pa.field("copy_of", pa.string()),  # reference or seed image id
        pa.field("copy_of_collection", pa.string()),
        pa.field("copy_of_url", pa.string()),  # of a local set: file and member or row, so which split it is from
        schema.SIMILARITY,
        pa.field("match", pa.string()),  # direct | component
        schema.COMPONENT_ID,  # null for seeds: they are not grouped
        schema.COMPONENT_SIZE,
        pa.field("decision", pa.string()),  # reference_copy | seed_copy
    ]
)
_BLOCK_ROWS = 65_536


class Dropped(NamedTuple):
    """Rows that are dropped.

    Attributes:
        rows: (M,) ascending.
        of: (M,) what each is dropped for.
        similarity: (M,) of both.
        is_direct: (M,) whether the image itself is above the threshold.
        positions: (M,) where the rows are in the components.
    """

    rows: Rows
    of: Rows
    similarity: npt.NDArray[np.float32]
    is_direct: npt.NDArray[np.bool_]
    positions: Rows


class Audit:
    """An audit that is being written, a block of rows at a time."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, AUDIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def add(self, decision: str, images: Numbered, dropped: Dropped, of: Known, groups: Groups | None = None) -> None:
        """Write rows.

        Args:
            decision: Why all of them are dropped.
            images: What is dropped.
            dropped: Rows of ``images``.
            of: What they are dropped for.
            groups: Components of ``images``; None: they have none.
        """
        different, place = np.unique(dropped.of, return_inverse=True)
        of_urls = of.rows.urls(different)
        for start, stop in blocks(len(dropped.rows), _BLOCK_ROWS):
            mine, of_mine = dropped.rows[start:stop], dropped.of[start:stop]
            ids, sizes = pa.nulls(len(mine), pa.string()), pa.nulls(len(mine), pa.int32())
            if groups is not None:
                ids, sizes = groups.describe(dropped.positions[start:stop])
            columns = [
                pa.array(hex_from_keys(images.keys(mine))),
                images.collection_of(mine),
                images.urls(mine),
                pa.array(hex_from_keys(of.keys[of_mine])),
                of.rows.collection_of(of_mine),
                of_urls.take(pa.array(place[start:stop])),
                pa.array(dropped.similarity[start:stop]),
                pa.array(np.where(dropped.is_direct[start:stop], "direct", "component").tolist(), pa.string()),
                ids,
                sizes,
                pa.array([decision] * len(mine)),
            ]
            self._writer.write_table(pa.table(columns, schema=AUDIT))
