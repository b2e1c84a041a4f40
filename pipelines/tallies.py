"""Count the rows of a collection shard by shard, in bounded memory, while others may be writing the run.

A writer replaces a table by naming a new file in its marker and deletes the old one later; what is gone between reading
the marker and the file is read again.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import CorruptError
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import crawl_marker, shard_markers
from curation.report.overview import CollectionOverview, FetchOverview, FunnelEntry, HostOverview
from curation.stages.funnel import Funnel
from curation.store import Run

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
        sum(rows.values()),
        dict(sorted(crawled.skipped.items(), key=lambda item: (-item[1], item[0]))),
        _funnel(context, plan, collection, rows),
        _fetched(run, collection, rows),
        image_bytes,
        raw_bytes,
    )


def _funnel(context: Context, plan: Plan, collection: str, rows: dict[int, int]) -> tuple[FunnelEntry, ...]:
    verdicts = finished_verdicts(context, plan, collection, rows)
    funnel = Funnel(["crawl", *(step.stage for step in verdicts)])
    for shard, num_rows in rows.items():
        found = reasons(context.run, collection, shard, num_rows, verdicts)
        funnel.add(num_rows, [(step.stage, column) for step, column in found])
    return tuple(FunnelEntry(row["stage"], row["in"], row["out"], row["rejected"]) for row in funnel.rows())


def _fetched(run: Run, collection: str, rows: dict[int, int]) -> FetchOverview | None:
    markers = run.markers(collection, "fetch")
    done = {shard: n for shard, n in rows.items() if shard in markers and markers[shard].num_rows == n}
    if not done:
        return None
    hosts = HostTally()
    rejected: Counter[str] = Counter()
    kept = 0
    for shard, num_rows in done.items():
        urls = read_aligned(run, collection, "crawl", shard, ["url"], num_rows).column(0)
        why = read_aligned(run, collection, "fetch", shard, ["reject_reason"], num_rows).column(0)
        failed = why.is_valid().to_numpy()
        hosts.add(urls, failed)
        kept += num_rows - int(failed.sum())
        rejected.update({entry["values"]: entry["counts"] for entry in why.drop_null().value_counts().to_pylist()})
    ordered = dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0])))
    return FetchOverview(sum(done.values()), kept, ordered, hosts.top(_TOP_HOSTS), hosts.exact)


class HostTally:
    """Rows and failures of each host.

    There may be more hosts than fit into memory: when more than ``max_hosts`` are known, the smaller half is forgotten,
    and counts are lower bounds from then on.
    """

    def __init__(self, max_hosts: int = _MAX_HOSTS) -> None:
        self.exact = True
        self._max_hosts = max_hosts
        self._hosts: dict[str, tuple[int, int]] = {}

    def add(self, urls: pa.ChunkedArray, failed: npt.NDArray[np.bool_]) -> None:
        """Count rows by the host of their URL; one without a host counts for the host ''."""
        hosts = pc.struct_field(pc.extract_regex(urls, _HOST), "host").fill_null("")
        counts = pa.table({"host": hosts, "failed": failed.astype(np.int64)}).group_by("host")
        for entry in counts.aggregate([("failed", "count"), ("failed", "sum")]).to_pylist():
            num_rows, num_failed = self._hosts.get(entry["host"], (0, 0))
            self._hosts[entry["host"]] = (num_rows + entry["failed_count"], num_failed + entry["failed_sum"])
        if len(self._hosts) > self._max_hosts:
            self._hosts = dict(self._ordered()[: self._max_hosts // 2])
            self.exact = False

    def top(self, number: int) -> tuple[HostOverview, ...]:
        """Return the hosts with the most rows."""
        return tuple(HostOverview(host, *counts) for host, counts in self._ordered()[:number])

    def _ordered(self) -> list[tuple[str, tuple[int, int]]]:
        return sorted(self._hosts.items(), key=lambda item: (-item[1][0], item[0]))


def _tar_bytes(run: Run, folder: str) -> int:
    def read() -> int:
        path = run.path(folder)
        entries = run.fs.ls(path, detail=True) if run.fs.exists(path) else []
        return sum(int(entry["size"]) for entry in entries if entry["name"].endswith(".tar"))

    return steadily(read)
