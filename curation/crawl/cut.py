"""Unique links, cut into shards, in bounded memory.

Links of the web go to shards by a hash of their host, so that politeness is local to a shard. A host with many links is
spread over up to ``crawl.host_spread`` shards that lie side by side, and over more only where they would hold more than
``_HOST_ROWS`` times ``shards.rows`` of its links; each row says how many share the host, so that its rate can be
divided. The order in which links were found does not matter. Images of local sets keep their order, so that files are
read from front to back.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.config import RunConfig
from curation.crawl.bulk import Hashes
from curation.crawl.merge import FOUND, unique
from curation.spill import MAX_BUCKETS, Spill

_HOST_ROWS = 100
_SORTED_ROWS = 300_000  # at a time; shards that have more are sorted one by one
_PLACED = FOUND.append(pa.field("shard", pa.int64()))
_COUNTS = pa.schema([pa.field("host_hash", pa.uint64()), pa.field("num_rows", pa.int64())])


def cut(tables: Iterable[pa.Table], config: RunConfig, scratch: Path) -> Iterator[pa.Table]:
    """Yield one ``schema.CRAWL`` table a shard, in the order of shards; at least one, though it be empty.

    A URL that comes more than once is one row; all of its pages are kept, up to ``crawl.max_pages_per_link``.

    Args:
        tables: With the columns of ``merge.FOUND``.
        config: How many rows a shard has, and how hosts are spread.
        scratch: A folder of this machine with space for the links, twice.
    """
    rows = Spill(scratch / "unique", FOUND, 1)
    hosts = Spill(scratch / "hosts", _COUNTS, MAX_BUCKETS)
    num_web = num_local = end = 0
    with rows, hosts:
        for table in unique(tables, scratch / "seen", config.crawl.max_pages_per_link):
            rows.add(table, np.zeros(table.num_rows, np.int64))
            of_web = table.filter(pc.equal(table.column("source_kind"), "web"))
            counts = _counts(of_web)
            hosts.add(counts, (counts.column("host_hash").to_numpy() % np.uint64(MAX_BUCKETS)).astype(np.int64))
            num_web += of_web.num_rows
            num_local += table.num_rows - of_web.num_rows
            end = max(end, pc.max(table.column("position")).as_py() + 1)
    spread = _Spread(hosts, config, -(-num_web // config.shards.rows))
    local_shards = -(-num_local // config.shards.rows)
    num_shards = max(1, spread.num_shards + local_shards)
    placed = (_placed(table, spread, local_shards, end) for table in rows.batches(0))
    yield from _in_order(placed, 0, num_shards, scratch / "placed")


def _counts(of_web: pa.Table) -> pa.Table:
    hashes, counts = np.unique(of_web.column("host_hash").to_numpy(), return_counts=True)
    return pa.table([hashes, counts.astype(np.int64)], schema=_COUNTS)


class _Spread:
    """Which shard a link of the web goes to.

    Args:
        hosts: Rows of each host, in pieces, by bucket.
        config: See ``cut``.
        num_shards: Shards for links of the web.
    """

    def __init__(self, hosts: Spill, config: RunConfig, num_shards: int) -> None:
        self.num_shards = num_shards
        rows, spread = config.shards.rows, config.crawl.host_spread
        heavy, shares = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for bucket in range(hosts.num_buckets):
            counts = hosts.read(bucket)
            if not counts.num_rows:
                continue
            found = counts.group_by("host_hash").aggregate([("num_rows", "sum")])
            num_rows = found.column("num_rows_sum").to_numpy()
            wanted = np.minimum(-(-num_rows * spread // rows), np.minimum(spread, num_rows))
            wanted = np.minimum(np.maximum(wanted, -(-num_rows // (_HOST_ROWS * rows))), num_shards)
            is_heavy = wanted > 1
            heavy.append(found.column("host_hash").to_numpy()[is_heavy])
            shares.append(wanted[is_heavy])
        order = np.argsort(np.concatenate(heavy))
        self._heavy, self._shares = np.concatenate(heavy)[order], np.concatenate(shares)[order]

    def shares(self, host_hashes: Hashes) -> npt.NDArray[np.int64]:
        """Return over how many shards each host is spread."""
        if not len(self._heavy):
            return np.ones(len(host_hashes), np.int64)
        places = np.minimum(np.searchsorted(self._heavy, host_hashes), len(self._heavy) - 1)
        return np.where(self._heavy[places] == host_hashes, self._shares[places], 1)

    def shards(self, host_hashes: Hashes, url_hashes: Hashes, shares: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the shard of each link: the one of its host, or one of those behind it."""
        # The low bits of the hash: the high ones tell buckets apart, and are alike within one.
        further = (url_hashes % shares.astype(np.uint64)).astype(np.int64)
        first = (host_hashes % np.uint64(max(1, self.num_shards))).astype(np.int64)
        return (first + further) % max(1, self.num_shards)


def _placed(table: pa.Table, spread: _Spread, local_shards: int, end: int) -> pa.Table:
    is_web = pc.equal(table.column("source_kind"), "web").to_numpy(zero_copy_only=False)
    hosts = table.column("host_hash").to_numpy()
    shares = spread.shares(hosts)
    of_web = spread.shards(hosts, table.column("url_hash").to_numpy(), shares)
    of_local = spread.num_shards + table.column("position").to_numpy() * local_shards // max(end, 1)
    place = table.schema.get_field_index("host_shards")
    table = table.set_column(place, table.schema.field(place), pa.array(shares, pa.int32(), mask=~is_web))
    return table.append_column(_PLACED.field("shard"), pa.array(np.where(is_web, of_web, of_local), pa.int64()))


def _in_order(tables: Iterable[pa.Table], first: int, stop: int, scratch: Path) -> Iterator[pa.Table]:
    """Yield the tables of the shards from ``first`` up to, and without, ``stop``.

    Where they have more than ``_SORTED_ROWS`` rows, these are spilled to groups of neighbouring shards first.

    Args:
        tables: With the columns of ``_PLACED``, of these shards only.
        first: A shard.
        stop: A shard.
        scratch: A folder of this machine.
    """
    rows = iter(tables)
    held = [_PLACED.empty_table()]
    num_rows, num_shards = 0, stop - first
    for table in rows:
        held.append(table)
        num_rows += table.num_rows
        if num_rows > _SORTED_ROWS and num_shards > 1:
            groups = min(MAX_BUCKETS, num_shards)
            with Spill(scratch, _PLACED, groups) as spill:
                for more in chain(held, rows):
                    spill.add(more, (more.column("shard").to_numpy() - first) * groups // num_shards)
            held.clear()
            for group in range(groups):
                begin, end = (first + -(-edge * num_shards // groups) for edge in (group, group + 1))
                yield from _in_order(spill.batches(group), begin, end, scratch / f"{group:02x}")
                spill.forget(group)
            return
    together = pa.concat_tables(held).combine_chunks()
    held.clear()
    together = together.sort_by([("shard", "ascending"), ("position", "ascending"), ("url", "ascending")])
    shards = together.column("shard").to_numpy()
    for shard in range(first, stop):
        begin, end = np.searchsorted(shards, [shard, shard + 1])
        yield together.slice(begin, end - begin).select(schema.CRAWL.schema.names).combine_chunks()
