"""A unit of work: one step on one shard or on one block of shards, or one reduce; and what came of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from curation.crawl.inputs import InputPart
from curation.errors import InputError
from curation.fingerprint import fingerprint
from curation.pipelines.context import Context
from curation.store import Marker


@dataclass(frozen=True)
class Part:
    """What one worker does of a fit that goes in rounds, see ``kmeans_rounds``.

    Attributes:
        key: Names the fit.
        round: 0 gathers the points, the others are iterations.
        shards: Shards of the pool whose points it has.
        limit: Up to which hash and key images belong to the sample; None: all do.
    """

    key: str
    round: int
    shards: tuple[int, ...]
    limit: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Reading:
    """What one worker does of a crawl, see ``crawl_parts``.

    Attributes:
        key: Names the crawl: its settings and its inputs.
        num_parts: Parts of its inputs.
        part: What is to be read; None: all parts have been read, and their links are to be cut into shards.
    """

    key: str
    num_parts: int
    part: InputPart | None = None


@dataclass(frozen=True)
class Span:
    """Consecutive shards of a collection: from ``first`` up to, and without, ``stop``."""

    collection: str
    first: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """What is to be done, and what its marker will say of its causes.

    Attributes:
        step: Name of the step.
        collection: The collection; empty for a reduce; the folder of a block.
        shard: The shard; None for a reduce and for ``crawl``; the number of a block.
        inputs: Parts of the fingerprint by name.
        covers: Digest of the verdicts that say which rows are needed.
        anew: Compute every row again, those that are there already too.
        part: A part of a reduce that goes in rounds; ``shard`` is then the number of the part.
        with_steps: Image steps that were never done on the shard and share its pass: one read, one decode.
        block: The two groups of a block; the same one twice: it is compared with itself.
        extend: Of a crawl: numbers of the inputs whose new links are to be added to those that are there.
        reading: A part of a crawl, ``shard`` is then the number of the part; or the cut that ends it.
    """

    step: str
    collection: str
    shard: int | None
    inputs: dict[str, str]
    covers: str = ""
    anew: bool = False
    with_steps: tuple[str, ...] = ()
    part: Part | None = None
    block: tuple[Span, Span] | None = None
    extend: tuple[int, ...] = ()
    reading: Reading | None = None

    @property
    def fingerprint(self) -> str:
        """What the output is made from."""
        return fingerprint(self.inputs)


@dataclass(frozen=True)
class Done:
    """What came of a unit.

    Attributes:
        unit: The unit.
        num_rows: Rows of the output.
        num_computed: Rows that were worked on; the others were there already or not needed.
        seconds: Time it took.
    """

    unit: Unit
    num_rows: int
    num_computed: int
    seconds: float


def cores_of_each(num_workers: int, units: Sequence[Unit]) -> int:
    """Return how many cores of this machine each unit has for itself, where ``num_workers`` are worked on at a time."""
    return max(1, min(num_workers, os.cpu_count() or 1) // max(1, len(units)))


def crawl_marker(collection: str) -> str:
    """Return the name under which the crawl of a collection is recorded."""
    return f"crawl.{collection.replace('/', '.')}"


def is_retry(crawled: Marker, shard: int) -> bool:
    """Whether a shard of a collection tries rows of earlier shards again."""
    return any(first <= shard < stop for first, stop in crawled.retries)


def shard_markers(context: Context, collection: str) -> dict[int, Marker]:
    """Return the ``crawl`` markers of a collection's shards.

    Raises:
        InputError: If the collection has not been crawled.
    """
    crawled = context.run.artefact_marker(crawl_marker(collection))
    if crawled is None:
        raise InputError(f"{context.run.url}: {collection} has not been crawled; run the crawl stage first")
    markers = context.run.markers(collection, "crawl")
    return {shard: marker for shard, marker in markers.items() if shard < crawled.num_shards}
