"""A collection whose inputs have grown: links that it does not have yet form new shards.

An input that was added to the settings is read by the next run. A file or folder that has grown in place cannot be
told without reading it: ``curate run --extend`` reads all inputs again. Links that the collection has stay as they are.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from curation import schema
from curation.crawl import Link, read_inputs
from curation.crawl.cut import cut
from curation.crawl.known import KnownUrls
from curation.pipelines.append import append, crawled
from curation.pipelines.context import Context
from curation.pipelines.ingest import input_names, inputs_of
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
    """Read the inputs that a unit names, and commit shards of the links that are new; return how many there are."""
    start = time.monotonic()
    collection, numbers = unit.collection, unit.extend
    inputs = inputs_of(context.config, collection)
    before = crawled(context, collection)
    skipped: Counter[str] = Counter()

    def report(reason: str) -> None:
        skipped[reason] += 1

    changes = {"fingerprint": unit.fingerprint, "inputs": unit.inputs, "read": input_names(inputs)}
    with tempfile.TemporaryDirectory(prefix="curation-extend-") as scratch:
        known = KnownUrls(Path(scratch) / "known")
        for shard in range(before.num_shards):
            urls = context.run.read_table(collection, schema.CRAWL.name, shard, ["url"]).column(0)
            known.add(urls.drop_null().to_pylist())
        links = read_inputs([inputs[number] for number in numbers], context.config, report)
        tables = cut(_new(links, known, report), context.config, Path(scratch))
        after = append(context, collection, ((table, None) for table in tables if table.num_rows), changes)
    if len(numbers) < len(inputs):
        skipped.update(before.skipped)
    seconds = before.seconds + time.monotonic() - start
    context.run.commit_artefacts(
        crawl_marker(collection), {}, replace(after, skipped=dict(sorted(skipped.items())), seconds=seconds)
    )
    return after.num_rows - before.num_rows


def _new(links: Iterable[Link], known: KnownUrls, report: Callable[[str], None]) -> Iterator[Link]:
    for link, is_new in known.new(links):
        if is_new:
            yield link
        else:
            report("known")
