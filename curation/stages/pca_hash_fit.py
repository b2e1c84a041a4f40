"""Fit the PCA that ``pca_hash`` takes signs of, on a sample of the pool that does not depend on shards."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config import ImagesConfig, PcaHashConfig
from curation.errors import ImageError
from curation.images import decode
from curation.indexes.keys import keys_from_hex
from curation.indexes.lookup import as_bytes
from curation.indexes.sampling import HashSample
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.pca_hash import fit, grey_thumbnail

PCA_FILE = "pca.npz"


class PcaHashFit:
    """Grey images of the sample (the smallest hashes of seed and image id) → mean and 64 components."""

    name: ClassVar[str] = "pca_hash_fit"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH,)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (PCA_FILE,)

    def __init__(self, config: PcaHashConfig, limits: ImagesConfig, seed: int) -> None:
        self.config = config
        self.limits = limits
        self.seed = seed

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave ``pca.npz`` in ``scratch``; yield nothing."""
        sample = HashSample(self.seed, self.config.sample_size)
        for view in inputs.shards("pool"):
            ids = view.read(schema.FETCH, ["image_id"]).column(0)
            rows = np.flatnonzero(view.kept & ids.is_valid().to_numpy())
            keys_N2 = keys_from_hex(ids.take(pa.array(rows)).to_pylist())
            _, first = np.unique(as_bytes(keys_N2), return_index=True)
            where = np.stack([np.full(len(first), view.shard), rows[first]], axis=1).astype(np.int64)
            sample.add(keys_N2[first], where)
        chosen = sample.result()
        _, first = np.unique(as_bytes(chosen.keys), return_index=True)
        greys = self._greys(inputs, chosen.rows[np.sort(first)])
        fit(greys).save(scratch / PCA_FILE)
        yield from ()

    def _greys(self, inputs: ReduceInputs, places_N2: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        wanted: dict[int, dict[int, int]] = defaultdict(dict)
        for index, (shard, row) in enumerate(places_N2.tolist()):
            wanted[shard][row] = index
        side = self.config.side_px
        greys = np.zeros((len(places_N2), side * side), np.uint8)
        good = np.zeros(len(places_N2), bool)
        for view in inputs.shards("pool"):
            rows = wanted.get(view.shard, {})
            for row, data in view.images(np.array(sorted(rows), np.int64)):
                try:
                    greys[rows[row]] = grey_thumbnail(decode(data, self.limits), side).reshape(-1)
                    good[rows[row]] = True
                except ImageError:
                    continue  # it becomes a row with a reason in the pass that stores it
        return greys[good]
