"""Input files wherever they lie: local paths, http(s), and whatever else fsspec opens, such as ``s3://``.

A remote file is read as a stream that survives what networks do: a broken connection is opened again where it broke,
with growing pauses, until several attempts in a row bring no byte. A file that changes under the reader is noticed.
"""

import email.message
import io
import posixpath
import random
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from curation.config.fetch import CrawlConfig
from curation.errors import InputError
from curation.local_files import expand, walk

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*)://")
_FINAL_STATUSES = frozenset({400, 401, 403, 404, 405, 410, 416})  # asking again changes nothing
_MAX_PAUSE_S = 30.0
_BLOCK_BYTES = 1 << 20


class RemoteError(OSError):
    """A remote file does not come: the fault of who sends it, and not of what is in it."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL of something that is not a local file."""
    found = _SCHEME.match(path)
    return found is not None and found[1].lower() not in ("file", "local")


def suffix_of(path: str) -> str:
    """Return the lower-case suffix of a path or URL, ``.gz`` and its like left out where another one is before it."""
    name = posixpath.basename(path.partition("?")[0] if is_remote(path) else path).lower()
    stem, suffix = posixpath.splitext(name)
    inner = posixpath.splitext(stem)[1]
    return inner if suffix in (".gz", ".zst", ".lz4", ".bz2") and inner else suffix


def files_of(path: str, suffixes: frozenset[str], what: str) -> list[str]:
    """Return the files that a path or URL of the settings means, sorted.

    Args:
        path: A file, folder or glob; of remote ones, folders end in a slash, and http has neither folders nor globs.
        suffixes: Of the files that a folder is searched for, as ``suffix_of`` gives them.
        what: Name of the input, for messages.

    Raises:
        InputError: If there is nothing.
    """
    if not is_remote(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            return [str(file) for file in expand(path, suffixes, what)[0]]
        below = [str(file) for file in walk(folder.absolute()) if suffix_of(file.name) in suffixes]
        if not below:
            raise InputError(f"{what} {path}: no file in this folder ends in {', '.join(sorted(suffixes))}")
        return below
    if path.lower().startswith(("http://", "https://")) or not (has_magic(path) or path.endswith("/")):
        return [path]
    fs, root = _file_system(path, what)
    try:
        found = fs.glob(root) if has_magic(path) else fs.find(root)
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be listed: {error}") from error
    files = sorted(str(fs.unstrip_protocol(name)) for name in found if has_magic(path) or suffix_of(name) in suffixes)
    if not files:
        raise InputError(f"{what} {path}: names no file; check it, and the credentials that it needs")
    return files


def open_source(path: str, config: CrawlConfig, user_agent: str) -> BinaryIO:
    """Open an input file for reading from front to back; it can also seek.

    Raises:
        OSError: It cannot be opened, or later read.
    """
    if not is_remote(path):
        return open(path, "rb")
    return io.BufferedReader(RemoteFile(path, config, user_agent), _BLOCK_BYTES)


@contextmanager
def local_copy(path: str, config: CrawlConfig, user_agent: str) -> Iterator[Path]:
    """Give a local path for an input file; a remote one is copied to scratch disk first.

    Raises:
        OSError: It cannot be read, or is larger than ``config.max_download_bytes``.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="curation-input-") as folder:
        target = Path(folder) / f"copy{suffix_of(path)}"
        with open_source(path, config, user_agent) as stream, target.open("wb") as copy:
            while block := stream.read(_BLOCK_BYTES):
                copy.write(block)
        yield target


class RemoteFile(io.RawIOBase):
    """A remote file that is opened again where its connection broke.

    Args:
        url: Where it lies.
        config: ``input_attempts`` in a row without a byte end in an error; more than ``max_download_bytes`` do too.
        user_agent: Sent over http.
    """

    def __init__(self, url: str, config: CrawlConfig, user_agent: str) -> None:
        self._url, self._config, self._user_agent = url, config, user_agent
        self._place = 0
        self._received = 0
        self._version: str | None = None
        self._stream: Any = None
        self._is_http = url.lower().startswith(("http://", "https://"))
        self._with_patience(self._connect)

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that it can seek, at the price of a new connection."""
        return True

    def tell(self) -> int:
        """Return the position of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position counted from the start or from here."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of a remote file is not known")
        place = offset + (self._place if whence == io.SEEK_CUR else 0)
        if place != self._place:
            self._hang_up()
            self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        """Read up to ``len(buffer)`` bytes; 0 at the end."""
        data = self._with_patience(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._place += len(data)
        self._received += len(data)
        if self._received > self._config.max_download_bytes:
            raise RemoteError(
                f"{self._url}: more than crawl.max_download_bytes = {self._config.max_download_bytes} bytes"
            )
        return len(data)

    def close(self) -> None:
        """Close the connection."""
        self._hang_up()
        super().close()

    def _with_patience(self, attempt: Any) -> Any:
        for number in range(1, self._config.input_attempts + 1):
            try:
                return attempt()
            except urllib.error.HTTPError as error:
                if error.code in _FINAL_STATUSES or number == self._config.input_attempts:
                    raise RemoteError(f"{self._url}: the server answered {error.code} {error.reason}") from error
                pause_s = _retry_after_s(error.headers)
            except (PermissionError, FileNotFoundError, InputError):
                raise
            except (OSError, HTTPException) as error:
                if number == self._config.input_attempts:
                    raise RemoteError(f"{self._url}: {error or type(error).__name__}") from error
                pause_s = None
            self._hang_up()
            backoff_s = self._config.input_backoff_s * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            time.sleep(min(_MAX_PAUSE_S, backoff_s if pause_s is None else pause_s))
        raise RemoteError(f"{self._url}: no attempt was allowed")

    def _read(self, num_bytes: int) -> bytes:
        if self._stream is None:
            self._connect()
        if self._stream is None:  # the end of the file
            return b""
        data: bytes = self._stream.read(num_bytes)
        if not data and self._is_http and getattr(self._stream, "length", None):
            raise HTTPException(f"{self._stream.length} bytes are missing")
        return data

    def _connect(self) -> None:
        if not self._is_http:
            fs, root = _file_system(self._url, "input")
            self._stream = fs.open(root, "rb", block_size=8 * _BLOCK_BYTES, cache_type="readahead")
            self._stream.seek(self._place)
            return
        headers = {"User-Agent": self._user_agent, "Accept-Encoding": "identity"}
        if self._place:
            headers["Range"] = f"bytes={self._place}-"
        request = urllib.request.Request(self._url, headers=headers)  # noqa: S310  # only http(s) gets here
        try:
            answer = _opener().open(request, timeout=self._config.input_timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 416 and self._place:  # nothing behind the last byte
                error.close()
                return
            raise
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if self._version not in (None, version):
            answer.close()
            raise InputError(f"{self._url}: has changed while it was read; run again")
        self._version = version
        self._stream = answer
        if self._place and answer.status != 206:  # a server without ranges: read up to where we were
            self._skip(self._place)
        elif self._place and not answer.headers.get("Content-Range", "").startswith(f"bytes {self._place}-"):
            raise RemoteError(f"{self._url}: the server sent another range than asked for")

    def _skip(self, num_bytes: int) -> None:
        while num_bytes:
            data = self._stream.read(min(num_bytes, _BLOCK_BYTES))
            if not data:
                raise HTTPException("the file is shorter than before")
            num_bytes -= len(data)

    def _hang_up(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _opener() -> urllib.request.OpenerDirector:
    """Return what speaks http(s) and nothing else, and asks no proxy of the environment."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _retry_after_s(headers: email.message.Message) -> float | None:
    text = headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None


def _file_system(url: str, what: str) -> tuple[Any, str]:
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{what} {url}: cannot be opened: {error}") from error
    return fs, root
