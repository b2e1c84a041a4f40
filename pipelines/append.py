"""More shards for a collection that has been crawled: what is there stays as it is, byte for byte.

New shards get the numbers behind the last one. They exist once the collection's crawl marker, written last, counts
them; what a killed attempt has left behind that number is cleared up by the next writer.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from curation import schema
from curation.errors import StageError
from curation.fingerprint import fingerprint
from curation.pipelines.context import Context
from curation.pipelines.units import crawl_marker
from curation.store import Marker


def crawled(context: Context, collection: str) -> Marker:
    """Return the crawl marker of a collection.

    Raises:
        StageError: There is none.
    """
    marker = context.run.artefact_marker(crawl_marker(collection))
    if marker is None:
        raise StageError("crawl", None, f"{collection} has not been crawled")
    return marker


def append(
    context: Context, collection: str, shards: Iterable[tuple[pa.Table, pa.Table | None]], changes: dict[str, Any]
) -> Marker:
    """Commit new shards of a collection, and return its crawl marker as it is then.

    Args:
        context: Of the run; the caller holds its lease, or works for who does.
        collection: One that has been crawled.
        shards: Of each, rows of ``schema.CRAWL``, and of ``schema.RETRY`` where it tries rows again.
        changes: Fields of the crawl marker that change, beside those that count shards.
    """
    run, old = context.run, crawled(context, collection)
    made = {"fingerprint": old.fingerprint, "inputs": old.inputs, **changes}
    cause = {"fingerprint": made["fingerprint"], "inputs": made["inputs"]}
    shard, num_rows, is_retry = old.num_shards, old.num_rows, False
    for links, retry in shards:
        run.commit(collection, schema.CRAWL.name, shard, links, cause)
        if retry is not None:
            is_retry = True
            run.commit(collection, schema.RETRY.name, shard, retry, cause)
        num_rows += links.num_rows
        shard += 1
    markers = run.markers(collection, schema.CRAWL.name)
    digest = fingerprint({"shards": [markers[number].digest for number in range(shard)]})
    retries = [*old.retries, [old.num_shards, shard]] if is_retry else old.retries
    grown = {"num_shards": shard, "num_rows": num_rows, "digest": digest, "retries": retries}
    return run.commit_artefacts(crawl_marker(collection), {}, Marker(**{**asdict(old), **made, **grown}))
