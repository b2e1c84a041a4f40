"""PngSuite against a PNG reader of our own: zlib and NumPy, from the specification, with nothing of Pillow."""

import itertools
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from curation import images, schema
from curation.config.images import ImagesConfig
from curation.errors import ImageError

LIMITS = ImagesConfig(min_side_px=1, max_aspect=1000.0)
SHARED = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
PATH = SHARED / "malformed.zip"
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def pngsuite():
    if not PATH.is_file():
        return {}
    with zipfile.ZipFile(PATH) as archive:
        names = [name for name in archive.namelist() if name.startswith("pngsuite/") and name.endswith(".png")]
        return {Path(name).stem: archive.read(name) for name in names}


FILES = pngsuite()
VALID = sorted(name for name in FILES if not name.startswith("x"))
BROKEN = sorted(name for name in FILES if name.startswith("x"))
needs_pngsuite = pytest.mark.skipif(not FILES, reason=f"{PATH} is not there")


def unfiltered(raw, height, row_bytes, pixel_bytes):
    rows, above = np.zeros((height, row_bytes), np.int64), np.zeros(row_bytes, np.int64)
    for y in range(height):
        kind, *line = raw[y * (row_bytes + 1) : (y + 1) * (row_bytes + 1)]
        row = rows[y]
        for x, value in enumerate(line):
            a = row[x - pixel_bytes] if x >= pixel_bytes else 0
            b, c = above[x], above[x - pixel_bytes] if x >= pixel_bytes else 0
            pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
            paeth = a if pa <= pb and pa <= pc else b if pb <= pc else c
            row[x] = (value + (0, a, b, (a + b) // 2, paeth)[kind]) % 256
        above = row
    return rows.astype(np.uint8), raw[height * (row_bytes + 1) :]


def samples(rows, width, num_samples, depth):
    """Unpack rows of bytes to (H, W, S) integers."""
    if depth == 16:
        wide = rows.reshape(len(rows), -1, 2).astype(np.int64)
        return (wide[..., 0] * 256 + wide[..., 1]).reshape(len(rows), width, num_samples)
    bits = np.unpackbits(rows, axis=1)[:, : width * num_samples * depth].reshape(len(rows), width, num_samples, depth)
    return (bits * (1 << np.arange(depth - 1, -1, -1))).sum(axis=-1)


def read_png(data):
    """Return (H, W, 3) uint8: high bytes, palette looked up, alpha and tRNS on white."""
    chunks, position = [], 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    first = dict(reversed(chunks))
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", first[b"IHDR"])
    raw = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    count = SAMPLES[kind]
    pixels = np.zeros((height, width, count), np.int64)
    for x0, y0, dx, dy in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        w, h = -(-(width - x0) // dx), -(-(height - y0) // dy)
        if w > 0 and h > 0:
            rows, raw = unfiltered(raw, h, -(-w * count * depth // 8), max(1, count * depth // 8))
            pixels[y0::dy, x0::dx] = samples(rows, w, count, depth)
    return on_white(pixels, kind, depth, first)


def on_white(pixels, kind, depth, chunks):
    transparent = chunks.get(b"tRNS")
    alpha = np.full(pixels.shape[:2], 255.0)
    if kind == 3:
        index = pixels[..., 0]
        rgb = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[index].astype(float)
        if transparent is not None:
            table = np.full(256, 255.0)
            table[: len(transparent)] = list(transparent)
            alpha = table[index]
    else:
        if transparent is not None:
            key = struct.unpack(f">{len(transparent) // 2}H", transparent)
            alpha = np.where((pixels == key).all(axis=-1), 0.0, 255.0)
        narrow = pixels >> 8 if depth == 16 else pixels * 255 // ((1 << depth) - 1)
        if kind in (4, 6):
            alpha = narrow[..., -1].astype(float)
            narrow = narrow[..., :-1]
        rgb = np.repeat(narrow, 3 // narrow.shape[2], axis=2).astype(float)
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share), bool(((alpha > 0) & (alpha < 255)).any())


@needs_pngsuite
@pytest.mark.shared_data
@pytest.mark.parametrize("name", VALID)
def test_a_valid_file_decodes_to_its_documented_values(name):
    expected, is_mixed = read_png(FILES[name])

    decoded = images.decode(FILES[name], LIMITS)

    assert decoded.shape == expected.shape
    # Only where alpha mixes colours does rounding have a choice.
    assert np.abs(decoded - expected).max() <= (1 if is_mixed else 0)
    stripped, _ = images.strip_metadata(FILES[name], "png", LIMITS)
    assert (images.decode(stripped, LIMITS) == decoded).all()


@needs_pngsuite
@pytest.mark.shared_data
@pytest.mark.parametrize("name", BROKEN)
def test_a_corrupt_file_is_refused_with_a_reason(name):
    with pytest.raises(ImageError) as caught:
        images.decode(FILES[name], LIMITS)

    signature_is_broken = name[:3] in ("xcr", "xlf") or name[:2] == "xs"
    assert caught.value.reason == ("not_an_image" if signature_is_broken else "undecodable")
    assert caught.value.reason in schema.IMAGE_REASONS


@needs_pngsuite
@pytest.mark.shared_data
def test_the_whole_suite_is_there():
    assert len(VALID) == 162
    assert len(BROKEN) == 14
    assert {"".join(letters) for letters in itertools.product("x", "cdhls")} == {name[:2] for name in BROKEN}
