"""What Pillow is shown of a hostile file: coded pixels and their colours, in a number of parts that can be walked.

Pillow reads metadata in Python, part by part, and has no limit of its own. Measured with Pillow 13 on crafted files: a
4 MB JPEG of empty segments takes 1.4 s and 140 MB, 20 MB of JPEG fill bytes take 9 s, 2,000 scans in 0.1 MB take 2.7 s,
a 0.9 MB TIFF of one huge tile takes 2.4 s, and a 30 MB run-length-coded BMP takes 9 s; here each takes milliseconds. So
metadata never reaches Pillow: ``lean`` copies a file without it, reads the one number that pixels depend on (the EXIF
orientation) itself, and refuses what has too many parts.
"""

import re
import struct
import zlib
from dataclasses import dataclass

from curation import containers
from curation.errors import ImageError

MAX_PARTS = 65_536  # PNG chunks (the largest real files have some thousands), WebP chunks, TIFF strips x 4
_MAX_SEGMENTS = 4_096  # before the pixels: JPEG (a 16 MB profile has 256), GIF extension blocks (one XMP has hundreds)
_MAX_RLE_BYTES = 4 << 20  # of a run-length-coded BMP, which Pillow decodes in Python at about 3 MB/s
_MAX_SCANS = 100  # progressive JPEGs have about ten; each one walks all blocks, however few bytes it has

_PNG_SHOWN = frozenset(b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP".split())
_AVIF_EXIF_ITEM = re.compile(rb"(infe[\x02\x03].{3}(?:.{4}|.{6}))Exif", re.DOTALL)

# TIFF: bytes of a value by type; the tags that pixels depend on.
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_PIXELS = frozenset({*range(256, 260), 262, 263, 266, 273, 274, 277, 278, 279, 284, 292, 293, 301, 317, 320})
_TIFF_SHOWN = _TIFF_PIXELS | {*range(322, 326), 338, 339, 347, *range(512, 522), *range(529, 533), 34675}
_TILE_WIDTH, _TILE_LENGTH = 322, 323


@dataclass(frozen=True)
class Lean:
    """A file without its metadata.

    Attributes:
        data: The file for Pillow.
        orientation: EXIF orientation of its pixels, 1 to 8; 1 for TIFF and AVIF, which carry their own.
    """

    data: bytes
    orientation: int


def lean(data: bytes, max_pixels: int) -> Lean:
    """Return a file with what its pixels need. One whose structure is broken keeps the rest from there on.

    Args:
        data: Any bytes; what is none of JPEG, PNG, GIF, WebP, TIFF and AVIF is returned as it is.
        max_pixels: No canvas or tile may be larger.

    Raises:
        ImageError: Too many parts, or a canvas or tile that is too large.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return Lean(_gif(data), 1)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data, max_pixels)
    if data[4:8] == b"ftyp":
        return Lean(_avif(data), 1)
    if data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and len(data) > _MAX_RLE_BYTES:
        raise ImageError("undecodable", "a run-length-coded BMP of more than 4 MiB")
    if data[:2] in (b"II", b"MM"):
        return Lean(_tiff(data, max_pixels), 1)
    return Lean(data, 1)


def _too_many(what: str) -> ImageError:
    return ImageError("undecodable", f"too many {what}")


def _jpeg(data: bytes) -> Lean:
    """Header segments up to the first scan, then all the rest."""
    parts, exif = [b"\xff\xd8"], b""
    for number, segment in enumerate(containers.jpeg_segments(data)):
        if number == _MAX_SEGMENTS:
            raise _too_many("JPEG segments")
        if segment.code in (containers.SOS, containers.EOI) or segment.end > len(data):
            parts.append(data[segment.marker :])
            if data.count(b"\xff\xda", segment.marker) > _MAX_SCANS:
                raise _too_many("JPEG scans")
            break
        payload = data[segment.start : segment.end]
        if segment.code == 0xE1 and payload.startswith(b"Exif\0") and not exif:
            exif = payload
        kept = containers.kept_segment(segment.code, payload)
        if kept is not None:
            parts.append(containers.jpeg_segment(segment.code, kept))
    return Lean(b"".join(parts), containers.exif_orientation(exif))


def _png(data: bytes) -> Lean:
    """Chunks without texts, times and animation; an orientation that comes after the pixels does not count."""
    parts, exif, position, number, has_pixels = [data[:8]], b"", 8, 0, False
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        number += 1
        if number > MAX_PARTS:
            raise _too_many("PNG chunks")
        has_pixels |= kind == b"IDAT"
        if end > len(data) or kind == b"IEND":
            break
        if kind == b"IDAT" and zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageError("undecodable", "a checksum of the PNG's pixels is wrong")  # Pillow does not look at it
        if kind == b"eXIf" and not has_pixels:
            exif = data[position + 8 : end - 4]
        if kind in _PNG_SHOWN:
            parts.append(data[position:end])
        position = end
    parts.append(data[position:])
    return Lean(b"".join(parts), containers.exif_orientation(exif))


def _gif(data: bytes) -> bytes:
    """Header, global palette, the last graphic control before the first frame, and all from that frame on."""
    if len(data) < 13:
        return data
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    parts, control, number = [data[:position]], b"", 0
    while data[position : position + 1] == b"!":
        start, label = position, data[position + 1 : position + 2]
        position += 2
        while position < len(data) and data[position]:
            position += 1 + data[position]
            number += 1
            if number > _MAX_SEGMENTS:
                raise _too_many("GIF extension blocks")
        position += 1
        if label == b"\xf9":
            control = data[start:position]
    return b"".join((*parts, control, data[position:]))


def _webp(data: bytes, max_pixels: int) -> Lean:
    exif, position, number = b"", 12, 0
    while position + 8 <= len(data):
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        payload = position + 8
        if kind == b"VP8X":
            width = 1 + int.from_bytes(data[payload + 4 : payload + 7], "little")
            height = 1 + int.from_bytes(data[payload + 7 : payload + 10], "little")
            if width * height > max_pixels:
                raise ImageError("too_many_pixels", f"{width} x {height} is more than images.max_pixels")
        if kind == b"EXIF" and not exif:
            exif = data[payload : payload + length]
        position = payload + length + length % 2
        number += 1
        if number > MAX_PARTS:
            raise _too_many("WebP chunks")
    return Lean(data, containers.exif_orientation(exif))


def _avif(data: bytes) -> bytes:
    """Rename the EXIF item, so that nobody reads it: what turns an AVIF are its own boxes."""
    start, end = containers.bmff_box(data, b"meta")
    if start == end:
        return data
    return data[:start] + _AVIF_EXIF_ITEM.sub(rb"\1skip", data[start:end]) + data[end:]


def _tiff(data: bytes, max_pixels: int) -> bytes:
    """Append a directory with the first page's pixel tags, and let the header point at it.

    Raises:
        ImageError: The directory is not within the file, values overlap or are too many, or a tile is too large.
    """
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    magic = int.from_bytes(data[2:4], "little" if order == "<" else "big")
    if magic not in (42, 43) or len(data) < 16:
        return data
    count_code, offset_code, entry = ("H", "I", struct.Struct(order + "HHI4s"))
    if magic == 43:
        count_code, offset_code, entry = ("Q", "Q", struct.Struct(order + "HHQ8s"))
    offset_at = 4 if magic == 42 else 8
    try:
        (offset,) = struct.unpack_from(order + offset_code, data, offset_at)
        (count,) = struct.unpack_from(order + count_code, data, offset)
        offset += struct.calcsize(count_code)
        if count > MAX_PARTS:
            raise _too_many("TIFF tags")
        found = [entry.unpack_from(data, offset + number * entry.size) for number in range(count)]
    except struct.error as error:
        raise ImageError("truncated", "the TIFF directory lies outside the file") from error
    entries = {tag: (tag, kind, number, value) for tag, kind, number, value in found if tag in _TIFF_SHOWN}
    _check_tiff(entries, order, len(data), max_pixels)
    header = data[:offset_at] + struct.pack(order + offset_code, len(data) + len(data) % 2)
    directory = struct.pack(order + count_code, len(entries)) + b"".join(
        entry.pack(*found) for found in entries.values()
    )
    rest = data[len(header) :] + b"\0" * (len(data) % 2)
    return header + rest + directory + struct.pack(order + offset_code, 0)


def _check_tiff(entries: dict[int, tuple[int, int, int, bytes]], order: str, num_bytes: int, max_pixels: int) -> None:
    sizes = [number * _TIFF_BYTES.get(kind, 1) for _, kind, number, _ in entries.values()]
    if sum(sizes) > num_bytes + 64 * len(sizes):
        raise ImageError("truncated", "TIFF values reach outside the file")
    if any(number > 4 * MAX_PARTS for _, kind, number, _ in entries.values() if _TIFF_BYTES.get(kind, 1) > 1):
        raise _too_many("TIFF strips")
    sides = []
    for tag in (_TILE_WIDTH, _TILE_LENGTH):
        _, kind, _, value = entries.get(tag, (tag, 3, 1, b"\0" * 8))
        sides.append(struct.unpack_from(order + ("H" if kind == 3 else "I"), value)[0])
    if sides[0] * sides[1] > max(max_pixels, 1 << 20):  # a small image may be one larger tile
        raise ImageError("too_many_pixels", f"tiles of {sides[0]} x {sides[1]} pixels")
