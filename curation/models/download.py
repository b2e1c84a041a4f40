"""Download one file into the cache: resumed, bounded, checked, and complete or not there at all.

Bytes gather in ``<name>.part``; beside it ``<name>.etag`` says of which version they are. Only a file of the right
digest gets its final name, by a rename. Processes that want the same file wait for each other and find it.
"""

import errno
import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from curation.errors import WeightsError
from curation.models.file_lock import locked
from curation.models.transport import Limits, RangeRefused, check_url, offline_variable, open_url, redacted

Progress = Callable[[str, int, int | None], None]  # name, bytes so far, bytes in all where known

_CHUNK_BYTES = 1 << 20
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)")
# What the loaders tell apart by name; anything else is kept without a suffix.
_SUFFIXES = {".onnx": ".onnx", ".safetensors": ".safetensors", ".pt": ".pt", ".pth": ".pth", ".pth.tar": ".pth"}
_DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Source:
    """A file to download.

    Attributes:
        name: For the cache's file name and for messages: letters, digits, ``.``, ``_`` and ``-``.
        url: Where it is.
        sha256: Its digest, hex; empty: not known, and the caller has decided to trust what arrives.
        num_bytes: Its size; 0: not known.
    """

    name: str
    url: str
    sha256: str = ""
    num_bytes: int = 0


@dataclass(frozen=True)
class Downloaded:
    """A complete file in the cache, with its digest (hex) and size."""

    path: Path
    sha256: str
    num_bytes: int


def cached_path(source: Source, folder: Path) -> Path:
    """Return where the file of a known digest lies when it is there."""
    return folder / f"{source.name}-{source.sha256[:16]}{_suffix(source.url)}"


def cached_files(folder: Path) -> dict[Path, str]:
    """Return the finished downloads of a folder, and the 16 digits of its digest that are in the name of each."""
    kept = "|".join(map(re.escape, sorted(set(_SUFFIXES.values()))))
    name = re.compile(rf".+-([0-9a-f]{{16}})(?:{kept})?")
    found = {path: name.fullmatch(path.name) for path in sorted(folder.glob("*")) if path.is_file()}
    return {path: match[1] for path, match in found.items() if match is not None}


def download(
    source: Source, folder: Path, *, progress: Progress | None = None, limits: Limits = _DEFAULT_LIMITS
) -> Downloaded:
    """Download a file, going on where an earlier attempt stopped.

    Args:
        source: What and where.
        folder: Created if missing.
        progress: Called with each chunk.
        limits: Of time and size.

    Raises:
        WeightsError: Offline, no network, a refusing or dripping server, or other bytes than pinned. Bytes that are
            wrong are removed; bytes that are merely too few are kept for the next attempt.
    """
    what = f"weights {source.name}"
    offline = offline_variable()
    if offline:
        raise WeightsError(
            f"{what}: not in {folder}, and {offline} forbids to download {redacted(source.url)}; "
            "fetch it where there is a network, or set weights to the path of a file that you have"
        )
    try:
        check_url(source.url)
        folder.mkdir(parents=True, exist_ok=True)
        key = source.sha256 or hashlib.sha256(source.url.encode()).hexdigest()
        part = folder / f"{source.name}-{key[:16]}.part"
        with locked(part.with_suffix(".lock")):
            target = cached_path(source, folder)
            if source.sha256 and target.is_file():  # by the process that was waited for
                return Downloaded(target, source.sha256, target.stat().st_size)
            _Transfer(source, part, progress, limits).run()
            return _finish(source, part, folder)
    except WeightsError as error:
        raise WeightsError(f"{what}: {error}") from error
    except OSError as error:
        raise WeightsError(
            f"{what}: download of {redacted(source.url)} failed: {error.strerror or error}; run again to go on"
        ) from error


def _finish(source: Source, part: Path, folder: Path) -> Downloaded:
    """Give a complete file its name, or remove it."""
    num_bytes = part.stat().st_size
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    part.with_suffix(".etag").unlink(missing_ok=True)
    wrong = (source.sha256 and found != source.sha256) or (source.num_bytes and num_bytes != source.num_bytes)
    if wrong:
        part.unlink()
        raise WeightsError(
            f"{redacted(source.url)} has sha256 {found} and {num_bytes} bytes, but what is pinned has "
            f"{source.sha256 or 'any sha256'} and {source.num_bytes or 'any number of'} bytes; what came was removed"
        )
    target = cached_path(Source(source.name, source.url, found), folder)
    part.replace(target)
    return Downloaded(target, found, num_bytes)


class _Transfer:
    """Brings a part file to its full length."""

    def __init__(self, source: Source, part: Path, progress: Progress | None, limits: Limits) -> None:
        self._source = source
        self._part = part
        self._etag = part.with_suffix(".etag")
        self._progress = progress
        self._limits = limits
        self._most_bytes = source.num_bytes or limits.max_bytes

    def run(self) -> None:
        """Try until the file is complete, or attempts bring next to nothing new."""
        failures, furthest = 0, self._have()
        while True:
            try:
                self._attempt()
            except (OSError, http.client.HTTPException) as error:
                # Counted from the furthest byte, not the last attempt's: a server that ignores ranges and always
                # breaks off in the middle brings nothing new.
                new = self._have() - furthest
                failures = 0 if new >= self._limits.stall_bytes else failures + 1
                furthest = max(furthest, self._have())
                if failures >= self._limits.attempts or not _may_pass(error):
                    raise _as_os_error(error) from error
                time.sleep(self._limits.backoff_s * 2 ** max(0, failures - 1))
            else:
                return

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)
        self._etag.unlink(missing_ok=True)

    def _attempt(self) -> None:
        have = self._have()
        if self._source.num_bytes and have == self._source.num_bytes:
            return  # complete; the digest decides
        if have > self._most_bytes:
            self._discard()
            have = 0
        etag = self._etag.read_text() if have and self._etag.exists() else ""
        headers = {"User-Agent": "curation", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if etag:
                headers["If-Range"] = etag
        try:
            with open_url(self._source.url, headers, self._limits) as answer:
                start, total = self._place(answer, have, etag)
                self._check_total(total)
                self._receive(answer, start, total)
        except RangeRefused as refused:
            place = _CONTENT_RANGE.fullmatch(refused.content_range)
            if not (have and place and place[3] == str(have)):  # else nothing is missing
                raise self._restart(416, have) from refused

    def _place(self, answer: http.client.HTTPResponse, have: int, etag: str) -> tuple[int, int | None]:
        """Return where the body belongs and the file's length, where it is said.

        Raises:
            ConnectionError: The answer does not continue what is here, which is thrown away: the next attempt
                starts from the first byte.
        """
        length = answer.headers.get("Content-Length", "")
        if answer.status == 200:
            self._discard()
            found = answer.headers.get("ETag", "")
            if found.startswith('"') and found.isprintable():  # weak ones promise less than equal bytes
                self._etag.write_text(found)
            return 0, int(length) if length.isdigit() and len(length) < 19 else None
        place = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        same = not etag or answer.headers.get("ETag", etag) == etag
        if have and same and place and place[1] == str(have) and int(place[2]) >= have:
            return have, None if place[3] == "*" else int(place[3])
        raise self._restart(answer.status, have)

    def _restart(self, status: int, have: int) -> ConnectionError:
        self._discard()
        return ConnectionError(f"HTTP {status} does not continue the {have} bytes that were here; they are removed")

    def _check_total(self, total: int | None) -> None:
        if total is None:
            if not self._source.sha256:
                self._discard()
                raise WeightsError(f"{redacted(self._source.url)} does not say how long it is; give its sha256")
            return
        if (self._source.num_bytes and total != self._source.num_bytes) or total > self._most_bytes:
            self._discard()
            bound = self._source.num_bytes or f"at most {self._most_bytes}"
            raise WeightsError(f"{redacted(self._source.url)} has {total} bytes, not {bound}")

    def _receive(self, answer: http.client.HTTPResponse, start: int, total: int | None) -> None:
        done, window_start, window_done = start, time.monotonic(), start
        with self._part.open("ab" if start else "wb") as file:
            while chunk := answer.read1(_CHUNK_BYTES):
                done += len(chunk)
                if done > (self._most_bytes if total is None else total):
                    raise self._too_long(total)
                file.write(chunk)
                if self._progress:
                    self._progress(self._source.name, done, total)
                now = time.monotonic()
                if now - window_start >= self._limits.stall_s:
                    if done - window_done < self._limits.stall_bytes:
                        raise TimeoutError(f"{done - window_done} bytes in {now - window_start:.0f} s; given up")
                    window_start, window_done = now, done
        if total is not None and done < total:
            raise ConnectionError(f"the connection ended after {done} of {total} bytes")

    def _too_long(self, total: int | None) -> WeightsError:
        self._discard()
        return WeightsError(f"{redacted(self._source.url)} sends more than {total or self._most_bytes} bytes")


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may help: not where this machine's disk or rights are the reason."""
    passing = ConnectionError | TimeoutError | ssl.SSLError | http.client.HTTPException
    return isinstance(error, passing) or getattr(error, "errno", None) in _NO_ROUTE


def _as_os_error(error: Exception) -> OSError:
    if isinstance(error, OSError):
        return OSError(error.strerror or str(error))
    return OSError("the answer broke off")  # what http.client says of it may quote the server


def _suffix(url: str) -> str:
    path = urllib.parse.urlsplit(url).path.lower()
    return next((kept for suffix, kept in _SUFFIXES.items() if path.endswith(suffix)), "")
