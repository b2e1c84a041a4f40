import faiss
import numpy as np
import pytest

from curation.indexes import preselect
from curation.indexes.vectors import widen


@pytest.mark.parametrize("dim", [3, 256, 4096])
@pytest.mark.parametrize("num_queries", [5, 100])  # Faiss scores few queries another way than many
def test_float32_scores_are_within_the_proven_error(mixture, dim, num_queries):
    # Values of one sign: nothing cancels, so rounding errors are as large as they get.
    values = np.abs(mixture.rng.standard_normal((300, dim)))
    vectors = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    single = widen(vectors)
    scores, rows = faiss.knn(single[:num_queries], single, 300, metric=faiss.METRIC_INNER_PRODUCT)
    exact = vectors[:num_queries].astype(np.float64) @ vectors.astype(np.float64).T
    worst = np.abs(scores - np.take_along_axis(exact, rows, axis=1)).max()
    assert 0 < worst < preselect.score_error(dim) / 2


def test_thread_setting_is_put_back():
    before = faiss.omp_get_max_threads()
    with preselect.threads(before + 1):
        assert faiss.omp_get_max_threads() == before + 1
    with pytest.raises(KeyError), preselect.threads(1):
        raise KeyError
    assert faiss.omp_get_max_threads() == before
