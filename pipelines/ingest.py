"""Data comes in: links are read and cut into shards, and a shard's images are fetched into its raw tar."""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation import schema
from curation.config import RunConfig
from curation.config.inputs import InputConfig
from curation.crawl.cut import cut
from curation.crawl.inputs import read_part
from curation.crawl.links import Fetched, Link, from_table
from curation.crawl.merge import FOUND, compacted, moved, with_hashes
from curation.errors import CorruptError, InputError, StageError
from curation.fingerprint import fingerprint
from curation.pipelines.context import Context
from curation.pipelines.extension import extend
from curation.pipelines.redact import record, redact
from curation.pipelines.retry import retried_rows
from curation.pipelines.units import Reading, Unit, crawl_marker
from curation.store import Marker
from curation.tars import TarWriter


def inputs_of(config: RunConfig, collection: str) -> Sequence[InputConfig]:
    """Return the inputs of ``pool``, ``seeds/<name>`` or ``references/<name>``."""
    kind, _, name = collection.partition("/")
    if kind == "pool":
        return config.pool.inputs
    return (config.seeds if kind == "seeds" else config.references)[name].inputs


def input_names(inputs: Sequence[InputConfig]) -> list[str]:
    """Return a name for what each input's settings say; settings that later versions have change none."""
    return [fingerprint(entry.model_dump(mode="json", exclude_defaults=True)) for entry in inputs]


def read(context: Context, unit: Unit) -> int:
    """Read one part of a collection's inputs and keep its links for the cut; return their number.

    Raises:
        InputError: If an input cannot be read at all.
    """
    start = time.monotonic()
    run, reading, number = context.run, _reading(unit), unit.shard
    if reading.part is None or number is None:
        raise StageError("crawl", number, "reads a part of the inputs, but was not told which")
    skipped: Counter[str] = Counter()

    def report(reason: str) -> None:
        skipped[reason] += 1

    source = inputs_of(context.config, unit.collection)[reading.part.source]
    path = run.new_path(parts_of(unit.collection), reading.key, number, "arrow")
    num_rows = 0
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with run.create(path) as stream, pa.ipc.new_stream(stream, FOUND, options=options) as writer:
        links = _with_positions(read_part(reading.part, source, context.config, report))
        for table in compacted(links, context.config.crawl.max_pages_per_link):
            if context.should_stop():
                raise InterruptedError
            writer.write_table(table)
            num_rows += table.num_rows
            context.on_rows(table.num_rows)
    made = Marker(
        fingerprint=unit.fingerprint,
        digest="",
        num_rows=num_rows,
        files={"links": path},
        seconds=time.monotonic() - start,
        skipped=dict(sorted(skipped.items())),
    )
    run.write_marker(parts_of(unit.collection), reading.key, number, made)
    return num_rows


def cut_parts(context: Context, unit: Unit) -> int:
    """Cut the links of all parts into shards and commit them; return the number of links.

    Raises:
        InputError: If the pool has no images.
    """
    start = time.monotonic()
    run, collection, reading = context.run, unit.collection, _reading(unit)
    markers = run.markers(parts_of(collection), reading.key)
    skipped = sum((Counter(marker.skipped) for marker in markers.values()), Counter())
    names = input_names(inputs_of(context.config, collection))
    if unit.extend:
        seconds = sum(marker.seconds for marker in markers.values())
        return extend(context, unit, _all_found(context, unit, markers), names, skipped, seconds)
    digests: list[str] = []
    total = 0
    with tempfile.TemporaryDirectory(prefix="curation-crawl-") as scratch:
        for shard, table in enumerate(cut(_all_found(context, unit, markers), context.config, Path(scratch))):
            total += table.num_rows
            if shard == 0 and sum(marker.num_rows for marker in markers.values()) == 0 and collection == "pool":
                found = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "nothing else"
                raise InputError(f"pool.inputs name no image (also seen: {found}); check their paths and kinds")
            if context.should_stop():
                raise InterruptedError
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
        read=names,
    )
    run.commit_artefacts(crawl_marker(collection), {}, made)
    return total


def parts_of(collection: str) -> str:
    """Return the folder of the run in which a crawl keeps what it has read."""
    return f"work/crawl/{collection.replace('/', '.')}"


def _reading(unit: Unit) -> Reading:
    if unit.reading is None:
        raise StageError("crawl", unit.shard, "reads and cuts parts of inputs, but was given none")
    return unit.reading


def _with_positions(tables: Iterable[pa.Table], position: int = 0) -> Iterator[pa.Table]:
    for table in tables:
        found, position = with_hashes(table, position)
        yield found


def _all_found(context: Context, unit: Unit, markers: Mapping[int, Marker]) -> Iterator[pa.Table]:
    """Yield what all parts found; positions go on from part to part.

    Raises:
        CorruptError: A part is damaged; the next run reads all of them again.
    """
    start = 0
    for number, marker in sorted(markers.items()):
        end = start
        try:
            with context.run.open(marker.files["links"]) as stream:
                for batch in pa.ipc.open_stream(stream):
                    table, last = moved(pa.Table.from_batches([batch]), start)
                    end = max(end, last + 1)
                    yield table
        except (pa.ArrowException, OSError, CorruptError) as error:
            context.run.remove_folder(parts_of(unit.collection))
            raise CorruptError(
                f"{context.run.url}: part {number} of the crawl is damaged; run again: {error}"
            ) from error
        start = end


def links_of(context: Context, collection: str, shard: int) -> list[Link]:
    """Return the links of a shard, row by row; one that is not kept has an empty URL."""
    table = context.run.read_table(collection, schema.CRAWL.name, shard)
    place = table.schema.get_field_index("url")
    return list(from_table(table.set_column(place, schema.URL, table.column(place).fill_null(""))))


def fetch(context: Context, unit: Unit) -> int:
    """Fetch a shard's links, check the images, and store them in its raw tar; return the number of rows.

    Reference images of local sets are checked but not copied. Rows that are settled are not fetched: those of
    blocklisted images, whose link is not kept, and those that a later shard tries again.
    """
    from curation.crawl.fetcher import fetch as fetch_links  # an HTTP client takes a while to import

    start = time.monotonic()
    run, collection, shard = context.run, unit.collection, unit.shard
    if shard is None:
        raise StageError("fetch", None, "works on shards, but was given none")
    links = links_of(context, collection, shard)
    rows: list[dict[str, Any] | None] = [None if link.url else {"reject_reason": "blocklisted"} for link in links]
    for row, reason in retried_rows(context, collection, shard).items():
        rows[row] = {"reject_reason": reason, "fetch_detail": "tried again in a later shard"}
    todo = [row for row, settled in enumerate(rows) if settled is None]
    context.on_rows(len(links) - len(todo))
    in_place = collection.startswith("references/")
    blocked: dict[str, str] = {}
    raw = run.new_path(collection, "raw", shard, "tar")
    with run.create(raw) as stream, TarWriter(stream) as tar:
        for fetched in fetch_links([links[row] for row in todo], context.config, context.should_stop):
            row = todo[fetched.index]
            store = not (in_place and links[row].source_kind != "web")
            rows[row] = _row(fetched, tar if store else None)
            if fetched.sha256 is not None:
                blocked[fetched.sha256] = fetched.list_name or ""
            context.on_rows(1)
    if context.should_stop():
        run.remove(raw)
        raise InterruptedError
    missing = sum(row is None for row in rows)
    if missing:
        run.remove(raw)
        raise StageError("fetch", shard, f"{missing} of {len(links)} links came to no result")
    if blocked:  # before the rows are committed: nobody would come back for the links
        record(context, collection, shard, blocked)
        gone = [row is not None and row["reject_reason"] == "blocklisted" for row in rows]
        redact(context, collection, shard, np.array(gone))
    run.commit(
        collection,
        "fetch",
        shard,
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
    if fetched.sha256 is not None:
        return {"reject_reason": fetched.reject_reason}  # what else is known of it may lead to it
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
            "image_id": fetched.image_id,
            "width": fetched.info.width,
            "height": fetched.info.height,
            "format": fetched.info.format,
            "num_bytes": len(fetched.data),
        }
        if tar is not None:
            row["raw_offset"] = tar.add(row["image_id"], fetched.data, fetched.info.format)
            row["raw_id"] = fetched.stored_id
    return row
