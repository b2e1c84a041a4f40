"""Group images of equal bytes and of equal PCA hash, over all shards, in bounded memory; each group keeps one.

Rows are spilled into buckets by hash, grouped bucket by bucket, and their verdicts spilled back by shard. The kept image
has the largest pixel area, then the largest byte size, then the smallest image id, then the smallest URL.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.schema import Table
from curation.spill import MAX_BUCKETS, Spill, buckets_for
from curation.stage import ReduceInputs, ShardView

_ROWS = pa.schema(
    [
        schema.PCA_HASH_BITS,
        schema.IMAGE_ID,
        pa.field("area", pa.int64()),
        schema.NUM_BYTES,
        schema.URL,
        pa.field("place", pa.int64()),  # shard number in the order of shards << 32 | row
    ]
)
_VERDICTS = pa.schema([pa.field("place", pa.int64()), *schema.PCA_HASH_VERDICT.schema])


class PcaHashGroups:
    """Reject all but one image of each group as ``exact_duplicate`` or ``hash_duplicate``; keep all URLs."""

    name: ClassVar[str] = "pca_hash_verdict"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (schema.CRAWL, schema.FETCH, schema.PCA_HASH)
    writes: Table | None = schema.PCA_HASH_VERDICT
    artefacts: tuple[str, ...] = ()

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield one verdict table a shard of the pool and of each seed set; seeds are grouped by their bytes alone."""
        for number, collection in enumerate([*inputs.collections("pool"), *inputs.collections("seeds")]):
            yield from _group(inputs, collection, scratch / str(number))


def _group(inputs: ReduceInputs, collection: str, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
    shards = [(view.shard, view.num_rows) for view in inputs.shards(collection)]
    num_buckets = buckets_for(sum(num_rows for _, num_rows in shards))
    rows = Spill(scratch / "rows", _ROWS, num_buckets)
    for index, view in enumerate(inputs.shards(collection)):
        table = _candidates(view, index)
        rows.add(table, _buckets(table, num_buckets))
    groups = max(1, min(MAX_BUCKETS, len(shards)))
    verdicts = Spill(scratch / "verdicts", _VERDICTS, groups)
    for bucket in range(num_buckets):
        found = pa.Table.from_pylist(list(_verdicts(rows.read(bucket).to_pylist())), schema=_VERDICTS)
        verdicts.add(found, (found.column("place").to_numpy() >> 32) * groups // max(1, len(shards)))
    for group in range(groups):
        table = verdicts.read(group)
        owner = table.column("place").to_numpy() >> 32
        for index in range(-(-group * len(shards) // groups), -(-(group + 1) * len(shards) // groups)):
            shard, num_rows = shards[index]
            yield collection, shard, _row_aligned(table.take(pa.array(np.flatnonzero(owner == index))), num_rows)


def _candidates(view: ShardView, index: int) -> pa.Table:
    links = view.read(schema.CRAWL, ["url"])
    images = view.read(schema.FETCH, ["image_id", "width", "height", "num_bytes"])
    rows = np.flatnonzero(view.kept & images.column("image_id").is_valid().to_numpy())
    take = pa.array(rows)
    images = images.take(take)
    area = images.column("width").to_numpy().astype(np.int64) * images.column("height").to_numpy()
    in_pool = view.collection == "pool"
    return pa.table(
        [
            view.read(schema.PCA_HASH).column(0).take(take) if in_pool else pa.nulls(len(rows), pa.uint64()),
            images.column("image_id"),
            pa.array(area),
            images.column("num_bytes"),
            links.column("url").take(take),
            pa.array((index << 32) | rows),
        ],
        schema=_ROWS,
    )


def _buckets(table: pa.Table, num_buckets: int) -> npt.NDArray[np.int64]:
    """Return a bucket for each row; equal bytes have equal hashes, so one bucket holds both kinds of groups whole."""
    hashes = table.column("pca_hash")
    first = np.array([int(image_id[:16], 16) for image_id in table.column("image_id").to_pylist()], np.uint64)
    bits = np.where(hashes.is_valid().to_numpy(), hashes.fill_null(0).to_numpy(), first).astype(np.uint64)
    return ((bits * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)).astype(np.int64) % num_buckets


def _verdicts(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rows.sort(key=lambda row: (-row["area"], -row["num_bytes"], row["image_id"], row["url"]))
    urls: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        urls[row["image_id"]].add(row["url"])
    by_bytes: set[str] = set()
    by_hash: dict[int, str] = {}
    for row in rows:
        verdict: dict[str, Any] = {"place": row["place"], "reject_reason": None, "duplicate_of": None, "urls": None}
        image_id, bits = row["image_id"], row["pca_hash"]
        if image_id in by_bytes:
            verdict |= {"reject_reason": "exact_duplicate", "duplicate_of": image_id}
        elif bits is not None and bits in by_hash:
            verdict |= {"reject_reason": "hash_duplicate", "duplicate_of": by_hash[bits]}
        else:
            verdict["urls"] = sorted(urls[image_id])
            if bits is not None:
                by_hash[bits] = image_id
        by_bytes.add(image_id)
        yield verdict


def _row_aligned(found: pa.Table, num_rows: int) -> pa.Table:
    wanted = schema.PCA_HASH_VERDICT.schema
    if not found.num_rows:
        return pa.table([pa.nulls(num_rows, field.type) for field in wanted], schema=wanted)
    place = np.full(num_rows, -1, np.int64)
    place[found.column("place").to_numpy() & 0xFFFFFFFF] = np.arange(found.num_rows)
    return found.combine_chunks().select(wanted.names).take(pa.array(place, mask=place < 0))
