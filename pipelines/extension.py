"""A collection whose inputs have grown: links that it does not have yet form new shards.

An input that was added to the settings is read by the next run. A file or folder that has grown in place cannot be
told without reading it: ``curate run --extend`` reads all inputs again. Links that the collection has stay as they are.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from curation import schema
from curation.crawl.cut import cut
from curation.crawl.known import KnownUrls
from curation.pipelines.append import append, crawled
from curation.pipelines.context import Context
from curation.pipelines.units import Unit, crawl_marker


def unread(read: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of inputs that were added to those that have been read.

    None where some of these are gone or say something else: that may be another selection altogether.

    Args:
        read: Names of the inputs that were read; empty where that is not known.
        names: Of all inputs, as they are now.
    """
    is_addition = bool(read) and set(read) <= set(names)
    return tuple(number for number, name in enumerate(names) if is_addition and name not in read)


def extend(
    context: Context,
    unit: Unit,
    tables: Iterable[pa.Table],
    names: Sequence[str],
    skipped: Counter[str],
    seconds: float,
) -> int:
    """Commit shards of the links that a collection does not have, and return how many there are.

    Args:
        context: Of the run.
        unit: The crawl; ``unit.extend`` are the numbers of the inputs that were read.
        tables: Links of these inputs, with the columns of ``merge.FOUND``.
        names: Of all inputs of the collection, read now or before.
        skipped: What was left out when they were read, by reason.
        seconds: What reading took.
    """
    collection = unit.collection
    before = crawled(context, collection)
    again: Counter[str] = Counter()
    changes = {"fingerprint": unit.fingerprint, "inputs": unit.inputs, "read": list(names)}
    with tempfile.TemporaryDirectory(prefix="curation-extend-") as scratch:
        known = KnownUrls(Path(scratch) / "known")
        for shard in range(before.num_shards):
            urls = context.run.read_table(collection, schema.CRAWL.name, shard, ["url"]).column(0)
            known.add(urls.drop_null().to_pylist())
        shards = cut(_new(context, tables, known, again), context.config, Path(scratch))
        after = append(context, collection, ((table, None) for table in shards if table.num_rows), changes)
    left_out = skipped + again + (Counter(before.skipped) if len(unit.extend) < len(names) else Counter())
    context.run.commit_artefacts(
        crawl_marker(collection),
        {},
        replace(after, skipped=dict(sorted(left_out.items())), seconds=before.seconds + seconds),
    )
    return after.num_rows - before.num_rows


def _new(context: Context, tables: Iterable[pa.Table], known: KnownUrls, left_out: Counter[str]) -> Iterator[pa.Table]:
    def counted() -> Iterator[pa.Table]:
        for table in tables:
            left_out["known"] += table.num_rows
            yield table

    for table in known.new(counted()):
        if context.should_stop():
            raise InterruptedError
        left_out["known"] -= table.num_rows
        if table.num_rows:
            yield table
