"""What the report shows of clusters: sizes, members with thumbnails, drift, and a map of the embeddings.

Memory: some tens of bytes a cluster, the members that are shown, and one shard.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.indexes.keys import keys_from_hex
from curation.indexes.sampling import HashSample, hash_keys
from curation.pipelines.components import size_bins
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan
from curation.pipelines.tallies import finished_verdicts, is_finished, read_aligned, shard_rows, steadily
from curation.pipelines.thumbnails import Place, look_up, takedowns, thumbnails
from curation.report.data import Cluster, Clusters, EmbeddingMap, Member
from curation.report.embedding_map import embedding_map
from curation.report.overview import DriftOverview
from curation.stages.cluster_summary import DRIFT_FILE, SIZES_FILE, ClusterSummary
from curation.stages.vectors import usable

NUM_LARGEST = 50
NUM_DRAWN = 25
NUM_NEAREST = 6
NUM_OTHERS = 6
MAP_IMAGES = 4000  # of each collection
MAP_SHARDS = 64  # of each collection: reading all embeddings of a large pool would take days
_PICKED = np.dtype([("cluster", "i4"), ("rank", "f8"), ("high", "u8"), ("low", "u8"), ("shard", "i4"), ("row", "i4")])
_Picked = npt.NDArray[np.void]


def drift(context: Context) -> DriftOverview | None:
    """Return how new images lie in the clusters, or None before ``cluster`` is finished."""
    found = _artefact(context, DRIFT_FILE)
    return None if found is None else DriftOverview(**json.loads(found))


def clusters(context: Context, plan: Plan) -> Clusters | None:
    """Return the clusters of the pool, or None before ``cluster`` is finished."""
    rows = shard_rows(context, "pool")
    found = _artefact(context, SIZES_FILE)
    if rows is None or found is None or not is_finished(context.run, "pool", "cluster", rows):
        return None
    sizes = pq.read_table(io.BytesIO(found))
    counts_K = sizes.column("pool").to_numpy()
    largest, drawn = chosen(counts_K, context.config.seed)
    members = _members(context, plan, rows, np.concatenate([largest, drawn]))

    def cluster(number: int) -> Cluster:
        names = [name for name in sizes.column_names if name.startswith("seeds/")]
        seeds = [(name.removeprefix("seeds/"), sizes.column(name)[number].as_py()) for name in names]
        seeds = sorted((entry for entry in seeds if entry[1]), key=lambda entry: (-entry[1], entry[0]))
        return Cluster(number, int(counts_K[number]), tuple(seeds), *members[number])

    values, numbers = np.unique(counts_K, return_counts=True)
    return Clusters(
        num_clusters=len(counts_K),
        num_empty=int((counts_K == 0).sum()),
        bins=size_bins({int(size): int(number) for size, number in zip(values, numbers, strict=True) if size}),
        largest=tuple(map(cluster, largest.tolist())),
        drawn=tuple(map(cluster, drawn.tolist())),
    )


def chosen(counts_K: npt.NDArray[np.int64], seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the numbers of the largest clusters, largest first, and of some others, drawn by the seed."""
    order = np.lexsort((np.arange(len(counts_K)), -counts_K))
    order = order[counts_K[order] > 0]
    largest, others = order[:NUM_LARGEST], order[NUM_LARGEST:]
    keys_N2 = np.stack([np.zeros(len(others), np.uint64), others.astype(np.uint64)], axis=1)
    return largest, np.sort(others[np.argsort(hash_keys(keys_N2, seed), kind="stable")[:NUM_DRAWN]])


def embeddings(context: Context) -> EmbeddingMap | None:
    """Return a map of a seeded sample of the embeddings of pool and seeds, or None before they are finished."""
    samples = {}
    for kind in ("pool", "seeds"):
        for collection in context.collections(kind):
            rows = shard_rows(context, collection)
            if rows and is_finished(context.run, collection, "embed", rows):
                sample = _sample(context, collection, rows)
                if len(sample):
                    samples[collection] = sample
    return embedding_map(samples) if "pool" in samples else None


def _sample(context: Context, collection: str, rows: Mapping[int, int]) -> npt.NDArray[np.float16]:
    seed = context.config.seed
    shards = np.array(sorted(rows), np.uint64)
    keys_N2 = np.stack([np.zeros(len(shards), np.uint64), shards], axis=1)
    sample = HashSample(seed, MAP_IMAGES)
    for shard in shards[np.argsort(hash_keys(keys_N2, seed), kind="stable")[:MAP_SHARDS]].tolist():
        column = read_aligned(context.run, collection, "embed", shard, ["embedding"], rows[shard]).column(0)
        if not pa.types.is_fixed_size_list(column.type):
            continue  # a table without any embedding
        vectors_ND, mine = usable(column, np.ones(rows[shard], bool), f"embed of {collection} shard {shard:08d}")
        ids = read_aligned(context.run, collection, "fetch", shard, ["image_id"], rows[shard]).column(0)
        keys = keys_from_hex(ids.take(pa.array(mine)).to_pylist())
        _, first = np.unique(keys, axis=0, return_index=True)  # equal bytes under two addresses
        sample.add(keys[first], vectors_ND[first])
    found: npt.NDArray[np.float16] = sample.result().rows
    return found


def _members(
    context: Context, plan: Plan, rows: Mapping[int, int], numbers: npt.NDArray[np.int64]
) -> dict[int, tuple[tuple[Member, ...], tuple[Member, ...]]]:
    """Return members of clusters: those nearest to the centroid, and some others."""
    nearest, drawn = np.zeros(0, _PICKED), np.zeros(0, _PICKED)
    for shard, num_rows in rows.items():
        found = _of_shard(context, shard, num_rows, numbers)
        keys_N2 = np.stack([found["high"], found["low"]], axis=1)
        nearest = _first_of_each(np.concatenate([nearest, found]), NUM_NEAREST)
        found["rank"] = hash_keys(keys_N2, context.config.seed)
        drawn = _first_of_each(np.concatenate([drawn, found]), NUM_NEAREST + NUM_OTHERS)
    drawn = drawn[~np.isin(_place_of(drawn), _place_of(nearest))]
    drawn = _first_of_each(drawn, NUM_OTHERS)
    shown = _with_thumbnails(context, plan, rows, np.concatenate([nearest, drawn]))

    def of(picked: _Picked, number: int) -> tuple[Member, ...]:
        return tuple(shown[int(one["shard"]), int(one["row"])] for one in picked[picked["cluster"] == number])

    return {number: (of(nearest, number), of(drawn, number)) for number in numbers.tolist()}


def _of_shard(context: Context, shard: int, num_rows: int, numbers: npt.NDArray[np.int64]) -> _Picked:
    """Return the rows of a shard that are in given clusters, ranked by their similarity with the centroid."""
    columns = ["cluster_id", "cluster_similarity"]
    table = read_aligned(context.run, "pool", "cluster", shard, columns, num_rows)
    clusters_N = table.column(0).fill_null(-1).to_numpy()
    mine = np.flatnonzero(np.isin(clusters_N, numbers))
    ids = read_aligned(context.run, "pool", "fetch", shard, ["image_id"], num_rows).column(0).take(pa.array(mine))
    found = np.zeros(len(mine), _PICKED)
    found["cluster"], found["shard"], found["row"] = clusters_N[mine], shard, mine
    found["rank"] = -table.column(1).take(pa.array(mine)).to_numpy()
    keys_N2 = keys_from_hex(ids.to_pylist())
    found["high"], found["low"] = keys_N2[:, 0], keys_N2[:, 1]
    return found


def _first_of_each(picked: _Picked, number: int) -> _Picked:
    """Return at most ``number`` of each cluster: smallest ranks first, ties by image id."""
    picked = picked[np.lexsort((picked["low"], picked["high"], picked["rank"], picked["cluster"]))]
    starts = np.searchsorted(picked["cluster"], picked["cluster"], side="left")
    return picked[np.arange(len(picked)) - starts < number]


def _place_of(picked: _Picked) -> npt.NDArray[np.int64]:
    places: npt.NDArray[np.int64] = picked["shard"].astype(np.int64) << 32 | picked["row"]
    return places


def _with_thumbnails(
    context: Context, plan: Plan, rows: Mapping[int, int], picked: _Picked
) -> dict[tuple[int, int], Member]:
    """Return what is shown of each place, by shard and row."""
    verdicts, excluded = finished_verdicts(context, plan, "pool", dict(rows)), takedowns(context)
    places: list[Place] = []
    for shard in np.unique(picked["shard"]).tolist():
        mine = pa.array(np.unique(picked["row"][picked["shard"] == shard]))
        found = look_up(context, verdicts, excluded, shard, rows[shard], mine)
        table = read_aligned(context.run, "pool", "cluster", shard, ["cluster_similarity"], rows[shard])
        for place, similarity in zip(found, table.column(0).take(mine).to_pylist(), strict=True):
            places.append(replace(place, member=replace(place.member, similarity=similarity)))
    pictures = thumbnails(context, rows, places)
    return {
        (place.shard, place.row): replace(place.member, thumbnail=pictures.get((place.shard, place.row)))
        for place in places
    }


def _artefact(context: Context, name: str) -> bytes | None:
    """Return a file of the newest summary; None before there is one."""

    def read() -> bytes | None:
        marker = context.run.artefact_marker(ClusterSummary.name)
        return None if marker is None else context.run.read_bytes(marker.files[name])

    return steadily(read)
