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

import errno
import json
import posixpath
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.errors import CorruptError, DiskFullError, LeaseError, StoreError, UsageError
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


class Run:
    """One run, named by a folder or an fsspec URL such as ``s3://bucket/run`` or ``memory://run``."""

    def __init__(self, url: str | Path) -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(url))
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: cannot be opened: {error}") from error
        # Workers start in folders of their own: a relative path would be another one there.
        self.url = self.root if "file" in _protocols(self.fs) else str(url)
        self.fence = ""  # token of the lease under which this process writes; handed on to workers

    # -- plain files ------------------------------------------------------------------------------------------------

    def path(self, relative: str) -> str:
        """Return the file system's path of a file of the run."""
        return posixpath.join(self.root, relative)

    def exists(self, relative: str) -> bool:
        """Whether a file of the run exists."""
        return bool(self.fs.exists(self.path(relative)))

    def read_bytes(self, relative: str) -> bytes:
        """Return the content of a small file."""
        data: bytes = self.fs.cat_file(self.path(relative))
        return data

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write a small file, replacing one that exists.

        On a local disk the old content survives a crash or a full disk; where nothing can be renamed, a file cut short
        is one that readers take for absent.
        """
        path = self.path(relative)
        with disk_full_is_said(self.url):
            self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
            if "file" not in _protocols(self.fs):
                self.fs.pipe_file(path, data)
                return
            draft = Path(f"{path}.{secrets.token_hex(6)}.tmp")
            try:
                draft.write_bytes(data)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)

    def remove(self, relative: str) -> None:
        """Delete a file; it is no error when it is gone already."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(relative))

    def remove_folder(self, relative: str) -> None:
        """Delete a folder and all below it; it is no error when it is gone already."""
        with suppress(FileNotFoundError):
            self.fs.rm(self.path(relative), recursive=True)

    @contextmanager
    def create(self, relative: str) -> Iterator[IO[bytes]]:
        """Open a new file for writing from front to back; what an error leaves half written is deleted."""
        path = self.path(relative)
        try:
            with disk_full_is_said(self.url):
                self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
                with self.fs.open(path, "wb") as stream:
                    yield stream
        except BaseException:
            with suppress(OSError):
                self.remove(relative)
            raise

    def open(self, relative: str) -> IO[bytes]:
        """Open a file for reading; it can seek."""
        try:
            stream: IO[bytes] = self.fs.open(self.path(relative), "rb")
        except FileNotFoundError as error:
            raise CorruptError(f"{self.url}: {relative} is missing although its marker names it") from error
        return stream

    def local_copy(self, relative: str, folder: Path) -> Path:
        """Return a path of this machine for a file of the run; copied into ``folder`` if the run is elsewhere."""
        if not self.exists(relative):
            raise CorruptError(f"{self.url}: {relative} is missing although its marker names it")
        if "file" in _protocols(self.fs):
            return Path(self.path(relative))
        target = folder / posixpath.basename(relative)
        self.fs.get_file(self.path(relative), str(target))
        return target

    def publish(self, relative: str, target: str) -> None:
        """Copy a committed file to a name that people know; on a local disk they never see half of it."""
        if not self.exists(relative):
            raise CorruptError(f"{self.url}: {relative} is missing although its marker names it")
        with disk_full_is_said(self.url):
            if "file" not in _protocols(self.fs):
                self.fs.copy(self.path(relative), self.path(target))
                return
            draft = Path(f"{self.path(target)}.{secrets.token_hex(6)}.tmp")
            try:
                shutil.copyfile(self.path(relative), draft)
                draft.replace(self.path(target))
            finally:
                draft.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Return the space left where the run lies, or None where that has no meaning."""
        if "file" not in _protocols(self.fs):
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

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
        for folder in self._folders(collection):
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
            folders = self._folders(collection)
            sizes = {path: size for folder in folders for path, size in self._sizes(folder)}
            for folder in folders:
                step = posixpath.basename(folder)
                for shard, marker in self.markers(collection, step).items():
                    yield from ((collection, step, shard, path) for path in _damaged(marker, sizes))
        for folder in self._folders("artefacts"):
            step = posixpath.basename(folder)
            found = self.artefact_marker(step)
            if found is not None:
                yield from (("", step, None, path) for path in _damaged(found, dict(self._sizes(folder))))

    def forget(self, collection: str, step: str, shard: int | None) -> None:
        """Take back a marker: the output does not exist any more."""
        self.remove(f"artefacts/{step}.json" if shard is None else _marker_path(collection, step, shard))

    def _sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        prefix = posixpath.relpath(folder, self.root)
        for entry in self.fs.ls(folder, detail=True):
            yield posixpath.join(prefix, posixpath.basename(entry["name"])), entry["size"]

    def collect_garbage(self, collections: Sequence[str]) -> int:
        """Delete data that no marker names: what killed or superseded attempts left. Return the number of files.

        Only the holder of the lease may call it.
        """
        removed = 0
        for collection in collections:
            folders = self._folders(collection)
            named = {
                path
                for folder in folders
                for marker in self.markers(collection, posixpath.basename(folder)).values()
                for path in marker.files.values()
            }
            removed += sum(self._remove_unnamed(folder, named) for folder in folders)
        for folder in self._folders("artefacts"):
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

    def _folders(self, relative: str) -> list[str]:
        try:
            entries = self.fs.ls(self.path(relative), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")

    def _read_marker(self, relative: str) -> Marker | None:
        try:
            fields = json.loads(self.fs.cat_file(self.path(relative)))
            return Marker(**fields)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # cut short while it was written: the output does not exist yet


@contextmanager
def disk_full_is_said(where: str) -> Iterator[None]:
    """Turn "no space left on device" into a clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{where}: no space left on the device; finished shards are kept. Free some space and run again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StoreError(f"{where}: cannot be written: {error.strerror}") from error
        raise


def _damaged(marker: Marker, sizes: Mapping[str, int]) -> Iterator[str]:
    for role, path in marker.files.items():
        if path not in sizes or marker.sizes.get(role, sizes[path]) != sizes[path]:
            yield path


def _marker_path(collection: str, step: str, shard: int) -> str:
    return posixpath.join(collection, step, f"{shard:08d}.json")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
