"""ICC profiles cut down to what colours need.

A profile has room for more than colours: who made it and when, device names and serial numbers, texts, and private tags
of any content. ``slimmed`` builds a new one of a neutral header, the tags that convert device colours to the connection
space, each cut to the length that its own type gives it, and two neutral texts that the format demands.

Source:
    ICC.1:2022 (profile version 4.4), ICC.1:2001-04 (version 2.4).
"""

import math
import struct

_MAX_TAGS = 200
_HEADER_BYTES, _ENTRY_BYTES = 128, 12
_NUMBERS = (b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt", b"chad")
_CURVES = (b"rTRC", b"gTRC", b"bTRC", b"kTRC")
_TABLES = (b"A2B0", b"A2B1", b"A2B2")
_KEPT = frozenset((*_NUMBERS, *_CURVES, *_TABLES))
_DATE = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
_D50 = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
_PARAMETERS = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7}  # of a parametric curve by its function
_CHAD_BYTES = 8 + 9 * 4
_TEXT = "colours"


def slimmed(profile: bytes) -> bytes | None:
    """Return a profile that converts device colours as the given one does; None if its structure is not understood.

    It can no longer convert to the device's colours.
    """
    try:
        tags = _tags(profile)
    except (struct.error, IndexError, KeyError):
        return None
    if tags is None:
        return None
    is_v4 = profile[8] >= 4
    tags[b"desc"], tags[b"cprt"] = _description(is_v4), _copyright(is_v4)
    place = _HEADER_BYTES + 4 + _ENTRY_BYTES * len(tags)
    entries, places, body = [], dict[bytes, int](), b""
    for name, data in sorted(tags.items()):
        if data not in places:
            places[data] = place + len(body)
            body += data + bytes(-len(data) % 4)
        entries.append(struct.pack(">4sII", name, places[data], len(data)))
    table = struct.pack(">I", len(entries)) + b"".join(entries)
    return _header(profile, place + len(body)) + table + body


def _header(profile: bytes, num_bytes: int) -> bytes:
    """Version, class, colour spaces and rendering intent; the rest is neutral: no maker, model, date or digest."""
    head = struct.pack(">I", num_bytes) + bytes(4) + profile[8:10] + bytes(2) + profile[12:24] + _DATE + b"acsp"
    return head + bytes(24) + bytes(3) + bytes((profile[67] & 3,)) + _D50 + bytes(48)


def _tags(profile: bytes) -> dict[bytes, bytes] | None:
    (count,) = struct.unpack_from(">I", profile, _HEADER_BYTES)
    if count > _MAX_TAGS:
        return None
    tags = {}
    for number in range(count):
        name, start, size = struct.unpack_from(">4sII", profile, _HEADER_BYTES + 4 + _ENTRY_BYTES * number)
        if name in _KEPT:
            if start + size > len(profile) or name in tags:
                return None
            element = _element(name, profile[start : start + size])
            if element is None:
                return None
            tags[name] = element
    return tags


def _element(name: bytes, data: bytes) -> bytes | None:
    """Return a tag's data without what its type does not read."""
    kind = data[:4]
    if name in _TABLES:
        if kind == b"mAB ":
            return _mab(data)
        size = {b"mft1": _mft1_bytes, b"mft2": _mft2_bytes}[kind](data)
        return data[:4] + bytes(4) + data[8:11] + bytes(1) + data[12:size] if size <= len(data) else None
    if name in _CURVES:
        return _curve(data, 0)
    size = _CHAD_BYTES if name == b"chad" else 20
    if kind != (b"sf32" if name == b"chad" else b"XYZ ") or size > len(data):
        return None
    return kind + bytes(4) + data[8:size]


def _curve(data: bytes, start: int) -> bytes | None:
    kind = data[start : start + 4]
    if kind == b"curv":
        (count,) = struct.unpack_from(">I", data, start + 8)
        end, fixed = start + 12 + 2 * count, data[start + 8 : start + 12]
    elif kind == b"para":
        (function,) = struct.unpack_from(">H", data, start + 8)
        end, fixed = start + 12 + 4 * _PARAMETERS[function], data[start + 8 : start + 10] + bytes(2)
    else:
        return None
    return kind + bytes(4) + fixed + data[start + 12 : end] if end <= len(data) else None


def _mft1_bytes(data: bytes) -> int:
    inputs, outputs, grid = data[8:11]
    return int(48 + 256 * inputs + grid**inputs * outputs + 256 * outputs)


def _mft2_bytes(data: bytes) -> int:
    inputs, outputs, grid = data[8:11]
    before, after = struct.unpack_from(">HH", data, 48)
    return int(52 + 2 * (before * inputs + grid**inputs * outputs + after * outputs))


def _mab(data: bytes) -> bytes | None:
    """Keep the parts that the offsets of a version 4 table lead to; what lies between them becomes zero.

    None if one of them is not within the tag: what is returned is never longer than what was given.
    """
    inputs, outputs = data[8], data[9]
    curves_b, matrix, curves_m, grid, curves_a = struct.unpack_from(">5I", data, 12)
    parts = [(0, data[:4] + bytes(4) + data[8:10] + bytes(2) + data[12:32])]
    if matrix:
        if matrix + 48 > len(data):
            return None
        parts.append((matrix, data[matrix : matrix + 48]))
    if grid:
        precision = data[grid + 16]
        num_bytes = math.prod(data[grid : grid + inputs]) * outputs * precision
        points = data[grid + 20 : grid + 20 + num_bytes]
        if inputs > 16 or precision not in (1, 2) or len(points) != num_bytes:
            return None
        parts.append((grid, data[grid : grid + inputs] + bytes(16 - inputs) + bytes((precision, 0, 0, 0)) + points))
    for start, count in ((curves_b, outputs), (curves_m, outputs), (curves_a, inputs)):
        for _ in range(count if start else 0):
            curve = _curve(data, start)
            if curve is None:
                return None
            parts.append((start, curve))
            start += len(curve) + -len(curve) % 4
    size = max(start + len(part) for start, part in parts)
    if size > len(data):
        return None
    kept = bytearray(size)
    for start, part in parts:
        kept[start : start + len(part)] = part
    return bytes(kept)


def _description(is_v4: bool) -> bytes:
    if is_v4:
        return _unicode_text()
    text = _TEXT.encode() + b"\0"  # then no Unicode and no Macintosh text
    return b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(8 + 3 + 67)


def _copyright(is_v4: bool) -> bytes:
    return _unicode_text() if is_v4 else b"text" + bytes(4) + _TEXT.encode() + b"\0"


def _unicode_text() -> bytes:
    text = _TEXT.encode("utf-16-be")
    return b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
