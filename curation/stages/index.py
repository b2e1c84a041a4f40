"""Index the pool's embeddings for search.

Memory: one shard and about 256 MiB of vectors, whatever the size of the pool. Scratch disk: twice the index, which has
2 * dim + 16 bytes an image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from curation import schema
from curation.indexes.flat import KEYS_FILE, VECTORS_FILE, FlatIndex
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.vectors import of_shard


class IndexStage:
    """Vectors and keys of kept pool images → an index that is searched exactly.

    Args:
        part_bytes: Vectors of about this size are held in memory before they go to disk.
    """

    name: ClassVar[str] = "index"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (VECTORS_FILE, KEYS_FILE)

    def __init__(self, part_bytes: int = 1 << 28) -> None:
        self.part_bytes = part_bytes

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the index in ``scratch``; yield nothing.

        Raises:
            DimensionError: Shards disagree on the dimension.
            VectorError: A vector is not L2-normalised.
        """
        whole: FlatIndex | None = None
        part: FlatIndex | None = None
        num_parts = 0
        for view in inputs.shards("pool"):
            vectors_ND, keys_N2, _ = of_shard(view, schema.EMBED)
            if whole is None:
                whole = FlatIndex(vectors_ND.shape[1])
            if part is None:  # an empty index is falsy
                part = FlatIndex(whole.dim)
            part.add(vectors_ND, keys_N2)
            if len(part) * part.dim * 2 >= self.part_bytes:
                whole.merge(_mapped(part, scratch / f"part-{num_parts}"))
                part, num_parts = None, num_parts + 1
        if whole is not None and part is not None:
            whole.merge(part)
        (FlatIndex(1) if whole is None else whole).save(scratch)
        yield from ()


def _mapped(part: FlatIndex, folder: Path) -> FlatIndex:
    """Return an index that lies on disk instead of in memory."""
    part.save(folder)
    return FlatIndex.load(folder, verify=False)  # checked when it was added
