"""A run's files: collections, shards, tars, tables, artefacts and their markers, on any fsspec file system.

Layout below the run's URL::

    run.yaml                                  the resolved settings
    lease.json                                who is writing
    manifest.parquet  manifest.json           the published manifest
    artefacts/<step>.json                     marker of a reduce
    artefacts/<step>/<attempt>-<name>         what it fitted or built
    <collection>/<step>/00000017.json         marker of a shard
    <collection>/<step>/00000017-<attempt>.parquet
    <collection>/raw/00000017-<attempt>.tar   fetched bytes; deleted once the shard is blurred
    <collection>/images/00000017-<attempt>.tar
    edges/<left>+<right>/<step>/00000017.json    marker of a block of two collections, beside its Parquet file

Nothing is renamed and nothing is overwritten but markers. Data is written under a name that no other attempt uses, and
exists for readers once a marker, written last, names it. A marker cut short by a crash is no JSON and counts as absent.
"""

import json
import posixpath
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import CorruptError, LeaseError, StoreError
from curation.files import Files
from curation.fingerprint import content_digest
from curation.lease import Lease


@dataclass(frozen=True)
class Marker:
    """What a finished output is.

    Attributes:
        fingerprint: What it was made from (see ``curation.fingerprint``).
        digest: Its content digest.
        num_rows: Rows of the table; 0 for artefacts.
        files: Role (``table``, ``raw``, ``images``, or an artefact's name) → path relative to the run.
        inputs: Parts of the fingerprint by name, so that a stale output can say what changed.
        covers: Digest of the verdicts whose kept rows it is known to cover.
        num_shards: Shards that a crawl or a reduce made.
        seconds: Time the work took.
        skipped: What a crawl left out, by reason.
        sizes: Bytes of each of ``files``, so that one that was cut short is found by listing.
        retries: Of a crawl: first and last but one of each range of shards that try rows of earlier ones again.
        read: Of a crawl: fingerprints of the inputs that it has read.
    """

    fingerprint: str
    digest: str
    num_rows: int
    files: dict[str, str]
    inputs: dict[str, str] = field(default_factory=dict)
    covers: str = ""
    num_shards: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    retries: list[list[int]] = field(default_factory=list)
    read: list[str] = field(default_factory=list)


class Run(Files):
    """One run."""

    def __init__(self, url: str | Path) -> None:
        super().__init__(url)
        self.fence = ""  # token of the lease under which this process writes; handed on to workers

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Hold the lease of a writer while the ``with`` block runs; it is the first thing that is written."""
        with ExitStack() as stack:
            try:
                lease = stack.enter_context(Lease(self))
            except OSError as error:
                raise StoreError(f"{self.url}: cannot be written: {error.strerror or error}") from error
            self.fence = lease.token
            try:
                yield lease
            finally:
                self.fence = ""

    def _check_fence(self) -> None:
        """Refuse to commit once somebody else has the lease: they may have cleared up what a marker would name."""
        if not self.fence:
            return
        try:
            token = json.loads(self.read_bytes("lease.json")).get("token")
        except (FileNotFoundError, ValueError):
            token = None
        if token != self.fence:
            raise LeaseError(f"{self.url}: another process has taken this run over; this one stops")

    # -- shards -----------------------------------------------------------------------------------------------------

    def marker(self, collection: str, step: str, shard: int) -> Marker | None:
        """Return the marker of a shard, or None while it is not finished."""
        return self._read_marker(_marker_path(collection, step, shard))

    def markers(self, collection: str, step: str) -> dict[int, Marker]:
        """Return the markers of all finished shards of a step, in the order of shards."""
        folder = self.path(posixpath.join(collection, step))
        try:
            names = [posixpath.basename(path) for path in self.fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return {}
        shards = sorted(int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name))
        found = {shard: self.marker(collection, step, shard) for shard in shards}
        return {shard: marker for shard, marker in found.items() if marker is not None}

    def new_path(self, collection: str, folder: str, shard: int, extension: str) -> str:
        """Return a path for this attempt's data that no other attempt uses."""
        return posixpath.join(collection, folder, f"{shard:08d}-{secrets.token_hex(6)}.{extension}")

    def commit(self, collection: str, step: str, shard: int, table: pa.Table, marker: Mapping[str, Any]) -> Marker:
        """Write a table, then the marker that makes it (and the files that ``marker`` names) exist.

        Args:
            collection: ``pool``, ``seeds/<name>`` or ``references/<name>``.
            step: Name of the table.
            shard: Number of the shard.
            table: One row a row of the shard.
            marker: Fields of ``Marker`` but ``digest``, ``num_rows`` and ``files["table"]``.
        """
        files = {**marker.get("files", {}), "table": self._write_table(collection, step, shard, table)}
        made = Marker(
            **{
                **marker,
                "digest": content_digest(table),
                "num_rows": table.num_rows,
                "files": files,
                "sizes": {role: self.fs.size(self.path(name)) for role, name in files.items()},
            }
        )
        self.write_marker(collection, step, shard, made)
        return made

    def replace(self, collection: str, step: str, shard: int, table: pa.Table) -> None:
        """Put a table in the place of one that says more than may be kept, and delete that one.

        The marker keeps its content digest: what was made from the old table is not made again.
        """
        marker = self.marker(collection, step, shard)
        if marker is None:
            raise CorruptError(f"{self.url}: {collection}/{step} shard {shard:08d} is not finished")
        path = self._write_table(collection, step, shard, table)
        files, sizes = {**marker.files, "table": path}, {**marker.sizes, "table": self.fs.size(self.path(path))}
        self.write_marker(collection, step, shard, Marker(**{**asdict(marker), "files": files, "sizes": sizes}))
        self.remove(marker.files["table"])

    def _write_table(self, collection: str, step: str, shard: int, table: pa.Table) -> str:
        path = self.new_path(collection, step, shard, "parquet")
        with self.create(path) as stream:
            pq.write_table(table, stream, compression="zstd", row_group_size=16_384, write_page_checksum=True)
        return path

    def write_marker(self, collection: str, step: str, shard: int, marker: Marker) -> None:
        """Write a shard's marker.

        Raises:
            LeaseError: If the lease is no longer this writer's.
        """
        self._check_fence()
        self.write_bytes(_marker_path(collection, step, shard), json.dumps(asdict(marker), sort_keys=True).encode())

    def read_table(self, collection: str, step: str, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a shard's table, or some of its columns.

        Raises:
            CorruptError: If it was not committed, or its file is not what the marker says.
        """
        marker = self.marker(collection, step, shard)
        if marker is None:
            raise CorruptError(f"{self.url}: {collection}/{step} shard {shard:08d} is not finished")
        with self.open(marker.files["table"]) as stream:
            try:
                file = pq.ParquetFile(stream, page_checksum_verification=True)
                table: pa.Table = file.read(columns=None if columns is None else list(columns))
            except (pa.ArrowException, OSError) as error:
                raise CorruptError(f"{self.url}: {marker.files['table']} cannot be read: {error}") from error
        if table.num_rows != marker.num_rows:
            raise CorruptError(
                f"{self.url}: {marker.files['table']} has {table.num_rows} rows, its marker says {marker.num_rows}"
            )
        return table

    def forget_shards(self, collection: str, num_shards: int) -> None:
        """Take back the markers of shards that a collection no longer has; their data is then garbage."""
        for folder in self.folders(collection):
            step = posixpath.basename(folder)
            for shard in self.markers(collection, step):
                if shard >= num_shards:
                    self.remove(_marker_path(collection, step, shard))

    # -- artefacts --------------------------------------------------------------------------------------------------

    def artefact_marker(self, step: str) -> Marker | None:
        """Return the marker of a reduce, or None while it is not finished."""
        return self._read_marker(f"artefacts/{step}.json")

    def commit_artefacts(self, step: str, files: Mapping[str, Path], marker: Marker) -> Marker:
        """Copy fitted files into the run, then write the reduce's marker."""
        attempt = secrets.token_hex(6)
        stored = dict(marker.files)
        for name, source in sorted(files.items()):
            stored[name] = f"artefacts/{step}/{attempt}-{name}"
            with self.create(stored[name]) as stream, source.open("rb") as data:
                shutil.copyfileobj(data, stream, 1 << 20)
        sizes = {name: self.fs.size(self.path(path)) for name, path in stored.items()}
        made = Marker(**{**asdict(marker), "files": stored, "sizes": sizes})
        self._check_fence()
        self.write_bytes(f"artefacts/{step}.json", json.dumps(asdict(made), sort_keys=True).encode())
        return made

    # -- clearing up ------------------------------------------------------------------------------------------------

    def damaged(self, collections: Sequence[str]) -> Iterator[tuple[str, str, int | None, str]]:
        """Yield (collection, step, shard, path) of committed files that are missing or cut short.

        Costs a listing of each folder. Artefacts have an empty collection and no shard.
        """
        for collection in collections:
            folders = self.folders(collection)
            sizes = {path: size for folder in folders for path, size in self.sizes(folder)}
            for folder in folders:
                step = posixpath.basename(folder)
                for shard, marker in self.markers(collection, step).items():
                    yield from ((collection, step, shard, path) for path in _damaged(marker, sizes))
        for folder in self.folders("artefacts"):
            step = posixpath.basename(folder)
            found = self.artefact_marker(step)
            if found is not None:
                yield from (("", step, None, path) for path in _damaged(found, dict(self.sizes(folder))))

    def forget(self, collection: str, step: str, shard: int | None) -> None:
        """Take back a marker: the output does not exist any more."""
        self.remove(f"artefacts/{step}.json" if shard is None else _marker_path(collection, step, shard))

    def collect_garbage(self, collections: Sequence[str]) -> int:
        """Delete data that no marker names: what killed or superseded attempts left. Return the number of files.

        Only the holder of the lease may call it.
        """
        removed = 0
        for collection in collections:
            folders = self.folders(collection)
            named = {
                path
                for folder in folders
                for marker in self.markers(collection, posixpath.basename(folder)).values()
                for path in marker.files.values()
            }
            removed += sum(self._remove_unnamed(folder, named) for folder in folders)
        for folder in self.folders("artefacts"):
            marker = self.artefact_marker(posixpath.basename(folder))
            removed += self._remove_unnamed(folder, set(marker.files.values()) if marker else set(), markers=False)
        return removed

    def _remove_unnamed(self, folder: str, named: set[str], markers: bool = True) -> int:
        """Delete the files of a folder that ``named`` lacks; ``markers``: JSON files there are markers, and stay."""
        prefix = posixpath.relpath(folder, self.root)
        names = [posixpath.basename(path) for path in self.fs.ls(folder, detail=False)]
        data = [posixpath.join(prefix, name) for name in names if not (markers and name.endswith(".json"))]
        unnamed = [path for path in data if path not in named]
        for path in unnamed:
            self.remove(path)
        return len(unnamed)

    def _read_marker(self, relative: str) -> Marker | None:
        try:
            fields = json.loads(self.fs.cat_file(self.path(relative)))
            return Marker(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # cut short while it was written: the output does not exist yet


def _damaged(marker: Marker, sizes: Mapping[str, int]) -> Iterator[str]:
    for role, path in marker.files.items():
        if path not in sizes or marker.sizes.get(role, sizes[path]) != sizes[path]:
            yield path


def _marker_path(collection: str, step: str, shard: int) -> str:
    return posixpath.join(collection, step, f"{shard:08d}.json")
