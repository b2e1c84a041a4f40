"""The manifest: one Parquet file with a row for each image that is kept, and with what it was made from.

Seed images that are taken as they are come first, then the pool. Nothing is sorted: the digest in the file's metadata is a
sum over rows, so it is the same for any sharding.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import schema
from curation.config import ExcludeConfig, RunConfig
from curation.errors import InputError
from curation.fingerprint import rows_digest
from curation.indexes.keys import keys_from_hex
from curation.indexes.lookup import as_bytes
from curation.schema import Table
from curation.stage import ReduceInputs, ShardView
from curation.stages.funnel import Funnel

MANIFEST_FILE = "manifest.parquet"
SUMMARY_FILE = "manifest.json"
DIGEST_KEY = b"curation.digest"
SUMMARY_KEY = b"curation.summary"

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
    reads: tuple[Table, ...] = _TABLES
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

    def __call__(self, inputs: ReduceInputs, scratch: Path) -> Iterator[tuple[str, int, pa.Table]]:
        """Yield a verdict for each shard of the pool and the seeds; leave the manifest and its summary."""
        funnels: dict[str, Any] = {}
        digest = num_rows = 0
        taken = np.empty(0, "S16")
        with pq.ParquetWriter(scratch / MANIFEST_FILE, schema.MANIFEST, compression="zstd") as writer:
            for collection in [*inputs.collections("seeds"), "pool"]:
                kind, _, name = collection.partition("/")
                funnel = Funnel(["crawl", *(stage for stage, _ in self.verdicts[kind]), "manifest"])
                chosen: list[npt.NDArray[Any]] = [taken]
                for view in inputs.shards(collection):
                    table = _rows(view)
                    reasons = _once(self.excluded.reasons(table, view.kept), table, taken)
                    reasons = pc.if_else(pa.array(view.kept), reasons, pa.scalar(None, pa.string()))
                    if kind == "pool" or self.config.seeds[name].as_is:
                        selected = view.kept & reasons.is_null().to_numpy(zero_copy_only=False)
                        rows = table.take(pa.array(np.flatnonzero(selected)))
                        writer.write_table(rows)
                        digest += rows_digest(rows)
                        num_rows += rows.num_rows
                        if kind == "seeds":
                            chosen.append(as_bytes(keys_from_hex(rows.column("image_id").to_pylist())))
                    earlier = [(stage, view.read(made, ["reject_reason"]).column(0)) for stage, made in self.verdicts[kind]]
                    funnel.add(view.num_rows, [*earlier, ("manifest", reasons)])
                    yield collection, view.shard, pa.table([reasons], schema=schema.MANIFEST_VERDICT.schema)
                taken = np.concatenate(chosen)
                funnels[collection] = funnel.rows()
            summary = {
                "digest": f"{digest % 2**256:064x}",
                "num_images": num_rows,
                "funnel": funnels,
                **self.provenance,
            }
            writer.add_key_value_metadata(
                {DIGEST_KEY: summary["digest"].encode(), SUMMARY_KEY: json.dumps(summary, sort_keys=True).encode()}
            )
        (scratch / SUMMARY_FILE).write_text(json.dumps(summary, indent=1, sort_keys=True))


class Excluded:
    """URLs, domains and image ids that must not be in the manifest.

    Raises:
        InputError: A list cannot be read.
    """

    def __init__(self, config: ExcludeConfig) -> None:
        self.urls = _lines(config.urls)
        self.domains = {domain.lower().strip(".") for domain in _lines(config.domains)}
        self.ids = {image_id.lower() for image_id in _lines(config.ids)}

    def reasons(self, table: pa.Table, kept: npt.NDArray[np.bool_]) -> pa.Array:
        """Return why each row is left out, or null. Any URL under which an image was found counts."""
        if not (self.urls or self.domains or self.ids):
            return pa.nulls(table.num_rows, pa.string())
        columns = (table.column(name).to_pylist() for name in ("image_id", "url", "urls"))
        return pa.array(
            [
                self._reason(image_id, urls or [url]) if keep else None
                for image_id, url, urls, keep in zip(*columns, kept.tolist(), strict=True)
            ],
            pa.string(),
        )

    def _reason(self, image_id: str | None, urls: Sequence[str]) -> str | None:
        if image_id in self.ids:
            return "excluded_id"
        if not self.urls.isdisjoint(urls):
            return "excluded_url"
        return "excluded_domain" if any(self._is_domain(url) for url in urls) else None

    def _is_domain(self, url: str) -> bool:
        labels = (urlsplit(url).hostname or "").lower().split(".")
        return any(".".join(labels[start:]) in self.domains for start in range(len(labels)))


def _once(reasons: pa.Array, table: pa.Table, taken: npt.NDArray[Any]) -> pa.Array:
    """Reject rows whose image an earlier collection has put into the manifest."""
    if not len(taken):
        return reasons
    ids = table.column("image_id")
    rows = np.flatnonzero(ids.is_valid().to_numpy())
    again = np.zeros(table.num_rows, bool)
    again[rows] = np.isin(as_bytes(keys_from_hex(ids.take(pa.array(rows)).to_pylist())), taken)
    return pc.if_else(pc.and_(pa.array(again), reasons.is_null()), "exact_duplicate", reasons)


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


def _lines(paths: Sequence[str]) -> set[str]:
    lines: set[str] = set()
    for path in paths:
        try:
            with Path(path).open(encoding="utf-8") as stream:
                lines.update(text for line in stream if (text := line.strip()) and not text.startswith("#"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"manifest.exclude: {path} cannot be read: {error}") from error
    return lines
