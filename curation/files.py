"""Files below one URL, on any fsspec file system: small ones are replaced whole, large ones written once."""

import errno
import posixpath
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import fsspec

from curation.errors import CorruptError, DiskFullError, StoreError, UsageError


class Files:
    """Files of a folder, or of an fsspec URL such as ``s3://bucket/run`` or ``memory://run``.

    Attributes:
        url: The folder or URL.
        is_local: Whether they lie on a disk of this machine, where a file can be renamed.
    """

    def __init__(self, url: str | Path) -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(str(url))
        except (ImportError, ValueError) as error:
            raise UsageError(f"{url}: cannot be opened: {error}") from error
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        self.is_local = "file" in protocols
        # Workers start in folders of their own: a relative path would be another one there.
        self.url = self.root if self.is_local else str(url)

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
            if not self.is_local:
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
        if self.is_local:
            return Path(self.path(relative))
        target = folder / posixpath.basename(relative)
        self.fs.get_file(self.path(relative), str(target))
        return target

    def publish(self, relative: str, target: str) -> None:
        """Copy a committed file to a name that people know; on a local disk they never see half of it."""
        if not self.exists(relative):
            raise CorruptError(f"{self.url}: {relative} is missing although its marker names it")
        with disk_full_is_said(self.url):
            if not self.is_local:
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
        if not self.is_local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def folders(self, relative: str) -> list[str]:
        """Return the paths of the folders in a folder, sorted; none where there is no such folder."""
        try:
            entries = self.fs.ls(self.path(relative), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")

    def sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield the files of a folder of ``folders``, relative, with their bytes."""
        prefix = posixpath.relpath(folder, self.root)
        for entry in self.fs.ls(folder, detail=True):
            yield posixpath.join(prefix, posixpath.basename(entry["name"])), entry["size"]


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
