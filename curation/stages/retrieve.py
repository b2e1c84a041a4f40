"""Retrieve pool images towards seed sets.

Sample-based: the ``k`` nearest pool images of each seed image. Cluster-based: from every cluster that holds more than
``min_seed_images`` seed images, up to ``images_per_cluster`` images, at most ``max_images`` in all; which ones is decided
by the smallest hashes of (seed, image id). A pool image may be retrieved more than once: ``nominal_count`` says how often.
Without seed sets every image is kept.

Source: Oquab et al. 2023, "DINOv2", section 3 and appendix A.4 (arXiv 2304.07193).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config import RunConfig, SeedConfig
from curation.indexes.flat import FlatIndex
from curation.indexes.keys import Keys, hex_from_keys
from curation.indexes.sampling import HashSample
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView
from curation.stages.vectors import of_shard

_QUERIES = 4096
_TABLE = schema.RETRIEVE.schema


@dataclass
class _Hit:
    """What retrieved a pool image."""

    seeds: set[str] = field(default_factory=set)
    count: int = 0
    similarity: float = -np.inf
    seed_image_id: str | None = None

    def add(self, name: str, similarity: float | None = None, seed_image_id: str | None = None) -> None:
        self.seeds.add(name)
        self.count += 1
        if similarity is not None and seed_image_id is not None:
            better = (-similarity, seed_image_id) < (-self.similarity, self.seed_image_id or "")
            if better:
                self.similarity, self.seed_image_id = similarity, seed_image_id


class RetrieveStage:
    """Keep what seed sets retrieve; reject the rest as ``not_retrieved``."""

    name: ClassVar[str] = "retrieve"
    version: ClassVar[int] = 1
    writes: Table | None = schema.RETRIEVE
    artefacts: tuple[str, ...] = ()

    reads: tuple[Table, ...] = (schema.FETCH, schema.EMBED, schema.CLUSTER)

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield one table a shard of the pool."""
        hits: dict[str, _Hit] = defaultdict(_Hit)
        for name, seeds in sorted(self.config.seeds.items()):
            if seeds.retrieve == "sample":
                self._by_sample(inputs, name, seeds, hits)
            elif seeds.retrieve == "cluster":
                self._by_cluster(inputs, name, seeds, hits)
        everything = not self.config.seeds
        for view in inputs.shards("pool"):
            yield view.collection, view.shard, _table(view, hits, everything)

    def _by_sample(
        self, inputs: ReduceInputs, name: str, seeds: SeedConfig, hits: dict[str, _Hit]
    ) -> None:
        index = FlatIndex.load(inputs.artefacts("index"))
        if not len(index):
            return
        taken: set[int] = set()
        for vectors_QD, keys_Q2 in _in_key_order(inputs, f"seeds/{name}"):
            for start in range(0, len(keys_Q2), _QUERIES):
                queries, keys = vectors_QD[start : start + _QUERIES], keys_Q2[start : start + _QUERIES]
                if self.config.retrieve.collisions == "keep_nominal":
                    found = _nearest(index, queries, seeds.k)
                else:
                    found = _next_free(index, queries, seeds.k, taken)
                for seed_id, neighbours in zip(hex_from_keys(keys), found, strict=True):
                    for image_id, similarity in neighbours:
                        hits[image_id].add(name, similarity, seed_id)

    def _by_cluster(
        self, inputs: ReduceInputs, name: str, seeds: SeedConfig, hits: dict[str, _Hit]
    ) -> None:
        seed_counts: Counter[int] = Counter()
        for view in inputs.shards(f"seeds/{name}"):
            clusters = view.read(schema.CLUSTER, ["cluster_id"]).column(0).to_pylist()
            seed_counts.update(cluster for cluster, kept in zip(clusters, view.kept, strict=True) if kept and cluster is not None)
        samples = {
            cluster: HashSample(self.config.seed, seeds.images_per_cluster)
            for cluster, count in seed_counts.items()
            if count > seeds.min_seed_images
        }
        for view in inputs.shards("pool"):
            _, keys_N2, rows = of_shard(view, schema.EMBED)
            clusters_N = view.read(schema.CLUSTER, ["cluster_id"]).column(0).fill_null(-1).to_numpy()[rows]
            for cluster in samples.keys() & set(clusters_N.tolist()):
                mine = np.flatnonzero(clusters_N == cluster)
                samples[cluster].add(keys_N2[mine], np.zeros((len(mine), 0), np.int8))
        chosen = HashSample(self.config.seed, seeds.max_images)
        for cluster in sorted(samples):
            keys_N2 = samples[cluster].result().keys
            chosen.add(keys_N2, np.zeros((len(keys_N2), 0), np.int8))
        for image_id in hex_from_keys(chosen.result().keys):
            hits[image_id].add(name)


def _in_key_order(
    inputs: ReduceInputs, collection: str
) -> Iterator[tuple[npt.NDArray[np.float16], Keys]]:
    """Yield all seed vectors of a collection, ordered by key: collisions are settled the same for any sharding."""
    parts = [of_shard(view, schema.EMBED)[:2] for view in inputs.shards(collection)]
    vectors, keys = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    distinct = order[np.unique(keys[order], axis=0, return_index=True)[1]] if len(order) else order
    yield vectors[distinct], keys[distinct]


def _nearest(index: FlatIndex, queries_QD: npt.NDArray[np.float16], k: int) -> list[list[tuple[str, float]]]:
    found = index.search(queries_QD, min(k, len(index)), num_threads=1)
    ids = hex_from_keys(found.keys.reshape(-1, 2))
    width = found.keys.shape[1]
    return [
        [(ids[query * width + place], float(found.similarities[query, place])) for place in range(width)]
        for query in range(len(queries_QD))
    ]


def _next_free(
    index: FlatIndex, queries_QD: npt.NDArray[np.float16], k: int, taken: set[int]
) -> list[list[tuple[str, float]]]:
    """Return the ``k`` nearest images of each query that no earlier query took; looks further while too few are free."""
    results: list[list[tuple[str, float]]] = [[] for _ in queries_QD]
    depth = min(len(index), 4 * k)
    found = index.search(queries_QD, depth, num_threads=1)
    for query in range(len(queries_QD)):
        mine, wide = found, depth
        place = query
        while True:
            free = [
                spot for spot, row in enumerate(mine.rows[place].tolist()) if row >= 0 and row not in taken
            ][:k]
            if len(free) == min(k, len(index) - len(taken)) or wide == len(index):
                break
            wide = min(len(index), wide * 4)
            mine, place = index.search(queries_QD[query : query + 1], wide, num_threads=1), 0
        taken.update(mine.rows[place][free].tolist())
        ids = hex_from_keys(mine.keys[place][free])
        results[query] = [(image_id, float(mine.similarities[place][spot])) for image_id, spot in zip(ids, free, strict=True)]
    return results


def _table(view: ShardView, hits: dict[str, _Hit], everything: bool) -> pa.Table:
    ids = view.read(schema.FETCH, ["image_id"]).column(0).to_pylist()
    rows: list[dict[str, Any]] = []
    for image_id, kept in zip(ids, view.kept.tolist(), strict=True):
        hit = hits.get(image_id) if kept else None
        if hit is not None:
            rows.append(
                {
                    "seeds": sorted(hit.seeds),
                    "seed_image_id": hit.seed_image_id,
                    "seed_similarity": hit.similarity if hit.seed_image_id is not None else None,
                    "nominal_count": hit.count,
                }
            )
        else:
            rows.append({"reject_reason": "not_retrieved"} if kept and not everything else {})
    return pa.Table.from_pylist(rows, schema=_TABLE)

