"""How many frames an image file has, up to a limit, without decoding any of them.

Only the first frame of an animation is used, but a file of thousands of frames is a film and seldom a picture that
somebody chose. What is broken is left to the decoder: here it ends the count.
"""

import struct
from collections.abc import Iterator
from itertools import islice

_GIF_FRAME, _GIF_EXTENSION = 0x2C, 0x21
_TIFF_ORDER = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}


def has_more(data: bytes, max_frames: int) -> bool:
    """Return whether a GIF, PNG, WebP or TIFF has more than ``max_frames`` frames or pages; others have one."""
    if data.startswith((b"GIF87a", b"GIF89a")):
        frames = _gif(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data) > max_frames
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        frames = _webp(data)
    elif data[:4] in _TIFF_ORDER:
        frames = _tiff(data)
    else:
        return False
    return next(islice(frames, max_frames, None), None) is not None


def _palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif(data: bytes) -> Iterator[int]:
    """Yield where each frame begins."""
    if len(data) < 13:
        return
    position = 13 + _palette(data[10])
    while position + 10 < len(data):
        kind = data[position]
        if kind == _GIF_FRAME:
            yield position
            position += 11 + _palette(data[position + 9])  # and the code size behind the palette
        elif kind == _GIF_EXTENSION:
            position += 2
        else:
            return
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1


def _png(data: bytes) -> int:
    """Return what an APNG's control chunk says; it stands before the pixels."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        if kind == b"acTL" and length >= 4:
            return int.from_bytes(data[position + 8 : position + 12], "big")
        if kind == b"IDAT":
            break
        position += 12 + length
    return 1


def _webp(data: bytes) -> Iterator[int]:
    position = 12
    while position + 8 <= len(data):
        if data[position : position + 4] == b"ANMF":
            yield position
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + length + length % 2


def _tiff(data: bytes) -> Iterator[int]:
    """Yield where each directory begins; a chain that runs in a circle has no end."""
    order, is_big = _TIFF_ORDER[data[:4]], b"+" in data[:4]
    count_code, offset_code, entry_bytes, offset_at = ("Q", "Q", 20, 8) if is_big else ("H", "I", 12, 4)
    try:
        while True:
            (offset,) = struct.unpack_from(order + offset_code, data, offset_at)
            if not offset:
                return
            (count,) = struct.unpack_from(order + count_code, data, offset)
            yield offset
            offset_at = offset + struct.calcsize(order + count_code) + count * entry_bytes
    except struct.error:
        return
