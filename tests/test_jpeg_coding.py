import io

import numpy as np
import pytest
from PIL import Image

from curation.errors import ImageError
from curation.jpeg_coding import JpegCoding, coding_of, encode_jpeg, opened

skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def photo():
    return np.ascontiguousarray(skimage_data.coffee()[:333, :401])


def jpeg(rgb, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("quality", [35, 75, 92, 100])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_tables_and_subsampling_are_those_of_the_source(quality, subsampling, progressive, photo):
    source = jpeg(photo, quality=quality, subsampling=subsampling, progressive=progressive)

    written = encode_jpeg(photo, coding_of(source))

    with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(written)) as after:
        assert after.quantization == before.quantization
        assert [part[1:] for part in after.layer] == [part[1:] for part in before.layer]
        assert after.size == before.size


def test_grey_stays_grey_unless_there_is_colour(photo):
    coding = coding_of(jpeg(photo, "L", quality=80))
    grey = np.repeat(photo[:, :, :1], 3, axis=2)

    with Image.open(io.BytesIO(encode_jpeg(grey, coding))) as image:
        assert image.mode == "L"
    with Image.open(io.BytesIO(encode_jpeg(photo, coding))) as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize("size", [(333, 401), (320, 320)])
def test_a_turned_photo_gets_transposed_tables_and_full_chroma(size, photo):
    tables = [list(range(1, 65)), list(range(65, 129))]
    crop, exif = np.ascontiguousarray(photo[: size[0], : size[1]]), Image.Exif()
    exif[0x0112] = 6

    upright = coding_of(jpeg(crop, qtables=tables, subsampling="4:2:2"))
    turned = coding_of(jpeg(crop, qtables=tables, subsampling="4:2:2", exif=exif))

    assert turned.tables[0] == tuple(np.arange(1, 65).reshape(8, 8).T.ravel().tolist())
    assert turned.subsampling == "4:4:4"
    assert upright == JpegCoding(tuple(map(tuple, tables)), "4:2:2", False)


def test_pillow_is_shown_no_metadata_and_no_fill_bytes(photo):
    source = jpeg(photo, quality=80)
    exif = b"\xff\xe1\x00\x18Exif\0\0garbage here..."
    padded = source[:2] + exif + b"\xff" * (1 << 20) + source[2:]

    with opened(padded) as (image, orientation):
        num_bytes = image.fp.getbuffer().nbytes

    assert orientation == 1
    assert num_bytes <= len(source)
    assert coding_of(padded) == coding_of(source)


def test_cmyk_and_rgb_jpegs_have_no_coding_to_keep(photo):
    assert coding_of(jpeg(photo, "CMYK")) is None
    assert coding_of(jpeg(photo, keep_rgb=True)) is None


def test_what_is_no_jpeg_is_refused():
    with pytest.raises(ImageError):
        coding_of(b"\xff\xd8\xff" + bytes(100))


def test_an_image_larger_than_a_jpeg_can_hold_is_refused():
    with pytest.raises(ImageError, match="cannot write"):
        encode_jpeg(np.zeros((1, 65_600, 3), np.uint8), JpegCoding(((1,) * 64,) * 2, "4:4:4", False))
