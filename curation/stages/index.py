"""Index the pool's embeddings for search."""

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
    """Vectors and keys of kept pool images → an index that is searched exactly."""

    name: ClassVar[str] = "index"
    version: ClassVar[int] = 1
    writes: Table | None = None
    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED)
    artefacts: tuple[str, ...] = (VECTORS_FILE, KEYS_FILE)

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the index in ``scratch``; yield nothing."""
        index: FlatIndex | None = None
        for view in inputs.shards("pool"):
            vectors_ND, keys_N2, _ = of_shard(view, schema.EMBED)
            if index is None:
                index = FlatIndex(vectors_ND.shape[1])
            index.add(vectors_ND, keys_N2)
        (FlatIndex(1) if index is None else index).save(scratch)
        yield from ()
