"""Containers of coded pixels without their metadata: JPEG, PNG and WebP, byte by byte.

Each function copies only the parts that a decoder needs for pixels, their colours and their orientation, so what a
camera, an editor or a phone adds next year is dropped without a new rule. None is returned when the structure is not
understood; the caller then encodes the pixels anew.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from curation.errors import ImageError

# JPEG: SOI; segments of marker (2 bytes), length (2, itself included) and payload; coded data after each SOS; EOI.
SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
_CODING = frozenset({*range(0xC0, 0xC8), *range(0xC9, 0xD0), SOS, 0xDB, 0xDC, 0xDD})  # frames, tables, scans, restarts
_NO_PAYLOAD = frozenset({0x01, *range(0xD0, 0xDA)})
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_FILLED_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_SCAN_END = re.compile(rb"\xff(?![\x00\xd0-\xd7])")  # stuffed zeros and restarts belong to the coded data
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_TEXT = re.compile(rb"[\x20-\x7e]{24}")  # in none of 5,000 photos at the end of a scan
_TEXT_BYTES = 4_096  # that are looked at there
_DRI, _PROGRESSIVE = 0xDD, 0xC2
_FRAMES = frozenset({0xC0, 0xC1, _PROGRESSIVE})  # of Huffman-coded blocks
_TABLES = frozenset({0xC4, 0xDB, _DRI})
_APPLICATION = frozenset({*range(0xE0, 0xF0), 0xFE})  # and comments
_ICC = b"ICC_PROFILE\0"
_ICC_BYTES = 65_535 - 2 - len(_ICC) - 2  # of a profile, in one segment
_JFIF_BYTES = 14  # of APP0 without its thumbnail
_MAX_EXIF_ENTRIES = 1_000
_MAX_BOXES = 1_000

# PNG: signature; chunks of length (4), type (4), payload and CRC (4).
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bytes of the chunks that are kept besides pixels and palette; no animation: later frames were never
# looked at.
_PNG_KEPT = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"cICP": 4}
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"IDAT"))
_PNG_WITH_ALPHA = (4, 6)  # colour types
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_DEFLATED_BYTES, _INFLATED_BYTES = 1 << 16, 1 << 20  # at a time

# WebP: RIFF, length, WEBP; chunks of type (4), length (4), payload, padded to even.
_WEBP_ICC, _WEBP_ALPHA, _WEBP_EXIF, _WEBP_ANIMATION = 0x20, 0x10, 0x08, 0x02
_VP8L_ALPHA = 1 << 28  # behind a signature and two sides of 14 bits each
_WEBP_CODED = (b"VP8 ", b"VP8L")
_WEBP_HEADS: tuple[list[bytes], ...] = ([], [b"VP8X"], [b"VP8X", b"ICCP"])
_WEBP_PIXELS = frozenset((*_WEBP_CODED, b"VP8X", b"ICCP", b"ALPH", b"ANIM", b"ANMF"))


@dataclass(frozen=True)
class Segment:
    """One JPEG segment: ``data[start:end]`` is its payload; ``end`` may lie outside the file.

    Attributes:
        code: Second byte of its marker.
        marker: Where the marker lies.
        start: First byte of the payload.
        end: Its end.
    """

    code: int
    marker: int
    start: int
    end: int


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments of a JPEG file up to its first scan; like libjpeg, over any junk and fill bytes between them.

    Raises:
        ImageError: A segment is shorter than its own length.
    """
    position = 2
    while found := _MARKER.search(data, position):
        code, position = data[found.end() - 1], found.end()
        if code in _NO_PAYLOAD:
            if code in (SOI, EOI):
                yield Segment(code, found.start(), position, position)
            continue
        if position + 2 > len(data):
            yield Segment(code, found.start(), position, position + 2)
            return
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2:
            raise ImageError("undecodable", "a JPEG segment without a length")
        yield Segment(code, found.start(), position + 2, position + length)
        if code == SOS:
            return
        position += length


def jpeg_segment(code: int, payload: bytes) -> bytes:
    """Return a segment's bytes."""
    return bytes((0xFF, code)) + struct.pack(">H", len(payload) + 2) + payload


def strip_jpeg(data: bytes, orientation: int, profile: bytes | None = None) -> bytes | None:
    """Keep the coded data, JFIF (without thumbnail) and Adobe's colour transform; and the orientation.

    Args:
        data: A JPEG file that decodes.
        orientation: EXIF orientation to keep, 1 to 8; 1 writes none.
        profile: ICC profile to write instead of the file's own.

    Returns:
        The file; None for one that some decoder may step over parts of: then what is shown, or hidden, is not certain
        to be what was decoded here.
    """
    segments = _whole_jpeg(data)
    if segments is None or not _is_plain(segments):
        return None
    parts = [b"\xff\xd8"]
    marks = [] if orientation == 1 else [jpeg_segment(0xE1, b"Exif\0\0" + _orientation_tiff(orientation))]
    if profile is not None:
        pieces = [profile[start : start + _ICC_BYTES] for start in range(0, len(profile), _ICC_BYTES)]
        counted = enumerate(pieces, start=1)
        marks += [jpeg_segment(0xE2, _ICC + bytes((number, len(pieces))) + piece) for number, piece in counted]
    for code, payload, coded in segments:
        kept = kept_segment(code, payload)
        if kept is not None and code != 0xE2:
            if code != 0xE0:  # the JFIF segment comes first by its definition
                parts, marks = parts + marks, []
            parts += [jpeg_segment(code, kept), coded]
    return b"".join((*parts, b"\xff\xd9"))


def _whole_jpeg(data: bytes) -> list[tuple[int, bytes, bytes]] | None:
    """Return marker, payload and following coded data of each segment between start and end of image.

    None if there are bytes between segments, other than fill bytes, or no end.
    """
    segments: list[tuple[int, bytes, bytes]] = []
    position = 2
    while data[:2] == b"\xff\xd8" and (found := _FILLED_MARKER.match(data, position)):
        code, start = data[found.end() - 1], found.end() + 2
        if code == EOI:
            return segments
        position = end = start - 2 + int.from_bytes(data[start - 2 : start], "big")
        if code in _NO_PAYLOAD or not start <= end <= len(data):
            return None
        if code == SOS:
            scan_end = _SCAN_END.search(data, end)
            if scan_end is None:
                return None
            position = scan_end.start()
        segments.append((code, data[start:end], data[end:position]))
    return None


def _is_plain(segments: list[tuple[int, bytes, bytes]]) -> bool:
    """Whether there is one Huffman-coded frame of a known height and, behind it, its scans with tables between them.

    Those of a frame that is not progressive have to be of each component once; restarts have to be announced and
    counted; and no scan may end in text.
    """
    codes = [code for code, _, _ in segments]
    frames = [(number, payload) for number, (code, payload, _) in enumerate(segments) if code in _FRAMES]
    if SOS not in codes or codes[-1] != SOS or len(frames) != 1:
        return False
    (frame_at, frame), first_scan = frames[0], codes.index(SOS)
    header, rest = codes[:first_scan], codes[first_scan:]
    if frame_at > first_scan or not {*header} <= _FRAMES | _TABLES | _APPLICATION or not {*rest} <= _TABLES | {SOS}:
        return False
    components, scanned, interval = frame[6::3], b"", 0
    for code, payload, coded in segments:
        if code == _DRI:
            interval = int.from_bytes(payload, "big")
        if code == SOS:
            scanned += payload[1:-3:2]
            if _TEXT.search(coded[-_TEXT_BYTES:]):
                return False
            restarts = b"".join(_RESTART.findall(coded))
            if restarts and (not interval or restarts != bytes(0xD0 + n % 8 for n in range(len(restarts)))):
                return False
    seen = {*scanned} if codes[frame_at] == _PROGRESSIVE else scanned
    return frame[1:3] != b"\0\0" and sorted(seen) == sorted({*components}) and len({*components}) == len(components)


def kept_segment(code: int, payload: bytes) -> bytes | None:
    """Return what pixels and colours need of a JPEG segment's payload; None: nothing."""
    if code == 0xE0:
        jfif = payload.startswith(b"JFIF\0") and len(payload) >= _JFIF_BYTES
        return payload[: _JFIF_BYTES - 2] + b"\0\0" if jfif else None
    if code == 0xE2:
        return payload if payload.startswith(_ICC) else None
    if code == 0xEE:
        return payload[:12] if payload.startswith(b"Adobe") else None
    return payload if code in _CODING else None


def strip_png(data: bytes, orientation: int, profile: bytes | None = None) -> bytes | None:
    """Keep the chunks that decide pixels and colours of the default image, and of its pixels what decoders read.

    None where pixels may be transparent: the colours below were never looked at.

    Args:
        data: A PNG file that decodes.
        orientation: EXIF orientation to keep, 1 to 8; 1 writes none.
        profile: ICC profile to write instead of the file's own.
    """
    chunks = _png_chunks(data)
    if chunks is None or len(chunks.get(b"IHDR", b"")) != 13:
        return None
    header = chunks[b"IHDR"]
    if header[9] in _PNG_WITH_ALPHA or b"tRNS" in chunks:
        return None
    pixels = _png_pixels(chunks.get(b"IDAT", b""), _png_inflated_bytes(header))
    if pixels is None:
        return None
    kept = [b"IHDR" + header]
    kept += [kind + chunks[kind] for kind, size in _PNG_KEPT.items() if len(chunks.get(kind, b"")) == size]
    if profile is not None:
        kept.append(b"iCCP" + b"icc\0\0" + zlib.compress(profile))
    if header[9] == 3:
        kept.append(b"PLTE" + chunks.get(b"PLTE", b""))
    if orientation != 1:
        kept.append(b"eXIf" + _orientation_tiff(orientation))
    step = (1 << 31) - 1
    kept += [b"IDAT" + pixels[start : start + step] for start in range(0, len(pixels), step)]
    return _PNG_SIGNATURE + b"".join(map(_png_chunk, (*kept, b"IEND")))


def _png_chunks(data: bytes) -> dict[bytes, bytes] | None:
    """Return the payloads of chunks by type; those of pixels in one piece. Of other types the first counts.

    None if the file is cut, or what pixels depend on comes twice or out of order: then decoders differ.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return None
    chunks: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    position, previous = len(_PNG_SIGNATURE), b""
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        if end > len(data):
            return None
        if not chunks and kind != b"IHDR":
            return None
        if kind == b"IEND":
            return chunks | {b"IDAT": b"".join(pixels)}
        if kind in _PNG_PIXELS and (kind in chunks or (pixels and not kind == previous == b"IDAT")):
            return None
        previous = kind
        if kind == b"IDAT":
            pixels.append(data[position + 8 : end - 4])
        else:
            chunks.setdefault(kind, data[position + 8 : end - 4])
        position = end
    return None


def _png_inflated_bytes(header: bytes) -> int:
    """Return the bytes of filtered rows that an image header asks for."""
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header)
    passes = _ADAM7 if interlace else ((0, 0, 1, 1),)
    total = 0
    for left, top, step_x, step_y in passes:
        columns, rows = max(0, -((left - width) // step_x)), max(0, -((top - height) // step_y))
        total += rows * (1 + (columns * depth * _PNG_SAMPLES.get(colour, 1) + 7) // 8) if columns else 0
    return total


def _png_pixels(coded: bytes, num_bytes: int) -> bytes | None:
    """Return a zlib stream without what follows its end; None if it does not hold the bytes that decoders read."""
    inflate, given, found = zlib.decompressobj(), 0, 0
    try:
        while not inflate.eof and given < len(coded):
            waiting = coded[given : given + _DEFLATED_BYTES]
            given += len(waiting)
            while waiting and found <= num_bytes:
                found += len(inflate.decompress(waiting, _INFLATED_BYTES))
                waiting = inflate.unconsumed_tail
    except zlib.error:
        return None
    return coded[: given - len(inflate.unused_data)] if inflate.eof and found == num_bytes else None


def _png_chunk(body: bytes) -> bytes:
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def strip_webp(data: bytes, orientation: int, profile: bytes | None = None) -> bytes | None:
    """Keep the coded image, and the orientation.

    None for animations, where chunks that decide pixels are not as the format orders them, and where pixels may be
    transparent: the colours below were never looked at.

    Args:
        data: A WebP file that decodes.
        orientation: EXIF orientation to keep, 1 to 8; 1 writes none.
        profile: ICC profile to write instead of the file's own.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    chunks: list[tuple[bytes, bytes]] = []
    position, stop = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while position + 8 <= stop:
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        payload = data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
        if len(payload) < length:
            return None
        chunks.append((kind, payload))
    kinds = [kind for kind, _ in chunks]
    at = next((number for number, kind in enumerate(kinds) if kind in _WEBP_CODED), -1)
    if at < 0 or kinds[:at] not in _WEBP_HEADS or not _WEBP_PIXELS.isdisjoint(kinds[at + 1 :]):
        return None
    kind, coded = chunks[at]
    if kind == b"VP8L" and int.from_bytes(coded[1:5], "little") & _VP8L_ALPHA:
        return None
    if at == 0:
        bare = orientation == 1 and profile is None
        return _riff_chunk(b"RIFF", b"WEBP" + _riff_chunk(kind, coded)) if bare else None
    extended = chunks[0][1]
    if len(extended) < 10 or extended[0] & (_WEBP_ANIMATION | _WEBP_ALPHA):
        return None
    flags, parts = 0, [_riff_chunk(kind, coded)]
    if profile is not None:
        flags |= _WEBP_ICC
        parts.insert(0, _riff_chunk(b"ICCP", profile))
    if orientation != 1:
        flags |= _WEBP_EXIF
        parts.append(_riff_chunk(b"EXIF", _orientation_tiff(orientation)))
    parts.insert(0, _riff_chunk(b"VP8X", bytes((flags, 0, 0, 0)) + extended[4:10]))
    return _riff_chunk(b"RIFF", b"WEBP" + b"".join(parts))


def _riff_chunk(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def _orientation_tiff(orientation: int) -> bytes:
    """EXIF with one entry: a little-endian TIFF header, a directory of one SHORT, and no next directory."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def exif_orientation(exif: bytes) -> int:
    """Return the orientation of an EXIF block, 1 to 8; 1 where it has none or is broken.

    Only the first directory is looked at, and nothing in it is followed.
    """
    tiff = exif[6:] if exif.startswith(b"Exif\0") else exif
    order: Literal["little", "big"] | None = {b"II*\0": "little", b"MM\0*": "big"}.get(tiff[:4])  # type: ignore[assignment]
    if order is None:
        return 1
    start = int.from_bytes(tiff[4:8], order)
    count = min(int.from_bytes(tiff[start : start + 2], order), _MAX_EXIF_ENTRIES)
    for position in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        if int.from_bytes(tiff[position : position + 2], order) == 0x0112:
            kind = int.from_bytes(tiff[position + 2 : position + 4], order)
            value = int.from_bytes(tiff[position + 8 : position + 8 + {1: 1, 3: 2, 4: 4}.get(kind, 0)], order)
            return value if 1 <= value <= 8 else 1
    return 1


def bmff_box(data: bytes, kind: bytes) -> tuple[int, int]:
    """Return where the first top-level box of a kind lies in an ISO base media file (AVIF); (0, 0): nowhere."""
    position = 0
    for _ in range(_MAX_BOXES):
        if position + 8 > len(data):
            break
        length = int.from_bytes(data[position : position + 4], "big")
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        end = len(data) if length == 0 else min(position + length, len(data))
        if data[position + 4 : position + 8] == kind:
            return position, end
        if end - position < 8:
            break
        position = end
    return 0, 0


def is_cut_bmff(data: bytes) -> bool:
    """Whether the top-level boxes of an ISO base media file (AVIF) reach past its end."""
    position = 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if length == 1 and position + 16 <= len(data):
            (length,) = struct.unpack_from(">Q", data, position + 8)
        if length == 0:  # to the end of the file
            return False
        if length < 8:
            return False
        position += length
    return position != len(data)
