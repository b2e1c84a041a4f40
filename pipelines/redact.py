"""What is left of the link of a blocklisted image: a row that says so, and nothing that leads to it.

The tables of crawl and fetch are committed anew without what would identify the link, under the content digest that
they had: nothing that was made from the other rows is made again.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.pipelines.context import Context
from curation.pipelines.units import crawl_marker, is_retry

_NO_TRACE = ("reject_reason", "http_status", "num_redirects", "received_bytes", "fetch_ms")  # lead to no link


def record(context: Context, collection: str, shard: int, found: Mapping[str, str]) -> None:
    """Add to what a shard's images were recognised as; an image that is recorded keeps its time.

    Args:
        context: Of the run.
        collection: Of the shard.
        shard: Number of the shard.
        found: sha256 of each image, in hex → name of the list.
    """
    run, name = context.run, schema.BLOCKLISTED.name
    old = run.marker(collection, name, shard)
    rows = {} if old is None else {row["sha256"]: row for row in run.read_table(collection, name, shard).to_pylist()}
    now = datetime.now(UTC).replace(microsecond=0)
    new = {sha256: {"sha256": sha256, "time": now, "list": listed} for sha256, listed in found.items()}
    if new.keys() <= rows.keys():
        return
    table = pa.Table.from_pylist([row for _, row in sorted((new | rows).items())], schema.BLOCKLISTED.schema)
    run.commit(collection, name, shard, table, {"fingerprint": ""})


def redact(context: Context, collection: str, shard: int, rows: npt.NDArray[np.bool_]) -> None:
    """Take the links of rows out of a shard: URL, pages, place in a local set, further columns."""
    links = context.run.read_table(collection, schema.CRAWL.name, shard)
    if not (rows & links.column("url").is_valid().to_numpy()).any():
        return
    context.run.replace(collection, schema.CRAWL.name, shard, without(links, rows, keep=("source_kind",)))


def without(table: pa.Table, rows: npt.NDArray[np.bool_], keep: Iterable[str] = ()) -> pa.Table:
    """Return a table with nulls in place of what it says of some rows, but for the columns to ``keep``."""
    stays = pa.array(np.where(rows, -1, np.arange(len(rows))), mask=rows)
    columns = [
        column if field.name in keep else column.combine_chunks().take(stays)
        for field, column in zip(table.schema, table.columns, strict=True)
    ]
    return pa.table(columns, schema=table.schema)


def redact_retried(context: Context, collection: str, shard: int) -> None:
    """Redact the rows that a shard's blocklisted rows had tried again, and those that these had, and so on.

    Only one process may do this at a time: rows of several shards may lead to the same one.
    """
    is_made = context.run.marker(collection, schema.FETCH.name, shard) is not None
    if is_made and context.run.marker(collection, schema.BLOCKLISTED.name, shard) is not None:
        _redact_before(context, collection, shard)


def _redact_before(context: Context, collection: str, shard: int) -> None:
    run = context.run
    crawled = run.artefact_marker(crawl_marker(collection))
    if crawled is None or not is_retry(crawled, shard):
        return
    gone = run.read_table(collection, schema.CRAWL.name, shard, ["url"]).column(0).is_null().to_numpy()
    places = run.read_table(collection, schema.RETRY.name, shard, ["retry_of"]).column(0).to_numpy()[gone]
    for before in np.unique(places >> 32).tolist():
        table = run.read_table(collection, schema.FETCH.name, before)
        rows = np.zeros(table.num_rows, bool)
        rows[places[places >> 32 == before] & 0xFFFFFFFF] = True
        urls = run.read_table(collection, schema.CRAWL.name, before, ["url"]).column(0)
        if (rows & urls.is_valid().to_numpy()).any():
            # What servers and errors said first: the row is found again by its URL until that is gone, which goes last.
            run.replace(collection, schema.FETCH.name, before, without(table, rows, keep=_NO_TRACE))
            redact(context, collection, before, rows)
        _redact_before(context, collection, before)


def redact_all_retried(context: Context, collection: str) -> None:
    """Finish what a killed process has left."""
    crawled = context.run.artefact_marker(crawl_marker(collection))
    for first, stop in crawled.retries if crawled is not None else ():
        for shard in range(first, stop):
            redact_retried(context, collection, shard)
