"""Links that failed are tried again in new shards; the rows that failed stay as they are.

Each row of a new shard names, in ``schema.RETRY``, the row that it tries again and why that one had failed. Whoever
counts takes that row out again (``Funnel.add``), so that a link counts once, as what became of it in the end, and a
run whose links came on the second try says the same of itself as one whose links came at once.

Links of a host lie in no more of the new shards than they lay in before, so its requests stay as far apart.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation import schema
from curation.crawl.links import LINK_REASONS
from curation.errors import UsageError
from curation.pipelines.append import append, crawled
from curation.pipelines.context import Context
from curation.pipelines.units import is_retry
from curation.store import Marker

TRANSIENT = (
    *("connect", "dns", "tls", "timeout", "truncated", "host_down", "host_busy"),
    *("http_408", "http_425", "http_429", "http_5xx"),
)
_FAMILIES = ("http_4xx", "http_5xx")
_ROW_BITS, _REASON_BITS = 27, 10  # of 64; the rest is the shard, whose number has eight digits


@dataclass
class Retry:
    """What a retry of one collection adds.

    Attributes:
        num_shards: New shards.
        reasons: Why the links that are tried again had failed → links.
    """

    num_shards: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def wanted_reasons(names: Iterable[str]) -> frozenset[str]:
    """Return what ``--retry`` names, ``all`` spelt out.

    Raises:
        UsageError: A name is no reason for which a link fails.
    """
    wanted: set[str] = set()
    known = (LINK_REASONS | schema.IMAGE_REASONS) - {"blocklisted"}
    for name in names:
        if name == "all":
            wanted.update(TRANSIENT)
        elif name in known or name in _FAMILIES or (name[:5] == "http_" and name[5:].isdigit() and len(name) == 8):
            wanted.add(name)
        else:
            raise UsageError(
                f"--retry {name}: is no reason for which a link fails; reasons: all (of which another try may help: "
                f"{', '.join(TRANSIENT)}), {', '.join(_FAMILIES)}, http_<status>, {', '.join(sorted(known))}"
            )
    return frozenset(wanted)


def is_wanted(reason: str, wanted: frozenset[str]) -> bool:
    """Whether a reason is among those wanted, by itself or by its family."""
    return reason in wanted or (reason.startswith("http_") and f"{reason[:6]}xx" in wanted)


def add_retries(context: Context, collection: str, wanted: frozenset[str]) -> Retry:
    """Append shards with the links of a fetched collection that failed for such reasons and were not tried again."""
    marker = crawled(context, collection)
    done = Retried(context, collection, marker)
    reasons: Counter[str] = Counter()
    for shard in range(marker.num_shards):
        reasons.update(_failed(context, collection, shard, wanted, done)[1].to_pylist())
    num_shards = -(-reasons.total() // context.config.shards.rows)
    if num_shards:
        append(context, collection, _shards(context, collection, marker, wanted, done, num_shards), {})
    return Retry(num_shards, reasons)


def is_left(context: Context, collection: str) -> bool:
    """Whether shards of an earlier retry have not been fetched yet."""
    marker = crawled(context, collection)
    shards = (shard for first, stop in marker.retries for shard in range(first, stop))
    return any(context.run.marker(collection, schema.FETCH.name, shard) is None for shard in shards)


def _shards(
    context: Context, collection: str, marker: Marker, wanted: frozenset[str], done: "Retried", num_shards: int
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield the new shards; rows in the order of those that they try again."""
    size = context.config.shards.rows
    waiting = _links(context, collection, 0, (), pa.nulls(0, pa.string()), num_shards)
    for shard in range(marker.num_shards):
        waiting = pa.concat_tables(
            [
                waiting,
                _links(context, collection, shard, *_failed(context, collection, shard, wanted, done), num_shards),
            ]
        )
        while waiting.num_rows >= size:
            yield _cut(waiting.slice(0, size))
            waiting = waiting.slice(size)
    if waiting.num_rows:
        yield _cut(waiting)


def _cut(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    links, retry = (rows.select(table.schema.names).combine_chunks() for table in (schema.CRAWL, schema.RETRY))
    return links, retry


def _failed(
    context: Context, collection: str, shard: int, wanted: frozenset[str], done: "Retried"
) -> tuple[npt.NDArray[np.int64], pa.ChunkedArray]:
    """Return the rows of a shard that are to be tried again, and why they had failed."""
    why = context.run.read_table(collection, schema.FETCH.name, shard, ["reject_reason"]).column(0)
    different = [reason for reason in pc.unique(why.drop_null()).to_pylist() if is_wanted(reason, wanted)]
    rows = np.flatnonzero(pc.is_in(why, pa.array(different, pa.string())).to_numpy())
    rows = rows[~np.isin(rows, list(done.of(shard)))]
    return rows, why.take(pa.array(rows))


def _links(
    context: Context,
    collection: str,
    shard: int,
    rows: npt.NDArray[np.int64] | tuple[()],
    why: pa.ChunkedArray,
    num_shards: int,
) -> pa.Table:
    """Return rows of a shard with the columns of ``CRAWL`` and of ``RETRY``."""
    links = schema.CRAWL.schema.empty_table()
    if len(rows):
        links = context.run.read_table(collection, schema.CRAWL.name, shard).take(pa.array(rows))
    spread = schema.HOST_SHARDS
    place = links.schema.get_field_index(spread.name)
    links = links.set_column(
        place, spread, pc.min_element_wise(links.column(place), num_shards, skip_nulls=False).cast(spread.type)
    )
    places = pa.array((shard << 32) | np.asarray(rows, np.int64), pa.int64())
    return links.append_column(schema.RETRY_OF, places).append_column(schema.RETRY_REASON, why)


class Retried:
    """Which rows of a collection later shards try again, and why they had failed.

    On scratch disk, 8 bytes a row: shard, row and the number of the reason in one integer, sorted.
    """

    def __init__(self, context: Context, collection: str, marker: Marker) -> None:
        self._reasons: list[str] = []
        numbers: dict[str, int] = {}
        with TemporaryFile(prefix="curation-retried-") as scratch:
            for first, stop in marker.retries:
                for shard in range(first, stop):
                    table = context.run.read_table(collection, schema.RETRY.name, shard)
                    place = table.column("retry_of").to_numpy().astype(np.uint64)
                    why = [
                        numbers.setdefault(reason, len(numbers)) for reason in table.column("retry_reason").to_pylist()
                    ]
                    packed = ((place >> np.uint64(32)) << np.uint64(_ROW_BITS)) | (place & np.uint64(0xFFFFFFFF))
                    scratch.write(((packed << np.uint64(_REASON_BITS)) | np.array(why, np.uint64)).tobytes())
            scratch.flush()
            empty = scratch.tell() == 0
            self._rows: npt.NDArray[np.uint64] = np.empty(0, np.uint64) if empty else np.memmap(scratch, np.uint64)
        self._rows.sort()
        self._reasons = list(numbers)

    def of(self, shard: int) -> dict[int, str]:
        """Return the rows of a shard that were tried again, and why they had failed."""
        shift = _ROW_BITS + _REASON_BITS
        begin, end = np.searchsorted(self._rows, np.array([shard << shift, (shard + 1) << shift], np.uint64))
        found = self._rows[begin:end].tolist()
        mask = (1 << _REASON_BITS) - 1
        return {(packed >> _REASON_BITS) & ((1 << _ROW_BITS) - 1): self._reasons[packed & mask] for packed in found}


def retried_rows(context: Context, collection: str, shard: int) -> dict[int, str]:
    """Return the rows of a shard that a later shard has tried again, and why they had failed: they are settled."""
    marker = crawled(context, collection)
    if not any(first > shard for first, _ in marker.retries):
        return {}
    made = context.once(f"retried {collection} {marker.retries}", lambda: Retried(context, collection, marker))
    return made.of(shard)


def retry_reasons(context: Context, collection: str, shard: int, marker: Marker) -> list[str]:
    """Return why the rows that a shard tries again had failed; empty for one that tries none again."""
    if not is_retry(marker, shard):
        return []
    reasons: list[str] = context.run.read_table(collection, "retry", shard, ["retry_reason"]).column(0).to_pylist()
    return reasons
