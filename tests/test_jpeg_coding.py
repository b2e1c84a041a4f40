import io

import numpy as np
import pytest
from PIL import Image

from curation.errors import ImageError
from curation.jpeg_coding import JpegCoding, coding_of, encode_jpeg

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

    written = encode_jpeg(photo, coding_of(source, 401, 333))

    with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(written)) as after:
        assert after.quantization == before.quantization
        assert [part[1:] for part in after.layer] == [part[1:] for part in before.layer]
        assert after.size == before.size


def test_grey_stays_grey_unless_there_is_colour(photo):
    coding = coding_of(jpeg(photo, "L", quality=80), 401, 333)
    grey = np.repeat(photo[:, :, :1], 3, axis=2)

    with Image.open(io.BytesIO(encode_jpeg(grey, coding))) as image:
        assert image.mode == "L"
    with Image.open(io.BytesIO(encode_jpeg(photo, coding))) as image:
        assert image.mode == "RGB"


def test_a_turned_photo_gets_transposed_tables_and_full_chroma(photo):
    tables = [list(range(1, 65)), list(range(65, 129))]
    source = jpeg(photo, qtables=tables, subsampling="4:2:2")

    turned = coding_of(source, 333, 401)

    assert turned.tables[0] == tuple(np.arange(1, 65).reshape(8, 8).T.ravel().tolist())
    assert turned.subsampling == "4:4:4"
    assert coding_of(source, 401, 333) == JpegCoding(tuple(map(tuple, tables)), "4:2:2", False)


def test_cmyk_and_rgb_jpegs_have_no_coding_to_keep(photo):
    assert coding_of(jpeg(photo, "CMYK"), 401, 333) is None
    assert coding_of(jpeg(photo, keep_rgb=True), 401, 333) is None


def test_what_is_no_jpeg_is_refused():
    with pytest.raises(ImageError):
        coding_of(b"\xff\xd8\xff" + bytes(100), 8, 8)


def test_an_image_larger_than_a_jpeg_can_hold_is_refused():
    with pytest.raises(ImageError, match="cannot write"):
        encode_jpeg(np.zeros((1, 65_600, 3), np.uint8), JpegCoding(((1,) * 64,) * 2, "4:4:4", False))
