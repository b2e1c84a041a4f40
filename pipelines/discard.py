"""Discard images that a list of ``fetch.blocked_hashes`` has come to name after they were fetched.

Nothing of them stays: bytes are cut out of tars, features and links out of every table of the shard, published
manifests and reports are deleted. What was computed of the other images stays fresh: the tables of their shard are
committed with fingerprints of the tables that they stand on now. Verdicts of the whole run become stale by that, and
are made again by the next run.

The table of fetch, which shows that there is something to discard, is committed last; a file says so meanwhile, so that
a killed ``curate purge`` is finished before anybody works on a shard that is half done.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.blocklist import blocklists
from curation.errors import StoreError
from curation.fingerprint import content_digest, fingerprint
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan
from curation.pipelines.redact import record, redact, redact_retried, without
from curation.pipelines.tar_rewrite import BLURRED, RAW, rewrite
from curation.store import Marker, Run

UNFINISHED = "discarding.json"
_PUBLISHED = ("manifest.parquet", "manifest.json", "published.json", "report.html", "embedding_map.png")


@dataclass(frozen=True)
class Listed:
    """Images of a shard that are on a list.

    Attributes:
        collection: Of the shard.
        shard: Its number.
        found: Row → (sha256 in hex, name of the list).
    """

    collection: str
    shard: int
    found: dict[int, tuple[str, str]]


def listed(context: Context) -> Iterator[Listed]:
    """Yield, shard by shard, the images that were fetched and are on a list now."""
    lists = blocklists(context.config.fetch.blocked_hashes)
    for kind in ("pool", "seeds", "references") if lists else ():
        for collection in context.collections(kind):
            for shard in context.run.markers(collection, schema.FETCH.name):
                ids = context.run.read_table(collection, schema.FETCH.name, shard, ["image_id"]).column(0)
                if found := lists.find(ids.to_pylist()):
                    yield Listed(collection, shard, found)


def check_finished(context: Context) -> None:
    """Refuse to work on a run in which images are half discarded.

    Raises:
        StoreError: It says what to do.
    """
    if context.run.exists(UNFINISHED):
        raise StoreError(f"{context.run.url}: `curate purge` was interrupted; run it again first")


def discard(context: Context, plan: Plan) -> int:
    """Discard them, and return how many there were; the caller holds the lease."""
    run, num_images = context.run, 0
    for each in listed(context):
        if not num_images:
            run.write_bytes(UNFINISHED, b"{}")
        _discard(context, plan, each)
        num_images += len(each.found)
    if num_images or run.exists(UNFINISHED):
        for step in plan.steps:
            if step.kind == "reduce" and step.makes and not step.fitted:
                run.forget("", step.name, None)
        run.collect_garbage([name for kind in ("pool", "seeds", "references") for name in context.collections(kind)])
        for name in _PUBLISHED:
            run.remove(name)
        for folder in ("work", "stopped"):
            run.remove_folder(folder)
        run.remove(UNFINISHED)
    return num_images


def _discard(context: Context, plan: Plan, each: Listed) -> None:
    run, collection, shard = context.run, each.collection, each.shard
    record(context, collection, shard, dict(each.found.values()))
    fetched = run.marker(collection, schema.FETCH.name, shard)
    if fetched is None:
        return
    table = run.read_table(collection, schema.FETCH.name, shard)
    rows = np.zeros(table.num_rows, bool)
    rows[list(each.found)] = True
    redact(context, collection, shard, rows)
    names = table.column("image_id").to_pylist()
    raw, refused = rewrite(run, (collection, "raw", shard), fetched, names, _refused(table, rows), RAW)
    digests = {schema.FETCH.name: (fetched.digest, content_digest(refused))}
    for step in plan.steps:
        marker = None if step.writes is None else run.marker(collection, step.name, shard)
        if marker is None or step.kind in ("crawl", "fetch"):
            continue
        left = without(run.read_table(collection, step.name, shard), rows)
        files, left = rewrite(run, (collection, "images", shard), marker, names, left, BLURRED)
        digests[step.name] = (marker.digest, content_digest(left))
        covers = {table.name: digests.get(table.name) for table in step.existing(step.after, collection, plan)}
        run.commit(collection, step.name, shard, left, {**_relinked(marker, digests, covers), "files": files})
        _remove(run, marker)
    run.commit(collection, schema.FETCH.name, shard, refused, {**_relinked(fetched, digests, {}), "files": raw})
    _remove(run, fetched)
    redact_retried(context, collection, shard)


def _remove(run: Run, marker: Marker) -> None:
    for path in marker.files.values():
        run.remove(path)


def _refused(fetched: pa.Table, rows: npt.NDArray[np.bool_]) -> pa.Table:
    """Return the table of ``fetch`` with rows that say that they are blocklisted and nothing else."""
    table = without(fetched, rows)
    place = table.schema.get_field_index("reject_reason")
    reasons = pc.if_else(pa.array(rows), "blocklisted", table.column(place))
    return table.set_column(place, table.schema.field(place), reasons)


def _relinked(
    marker: Marker, digests: Mapping[str, tuple[str, str]], covers: Mapping[str, tuple[str, str] | None]
) -> dict[str, Any]:
    """Return what a marker says of its causes once the tables that it was made from have other content digests.

    Args:
        marker: The old one.
        digests: Table → content digest before and after.
        covers: The same of the verdicts whose kept rows it covers; None: that one was not there or is made again.
    """
    inputs = dict(marker.inputs)
    for name, (before, after) in digests.items():
        if inputs.get(f"table {name}") == before:
            inputs[f"table {name}"] = after
    known = {name: pair for name, pair in covers.items() if pair is not None}
    before, after = (fingerprint({name: pair[side] for name, pair in known.items()}) for side in (0, 1))
    return {
        "fingerprint": fingerprint(inputs),
        "inputs": inputs,
        "covers": after if marker.covers == before else marker.covers,
        "seconds": marker.seconds,
    }
