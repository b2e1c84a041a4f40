"""Count the rows of a collection shard by shard, in bounded memory, while others may be writing the run.

A writer replaces a table by naming a new file in its marker and deletes the old one later; what is gone between reading
the marker and the file is read again.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import CorruptError
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.retry import retry_reasons
from curation.pipelines.units import crawl_marker, is_retry, shard_markers
from curation.report.overview import CollectionOverview, FetchOverview, FunnelEntry, HostOverview
from curation.stages.funnel import Funnel
from curation.store import Marker, Run

T = TypeVar("T")

_ATTEMPTS = 4
_PAUSE_S = 0.1
_TOP_HOSTS = 20
_MAX_HOSTS = 100_000
# Normalised URLs: scheme://[user@]host[:port]/...; the host of an IPv6 address is in brackets.
_HOST = r"^[^:/?#]+://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^:/?#]*)"


def steadily(read: Callable[[], T]) -> T:
    """Return ``read()``, tried again where a writer has just replaced what is read."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return read()
        except (CorruptError, FileNotFoundError):
            time.sleep(_PAUSE_S)
    return read()


def read_aligned(run: Run, collection: str, step: str, shard: int, columns: Sequence[str], num_rows: int) -> pa.Table:
    """Return columns of a table that has one row for each of ``num_rows`` rows.

    Raises:
        CorruptError: It is missing, or made for another shard of that number.
    """

    def read() -> pa.Table:
        table = run.read_table(collection, step, shard, columns)
        if table.num_rows != num_rows:
            raise CorruptError(
                f"{run.url}: {collection}/{step} shard {shard:08d} has {table.num_rows} rows instead of {num_rows}; "
                "is the run being written? Try again"
            )
        return table

    return steadily(read)


def shard_rows(context: Context, collection: str) -> dict[int, int] | None:
    """Return the rows of each shard of a collection, or None before it is crawled."""
    if context.run.artefact_marker(crawl_marker(collection)) is None:
        return None
    return {shard: marker.num_rows for shard, marker in shard_markers(context, collection).items()}


def is_finished(run: Run, collection: str, step: str, rows: dict[int, int]) -> bool:
    """Return whether a step has a table, row for row, for every shard; it may be stale."""
    markers = run.markers(collection, step)
    return all(shard in markers and markers[shard].num_rows == num_rows for shard, num_rows in rows.items())


def finished_verdicts(context: Context, plan: Plan, collection: str, rows: dict[int, int]) -> list[Step]:
    """Return the steps that have a verdict on every row of a collection, in order."""
    kind = collection.partition("/")[0]
    return [step for step in plan.verdicts(kind) if is_finished(context.run, collection, step.name, rows)]


def reasons(
    run: Run, collection: str, shard: int, num_rows: int, verdicts: Sequence[Step]
) -> Iterator[tuple[Step, pa.ChunkedArray]]:
    """Yield ``reject_reason`` of each verdict on a shard."""
    for step in verdicts:
        yield step, read_aligned(run, collection, step.name, shard, ["reject_reason"], num_rows).column(0)


def tally(context: Context, plan: Plan, collection: str) -> CollectionOverview:
    """Return the counts of a collection."""
    run = context.run
    rows = shard_rows(context, collection)
    image_bytes, raw_bytes = (_tar_bytes(run, f"{collection}/{folder}") for folder in ("images", "raw"))
    crawled = run.artefact_marker(crawl_marker(collection))
    if rows is None or crawled is None:
        return CollectionOverview(collection, False, image_bytes=image_bytes, raw_bytes=raw_bytes)
    return CollectionOverview(
        collection,
        True,
        len(rows),
        sum(n if not is_retry(crawled, shard) else 0 for shard, n in rows.items()),
        dict(sorted(crawled.skipped.items(), key=lambda item: (-item[1], item[0]))),
        _funnel(context, plan, collection, rows, crawled),
        _fetched(run, collection, rows, crawled),
        image_bytes,
        raw_bytes,
    )


def _funnel(
    context: Context, plan: Plan, collection: str, rows: dict[int, int], crawled: Marker
) -> tuple[FunnelEntry, ...]:
    verdicts = finished_verdicts(context, plan, collection, rows)
    funnel = Funnel(["crawl", *(step.stage for step in verdicts)])
    for shard, num_rows in rows.items():
        found = reasons(context.run, collection, shard, num_rows, verdicts)
        again = retry_reasons(context, collection, shard, crawled)
        funnel.add(num_rows, [(step.stage, column) for step, column in found], again)
    return tuple(FunnelEntry(row["stage"], row["in"], row["out"], row["rejected"]) for row in funnel.rows())


def _fetched(run: Run, collection: str, rows: dict[int, int], crawled: Marker) -> FetchOverview | None:
    markers = run.markers(collection, "fetch")
    done = {shard: n for shard, n in rows.items() if shard in markers and markers[shard].num_rows == n}
    if not done:
        return None
    hosts = HostTally()
    rejected: Counter[str] = Counter()
    num_rows = num_retried = num_recovered = 0
    for shard, here in done.items():
        urls = read_aligned(run, collection, "crawl", shard, ["url"], here).column(0)
        why = read_aligned(run, collection, "fetch", shard, ["reject_reason"], here).column(0)
        num_rows += here
        _count(rejected, why, 1)
        hosts.add(urls, why)
        if is_retry(crawled, shard):  # the rows that these try again count no more
            before = read_aligned(run, collection, "retry", shard, ["retry_reason"], here).column(0)
            num_rows -= here
            num_retried += here
            num_recovered += why.null_count
            _count(rejected, before, -1)
            hosts.add(urls, before, -1)
    ordered = dict(sorted(((reason, count) for reason, count in rejected.items() if count), key=_largest_first))
    kept = num_rows - rejected.total()
    return FetchOverview(
        num_rows,
        kept,
        ordered,
        hosts.top(_TOP_HOSTS),
        hosts.exact,
        hosts.failing(_TOP_HOSTS),
        num_retried,
        num_recovered,
    )


def _count(counts: Counter[str], reasons: pa.ChunkedArray, sign: int) -> None:
    for entry in reasons.drop_null().value_counts().to_pylist():
        counts[entry["values"]] += sign * entry["counts"]


def _largest_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


class HostTally:
    """Rows and failures of each host, by reason.

    There may be more hosts than fit into memory: when more than ``max_hosts`` are known, those that are not among the
    half with the most rows or the half with the most failures are forgotten, and counts are lower bounds from then on.
    """

    def __init__(self, max_hosts: int = _MAX_HOSTS) -> None:
        self.exact = True
        self._max_hosts = max_hosts
        self._hosts: dict[str, Counter[str]] = {}  # reason → rows; the empty reason: all rows

    def add(self, urls: pa.ChunkedArray, reasons: pa.ChunkedArray, sign: int = 1) -> None:
        """Count rows by the host of their URL and by why they failed (null: not at all).

        A URL without a host counts for the host ''; a row without a URL, whose link is not kept, does not count.
        """
        hosts = pc.struct_field(pc.extract_regex(urls.drop_null(), _HOST), "host").fill_null("")
        why = reasons.filter(urls.is_valid())
        rows = pa.table({"host": hosts, "reason": why}).group_by(["host", "reason"]).aggregate([([], "count_all")])
        for entry in rows.to_pylist():
            counts = self._hosts.setdefault(entry["host"], Counter())
            counts[""] += sign * entry["count_all"]
            if entry["reason"] is not None:
                counts[entry["reason"]] += sign * entry["count_all"]
        if len(self._hosts) > self._max_hosts:
            half = self._max_hosts // 4
            self._hosts = dict([*self._most_rows()[:half], *self._most_failures()[:half]])
            self.exact = False

    def top(self, number: int) -> tuple[HostOverview, ...]:
        """Return the hosts with the most rows."""
        return tuple(_host(host, counts) for host, counts in self._most_rows()[:number])

    def failing(self, number: int) -> tuple[HostOverview, ...]:
        """Return the hosts with the most failures, those that have any."""
        found = (_host(host, counts) for host, counts in self._most_failures()[:number])
        return tuple(host for host in found if host.num_failed > 0)

    def _most_rows(self) -> list[tuple[str, Counter[str]]]:
        return sorted(self._hosts.items(), key=lambda item: (-item[1][""], item[0]))

    def _most_failures(self) -> list[tuple[str, Counter[str]]]:
        return sorted(self._hosts.items(), key=lambda item: (item[1][""] - item[1].total(), item[0]))


def _host(host: str, counts: Counter[str]) -> HostOverview:
    reasons = sorted(((reason, count) for reason, count in counts.items() if reason and count > 0), key=_largest_first)
    return HostOverview(host, max(0, counts[""]), sum(count for _, count in reasons), dict(reasons))


def _tar_bytes(run: Run, folder: str) -> int:
    def read() -> int:
        path = run.path(folder)
        entries = run.fs.ls(path, detail=True) if run.fs.exists(path) else []
        return sum(int(entry["size"]) for entry in entries if entry["name"].endswith(".tar"))

    return steadily(read)
