"""Containers of coded pixels without their metadata: JPEG, PNG and WebP, byte by byte.

Each function copies only the parts that a decoder needs for pixels, their colours and their orientation, so what a
camera, an editor or a phone adds next year is dropped without a new rule. None is returned when the structure is not
understood; the caller then encodes the pixels anew.
"""

import re
import struct
import zlib

# JPEG: SOI; segments of marker (2 bytes), length (2, itself included) and payload; coded data after each SOS; EOI.
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # stuffed zeros and restart markers belong to the coded data
_JFIF_BYTES = 14  # of APP0 without its thumbnail

# PNG: signature; chunks of length (4), type (4), payload and CRC (4).
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset(
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP sBIT bKGD pHYs cICP".split()
)  # no animation: later frames were never looked at

# WebP: RIFF, length, WEBP; chunks of type (4), length (4), payload, padded to even.
_WEBP_KEPT = frozenset((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ICCP"))
_WEBP_EXIF, _WEBP_XMP, _WEBP_ANIMATION = 0x08, 0x04, 0x02


def strip_jpeg(data: bytes, orientation: int) -> bytes | None:
    """Keep the coded data, JFIF (without thumbnail), ICC profile and Adobe's colour transform; and the orientation.

    Args:
        data: A JPEG file.
        orientation: EXIF orientation to keep, 1 to 8; 1 writes none.
    """
    if data[:2] != b"\xff\xd8":
        return None
    exif = b"Exif\0\0" + _orientation_tiff(orientation)
    parts = [b"\xff\xd8"]
    marks = [] if orientation == 1 else [b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif]
    position = 2
    while position + 2 <= len(data):
        if data[position] != 0xFF:
            return None
        code = data[position + 1]
        if code == 0xFF:  # fill byte
            position += 1
            continue
        if code == _EOI:
            break
        (length,) = struct.unpack_from(">H", data, position + 2) if position + 4 <= len(data) else (0,)
        end = position + 2 + length
        if code in (0x00, 0x01, _SOI) or 0xD0 <= code <= 0xD7 or length < 2 or end > len(data):
            return None
        kept = _kept_segment(code, data[position + 4 : end])
        if kept is not None:
            if code != 0xE0:  # the JFIF segment comes first by its definition
                parts, marks = parts + marks, []
            parts.append(bytes((0xFF, code)) + struct.pack(">H", len(kept) + 2) + kept)
        position = end
        if code == _SOS:
            marker = _NEXT_MARKER.search(data, position)
            following = len(data) if marker is None else marker.start()
            parts.append(data[position:following])
            position = following
    return b"".join((*parts, b"\xff\xd9"))


def _kept_segment(code: int, payload: bytes) -> bytes | None:
    if code == 0xE0:
        jfif = payload.startswith(b"JFIF\0") and len(payload) >= _JFIF_BYTES
        return payload[: _JFIF_BYTES - 2] + b"\0\0" if jfif else None
    if code == 0xE2:
        return payload if payload.startswith(b"ICC_PROFILE\0") else None
    if code == 0xEE:
        return payload[:12] if payload.startswith(b"Adobe") else None
    if 0xE0 <= code <= 0xEF or code == _COM:
        return None
    return payload


def strip_png(data: bytes, orientation: int) -> bytes | None:
    """Keep the chunks that decide pixels and colours of the default image; and the orientation."""
    if not data.startswith(_PNG_SIGNATURE):
        return None
    parts = [_PNG_SIGNATURE]
    exif = b"eXIf" + _orientation_tiff(orientation)
    marks = [] if orientation == 1 else [_png_chunk(exif)]
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 12 + length
        if end > len(data):
            return None
        if kind == b"IDAT":
            parts, marks = parts + marks, []
        if kind in _PNG_KEPT:
            parts.append(data[position:end])
        if kind == b"IEND":
            return b"".join(parts)
        position = end
    return None


def _png_chunk(body: bytes) -> bytes:
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def strip_webp(data: bytes, orientation: int) -> bytes | None:
    """Keep the coded image, its alpha and its ICC profile; and the orientation. None for animations."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    parts: list[bytes] = []
    extended = False
    position, stop = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while position + 8 <= stop:
        kind = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        payload = data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
        if len(payload) < length:
            return None
        if kind == b"VP8X":
            if length < 10 or payload[0] & _WEBP_ANIMATION:
                return None
            extended = True
            flags = payload[0] & ~(_WEBP_EXIF | _WEBP_XMP)
            payload = bytes((flags | (_WEBP_EXIF if orientation != 1 else 0),)) + payload[1:10]
        if kind in _WEBP_KEPT:
            parts.append(_riff_chunk(kind, payload))
    if orientation != 1:
        if not extended:
            return None
        parts.append(_riff_chunk(b"EXIF", _orientation_tiff(orientation)))
    return _riff_chunk(b"RIFF", b"WEBP" + b"".join(parts))


def _riff_chunk(kind: bytes, payload: bytes) -> bytes:
    return kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def _orientation_tiff(orientation: int) -> bytes:
    """EXIF with one entry: a little-endian TIFF header, a directory of one SHORT, and no next directory."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


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
