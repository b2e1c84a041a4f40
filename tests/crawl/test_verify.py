"""What is stored of an image that decodes."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from curation.config.fetch import ResizeConfig
from curation.config.images import ImagesConfig
from curation.crawl.verify import verify
from curation.errors import ImageError
from curation.images import decode


def encoded(width: int, height: int, kind: str = "JPEG", **options) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (height // 8 or 1, width // 8 or 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def test_an_image_is_stored_as_it_came():
    data = encoded(400, 300)

    found = verify(data, ImagesConfig())

    assert (found.data, found.image_id, found.stored_id) == (data, digest(data), digest(data))
    assert (found.info.format, found.info.width, found.info.height) == ("jpeg", 400, 300)


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("shorter", (800, 600), (171, 128)),
        ("longer", (800, 600), (128, 96)),
        ("shorter", (100, 90), (100, 90)),
        ("longer", (100, 90), (100, 90)),
        ("none", (800, 600), (800, 600)),
        ("shorter", (2400, 1800), (171, 128)),
        ("longer", (16, 300), (7, 128)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_resized_image_has_the_side_that_was_asked_for_and_its_own_hash(mode, size, expected, kind):
    data = encoded(*size, kind)

    found = verify(data, ImagesConfig(), None, ResizeConfig(side_px=128, mode=mode, format="jpeg"))

    assert Image.open(io.BytesIO(found.data)).size == (found.info.width, found.info.height) == expected
    assert (found.image_id, found.stored_id, found.info.format) == (digest(data), digest(found.data), "jpeg")
    assert verify(data, ImagesConfig(), None, ResizeConfig(side_px=128, mode=mode)) == found


def test_a_resized_image_looks_the_same_and_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(640, 480, exif=exif.tobytes())

    found = verify(data, ImagesConfig(), None, ResizeConfig(side_px=120, mode="shorter", format="png"))

    assert (found.info.width, found.info.height) == (120, 160)
    wanted = Image.fromarray(decode(data, ImagesConfig())).resize((120, 160), Image.Resampling.LANCZOS)
    difference = np.asarray(wanted, float) - decode(found.data, ImagesConfig())
    assert np.abs(difference).mean() < 2


@pytest.mark.parametrize("mode", ["shorter", "none"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("source", ["jpeg", "png", "webp"])
def test_a_resized_image_has_no_metadata_of_the_one_that_came(source, kind, mode):
    exif = Image.Exif()
    exif[0x010E] = "secret"  # ImageDescription
    data = encoded(64, 48, source, exif=exif.tobytes(), xmp=b"<x>secret</x>", comment=b"secret")
    assert b"secret" in data

    found = verify(data, ImagesConfig(), None, ResizeConfig(side_px=32, mode=mode, format=kind))

    assert b"secret" not in found.data


@pytest.mark.parametrize("resize", [None, ResizeConfig()])
def test_what_is_cut_off_is_refused_either_way(resize):
    with pytest.raises(ImageError) as refused:
        verify(encoded(400, 300)[:-3000], ImagesConfig(), None, resize)
    assert refused.value.reason == "truncated"
