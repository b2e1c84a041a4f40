"""The body of an archived HTTP answer, freed of chunks and compression as far as it is whole.

Archives keep what servers sent, or what crawlers had made of it, under the headers that came with it: both the headers
and the bytes may be wrong, cut short, or decoded already. What can be read is returned; nothing here fails.
"""

import io
import zlib

import pyarrow as pa

_MAX_SIZE_LINE = 256
_STEP_BYTES = 1 << 12
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
        return _inflated(body, 16 + zlib.MAX_WBITS, max_bytes)
    if encoding == "deflate" and body:
        is_zlib = body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
        unpacked, whole = _inflated(body, zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS, max_bytes)
        return (unpacked, whole) if unpacked else (body, True)
    if encoding == "zstd" and body.startswith(_ZSTD):
        return _decompressed(body, "zstd", max_bytes)
    if encoding == "br" and body:
        unpacked, whole = _decompressed(body, "brotli", max_bytes)
        return (unpacked, whole) if unpacked else (body, True)  # brotli has no signature
    return body, True


def _inflated(body: bytes, window_bits: int, max_bytes: int) -> tuple[bytes, bool]:
    """Inflate in small steps, so that what is before the damage is kept; gzip members follow each other."""
    inflate = zlib.decompressobj(window_bits)
    unpacked = bytearray()
    rest = memoryview(body)
    waiting = b""
    try:
        while not inflate.eof and len(unpacked) < max_bytes and (waiting or rest):
            if not waiting:
                waiting, rest = bytes(rest[:_STEP_BYTES]), rest[_STEP_BYTES:]
            unpacked += inflate.decompress(waiting, max_bytes - len(unpacked))
            waiting = inflate.unconsumed_tail
            if inflate.eof and (inflate.unused_data + rest[:2].tobytes()).startswith(_GZIP):
                waiting, inflate = inflate.unused_data, zlib.decompressobj(window_bits)
    except zlib.error:
        return bytes(unpacked), False
    return bytes(unpacked), inflate.eof or len(unpacked) >= max_bytes


def _decompressed(body: bytes, codec: str, max_bytes: int) -> tuple[bytes, bool]:
    unpacked = bytearray()
    try:
        with pa.CompressedInputStream(io.BytesIO(body), codec) as stream:
            while len(unpacked) < max_bytes:
                block = stream.read(min(_STEP_BYTES, max_bytes - len(unpacked)))
                if not block:
                    break
                unpacked += block
    except OSError:
        return bytes(unpacked), False
    return bytes(unpacked), True
