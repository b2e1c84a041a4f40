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


def pairs_of(pieces):
    return sorted(map(tuple, np.concatenate([np.stack(pair, axis=1) for pair in pieces]).tolist()))


def pairs_above(single, threshold):
    return pairs_of(preselect.above(single, single, threshold))


def best_pairs(single, k):
    return pairs_of(preselect.best(single, single, k, np.full(len(single), -np.inf)))


def hub(mixture, num_rows=400, dim=24):
    """Return rows of which half crowd together, more than a GPU is asked for."""
    values = mixture.rng.standard_normal((num_rows, dim))
    values[: num_rows // 2] = values[0] + 0.05 * values[: num_rows // 2]
    return widen((values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16))


@pytest.mark.parametrize("num_neighbours", [8, 256, 2048])
def test_a_search_by_neighbours_finds_what_one_by_radius_finds(mixture, monkeypatch, num_neighbours):
    single = hub(mixture)
    by_radius = pairs_above(single, 0.5)
    best = best_pairs(single, 5)
    # The search that a GPU has, done by the processor: what is around it is the same.
    monkeypatch.setattr(preselect, "gpu_knn", lambda: faiss.knn)
    monkeypatch.setattr(preselect, "GPU_NEIGHBOURS", num_neighbours)

    assert pairs_above(single, 0.5) == by_radius
    assert len(by_radius) >= 200 * 200
    assert best_pairs(single, 5) == best


@pytest.mark.gpu
@pytest.mark.skipif(preselect.gpu_knn() is None, reason="Faiss sees no GPU")
def test_a_gpu_finds_the_pairs_that_the_processor_finds(mixture, monkeypatch):
    single = hub(mixture, 5_000, 512)
    on_gpu = pairs_above(single, 0.5)
    monkeypatch.setattr(preselect, "gpu_knn", lambda: None)

    assert on_gpu == pairs_above(single, 0.5)
