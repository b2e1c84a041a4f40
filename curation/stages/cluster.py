"""Spherical k-means of the pool's embeddings, clusters of clusters, and the clusters of every pool and seed image.

The centroids are fitted on a sample: the kept images with the smallest hashes of (seed, image id), without those whose
embedding is unusable, or on all kept images. One process does it (``ClusterFit.__call__``) or many
(``curation.pipelines.kmeans_rounds``), to the same bits.

Memory of a fit in one process: 2 * dim bytes for each image of the sample, 24 for each image of twice the sample, 12 *
dim bytes a centroid, with levels up to 0.8 GB (``curation.indexes.linkage``), and one shard; nothing that grows with
the pool unless all of it is fitted on.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config.selection import ClusterConfig
from curation.errors import CorruptError
from curation.indexes import array_files, kmeans
from curation.indexes.hierarchy import Tree, grow
from curation.indexes.keys import Keys, keys_from_hex
from curation.indexes.sampling import SmallestRanks, hash_keys
from curation.indexes.seeding import initial_centroids
from curation.indexes.vectors import Singles, Vectors
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView
from curation.stages.vectors import of_shard, usable

CENTROIDS_FILE = "centroids.npy"
HISTORY_FILE = "history.json"
TREE_FILE = "clusters.npz"

Limit = tuple[int, int, int]  # of a sample: hash and both halves of the key of its last image


class ClusterFit:
    """Fit centroids on the pool, and clusters of clusters on the centroids."""

    name: ClassVar[str] = "cluster_fit"
    version: ClassVar[int] = 3
    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED)
    writes: Table | None = None
    artefacts: tuple[str, ...] = (CENTROIDS_FILE, HISTORY_FILE, TREE_FILE)

    def __init__(self, config: ClusterConfig, seed: int, num_threads: int = 1) -> None:
        """Take the settings; no result depends on ``num_threads``."""
        self.config = config
        self.seed = seed
        self.num_threads = num_threads

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Leave centroids (float32, k x dim), the history of iterations and the tree in ``scratch``; yield nothing.

        There are fewer than ``num_clusters`` centroids where there are fewer different embeddings, and none in an empty
        pool.

        Raises:
            DimensionError: Shards disagree on the dimension.
            VectorError: An embedding is not L2-normalised.
        """
        limit = self.limit(inputs.shards("pool"))
        parts = [self.points(view, limit) for view in inputs.shards("pool")]
        state = self.start(lambda: parts)
        k, iterations = self.config.num_clusters, self.config.iterations
        self.finish(kmeans.fit(lambda: parts, k, iterations, self.seed, self.num_threads, state), scratch)
        yield from ()

    def limit(self, views: Iterable[ShardView]) -> Limit | None:
        """Return the hash and key up to which images belong to the sample; None: all do."""
        if self.config.sample_size is None:
            return None
        smallest = SmallestRanks(self.config.sample_size)
        for view in views:
            ids = view.read(schema.FETCH, ["image_id"]).column(0).filter(pa.array(view.kept)).drop_null().to_pylist()
            keys_N2 = keys_from_hex(ids)
            smallest.add(hash_keys(keys_N2, self.seed), keys_N2, np.empty((len(keys_N2), 0), np.uint8))
        ranks, keys, _ = smallest.result()
        if len(ranks) < self.config.sample_size:
            return None
        return int(ranks[-1]), int(keys[-1, 0]), int(keys[-1, 1])

    def points(self, view: ShardView, limit: Limit | None) -> tuple[Vectors, Keys]:
        """Return the vectors and keys of a shard's images of the sample."""
        vectors_ND, keys_N2, _ = of_shard(view, schema.EMBED)
        if limit is None:
            return vectors_ND, keys_N2
        ranks_N = hash_keys(keys_N2, self.seed)
        rank, first, second = (np.uint64(number) for number in limit)
        inside = ranks_N < rank
        inside |= (ranks_N == rank) & ((keys_N2[:, 0] < first) | ((keys_N2[:, 0] == first) & (keys_N2[:, 1] <= second)))
        return vectors_ND[inside], keys_N2[inside]

    def start(self, shards: kmeans.Shards) -> kmeans.Centroids:
        """Return the first centroids of the sample's points; none, and nothing to do, where there are no points."""
        if not any(len(keys_N2) for _, keys_N2 in shards()):
            dim = max((vectors_ND.shape[1] for vectors_ND, _ in shards()), default=1)
            return kmeans.Centroids(np.zeros((0, dim), np.float32), converged=True)
        return kmeans.Centroids(initial_centroids(shards, self.config.num_clusters, self.seed, self.num_threads))

    def finish(self, state: kmeans.Centroids, scratch: Path) -> None:
        """Leave the artefacts of a fit in ``scratch``."""
        config = self.config
        tree = grow(
            state.vectors,
            config.levels,
            config.iterations,
            self.seed,
            config.resampling_rounds,
            config.resampled_per_cluster,
            self.num_threads,
            config.linkage,
        )
        tree.save(scratch / TREE_FILE)
        # numpy.save does not say that a disk is full.
        array_files.write(scratch / CENTROIDS_FILE, np.dtype("<f4"), state.vectors.shape, [state.vectors])
        (scratch / HISTORY_FILE).write_text(json.dumps([asdict(iteration) for iteration in state.history], indent=1))


class ClusterStage:
    """Assign images to the nearest centroid, and so to a cluster of each level above."""

    name: ClassVar[str] = "cluster"
    version: ClassVar[int] = 2
    reads: tuple[Table, ...] = (schema.EMBED,)
    writes: Table = schema.CLUSTER

    def __init__(self, centroids: Path) -> None:
        """Read the centroids and the tree that ``ClusterFit`` left in a folder.

        Raises:
            CorruptError: They are not an array of float32 rows, or the tree is not one over them.
        """
        path = centroids / CENTROIDS_FILE
        try:
            found = np.array(array_files.mapped(path, "<f4"))
        except (OSError, CorruptError) as error:
            raise CorruptError(f"{path}: not centroids: {error}") from error
        if not np.isfinite(found).all():
            raise CorruptError(f"{path}: not centroids: they are not finite")
        self.centroids_KD: Singles = found
        self.tree = Tree.load(centroids / TREE_FILE)
        if len(self.tree.centroids[0]) != len(found):
            raise CorruptError(f"{centroids / TREE_FILE}: is a tree over other centroids than those of {path}")

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
        ancestors_PT = self.tree.ancestors(numbers[~absent])
        starts = np.append(0, np.cumsum(~absent) * ancestors_PT.shape[1]).astype(np.int32)
        columns = [
            pa.array(numbers, mask=absent),
            pa.array(similarities, mask=absent),
            pa.ListArray.from_arrays(pa.array(starts), pa.array(ancestors_PT.ravel()), mask=pa.array(absent)),
        ]
        return pa.table(columns, schema=self.writes.schema)
