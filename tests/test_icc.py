"""Profiles lose everything but colours, and convert as before."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from curation import icc

SECRET = b"SecretOwner 48.858N 2.294E"


def curve(*values):
    return b"curv" + bytes(4) + struct.pack(f">I{len(values)}H", len(values), *values)


def parametric(gamma):
    return b"para" + bytes(4) + struct.pack(">HHI", 0, 0, int(gamma * 65536))


def numbers(x, y, z):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))


def lut16(inputs, outputs, grid):
    rng = np.random.default_rng(inputs)
    head = b"mft2" + bytes(4) + bytes((inputs, outputs, grid, 0))
    head += struct.pack(">9i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))) + struct.pack(">HH", 2, 2)
    points = rng.integers(0, 65280, grid**inputs * outputs)
    return head + np.concatenate([[0, 65535] * inputs, points, [0, 65535] * outputs]).astype(">u2").tobytes()


def lut8(inputs, outputs, grid):
    rng = np.random.default_rng(inputs)
    head = b"mft1" + bytes(4) + bytes((inputs, outputs, grid, 0))
    head += struct.pack(">9i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    ramps = np.tile(np.arange(256), inputs), np.tile(np.arange(256), outputs)
    return (
        head + np.concatenate([ramps[0], rng.integers(0, 256, grid**inputs * outputs), ramps[1]]).astype("u1").tobytes()
    )


def mab(inputs, outputs, grid, precision):
    """All five parts, with a secret between two of them."""
    rng = np.random.default_rng(inputs)
    body, places = b"", {}
    for name, part in (
        ("b", curve(0, 30000, 65535) + bytes(2) + curve() + curve()),
        ("matrix", struct.pack(">12i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)))),
        ("m", parametric(1.0) * outputs),
        (
            "grid",
            bytes([grid] * inputs + [0] * (16 - inputs) + [precision, 0, 0, 0])
            + rng.integers(0, 256, grid**inputs * outputs * precision, dtype=np.uint8).tobytes(),
        ),
        ("a", parametric(1.5) * inputs),
    ):
        body += SECRET + bytes(-len(SECRET + body) % 4)
        places[name] = 32 + len(body)
        body += part + bytes(-len(part) % 4)
    offsets = struct.pack(">5I", *(places[name] for name in ("b", "matrix", "m", "grid", "a")))
    return b"mAB " + bytes(4) + bytes((inputs, outputs, 0, 0)) + offsets + body


def profile(space, tags, version=2, connection=b"XYZ "):
    """A profile with secrets in its header, in texts, in private tags, behind tags, and behind its end."""
    tags |= {b"prvt": SECRET * 3, b"dmnd": b"desc" + bytes(4) + struct.pack(">I", len(SECRET) + 1) + SECRET + bytes(90)}
    tags |= {b"cprt": b"text" + bytes(4) + SECRET + b"\0", b"meta": b"dict" + SECRET}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", len(SECRET) + 1) + SECRET + bytes(1 + 8 + 3 + 67)
    if version == 4:
        text = SECRET.decode().encode("utf-16-be")
        for name in (b"desc", b"cprt", b"dmnd"):
            tags[name] = b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text
    place, entries, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        entries += struct.pack(">4sII", name, place + len(body), len(data) + len(SECRET))
        body += data + SECRET + bytes(-len(data + SECRET) % 4)
    head = b"Secr" + bytes((version, 0, 0, 0)) + b"scnr" + space + connection + struct.pack(">6H", 2024, 5, 6, 7, 8, 9)
    head += (
        b"acsp" + b"APPL" + bytes(4) + b"SecrSecr" + b"SecrSecr" + bytes(4) + struct.pack(">3I", 63190, 65536, 54061)
    )
    head += b"Secr" + SECRET[:16] + bytes(28)
    return struct.pack(">I", place + len(body)) + head + struct.pack(">I", len(tags)) + entries + body + SECRET


MATRIX = {b"wtpt": numbers(0.964, 1, 0.825), b"rXYZ": numbers(0.61, 0.31, 0.02), b"gXYZ": numbers(0.2, 0.63, 0.07)}
MATRIX |= {
    b"bXYZ": numbers(0.15, 0.06, 0.74),
    b"chad": b"sf32" + bytes(4) + struct.pack(">9i", *[65536, 0, 0, 0] * 2, 65536),
}
PROFILES = {
    "matrix": ("RGB", profile(b"RGB ", MATRIX | {name: curve(460) for name in (b"rTRC", b"gTRC", b"bTRC")})),
    "curves": (
        "RGB",
        profile(b"RGB ", MATRIX | {n: curve(*range(0, 65536, 600)) for n in (b"rTRC", b"gTRC", b"bTRC")}),
    ),
    "v4": (
        "RGB",
        profile(b"RGB ", MATRIX | {name: parametric(1.8) for name in (b"rTRC", b"gTRC", b"bTRC")}, version=4),
    ),
    "grey": ("L", profile(b"GRAY", {b"wtpt": numbers(0.964, 1, 0.825), b"kTRC": curve(600)})),
    "cmyk16": ("CMYK", profile(b"CMYK", {b"A2B0": lut16(4, 3, 5), b"wtpt": numbers(0.9, 1, 0.8)}, connection=b"Lab ")),
    "rgb8": ("RGB", profile(b"RGB ", {b"A2B0": lut8(3, 3, 7), b"wtpt": numbers(0.9, 1, 0.8)}, connection=b"Lab ")),
    "mab8": ("RGB", profile(b"RGB ", {b"A2B0": mab(3, 3, 5, 1), b"wtpt": numbers(0.9, 1, 0.8)}, 4, b"Lab ")),
    "mab16": ("CMYK", profile(b"CMYK", {b"A2B0": mab(4, 3, 3, 2), b"wtpt": numbers(0.9, 1, 0.8)}, 4, b"Lab ")),
}


def converted(data, mode):
    pixels = np.random.default_rng(0).integers(
        0, 256, (64, 64, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8
    )
    image = Image.frombytes(mode, (64, 64), pixels.tobytes())
    source = ImageCms.ImageCmsProfile(io.BytesIO(data))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    return np.asarray(ImageCms.applyTransform(image, transform))


@pytest.mark.parametrize("name", PROFILES)
def test_colours_stay_and_all_else_goes(name):
    mode, data = PROFILES[name]

    small = icc.slimmed(data)

    assert (converted(small, mode) == converted(data, mode)).all()
    assert SECRET[:6] in data
    assert b"ecr" not in small
    assert b"S\0e\0c\0r" not in small
    assert len(small) < len(data)


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_slim_stays_as_it_is(name):
    small = icc.slimmed(PROFILES[name][1])

    assert icc.slimmed(small) == small


def test_two_profiles_of_the_same_colours_become_the_same():
    tags = MATRIX | {name: curve(460) for name in (b"rTRC", b"gTRC", b"bTRC")}

    assert icc.slimmed(profile(b"RGB ", tags | {b"targ": SECRET})) == icc.slimmed(profile(b"RGB ", tags))


@pytest.mark.parametrize("name", PROFILES)
def test_mutated_profiles_are_slimmed_or_refused(name):
    rng = np.random.default_rng(7)
    outcomes = set()
    for _ in range(300):
        data = bytearray(PROFILES[name][1])
        for _ in range(3):
            data[rng.integers(len(data))] = rng.integers(256)
        cut = bytes(data[: rng.integers(len(data))] if rng.integers(4) == 0 else data)
        outcomes.add(icc.slimmed(cut) is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("beyond", [-12, 0, 1 << 24])
def test_a_table_that_leads_out_of_its_tag_is_refused(part, beyond):
    data = mab(3, 3, 5, 1)
    place = 12 + 4 * part
    data = data[:place] + struct.pack(">I", len(data) + len(SECRET) + beyond) + data[place + 4 :]

    assert icc.slimmed(profile(b"RGB ", {b"A2B0": data, b"wtpt": numbers(0.9, 1, 0.8)}, 4, b"Lab ")) is None
