"""Files made to be slow or large for a decoder: refused, or decoded without what makes them so, in under 2 s."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from curation import images
from curation.config.images import ImagesConfig
from curation.errors import ImageError
from curation.prescan import lean

LIMITS = ImagesConfig(max_pixels=4_000_000)


def noise(size=(64, 48), seed=0):
    grey = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    return Image.fromarray(grey).convert("RGB")


def encoded(kind, size=(64, 48), mode="RGB", **options):
    buffer = io.BytesIO()
    noise(size).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def behind(data, position, *more):
    return data[:position] + b"".join(more) + data[position:]


def jpeg_of_segments():
    return behind(encoded("JPEG"), 2, b"\xff\xe5\0\2" * 500_000)


def jpeg_of_scans():
    data = encoded("JPEG", size=(1600, 1600), progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2][:10] * 2_000 + data[-2:]


def png_of_chunks():
    return behind(encoded("PNG"), 33, chunk(b"tEXt", b"") * 300_000)


def gif_of_comments():
    data = encoded("GIF", mode="P")
    return behind(data, 13 + (3 << (data[10] & 7) + 1), b"!\xfe", b"\x01a" * 1_000_000, b"\0")


def webp_canvas():
    side = (16_382).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + side


def tiff(*entries, strips=b""):
    base = [(256, 3, 1, 64), (257, 3, 1, 48), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in (*base, *entries))
    body = strips + b"\0" * (len(strips) % 2)
    count = struct.pack("<H", len(base) + len(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + count + directory + b"\0" * 4


def tiff_tile():
    coded = zlib.compress(bytes(9_000_000))
    return tiff((322, 4, 1, 30_000), (323, 4, 1, 30_000), (324, 4, 1, 8), (325, 4, 1, len(coded)), strips=coded)


def tiff_of_strips():
    return tiff((273, 4, 500_000, 8), (278, 3, 1, 1), (279, 4, 500_000, 8), strips=bytes(8_000_000))


def tiff_of_overlaps():
    return tiff(*((tag, 2, 900_000, 8) for tag in (270, 34675, 347, 338, 339)), strips=bytes(1_000_000))


def bmp_of_runs():
    header = struct.pack("<IiiHHIIiiII", 40, 2000, 2000, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + header + bytes(1024) + b"\x01\x05" * 4_000_000


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (jpeg_of_segments, "undecodable"),
        (jpeg_of_scans, "undecodable"),
        (png_of_chunks, "undecodable"),
        (gif_of_comments, "undecodable"),
        (webp_canvas, "too_many_pixels"),
        (tiff_tile, "too_many_pixels"),
        (tiff_of_strips, "undecodable"),
        (tiff_of_overlaps, "truncated"),
        (bmp_of_runs, "undecodable"),
    ],
)
@pytest.mark.parametrize("act", [images.decode, images.inspect])
def test_a_file_of_too_many_parts_is_refused_at_once(act, make, reason):
    data = make()
    start = time.perf_counter()

    with pytest.raises(ImageError) as caught:
        act(data, LIMITS)

    assert caught.value.reason == reason
    assert time.perf_counter() - start < 2


def test_a_compressed_text_is_never_inflated():
    data = encoded("PNG")
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))) + chunk(b"iTXt", b"a\0\1\0\0\0" + b"x" * 99)

    assert (images.decode(behind(data, 33, bomb * 90), LIMITS) == images.decode(data, LIMITS)).all()
    assert lean(behind(data, 33, bomb * 90), 10**6).data == data


def test_a_compressed_profile_larger_than_any_real_one_is_refused():
    bomb = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))

    with pytest.raises(ImageError) as caught:
        images.decode(behind(encoded("PNG"), 33, bomb), LIMITS)

    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_profile_with_a_table_larger_than_itself_is_ignored(kind):
    header = bytearray(128)
    header[8], header[12:24], header[36:40] = 4, b"prtrRGB Lab ", b"acsp"
    table = b"mft2" + bytes(4) + bytes((3, 3, 255, 0)) + bytes(36) + struct.pack(">HH", 2, 2) + bytes(1000)
    profile = bytes(header) + struct.pack(">I", 1) + b"A2B0" + struct.pack(">II", 144, len(table)) + table
    profile = struct.pack(">I", len(profile)) + profile[4:]

    decoded = images.decode(encoded(kind, icc_profile=profile), LIMITS)

    assert (decoded == images.decode(encoded(kind), LIMITS)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_many_frames_or_pages_only_the_first_costs_anything(kind):
    frames = [noise(seed=seed) for seed in range(100)]
    buffer, first = io.BytesIO(), io.BytesIO()
    options = {"speed": 10} if kind == "AVIF" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **options)
    frames[0].save(first, kind, **options)
    start = time.perf_counter()

    decoded = images.decode(buffer.getvalue(), LIMITS)

    assert time.perf_counter() - start < 0.5
    assert np.abs(decoded.astype(int) - images.decode(first.getvalue(), LIMITS)).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP"])
def test_what_is_shown_to_the_decoder_has_no_text(kind):
    exif = Image.Exif()
    exif[0x010F] = "SecretMaker"
    options = {"GIF": {"comment": b"SecretNote"}, "JPEG": {"exif": exif, "comment": b"SecretNote"}}
    data = encoded(kind, **options.get(kind, {"exif": exif}))
    assert b"Secret" in data

    shown = lean(data, 10**6).data

    if kind in ("JPEG", "PNG", "GIF"):
        assert b"Secret" not in shown
    with Image.open(io.BytesIO(shown)) as image:
        assert kind == "WEBP" or not image.getexif().get(0x010F)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiffs_first_page_is_what_it_was(big, compression):
    data = encoded("TIFF", compression=compression, big_tiff=big)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))

    assert (images.decode(data, LIMITS) == expected).all()


@pytest.mark.parametrize(
    "data", [b"", b"II*\0", b"MM\0+", b"GIF89a", b"RIFF....WEBP", b"\xff\xd8\xff", b"....ftypavif"]
)
def test_a_signature_alone_is_an_image_error(data):
    with pytest.raises(ImageError):
        images.decode(data, LIMITS)
