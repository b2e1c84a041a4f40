"""Fit the PCA that ``pca_hash`` takes signs of, on a sample of the pool that does not depend on shards.

Memory: for each image of the sample ``side_px ** 2`` bytes and about 150 bytes of keys, besides one shard's ids;
nothing that grows with the pool.
"""

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
from curation.indexes.keys import Keys, keys_from_hex
from curation.indexes.lookup import as_bytes, find
from curation.indexes.sampling import HashSample
from curation.indexes.vectors import Rows
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView
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
        sample = HashSample(
            self.seed, self.config.sample_size, distinct=True
        )  # equal bytes count once, whatever the shards
        for view in inputs.shards("pool"):
            keys_N2, _ = _keys(view)
            sample.add(keys_N2, keys_N2)
        fit(self._greys(inputs, sample.result().keys)).save(scratch / PCA_FILE)
        yield from ()

    def _greys(self, inputs: ReduceInputs, wanted_N2: Keys) -> npt.NDArray[np.uint8]:
        """Return the grey pictures of images that decode, (at most N, side_px ** 2); of equal bytes any row will do."""
        side = self.config.side_px
        greys = np.zeros((len(wanted_N2), side * side), np.uint8)
        good, tried = np.zeros(len(wanted_N2), bool), np.zeros(len(wanted_N2), bool)
        for view in inputs.shards("pool"):
            keys_N2, rows = _keys(view)
            index_N = find(wanted_N2, keys_N2)
            wanted = {
                row: index
                for row, index in zip(rows.tolist(), index_N.tolist(), strict=True)
                if index >= 0 and not tried[index]
            }
            tried[list(wanted.values())] = True
            for row, data in view.images(np.array(sorted(wanted), np.int64)):
                try:
                    greys[wanted[row]] = grey_thumbnail(decode(data, self.limits), side).reshape(-1)
                    good[wanted[row]] = True
                except ImageError:
                    continue  # it becomes a row with a reason in the pass that stores it
        return greys[good]


def _keys(view: ShardView) -> tuple[Keys, Rows]:
    """Return the keys of a shard's kept images and their rows."""
    ids = view.read(schema.FETCH, ["image_id"]).column(0)
    rows = np.flatnonzero(view.kept & ids.is_valid().to_numpy())
    keys_N2 = keys_from_hex(ids.take(pa.array(rows)).to_pylist())
    first = np.sort(np.unique(as_bytes(keys_N2), return_index=True)[1])
    return keys_N2[first], rows[first]
