"""Records of WARC and WAT files, one after the other, past whatever is damaged.

Files may be plain, or compressed with gzip, Zstandard or LZ4, a frame a record. Behind damage reading goes on at the
next place that looks like the start of a record and is one, so that a broken record costs itself and not the file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecordType

from curation.crawl.sets import Report

# gzip, Zstandard and LZ4 frames, and the first words of an uncompressed record.
_STARTS = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"WARC/1.")
_MAX_START_BYTES = max(map(len, _STARTS))
_MAX_DAMAGES = 1_000  # then the rest of the file is given up: each costs a read of 64 KiB
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record that may hold a page.

    Attributes:
        kind: ``response``, ``resource`` or ``metadata``.
        url: Its target, as written.
        status: HTTP status; None where it is no HTTP answer.
        headers: HTTP headers, names in lower case, in order.
        content_type: Of the HTTP answer, or of the record where it is none.
        body: As archived, cut at the limit.
    """

    kind: str
    url: str
    status: int | None
    headers: tuple[tuple[str, str], ...]
    content_type: str
    body: bytes

    def header(self, name: str) -> str:
        """Return the values of an HTTP header, joined by commas; empty where it is absent."""
        return ", ".join(self.all_of(name))

    def all_of(self, name: str) -> list[str]:
        """Return the values of an HTTP header."""
        return [value for key, value in self.headers if key == name]


def read_records(stream: BinaryIO, kinds: frozenset[str], max_bytes: int, report: Report) -> Iterator[Record]:
    """Yield the records of the kinds asked for.

    Args:
        stream: An archive; it can seek.
        kinds: Of ``Record.kind``; ``revisit`` records are counted, whatever is asked for.
        max_bytes: Bodies are cut here.
        report: Called with ``record_damaged`` for each place that cannot be read and each record without a type,
            ``record_truncated`` for each record that ends before its announced length, and ``record_revisit``.

    Raises:
        OSError: The stream itself, and not what is in it, cannot be read.
    """
    source = _Watched(stream)
    head = source.read(_MAX_START_BYTES)
    starts = [start for start in _STARTS if head.startswith(start)] or _STARTS
    start = 0
    is_known = False  # that here is damage: the start after it is looked for
    for _ in range(_MAX_DAMAGES):
        place = start
        try:
            for record in _iterate(source, start):
                is_known = False
                place = max(place, start + record.stream_pos)
                found = _read(record, kinds, max_bytes, report)
                if found is not None:
                    yield found
            if source.ended or not source.received:
                return
            failed = source.received  # it stopped reading before the end
        except BaseException as error:
            if not (isinstance(error, (OSError, ValueError)) or _is_panic(error)):
                raise
            if source.broken is not None:
                raise source.broken from error
            failed = source.received
        if not is_known:
            report("record_damaged")
            is_known = True
        if source.ended and failed - place < _MAX_START_BYTES:
            return
        next_start = _next_start(source, place + 1, starts)
        if next_start is None:
            return
        start = next_start
    report("archive_given_up")


def _is_panic(error: BaseException) -> bool:
    """Whether fastwarc, which is Rust, stopped at what it had not foreseen, such as a wrong checksum of LZ4."""
    return type(error).__module__ == "pyo3_runtime"


def _iterate(source: "_Watched", start: int) -> Iterator[Any]:
    source.seek(start)
    yield from ArchiveIterator(source, record_types=WarcRecordType.any_type, parse_http=False)


def _read(record: Any, kinds: frozenset[str], max_bytes: int, report: Report) -> Record | None:
    # As written: fastwarc finds the type only where the name of its header has the usual capitals.
    kind = (record.headers.get("WARC-Type") or "").strip().lower()
    if kind == "revisit":
        report("record_revisit")
        return None
    if not kind.isalpha():  # missing, or lines that end otherwise and were taken for one value
        report("record_damaged")
    if kind not in kinds:
        return None
    headers: tuple[tuple[str, str], ...] = ()
    status = None
    content_type = record.headers.get("Content-Type") or ""
    if record.is_http:
        record.parse_http(quirks_mode=True)
        found = record.http_headers
        status = found.status_code
        headers = tuple((key.lower(), value) for key, value in found.items())
        content_type = found.get("Content-Type") or ""
    length = record.content_length
    body = _whole(record.reader, max_bytes)
    if len(body) < min(length, max_bytes):
        report("record_truncated")
    url = (record.headers.get("WARC-Target-URI") or "").strip().removeprefix("<").removesuffix(">")
    return Record(kind, url, status, headers, content_type, body)


def _whole(reader: Any, max_bytes: int) -> bytes:
    body = bytearray()
    while len(body) < max_bytes and (block := reader.read(min(_BLOCK_BYTES, max_bytes - len(body)))):
        body += block
    return bytes(body)


def _next_start(source: "_Watched", place: int, starts: Sequence[bytes]) -> int | None:
    """Return the first place from ``place`` on where a record may start."""
    source.seek(place)
    kept = b""
    while block := source.read(_BLOCK_BYTES):
        window = kept + block
        found = [where for where in (window.find(start) for start in starts) if where >= 0]
        if found:
            return place + min(found)
        kept = window[-(_MAX_START_BYTES - 1) :]
        place += len(window) - len(kept)
    return None


class _Watched:
    """A stream that tells its own failures from those of what it holds."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.received = 0
        self.ended = False
        self.broken: OSError | None = None

    def read(self, num_bytes: int = -1) -> bytes:
        """Read up to ``num_bytes``."""
        try:
            data = self._stream.read(num_bytes if num_bytes >= 0 else _BLOCK_BYTES)
        except OSError as error:
            self.broken = error
            raise
        self.received += len(data)
        self.ended = not data and num_bytes != 0
        return data

    def seek(self, place: int, whence: int = 0) -> int:
        """Move to a place from the start."""
        self.received = self._stream.seek(place, whence)
        self.ended = False
        return self.received

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._stream.tell()

    def close(self) -> None:
        """Leave the stream open: it is its opener's."""
