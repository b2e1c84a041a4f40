"""Data comes in: links are read and cut into shards, and a shard's images are fetched into its raw tar."""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation import schema
from curation.config import InputConfig, RunConfig
from curation.crawl import Fetched, Link, read_inputs
from curation.crawl import fetch as fetch_links
from curation.crawl.cut import cut
from curation.errors import InputError, StageError
from curation.fingerprint import fingerprint
from curation.pipelines.context import Context
from curation.pipelines.units import Unit, crawl_marker
from curation.store import Marker
from curation.tars import TarWriter


def inputs_of(config: RunConfig, collection: str) -> Sequence[InputConfig]:
    """Return the inputs of ``pool``, ``seeds/<name>`` or ``references/<name>``."""
    kind, _, name = collection.partition("/")
    if kind == "pool":
        return config.pool.inputs
    return (config.seeds if kind == "seeds" else config.references)[name].inputs


def crawl(context: Context, unit: Unit) -> int:
    """Read a collection's inputs, cut their links into shards and commit them; return the number of links.

    Raises:
        InputError: If the pool has no images.
    """
    start = time.monotonic()
    run, collection = context.run, unit.collection
    skipped: Counter[str] = Counter()

    def report(reason: str) -> None:
        skipped[reason] += 1

    digests: list[str] = []
    total = 0
    with tempfile.TemporaryDirectory(prefix="curation-crawl-") as scratch:
        links = read_inputs(inputs_of(context.config, collection), context.config, report)
        for shard, table in enumerate(cut(links, context.config, Path(scratch))):
            total += table.num_rows
            if shard == 0 and total == 0 and collection == "pool":
                found = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "nothing else"
                raise InputError(f"pool.inputs name no image (also seen: {found}); check their paths and kinds")
            if shard == 0:  # a crash half way must not leave old and new shards mixed
                run.remove(f"artefacts/{crawl_marker(collection)}.json")
            marker = run.commit(
                collection, "crawl", shard, table, {"fingerprint": unit.fingerprint, "inputs": unit.inputs}
            )
            digests.append(marker.digest)
    made = Marker(
        fingerprint=unit.fingerprint,
        digest=fingerprint({"shards": digests}),
        num_rows=total,
        files={},
        inputs=unit.inputs,
        num_shards=len(digests),
        seconds=time.monotonic() - start,
        skipped=dict(sorted(skipped.items())),
    )
    run.commit_artefacts(crawl_marker(collection), {}, made)
    return total


def links_of(context: Context, collection: str, shard: int) -> list[Link]:
    """Return the links of a shard, row by row."""
    rows = context.run.read_table(collection, "crawl", shard).to_pylist()
    return [Link(**{**row, "page_urls": tuple(row["page_urls"])}) for row in rows]


def fetch(context: Context, unit: Unit) -> int:
    """Fetch a shard's links, check the images, and store them in its raw tar; return the number of rows.

    Reference images of local sets are checked but not copied.
    """
    start = time.monotonic()
    run, collection = context.run, unit.collection
    if unit.shard is None:
        raise StageError("fetch", None, "works on shards, but was given none")
    links = links_of(context, collection, unit.shard)
    in_place = collection.startswith("references/")
    rows: list[dict[str, Any] | None] = [None] * len(links)
    raw = run.new_path(collection, "raw", unit.shard, "tar")
    with run.create(raw) as stream, TarWriter(stream) as tar:
        for fetched in fetch_links(links, context.config, context.should_stop):
            store = not (in_place and links[fetched.index].source_kind != "web")
            rows[fetched.index] = _row(fetched, tar if store else None)
            context.on_rows(1)
    if context.should_stop():
        run.remove(raw)
        raise InterruptedError
    missing = sum(row is None for row in rows)
    if missing:
        run.remove(raw)
        raise StageError("fetch", unit.shard, f"{missing} of {len(links)} links came to no result")
    run.commit(
        collection,
        "fetch",
        unit.shard,
        pa.Table.from_pylist(rows, schema=schema.FETCH.schema),
        {
            "fingerprint": unit.fingerprint,
            "inputs": unit.inputs,
            "files": {"raw": raw},
            "seconds": time.monotonic() - start,
        },
    )
    return len(links)


def image_id(data: bytes) -> str:
    """Return the first 128 bits of the sha256 of the bytes, in hex."""
    return hashlib.sha256(data).hexdigest()[:32]


def _row(fetched: Fetched, tar: TarWriter | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "reject_reason": fetched.reject_reason,
        "http_status": fetched.http_status,
        "num_redirects": fetched.num_redirects,
        "received_bytes": fetched.received_bytes,
        "etag": fetched.etag,
        "last_modified": fetched.last_modified,
        "fetch_ms": fetched.fetch_ms,
        "fetch_detail": fetched.detail or None,
    }
    if fetched.data is not None and fetched.info is not None and fetched.reject_reason is None:
        row |= {
            "image_id": image_id(fetched.data),
            "width": fetched.info.width,
            "height": fetched.info.height,
            "format": fetched.info.format,
            "num_bytes": len(fetched.data),
        }
        if tar is not None:
            row["raw_offset"] = tar.add(row["image_id"], fetched.data, fetched.info.format)
    return row
