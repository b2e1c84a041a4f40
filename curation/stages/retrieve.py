"""Retrieve pool images towards seed sets.

Sample-based: the ``k`` nearest pool images of each seed image. Cluster-based: from every cluster that holds more than
``min_seed_images`` seed images, up to ``images_per_cluster`` images, at most ``max_images`` in all; which ones is
decided by the smallest hashes of (seed, image id). A pool image may be retrieved more than once: ``nominal_count`` says
how often. Without seed sets every image is kept; with seed sets that all say ``retrieve: none``, none is.

Where the index is approximate, how much of it is searched is measured on a sample of the set's own images: seeds lie
elsewhere than the pool, and what finds the neighbours of the pool's images may miss theirs.

Balanced: ``retrieve.balanced_images`` pool images in equal shares for the branches of the tree of clusters, besides
what seed sets retrieve and whether or not there are any; ``balanced`` says which images they are.

Memory: see ``hits`` for what is retrieved; one seed set at a time, 20 bytes an image and 8 for its order; with
``next_neighbour`` 9 bytes a pool image; for a cluster-based set up to about 200 bytes for each of its ``max_images``,
for balanced sampling for each of ``balanced_images``.
Scratch disk: 2 * dim bytes a seed image. The time of sample-based retrieval is that of a search of the index for each
seed image (seeds * pool where it is flat; where it is not, an exact search for the sample besides), and with
``next_neighbour`` of several.

Sources: Oquab et al. 2023, "DINOv2", section 3 and appendix A.4 (arXiv 2304.07193); for balanced sampling see
``curation.indexes.balanced``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config import RunConfig
from curation.config.inputs import SeedConfig
from curation.indexes.balanced import QuotaSample, shares
from curation.indexes.hierarchy import Tree
from curation.indexes.index import Index, load
from curation.indexes.index_header import Probing
from curation.indexes.ivfpq import IvfPqIndex
from curation.indexes.keys import Keys, keys_from_hex
from curation.indexes.lookup import among, as_bytes
from curation.indexes.sampling import Ranks, hash_keys
from curation.indexes.tuning import NUM_QUERIES, tune
from curation.indexes.vectors import Rows, Similarities, Vectors, blocks
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView
from curation.stages.cluster import TREE_FILE
from curation.stages.hits import Hits, Retrieved
from curation.stages.vectors import Gathered, gather

_QUERIES = 4096
_MAX_NEIGHBOURS = 1 << 20  # of one batch of queries: 32 bytes each
_MIN_PENDING = 1 << 16


class RetrieveStage:
    """Keep what seed sets retrieve; reject the rest as ``not_retrieved``."""

    name: ClassVar[str] = "retrieve"
    version: ClassVar[int] = 3
    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED, schema.CLUSTER)
    writes: Table | None = schema.RETRIEVE
    artefacts: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, num_threads: int = 1) -> None:
        """Take the settings; no result depends on ``num_threads``."""
        self.config = config
        self.num_threads = num_threads

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield one table a shard of the pool.

        Raises:
            DimensionError: Seeds and the pool's index disagree on the dimension.
            VectorError: A seed's embedding is not L2-normalised.
        """
        hits = Hits(sorted(self.config.seeds))
        for number, name in enumerate(hits.names):
            seeds = self.config.seeds[name]
            if seeds.retrieve == "sample":
                self._by_sample(inputs, number, seeds, hits, scratch / f"{name}.f16")
            elif seeds.retrieve == "cluster":
                self._by_cluster(inputs, number, seeds, hits)
        retrieved = hits.grouped()
        del hits
        balanced = self._balanced(inputs)
        everything = not self.config.seeds and balanced is None
        for view in inputs.shards("pool"):
            yield view.collection, view.shard, _table(view, retrieved, balanced, everything)

    def _by_sample(self, inputs: ReduceInputs, number: int, seeds: SeedConfig, hits: Hits, path: Path) -> None:
        index = load(inputs.artefacts("index"), verify=False)  # every vector is checked when it is compared
        if not len(index):
            return
        name = hits.names[number]
        images = gather(inputs.shards(f"seeds/{name}"), schema.EMBED, path)
        if isinstance(index, IvfPqIndex):
            index.probing = self._probing(index, images, name)
        free = _Free(index, self.num_threads) if self.config.retrieve.collisions == "next_neighbour" else None
        # Seeds take turns in the order of their ids, so that collisions are settled the same for any sharding.
        order = np.lexsort((images.keys[:, 1], images.keys[:, 0]))
        k = min(seeds.k, len(index))
        for start, stop in blocks(len(order), max(1, min(_QUERIES, _MAX_NEIGHBOURS // k))):
            queries_QD, keys_Q2 = images.vectors[order[start:stop]], images.keys[order[start:stop]]
            if free is None:
                found = index.search(queries_QD, k, num_threads=self.num_threads)
                hits.add(number, found.keys.reshape(-1, 2), found.similarities.reshape(-1), keys_Q2.repeat(k, axis=0))
            elif taken := list(free.take(queries_QD, k)):
                query_H, keys_H2, similarities_H = (np.concatenate(parts) for parts in zip(*taken, strict=True))
                hits.add(number, keys_H2, similarities_H, keys_Q2[query_H])
        path.unlink()

    def _probing(self, index: IvfPqIndex, images: Gathered, name: str) -> Probing:
        """Return how the index is searched so that it finds what is asked for, of a sample of a seed set."""
        config = self.config.index
        ranks_N = hash_keys(images.keys, self.config.seed)
        rows = np.lexsort((images.keys[:, 1], images.keys[:, 0], ranks_N))[:NUM_QUERIES]
        return tune(
            index,
            images.vectors[rows],
            images.keys[rows],
            config.recall,
            config.probes,
            config.depth,
            self.num_threads,
            f"images of seeds/{name}",
        )

    def _by_cluster(self, inputs: ReduceInputs, number: int, seeds: SeedConfig, hits: Hits) -> None:
        counts = np.zeros(0, np.int64)
        for view in inputs.shards(f"seeds/{hits.names[number]}"):
            clusters_N, _ = _clusters(view)
            more = np.bincount(clusters_N, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        chosen = np.flatnonzero(counts > seeds.min_seed_images)
        sample = ClusterSample(self.config.seed, seeds.images_per_cluster, seeds.max_images)
        for view in inputs.shards("pool"):
            clusters_N, rows = _clusters(view)
            mine = np.isin(clusters_N, chosen)
            sample.add(clusters_N[mine], _keys(view, rows[mine]))
        hits.add(number, sample.result())

    def _balanced(self, inputs: ReduceInputs) -> npt.NDArray[Any] | None:
        """Return the images that balanced sampling selects, sorted as bytes; None where it is not asked for."""
        budget = self.config.retrieve.balanced_images
        if budget is None:
            return None
        tree = Tree.load(inputs.artefacts("cluster_fit") / TREE_FILE)
        sizes_K = np.zeros(len(tree.centroids[0]), np.int64)
        for view in inputs.shards("pool"):
            sizes_K += np.bincount(_clusters(view)[0], minlength=len(sizes_K))
        sample = QuotaSample(shares(sizes_K, tree.parents, budget, self.config.seed), self.config.seed)
        for view in inputs.shards("pool"):
            clusters_N, rows = _clusters(view)
            sample.add(clusters_N, _keys(view, rows))
        return np.sort(as_bytes(sample.result()))


class _Free:
    """Pool images that no seed image of a set has taken.

    Args:
        index: Of the pool.
        num_threads: Of searches.
    """

    def __init__(self, index: Index, num_threads: int) -> None:
        self._index = index
        self._num_threads = num_threads
        self._is_free = np.ones(len(index), bool)
        self._num_free = len(index)

    def take(self, queries_QD: Vectors, k: int) -> Iterator[tuple[Rows, Keys, Similarities]]:
        """Yield, for each query, its number and the keys and similarities of what it takes, one entry an image taken.

        It takes the ``k`` nearest images that are free when its turn comes.

        All queries are searched at once, deeper than ``k``. From the first that finds too few of these still free, a
        part is searched again among what is free by then, so every search serves at least the queries that would fill
        its depth by themselves. (Deeper searches for one query instead took minutes for 500 seed images of one kind.)
        """
        start, size, depth = 0, len(queries_QD), 2 * k
        while start < len(queries_QD) and self._num_free:
            stop = min(start + size, len(queries_QD))
            depth = min(depth, self._num_free)
            found = self._index.search(
                queries_QD[start:stop], depth, num_threads=self._num_threads, among_N=self._is_free
            )
            for query in range(start, stop):
                wanted = min(k, self._num_free)
                (places,) = np.nonzero(self._is_free[found.rows[query - start]])
                if len(places) < wanted:
                    stop, size = query, 32
                    break
                places = places[:wanted]
                self._is_free[found.rows[query - start, places]] = False
                self._num_free -= wanted
                yield (
                    np.full(wanted, query),
                    found.keys[query - start, places],
                    found.similarities[query - start, places],
                )
            start, size, depth = stop, 2 * size, 8 * k


class ClusterSample:
    """Up to ``per_cluster`` images of each cluster and ``total`` in all: those with the smallest hashes of (seed, key).

    A row that is behind ``total`` others now will never be in front of them again, so no more than that many are kept,
    and about as many wait.
    """

    def __init__(self, seed: int, per_cluster: int, total: int) -> None:
        self.seed = seed
        self.per_cluster = per_cluster
        self.total = total
        self._limit: np.uint64 | None = None  # hash of the last kept row once ``total`` rows are kept
        self._clusters: list[Rows] = [np.empty(0, np.int64)]
        self._ranks: list[Ranks] = [np.empty(0, np.uint64)]
        self._keys: list[Keys] = [np.empty((0, 2), np.uint64)]
        self._num_pending = 0

    def add(self, clusters_N: Rows, keys_N2: Keys) -> None:
        """Offer rows: cluster numbers and unique keys."""
        ranks_N = hash_keys(keys_N2, self.seed)
        if self._limit is not None:
            near = ranks_N <= self._limit
            clusters_N, ranks_N, keys_N2 = clusters_N[near], ranks_N[near], keys_N2[near]
        self._clusters.append(clusters_N)
        self._ranks.append(ranks_N)
        self._keys.append(keys_N2)
        self._num_pending += len(keys_N2)
        if self._num_pending > max(_MIN_PENDING, self.total):
            self._compact()

    def result(self) -> Keys:
        """Return the keys of the sample, in order of their hashes."""
        self._compact()
        return self._keys[0]

    def _compact(self) -> None:
        clusters, ranks = np.concatenate(self._clusters), np.concatenate(self._ranks)
        keys = np.concatenate(self._keys)
        order = np.lexsort((keys[:, 1], keys[:, 0], ranks, clusters))
        start = np.searchsorted(clusters[order], clusters[order])  # of each row's cluster
        order = order[np.arange(len(order)) - start < self.per_cluster]
        order = order[np.lexsort((keys[order, 1], keys[order, 0], ranks[order]))][: self.total]
        self._clusters, self._ranks, self._keys = [clusters[order]], [ranks[order]], [keys[order]]
        self._num_pending = 0
        if len(order) == self.total:
            self._limit = ranks[order[-1]]


def _clusters(view: ShardView) -> tuple[Rows, Rows]:
    """Return the clusters of a shard's kept rows that have one, and these rows."""
    clusters = view.read(schema.CLUSTER, ["cluster_id"]).column(0)
    rows = np.flatnonzero(view.kept & clusters.is_valid().to_numpy())
    return clusters.take(pa.array(rows)).to_numpy().astype(np.int64), rows


def _keys(view: ShardView, rows: Rows) -> Keys:
    return keys_from_hex(view.read(schema.FETCH, ["image_id"]).column(0).take(pa.array(rows)).to_pylist())


def _table(view: ShardView, retrieved: Retrieved, balanced: npt.NDArray[Any] | None, everything: bool) -> pa.Table:
    rows = np.flatnonzero(view.kept)
    keys = _keys(view, rows)
    images = np.full(view.num_rows, -1)
    images[rows] = retrieved.find(keys)
    selected = np.zeros(view.num_rows, bool)
    if balanced is not None:
        selected[rows] = among(balanced, as_bytes(keys))
    left: npt.NDArray[np.bool_] = view.kept & (images < 0) & ~selected & (not everything)
    columns = {
        "reject_reason": pa.array(np.where(left, "not_retrieved", ""), pa.string(), mask=~left),
        schema.BALANCED.name: pa.array(selected, mask=~view.kept | (balanced is None)),
    }
    columns |= retrieved.columns(images)
    return pa.table([columns[name] for name in schema.RETRIEVE.schema.names], schema=schema.RETRIEVE.schema)
