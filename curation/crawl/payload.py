"""The body of an archived HTTP answer, freed of chunks and compression as far as it is whole.

Archives keep what servers sent, or what crawlers had made of it, under the headers that came with it: both the headers
and the bytes may be wrong, cut short, or decoded already. What can be read is returned; nothing here fails.
"""

import io
import zlib
from collections.abc import Callable

import pyarrow as pa

_MAX_SIZE_LINE = 256
_BLOCK_BYTES = 1 << 16
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


def decode(body: bytes, transfer_encoding: str, content_encoding: str, max_bytes: int) -> tuple[bytes, bool]:
    """Return the decoded body, at most ``max_bytes`` of it, and whether it came to a proper end.

    Args:
        body: As archived.
        transfer_encoding: Header; anything but ``chunked`` is ignored.
        content_encoding: Header; encodings that are unknown, or that the bytes do not have, are ignored.
        max_bytes: Limit; a body that is cut here counts as whole.
    """
    whole = True
    if "chunked" in transfer_encoding.lower():
        body, whole = _unchunked(body)
    for name in reversed([part.strip().lower() for part in content_encoding.split(",")][:4]):
        body, complete = _unpacked(body, name, max_bytes)
        whole = whole and complete
    return body[:max_bytes], whole


def _unchunked(body: bytes) -> tuple[bytes, bool]:
    parts: list[bytes] = []
    place = 0
    while True:
        line_end = body.find(b"\n", place, place + _MAX_SIZE_LINE)
        size = _hexadecimal(body[place : max(line_end, place)].partition(b";")[0].strip())
        if size is None:
            if not parts:
                return body, True  # the crawler has taken the chunks apart already
            return b"".join(parts), False
        if size == 0:
            return b"".join(parts), True
        place = line_end + 1
        parts.append(body[place : place + size])
        if place + size > len(body):
            return b"".join(parts), False
        place += size
        place += 2 if body[place : place + 2] == b"\r\n" else 1 if body[place : place + 1] == b"\n" else 0


def _hexadecimal(text: bytes) -> int | None:
    if not 0 < len(text) <= 8 or text.strip(b"0123456789abcdefABCDEF"):
        return None
    return int(text, 16)


def _unpacked(body: bytes, encoding: str, max_bytes: int) -> tuple[bytes, bool]:
    if encoding in ("gzip", "x-gzip") and body.startswith(_GZIP):
        return _read(lambda: pa.CompressedInputStream(io.BytesIO(body), "gzip"), max_bytes)
    if encoding == "zstd" and body.startswith(_ZSTD):
        return _read(lambda: pa.CompressedInputStream(io.BytesIO(body), "zstd"), max_bytes)
    if encoding == "br" and body:
        unpacked, whole = _read(lambda: pa.CompressedInputStream(io.BytesIO(body), "brotli"), max_bytes)
        return (unpacked, whole) if unpacked else (body, True)  # brotli has no signature
    if encoding == "deflate" and body:
        unpacked, whole = _inflated(body, max_bytes)
        return (unpacked, whole) if unpacked else (body, True)
    return body, True


def _read(unpack: Callable[[], pa.NativeFile], max_bytes: int) -> tuple[bytes, bool]:
    """Read blocks up to the limit or to the damage."""
    unpacked = bytearray()
    try:
        stream = unpack()
        while len(unpacked) < max_bytes:
            block = stream.read(_BLOCK_BYTES)
            if not block:
                return bytes(unpacked), True
            unpacked += block
    except OSError:
        return bytes(unpacked), False
    return bytes(unpacked[:max_bytes]), True


def _inflated(body: bytes, max_bytes: int) -> tuple[bytes, bool]:
    is_zlib = body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    inflate = zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
    try:
        unpacked = inflate.decompress(body, max_bytes)
    except zlib.error:
        return b"", False
    return unpacked, inflate.eof or len(unpacked) == max_bytes
