"""Unique links, cut into shards, in bounded memory.

Links of the web go to shards by a hash of their host, so that politeness is local to a shard; one host is spread over
at most ``host_spread`` shards, and the order in which links were found does not matter. Images of local sets keep
their order, so that files are read from front to back.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from curation import schema
from curation.config import RunConfig
from curation.crawl.links import Link
from curation.spill import MAX_BUCKETS, Spill

_SEEN = schema.CRAWL.schema.append(pa.field("position", pa.int64()))
_BATCH = 10_000


def cut(links: Iterable[Link], config: RunConfig, scratch: Path) -> Iterator[pa.Table]:
    """Yield one ``schema.CRAWL`` table a shard, in the order of shards; at least one, though it be empty.

    A URL that comes more than once is one row; all of its pages are kept.
    """
    unique, num_web, num_local, end = _unique(links, scratch)
    web_shards = -(-num_web // config.shards.rows)
    local_shards = -(-num_local // config.shards.rows)
    num_shards = max(1, web_shards + local_shards)
    groups = min(num_shards, MAX_BUCKETS)
    placed = Spill(scratch / "shards", _SEEN.append(pa.field("shard", pa.int64())), groups)
    for bucket in range(unique.num_buckets):
        table = unique.read(bucket)
        shards = np.array(
            [
                _web_shard(url, config.crawl.host_spread, web_shards)
                if kind == "web"
                else web_shards + position * local_shards // max(end, 1)
                for url, kind, position in zip(
                    *(table.column(name).to_pylist() for name in ("url", "source_kind", "position")), strict=True
                )
            ],
            dtype=np.int64,
        )
        placed.add(table.append_column("shard", pa.array(shards)), shards * groups // num_shards)
    for group in range(groups):
        table = placed.read(group).sort_by([("shard", "ascending"), ("position", "ascending"), ("url", "ascending")])
        shards = table.column("shard").to_numpy()
        first, last = -(-group * num_shards // groups), -(-(group + 1) * num_shards // groups)
        for shard in range(first, last):
            begin, stop = np.searchsorted(shards, [shard, shard + 1])
            yield table.slice(begin, stop - begin).select(schema.CRAWL.schema.names).combine_chunks()


def _unique(links: Iterable[Link], scratch: Path) -> tuple[Spill, int, int, int]:
    """Return unique links by bucket, the number of web and of local ones, and the end of local positions."""
    seen = Spill(scratch / "seen", _SEEN, MAX_BUCKETS)
    batch: list[Link] = []
    position = 0
    for link in links:
        batch.append(link)
        if len(batch) == _BATCH:
            position = _spill(seen, batch, position)
            batch.clear()
    position = _spill(seen, batch, position)
    unique = Spill(scratch / "unique", _SEEN, MAX_BUCKETS)
    num_web = num_local = 0
    for bucket in range(MAX_BUCKETS):
        rows: dict[str, dict[str, object]] = {}
        pages: dict[str, set[str]] = {}
        for row in seen.read(bucket).to_pylist():
            rows.setdefault(row["url"], row)
            pages.setdefault(row["url"], set()).update(row["page_urls"])
        for url, row in rows.items():
            row["page_urls"] = sorted(pages[url])
            num_web += row["source_kind"] == "web"
        num_local += sum(row["source_kind"] != "web" for row in rows.values())
        unique.add(pa.Table.from_pylist(list(rows.values()), schema=_SEEN), np.full(len(rows), bucket))
    return unique, num_web, num_local, position


def _spill(seen: Spill, batch: list[Link], position: int) -> int:
    """Write links with their position among local ones, 0 for those of the web; return the next position."""
    rows = []
    for link in batch:
        is_local = link.source_kind != "web"
        row = {name: getattr(link, name) for name in schema.CRAWL.schema.names}
        rows.append(row | {"position": position if is_local else 0})
        position += is_local
    buckets = [_hash(link.url) % MAX_BUCKETS for link in batch]
    seen.add(pa.Table.from_pylist(rows, schema=_SEEN), buckets)
    return position


def _web_shard(url: str, host_spread: int, web_shards: int) -> int:
    host = urlsplit(url).hostname or ""
    return (_hash(host) + _hash(url) % host_spread) % web_shards


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest())
