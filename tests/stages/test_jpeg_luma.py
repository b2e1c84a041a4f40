import io

import numpy as np
import pytest
from PIL import Image

from curation.config.images import ImagesConfig
from curation.images import decode
from curation.stages.jpeg_luma import UNITS, small_luma
from curation.stages.small_grey import grey_thumbnail, small_grey

skimage_data = pytest.importorskip("skimage.data")
LIMITS = ImagesConfig()
SIDE_PX = 32


def photo(height=400, width=501):
    return Image.fromarray(skimage_data.astronaut()).resize((width, height), Image.Resampling.LANCZOS)


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def levels(small):
    return small.astype(float) / UNITS


def from_pixels(data):
    return levels(grey_thumbnail(decode(data, LIMITS), SIDE_PX))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(103, 131), (200, 1000), (256, 341), (511, 300), (1300, 900)])
def test_it_is_the_small_picture_of_the_pixels(size, subsampling):
    data = jpeg(photo(*size), subsampling=subsampling)

    error = np.abs(levels(small_luma(data, LIMITS, SIDE_PX)) - from_pixels(data))
    assert error.mean() < 0.7  # rounding of 8-bit pixels, and colours that have no place in RGB
    assert error.max() < 12


@pytest.mark.parametrize(
    "options",
    [
        {"restart_marker_blocks": 1},
        {"restart_marker_blocks": 7},
        {"restart_marker_rows": 1},
        {"optimize": True},
        {"quality": 100, "subsampling": "4:4:4"},
        {"quality": 5},
        {"comment": b"x" * 300},
    ],
)
def test_ways_of_writing_a_file_change_nothing(options):
    data = jpeg(photo(), **options)

    assert np.abs(levels(small_luma(data, LIMITS, SIDE_PX)) - from_pixels(data)).mean() < 0.35


def test_grey_files_are_read_too():
    data = jpeg(photo().convert("L"))

    assert np.abs(levels(small_luma(data, LIMITS, SIDE_PX)) - from_pixels(data)).mean() < 0.35


def test_lossless_rewriting_of_the_codes_gives_equal_levels():
    plain = small_luma(jpeg(photo()), LIMITS, SIDE_PX)

    for options in ({"optimize": True}, {"restart_marker_blocks": 3}):
        assert (small_luma(jpeg(photo(), **options), LIMITS, SIDE_PX) == plain).all()


def segments(data):
    """Split a file into what is before its codes, each segment of codes, and what is behind them."""
    first = place = data.index(b"\xff\xc4")
    codes = []
    while data[place : place + 2] == b"\xff\xc4":
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        codes.append(data[place:end])
        place = end
    return data[:first], codes, data[place:]


def test_codes_may_come_in_any_segments():
    data = jpeg(photo())
    plain = small_luma(data, LIMITS, SIDE_PX)
    head, codes, scan = segments(data)
    body = b"".join(code[4:] for code in codes)
    at_once = b"\xff\xc4" + (2 + len(body)).to_bytes(2, "big") + body
    comment = b"\xff\xfe\0\x06\xff\xda\0\0"  # it holds what a scan starts with
    stale = codes[0][:-1] + bytes([codes[0][-1] ^ 1])  # the last one of a name counts

    assert len(codes) > 1
    for written in (
        head + at_once + scan,
        head[:2] + at_once + head[2:] + scan,
        head + codes[0] + comment + b"".join(codes[1:]) + scan,
        head + stale + at_once + scan,
        head[:2] + stale + head[2:] + at_once + scan,
        head[:2] + b"\xff\xc4\0\2" + head[2:] + at_once + scan,
    ):
        assert (small_luma(written, LIMITS, SIDE_PX) == plain).all()
    assert small_luma(head + at_once[:-1] + scan, LIMITS, SIDE_PX) is None


@pytest.mark.parametrize("size", [(300, 512), (300, 513), (2000, 1990)])
def test_axes_that_are_kept_are_those_that_are_not(size):
    data = jpeg(photo(*size))

    first, again = small_luma(data, LIMITS, SIDE_PX), small_luma(data, LIMITS, SIDE_PX)
    assert (first == again).all()
    assert np.abs(levels(first) - from_pixels(data)).mean() < 0.7


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photo(), exif=exif)

    assert np.abs(levels(small_luma(data, LIMITS, SIDE_PX)) - from_pixels(data)).mean() < 0.35


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"GIF89a" + bytes(50),
        jpeg(photo(101, 400)),
        jpeg(photo(), progressive=True),
        jpeg(photo().convert("CMYK")),
        jpeg(photo(), keep_rgb=True),
        jpeg(photo())[:-200],
        jpeg(photo())[:-2],
        jpeg(photo(), restart_marker_blocks=5).replace(b"\xff\xd3", b"\xff\xd4", 1),
    ],
    ids=["nothing", "start", "gif", "small", "progressive", "cmyk", "rgb", "cut", "no end", "restart order"],
)
def test_what_is_unusual_or_broken_is_left_to_the_ordinary_decoder(data):
    assert small_luma(data, LIMITS, SIDE_PX) is None


@pytest.mark.parametrize(
    "limits", [ImagesConfig(max_pixels=1000), ImagesConfig(min_side_px=401), ImagesConfig(max_aspect=1.1)]
)
def test_limits_hold(limits):
    assert small_luma(jpeg(photo()), limits, SIDE_PX) is None


def test_mutated_files_never_crash():
    rng = np.random.default_rng(0)
    sources = [jpeg(photo(110, 120), **options) for options in ({}, {"restart_marker_blocks": 2}, {"optimize": True})]
    read = 0
    for index in range(1500):
        data = bytearray(sources[index % 3])
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(2, len(data)))] = int(rng.integers(0, 256))
        small = small_luma(bytes(data), LIMITS, SIDE_PX)
        read += small is not None
        assert small is None or (small.shape == (SIDE_PX, SIDE_PX) and small.max() <= 255 * UNITS)
    assert 0 < read < 1500


def test_other_formats_go_through_their_pixels_decoded_once_or_here():
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    rgb = decode(buffer.getvalue(), LIMITS)

    assert (small_grey(buffer.getvalue(), LIMITS, SIDE_PX) == grey_thumbnail(rgb, SIDE_PX)).all()
    assert (small_grey(buffer.getvalue(), LIMITS, SIDE_PX, rgb) == grey_thumbnail(rgb, SIDE_PX)).all()
    assert (small_grey(jpeg(photo()), LIMITS, SIDE_PX, rgb) == small_luma(jpeg(photo()), LIMITS, SIDE_PX)).all()


def test_a_thumbnail_averages_what_is_finer_than_its_pixels():
    y, x = np.mgrid[0:256, 0:320]
    checkers = np.repeat(((x + y) % 2 * 200).astype(np.uint8)[:, :, None], 3, axis=2)

    assert np.abs(levels(grey_thumbnail(checkers, SIDE_PX)) - 100).max() <= 2


def test_large_pictures_are_averaged_first_without_moving():
    large = np.asarray(photo(1100, 1603))
    once = np.asarray(Image.fromarray(large).convert("L").convert("F").resize((16, 16), Image.Resampling.BILINEAR))

    error = np.abs(levels(grey_thumbnail(large, 16)) - once)
    assert error.mean() < 0.2
    assert error.max() < 2.5  # in the last row, which ends within a pixel of the average
