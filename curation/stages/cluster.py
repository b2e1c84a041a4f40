"""Spherical k-means of the pool's embeddings, and the cluster of every pool and seed image.

Memory of the fit: 2 * dim bytes for each image of the sample, up to four times that while the sample is cut down, 12 *
dim bytes a centroid, and one shard; nothing that grows with the pool.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config import ClusterConfig
from curation.errors import CorruptError
from curation.indexes import kmeans
from curation.indexes.sampling import HashSample
from curation.indexes.vectors import Singles
from curation.schema import Table
from curation.stage import ReduceInputs
from curation.stages.vectors import of_shard, usable

CENTROIDS_FILE = "centroids.npy"
HISTORY_FILE = "history.json"


class ClusterFit:
    """Fit centroids on a sample of the pool: the smallest hashes of seed and image id."""

    name: ClassVar[str] = "cluster_fit"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (CENTROIDS_FILE, HISTORY_FILE)

    def __init__(self, config: ClusterConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave the centroids (float32, k x dim) and the history of iterations in ``scratch``; yield nothing.

        There are fewer than ``num_clusters`` centroids where there are fewer different embeddings, and none in an empty
        pool.

        Raises:
            DimensionError: Shards disagree on the dimension.
            VectorError: An embedding is not L2-normalised.
        """
        sample = HashSample(self.seed, self.config.sample_size)
        dim = 1
        for view in inputs.shards("pool"):
            vectors_ND, keys_N2, _ = of_shard(view, schema.EMBED)
            dim = vectors_ND.shape[1]
            sample.add(keys_N2, vectors_ND)
        chosen = sample.result()
        centroids_KD: Singles = np.zeros((0, dim), np.float32)
        history: tuple[kmeans.Iteration, ...] = ()
        if len(chosen.keys):
            fitted = kmeans.fit(
                lambda: [(chosen.rows, chosen.keys)],
                self.config.num_clusters,
                self.config.iterations,
                self.seed,
                num_threads=1,
            )
            centroids_KD, history = fitted.vectors, fitted.history
        np.save(scratch / CENTROIDS_FILE, centroids_KD, allow_pickle=False)
        (scratch / HISTORY_FILE).write_text(json.dumps([asdict(iteration) for iteration in history], indent=1))
        yield from ()


class ClusterStage:
    """Assign images to the nearest centroid."""

    name: ClassVar[str] = "cluster"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.EMBED,)
    writes: Table = schema.CLUSTER

    def __init__(self, centroids: Path) -> None:
        """Read the centroids that ``ClusterFit`` left in a folder.

        Raises:
            CorruptError: They are not an array of float32 rows.
        """
        path = centroids / CENTROIDS_FILE
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CorruptError(f"{path}: not centroids: {error}") from error
        if (
            not isinstance(found, np.ndarray)
            or found.dtype != np.float32
            or found.ndim != 2
            or not np.isfinite(found).all()
        ):
            raise CorruptError(f"{path}: not centroids: float32 rows of finite numbers are needed")
        self.centroids_KD: Singles = found

    def __call__(self, columns: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Table:
        """Return ``writes`` for a shard; null where an image is rejected or has no usable embedding.

        Raises:
            DimensionError: The centroids have another dimension.
            VectorError: An embedding is not L2-normalised.
        """
        numbers = np.zeros(len(kept), np.int32)
        similarities = np.zeros(len(kept), np.float32)
        absent = np.ones(len(kept), bool)
        if len(self.centroids_KD):
            vectors_ND, rows = usable(columns.column("embedding"), kept, "embed")
            numbers[rows], similarities[rows] = kmeans.assign(vectors_ND, self.centroids_KD, num_threads=1)
            absent[rows] = False
        return pa.table(
            [pa.array(numbers, mask=absent), pa.array(similarities, mask=absent)], schema=self.writes.schema
        )
