"""Files that call themselves images: what a crawl of the real web finds."""

import io
import random
import struct
import zlib

from PIL import Image

from curation.demo.edits import original
from curation.edits import jpeg

TRACKING_PIXEL = (  # a transparent GIF of 1 x 1, the usual 43 bytes
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff!\xf9\x04\x01\x00\x00\x00\x00,"
    b"\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


def broken_files(photo: Image.Image, rng: random.Random) -> dict[str, tuple[str, bytes]]:
    """Return file name → (what is wrong with it, bytes).

    Args:
        photo: A photo to damage; no more than a part of it survives in any of the files.
        rng: Source of noise.
    """
    whole_jpeg, whole_png, whole_webp = jpeg(photo), original(photo, ".png"), original(photo, ".webp")
    return {
        "truncated.jpg": ("truncated", whole_jpeg[: len(whole_jpeg) // 2]),
        "truncated.webp": ("truncated", whole_webp[: len(whole_webp) // 3]),
        "truncated.png": ("truncated", whole_png[: len(whole_png) // 2]),
        "error-page.jpg": ("html", b"<!doctype html><title>Gone</title><p>This image has moved.</p>\n"),
        "empty.jpg": ("empty", b""),
        "noise.jpg": ("noise", rng.randbytes(3000)),
        "damaged.png": ("damaged", _flip_bytes(whole_png)),
        "header-only.jpg": ("truncated", whole_jpeg[:180]),
        "huge.png": ("bomb", _claims(60_000, 60_000)),
    }


def _flip_bytes(png: bytes) -> bytes:
    """Damage the pixels of a PNG, which its checksums notice."""
    at = png.index(b"IDAT") + 4 + 200
    return png[:at] + bytes(byte ^ 0xFF for byte in png[at : at + 64]) + png[at + 64 :]


def _claims(width: int, height: int) -> bytes:
    """Return a PNG whose header promises far more pixels than a decoder should allocate."""
    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, io.SEEK_END)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        out.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return out.getvalue()
