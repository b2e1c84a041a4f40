import io

import numpy as np
import pytest
from PIL import Image

from curation import images
from curation.config.images import ImagesConfig
from curation.jpeg_coding import coding_of, encode_jpeg
from curation.jpeg_edit import encode_edited, source_planes

skimage_data = pytest.importorskip("skimage.data")
LIMITS = ImagesConfig(min_side_px=1)


@pytest.fixture(scope="module")
def photo():
    return np.ascontiguousarray(skimage_data.coffee()[:333, :401])


def jpeg(rgb, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def edited(rgb, radius=40):
    """Return the pixels with a disc blurred into a few cells, which fades at its rim as that of a hidden face does."""
    y, x = np.mgrid[0 : rgb.shape[0], 0 : rgb.shape[1]]
    share = np.clip((1 - np.hypot(y - 120, x - 95) / radius) / 0.15, 0, 1)[:, :, None]
    cells = np.asarray(Image.fromarray(rgb).resize((6, 5), Image.Resampling.BOX).resize(rgb.shape[1::-1]), float)
    return np.rint(rgb + share * (cells - rgb)).astype(np.uint8)


def written(source, change=edited):
    """Return source pixels, edited ones, what is stored of them, and what encoding the source again gives."""
    rgb = images.decode(source, LIMITS)
    coding = coding_of(source)
    changed = change(rgb)
    ours = encode_edited(source_planes(source, rgb, coding), rgb, changed, coding)
    stored, again = (images.decode(data, LIMITS).astype(int) for data in (ours, encode_jpeg(rgb, coding)))
    return rgb.astype(int), changed, stored, again


def statistics(errors):
    return np.array([errors.mean(), np.percentile(errors, 99), np.percentile(errors, 99.9), errors.max()])


@pytest.mark.parametrize("quality", [60, 85, 95])
def test_with_subsampled_chroma_no_statistic_of_unedited_pixels_is_worse_than_coding_the_source_again(quality, photo):
    rgb, changed, stored, again = written(jpeg(photo, quality=quality))
    unedited = (changed == rgb).all(axis=2)

    ours, plain = (statistics(np.abs(result - rgb)[unedited]) for result in (stored, again))

    assert (ours <= plain).all()
    assert ours[0] < 0.5 * plain[0]


@pytest.mark.parametrize("quality", [60, 85, 95])
def test_with_full_chroma_only_crossed_blocks_differ_and_only_a_little(quality, photo):
    rgb, changed, stored, again = written(jpeg(photo[:320, :400], quality=quality, subsampling="4:4:4"))
    touched = (changed != rgb).any(axis=2)
    blocks = touched.reshape(40, 8, 50, 8).any(axis=(1, 3)).repeat(8, axis=0).repeat(8, axis=1)

    errors = np.abs(stored - rgb)

    assert statistics(errors[~blocks]).max() <= np.abs(again - rgb).max() + 1
    assert errors[blocks & ~touched].mean() < 2.5


@pytest.mark.parametrize("options", [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"mode": "L"}])
def test_blocks_without_an_edit_keep_what_is_coded(options, photo):
    rgb, _, stored, _ = written(jpeg(photo[:320, :400], quality=80, **options))

    far = np.ones(rgb.shape[:2], bool)
    far[120 - 64 : 120 + 64, 95 - 64 : 95 + 64] = False

    assert np.abs(stored - rgb)[far].mean() < 0.05


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_a_turned_photo_is_as_close_as_an_upright_one(orientation, photo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb, changed, stored, again = written(jpeg(photo[:320, :400], quality=85, exif=exif))
    unedited = (changed == rgb).all(axis=2)

    ours, plain = (statistics(np.abs(result - rgb)[unedited]) for result in (stored, again))

    assert (ours <= plain).all()
    assert ours[0] < 0.5 * plain[0]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_turned_square_is_as_close_as_an_upright_one(orientation, subsampling, photo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    square = np.ascontiguousarray(photo[:320, :320])
    rgb, changed, stored, again = written(jpeg(square, quality=85, exif=exif, subsampling=subsampling))
    unedited = (changed == rgb).all(axis=2)

    assert np.abs(stored - rgb)[unedited].mean() < 0.3  # 0.8 with tables that are not transposed
    assert np.abs(stored - rgb)[unedited].mean() <= np.abs(again - rgb)[unedited].mean()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_turned_square_with_chroma_at_half_width_is_written(orientation, photo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    square = np.ascontiguousarray(photo[:320, :320])

    rgb, changed, stored, again = written(jpeg(square, quality=85, exif=exif, subsampling="4:2:2"))

    unedited = (changed == rgb).all(axis=2)
    assert np.abs(stored - rgb)[unedited].mean() <= 1.02 * np.abs(again - rgb)[unedited].mean()


@pytest.mark.parametrize("payload", [b"garbage here...", b"", b"II*\0", b"II*\0\xf0\xff\xff\x00"])
def test_a_broken_exif_block_changes_nothing(payload, photo):
    source = jpeg(photo, quality=85)
    exif = b"\xff\xe1" + (len(payload) + 8).to_bytes(2, "big") + b"Exif\0\0" + payload
    rgb = images.decode(source, LIMITS)

    planes, others = (source_planes(data, rgb, coding_of(data)) for data in (source, source[:20] + exif + source[20:]))

    assert all((mine == theirs).all() for mine, theirs in zip(planes, others, strict=True))


def test_pixels_that_are_not_those_of_the_file_are_written_from_the_pixels(photo):
    source = jpeg(photo, quality=90)
    rgb = 255 - images.decode(source, LIMITS)  # as if a colour profile had been applied
    coding = coding_of(source)

    stored = images.decode(encode_edited(source_planes(source, rgb, coding), rgb, edited(rgb), coding), LIMITS)

    unedited = (edited(rgb) == rgb).all(axis=2)
    assert np.abs(stored.astype(int) - rgb)[unedited].mean() < 3


@pytest.mark.parametrize("turned", [False, True])
def test_chroma_at_half_width_is_no_worse_on_average_than_coding_the_source_again(turned, photo):
    source = jpeg(photo, quality=85, subsampling="4:2:2")
    if turned:
        exif = Image.Exif()
        exif[0x0112] = 6
        source = jpeg(photo, quality=85, subsampling="4:2:2", exif=exif)
    rgb, changed, stored, again = written(source)
    unedited = (changed == rgb).all(axis=2)

    ours, plain = (np.abs(result - rgb)[unedited] for result in (stored, again))

    assert ours.mean() <= 1.02 * plain.mean()
    assert ours.max() <= plain.max() + 8


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (17, 15)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_sizes_that_fill_no_block_are_written(size, subsampling, photo):
    source = jpeg(np.ascontiguousarray(photo[100 : 100 + size[0], 100 : 100 + size[1]]), subsampling=subsampling)

    rgb, changed, stored, _ = written(source, lambda rgb: 255 - rgb)

    assert stored.shape == rgb.shape
    assert np.abs(stored - changed).mean() < 40


def test_nothing_of_an_edited_sample_shapes_what_is_written(photo):
    source = jpeg(photo, quality=85, subsampling="4:4:4")
    rgb = images.decode(source, LIMITS)
    coding, changed = coding_of(source), edited(rgb)
    touched = (changed != rgb).any(axis=2)
    other = np.where(touched[:, :, None], 255 - changed, rgb).astype(np.uint8)  # another face, hidden the same way
    planes, others = source_planes(source, rgb, coding), source_planes(jpeg(other, quality=85), other, coding)
    mixed = [np.where(touched, theirs, mine).astype(np.uint8) for mine, theirs in zip(planes, others, strict=True)]

    assert encode_edited(planes, rgb, changed, coding) == encode_edited(mixed, rgb, changed, coding)


def test_edits_stay_edited(photo):
    rgb, changed, stored, _ = written(jpeg(photo, quality=85))
    inside = (changed != rgb).any(axis=2)

    assert np.abs(stored - changed)[inside].mean() < 4
