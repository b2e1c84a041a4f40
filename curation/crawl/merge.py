"""Rows of one URL become one row, a table at a time.

Merging is associative and does not depend on order: parts may be merged wherever and whenever memory asks for it.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.crawl.bulk import hash_urls
from curation.spill import MAX_BUCKETS, Spill

# Rows on their way to their shards. Positions are those of local sets among themselves; rows of the web have 0.
FOUND = pa.schema(
    [
        *schema.CRAWL.schema,
        pa.field("url_hash", pa.uint64()),
        pa.field("host_hash", pa.uint64()),
        pa.field("position", pa.int64()),
    ]
)

_HELD_BYTES = 32 << 20  # of rows that wait to be merged; merging takes a few times as much
_HASH_BYTES = 8


def with_hashes(links: pa.Table, position: int) -> tuple[pa.Table, int]:
    """Return rows of ``schema.CRAWL`` with the columns of ``FOUND``, and the next position.

    Args:
        links: Rows as read.
        position: Of the first row that is not of the web.
    """
    urls = links.column("url").combine_chunks()
    url_hashes, host_hashes = hash_urls(urls)
    is_local = pc.not_equal(links.column("source_kind"), "web").to_numpy(zero_copy_only=False)
    positions = np.where(is_local, position + np.cumsum(is_local) - 1, 0)
    columns = [*links.columns, pa.array(url_hashes), pa.array(host_hashes), pa.array(positions, pa.int64())]
    return pa.table(columns, schema=FOUND), position + int(is_local.sum())


def moved(rows: pa.Table, start: int) -> tuple[pa.Table, int]:
    """Return rows whose local positions start at ``start`` instead of 0, and the largest of them (below it: none)."""
    is_local = pc.not_equal(rows.column("source_kind"), "web").to_numpy(zero_copy_only=False)
    positions = np.where(is_local, rows.column("position").to_numpy() + start, 0)
    last = int(positions[is_local].max()) if is_local.any() else start - 1
    return _with(rows, "position", pa.array(positions, pa.int64())), last


def merge(rows: pa.Table, max_pages: int) -> pa.Table:
    """Return one row for each URL, sorted by the hash of the URL.

    Where a URL comes more than once, the local row with the smallest position says where the bytes are; the smallest
    ``opt_out`` and ``extra`` stay, and the first ``max_pages`` of the pages, sorted.
    """
    if rows.num_rows == 0:
        return rows
    rows = rows.combine_chunks()
    group, rows = _grouped(rows)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    if len(first) == rows.num_rows:
        return rows
    kept = rows.take(pa.array(first))
    for name in ("opt_out", "extra"):
        kept = _with(kept, name, _smallest(group, rows.column(name), len(first)))
    return _with(kept, "page_urls", _pages(group, rows.column("page_urls"), len(first), max_pages))


def _grouped(rows: pa.Table) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Return rows sorted by URL hash, URL, and what makes the first of a group; and the number of each one's group."""
    hashes = rows.column("url_hash").to_numpy()
    is_web = pc.equal(rows.column("source_kind"), "web").to_numpy(zero_copy_only=False)
    order = np.lexsort((rows.column("position").to_numpy(), is_web, hashes))
    rows = rows.take(pa.array(order)).combine_chunks()
    hashes = hashes[order]
    urls = rows.column("url").combine_chunks()
    new_hash = hashes[1:] != hashes[:-1]
    new_url = pc.not_equal(urls.slice(1), urls.slice(0, len(urls) - 1)).to_numpy(zero_copy_only=False)
    if (new_url & ~new_hash).any():  # two URLs with one hash: put those of one URL side by side
        keys = ["url_hash", "url", "is_web", "position"]
        sorted_rows = rows.append_column("is_web", pa.array(is_web[order])).sort_by(
            [(key, "ascending") for key in keys]
        )
        rows = sorted_rows.drop_columns(["is_web"]).combine_chunks()
        urls = rows.column("url").combine_chunks()
        new_url = pc.not_equal(urls.slice(1), urls.slice(0, len(urls) - 1)).to_numpy(zero_copy_only=False)
    return np.concatenate(([0], np.cumsum(new_url))).astype(np.int64), rows


def _smallest(group: npt.NDArray[np.int64], values: Any, num_groups: int) -> pa.Array:
    """Return the smallest value of each group, null where all are."""
    is_valid = values.is_valid().to_numpy(zero_copy_only=False)
    if not is_valid.any():
        return pa.nulls(num_groups, values.type)
    known = pa.table({"group": group[is_valid], "value": values.filter(pa.array(is_valid))})
    smallest = known.group_by("group").aggregate([("value", "min")])
    places = np.full(num_groups, -1)
    places[smallest.column("group").to_numpy()] = np.arange(smallest.num_rows)
    return smallest.column("value_min").combine_chunks().take(pa.array(places, mask=places < 0))


def _pages(group: npt.NDArray[np.int64], pages: Any, num_groups: int, max_pages: int) -> pa.Array:
    """Return the pages of each group, sorted, each once, at most ``max_pages``."""
    lengths = pc.list_value_length(pages).fill_null(0).to_numpy()
    flat = pages.combine_chunks().flatten()
    pairs = pa.table({"group": np.repeat(group, lengths), "page": flat})
    pairs = pairs.group_by(["group", "page"]).aggregate([]).sort_by([("group", "ascending"), ("page", "ascending")])
    groups = pairs.column("group").to_numpy()
    starts = np.searchsorted(groups, np.arange(num_groups))
    is_kept = np.arange(len(groups)) - starts[groups] < max_pages
    counts = np.bincount(groups[is_kept], minlength=num_groups)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    texts = pairs.column("page").filter(pa.array(is_kept)).combine_chunks()
    return pa.ListArray.from_arrays(pa.array(offsets), texts)


def _with(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values)


def compacted(tables: Iterable[pa.Table], max_pages: int, held_bytes: int = _HELD_BYTES) -> Iterator[pa.Table]:
    """Yield the same rows with what repeats near by merged already: pages of one site show the same images."""
    held: list[pa.Table] = []
    num_bytes = 0
    for table in tables:
        held.append(table)
        num_bytes += table.nbytes
        if num_bytes >= held_bytes:
            yield merge(pa.concat_tables(held), max_pages)
            held, num_bytes = [], 0
    if held:
        yield merge(pa.concat_tables(held), max_pages)


def unique(
    tables: Iterable[pa.Table], scratch: Path, max_pages: int, held_bytes: int = _HELD_BYTES, level: int = 0
) -> Iterator[pa.Table]:
    """Yield every URL's row once, in tables that fit into memory, however many rows there are.

    Rows are merged whenever so many of them are held. Where that does not help, all are spilled to buckets by a byte of
    their URL's hash, and each bucket is treated the same way.

    Args:
        tables: With the columns of ``FOUND``.
        scratch: A folder of this machine.
        max_pages: See ``merge``.
        held_bytes: About so much is held.
        level: The byte of the hash that would tell buckets apart.
    """
    rows = iter(tables)
    held: list[pa.Table] = []
    num_bytes = 0
    for table in rows:
        if table.num_rows:
            held.append(table)
        num_bytes += table.nbytes
        if num_bytes < held_bytes:
            continue
        held = [merge(pa.concat_tables(held), max_pages)]
        num_bytes = held[0].nbytes
        if num_bytes > held_bytes // 2 and level < _HASH_BYTES:
            with Spill(scratch, FOUND, MAX_BUCKETS) as spill:
                for more in chain(held, rows):
                    spill.add(more, _bucket(more, level))
                del held, more
            for bucket in range(MAX_BUCKETS):
                folder = scratch / f"{bucket:02x}"
                yield from unique(spill.batches(bucket), folder, max_pages, held_bytes, level + 1)
                spill.forget(bucket)
            return
    if held:
        yield merge(pa.concat_tables(held), max_pages)


def _bucket(table: pa.Table, level: int) -> npt.NDArray[np.int64]:
    hashes = table.column("url_hash").to_numpy()
    shift = np.uint64(8 * (_HASH_BYTES - 1 - level))
    buckets: npt.NDArray[np.int64] = ((hashes >> shift) & np.uint64(MAX_BUCKETS - 1)).astype(np.int64)
    return buckets
