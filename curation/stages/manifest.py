"""The manifest: one Parquet file with a row for each image that is kept, and with what it was made from.

Seed images that are taken as they are come first, then the pool. Nothing is sorted: the digest in the file's metadata
is a sum over rows, so it is the same for any sharding. An image of several as-is seed sets is in the manifest once, for
the first of them by name.

The metadata of the file (``pyarrow.parquet.read_metadata(path).metadata``) has ``curation.digest`` and
``curation.summary``, the JSON that is ``manifest.json`` too.

Memory: one shard, 65,536 rows that wait for their row group, 16 bytes a seed image in the manifest, and the exclusion
lists (about 150 bytes a line); nothing else that grows with the pool.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import idna
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import schema
from curation.blocklist import blocklists
from curation.config import RunConfig
from curation.config.selection import ExcludeConfig
from curation.errors import InputError
from curation.fingerprint import add_digests, rows_digest
from curation.indexes.keys import keys_from_hex
from curation.indexes.lookup import as_bytes
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView
from curation.stages.funnel import Funnel

MANIFEST_FILE = "manifest.parquet"
SUMMARY_FILE = "manifest.json"
DIGEST_KEY = b"curation.digest"
SUMMARY_KEY = b"curation.summary"
_GROUP_ROWS = 65_536
_ID = re.compile(r"[0-9a-f]{32}")
_DOMAIN = re.compile(r"[^\s/:@?#]+")

_TABLES = (
    schema.CRAWL,
    schema.FETCH,
    schema.PCA_HASH,
    schema.PCA_HASH_VERDICT,
    schema.NSFW,
    schema.FACES,
    schema.DEDUP,
    schema.CLUSTER,
    schema.RETRIEVE,
)
_SEED_TABLES = tuple(table for table in _TABLES if table not in (schema.PCA_HASH, schema.RETRIEVE))


class ManifestStage:
    """Select, write and count.

    Args:
        config: Of the run.
        verdicts: For each kind of collection, the stage and table of each verdict before this one, in order.
        provenance: What else the summary says: versions, weights and their licences.
    """

    name: ClassVar[str] = "manifest_verdict"
    version: ClassVar[int] = 1
    reads: tuple[Table, ...] = (*_TABLES, schema.NSFW_VERDICT, schema.FACES_VERDICT)  # the funnel counts all verdicts
    writes: Table | None = schema.MANIFEST_VERDICT
    artefacts: tuple[str, ...] = (MANIFEST_FILE, SUMMARY_FILE)

    def __init__(
        self,
        config: RunConfig,
        verdicts: Mapping[str, Sequence[tuple[str, Table]]],
        provenance: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.verdicts = verdicts
        self.provenance = provenance
        self.excluded = Excluded(config.manifest.exclude)
        self.blocked = blocklists(config.fetch.blocked_hashes)

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield a verdict for each shard of the pool and the seeds; leave the manifest and its summary."""
        funnels: dict[str, Any] = {}
        taken = np.empty(0, "S16")  # seed images of earlier collections that are in the manifest, sorted
        with _Writer(scratch / MANIFEST_FILE) as writer:
            for collection in [*inputs.collections("seeds"), *inputs.collections("pool")]:
                kind, _, name = collection.partition("/")
                selects = kind == "pool" or self.config.seeds[name].as_is
                funnel = Funnel(["crawl", *(stage for stage, _ in self.verdicts[kind]), "manifest"])
                chosen: list[npt.NDArray[Any]] = [taken]
                for view in inputs.shards(collection):
                    table = _rows(view)
                    reasons = self._without_blocked(self.excluded.reasons(table, view.kept), table, view.kept)
                    if selects:
                        reasons = _once(reasons, table, view.kept, taken)
                        rows = table.filter(pc.and_(pa.array(view.kept), reasons.is_null()))
                        writer.add(rows)
                        if kind == "seeds":
                            chosen.append(as_bytes(keys_from_hex(rows.column("image_id").to_pylist())))
                    earlier = [
                        (stage, view.read(made, ["reject_reason"]).column(0)) for stage, made in self.verdicts[kind]
                    ]
                    funnel.add(view.num_rows, [*earlier, ("manifest", reasons)], _retried(view))
                    yield collection, view.shard, pa.table([reasons], schema=schema.MANIFEST_VERDICT.schema)
                taken = np.sort(np.concatenate(chosen))
                funnels[collection] = funnel.rows()
            summary = {
                **self.provenance,
                "digest": f"{writer.digest:064x}",
                "num_images": writer.num_rows,
                "funnel": funnels,
            }
            writer.describe(summary)
        (scratch / SUMMARY_FILE).write_text(json.dumps(summary, indent=1, sort_keys=True))

    def _without_blocked(self, reasons: pa.Array, table: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Array:
        """Reject kept rows whose image a list has come to name after it was fetched."""
        if not self.blocked:
            return reasons
        found = self.blocked.find(table.column("image_id").to_pylist())
        listed = np.zeros(table.num_rows, bool)
        listed[list(found)] = True
        return pc.if_else(pa.array(listed & kept), "blocklisted", reasons)


class _Writer:
    """The manifest that is being written, in row groups of ``_GROUP_ROWS`` whatever the shards, and its digest."""

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self.digest = 0
        self._writer = pq.ParquetWriter(path, schema.MANIFEST, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()

    def add(self, rows: pa.Table) -> None:
        self.num_rows += rows.num_rows
        self.digest = add_digests([self.digest, rows_digest(rows)])
        self._waiting.append(rows)
        self._num_waiting += rows.num_rows
        if self._num_waiting >= _GROUP_ROWS:
            self._flush()

    def describe(self, summary: Mapping[str, Any]) -> None:
        """Put the digest and the summary into the file's metadata."""
        text = json.dumps(summary, sort_keys=True)
        self._writer.add_key_value_metadata({DIGEST_KEY: summary["digest"].encode(), SUMMARY_KEY: text.encode()})

    def _flush(self) -> None:
        if self._num_waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=_GROUP_ROWS)
        self._waiting, self._num_waiting = [], 0


class Excluded:
    """URLs, domains and image ids that must not be in the manifest.

    Lists have one entry a line; empty lines and lines that start with ``#`` say nothing. URLs are compared as the
    manifest writes them. A domain stands for its subdomains too, and may be written in any script.

    Raises:
        InputError: A list cannot be read, or has a line that cannot match anything.
    """

    def __init__(self, config: ExcludeConfig) -> None:
        self.urls = {_checked(line, "://" in line, path, "a URL") for path, line in _lines(config.urls)}
        self.domains = {_domain(line, path) for path, line in _lines(config.domains)}
        self.ids = {
            _checked(line.lower(), _ID.fullmatch(line.lower()) is not None, path, "an image id")
            for path, line in _lines(config.ids)
        }

    def reasons(self, table: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Array:
        """Return why each kept row is left out, or null. Any URL under which an image was found counts."""
        if not (self.urls or self.domains or self.ids):
            return pa.nulls(table.num_rows, pa.string())
        columns = (table.column(name).to_pylist() for name in ("image_id", "url", "urls"))
        return pa.array(
            [
                self._reason(image_id, {url, *(urls or ())}) if keep else None
                for image_id, url, urls, keep in zip(*columns, kept.tolist(), strict=True)
            ],
            pa.string(),
        )

    def _reason(self, image_id: str | None, urls: set[str]) -> str | None:
        if image_id in self.ids:
            return "excluded_id"
        if not self.urls.isdisjoint(urls):
            return "excluded_url"
        return "excluded_domain" if self.domains and any(self._is_domain(url) for url in urls) else None

    def _is_domain(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:  # brackets that hold no address: a name of a local file
            return False
        labels = host.strip(".").split(".")
        return any(".".join(labels[start:]) in self.domains for start in range(len(labels)))


def _once(reasons: pa.Array, table: pa.Table, kept: npt.NDArray[np.bool_], taken: npt.NDArray[Any]) -> pa.Array:
    """Reject kept rows whose image an earlier collection has put into the manifest; ``taken`` is sorted."""
    rows = np.flatnonzero(kept)
    if not len(taken) or not len(rows):
        return reasons
    ids = as_bytes(keys_from_hex(table.column("image_id").take(pa.array(rows)).to_pylist()))
    place = np.minimum(np.searchsorted(taken, ids), len(taken) - 1)
    again = np.zeros(table.num_rows, bool)
    again[rows] = taken[place] == ids
    return pc.if_else(pc.and_(pa.array(again), reasons.is_null()), "exact_duplicate", reasons)


def _retried(view: ShardView) -> list[str]:
    return view.read(schema.RETRY, ["retry_reason"]).column(0).to_pylist() if view.is_retry else []


def _rows(view: ShardView) -> pa.Table:
    """Return a shard's rows in the shape of the manifest, kept or not; what a collection does not have is null."""
    columns: dict[str, Any] = {
        "collection": pa.array([view.collection] * view.num_rows, pa.string()),
        "tar": pa.array([view.tar] * view.num_rows, pa.string()),
    }
    for table in _TABLES if view.collection == "pool" else _SEED_TABLES:
        wanted = [name for name in table.schema.names if name in schema.MANIFEST.names and name not in columns]
        read = view.read(table, wanted)
        columns |= {name: read.column(name) for name in wanted}
    return pa.table(
        [columns.get(field.name, pa.nulls(view.num_rows, field.type)) for field in schema.MANIFEST],
        schema=schema.MANIFEST,
    )


def _lines(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (path, line) of every line that says something."""
    for path in paths:
        try:
            with Path(path).open(encoding="utf-8-sig") as stream:  # some editors put a mark before the first line
                for line in stream:
                    if (text := line.strip()) and not text.startswith("#"):
                        yield path, text
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"manifest.exclude: {path} cannot be read: {error}") from error


def _domain(line: str, path: str) -> str:
    """Return a domain as it stands in normalised URLs: lower case, in ASCII, without dots around it."""
    name = line.lower().removeprefix("*.").strip(".")
    try:
        name = name if name.isascii() else idna.encode(name, uts46=True).decode()
    except idna.IDNAError:
        name = ""
    return _checked(name, _DOMAIN.fullmatch(name) is not None, path, "a domain", line)


def _checked(entry: str, good: bool, path: str, what: str, line: str | None = None) -> str:
    if not good:
        raise InputError(f"manifest.exclude: {path}: {(line or entry)[:80]!r} is not {what}")
    return entry
