"""A collection whose inputs have grown: links that it does not have yet form new shards.

An input that was added to the settings is read by the next run. A file or folder that has grown in place cannot be
told without reading it: ``curate run --extend`` reads all inputs again. Links that the collection has stay as they are.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from curation import schema
from curation.crawl.cut import cut
from curation.crawl.known import KnownUrls
from curation.pipelines.append import append, crawled
from curation.pipelines.context import Context
from curation.pipelines.ingest import input_names, inputs_of, links_of_parts, tally_of_parts
from curation.pipelines.units import Unit, crawl_marker


def unread(context: Context, collection: str, everything: bool) -> tuple[int, ...]:
    """Return the numbers of the inputs to be read.

    Those that were added to the ones that have been read; none where some of these are gone or say something else, as
    that may be another selection altogether. ``everything``: all of them.
    """
    read = crawled(context, collection).read
    names = input_names(inputs_of(context.config, collection))
    if everything:
        return tuple(range(len(names)))
    is_addition = bool(read) and set(read) <= set(names)
    return tuple(number for number, name in enumerate(names) if is_addition and name not in read)


def extend(context: Context, unit: Unit) -> int:
    """Commit shards of the links that are new among those that the parts of a crawl hold; return how many there are."""
    start = time.monotonic()
    collection = unit.collection
    inputs = inputs_of(context.config, collection)
    before = crawled(context, collection)
    _, skipped = tally_of_parts(context, unit)
    changes = {"fingerprint": unit.fingerprint, "inputs": unit.inputs, "read": input_names(inputs)}
    with tempfile.TemporaryDirectory(prefix="curation-extend-") as scratch:
        known = KnownUrls(Path(scratch) / "known")
        for shard in range(before.num_shards):
            urls = context.run.read_table(collection, schema.CRAWL.name, shard, ["url"]).column(0)
            known.add(urls.drop_null().to_pylist())
        tables = cut(_new(links_of_parts(context, unit), known, skipped), context.config, Path(scratch))
        after = append(context, collection, ((table, None) for table in tables if table.num_rows), changes)
    if len(unit.extend) < len(inputs):
        skipped.update(before.skipped)
    seconds = before.seconds + time.monotonic() - start
    context.run.commit_artefacts(
        crawl_marker(collection), {}, replace(after, skipped=dict(sorted(skipped.items())), seconds=seconds)
    )
    return after.num_rows - before.num_rows


def _new(tables: Iterable[pa.Table], known: KnownUrls, skipped: Counter[str]) -> Iterator[pa.Table]:
    for table in tables:
        is_new = known.lacks(table.column("url").to_pylist())
        if not is_new.all():
            skipped["known"] += int((~is_new).sum())
        yield table.filter(pa.array(is_new))
