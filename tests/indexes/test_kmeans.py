from itertools import pairwise

import faiss
import numpy as np
import pytest

from curation.errors import CorruptError, DimensionError, VectorError
from curation.indexes import assignment, kmeans, preselect
from curation.indexes.keys import hex_from_keys
from curation.indexes.kmeans import Centroids, PartialSums, assign, fit, initial_centroids, partial_sums, update
from curation.indexes.seeding import OVERSAMPLING, ROUNDS


def shards_of(vectors, keys, size):
    return lambda: ((vectors[i : i + size], keys[i : i + size]) for i in range(0, len(keys), size))


@pytest.fixture
def points(mixture):
    return mixture.vectors(2000, dim=24, centres=40, spread=0.4), mixture.keys(2000)


@pytest.mark.parametrize(
    ("shard_rows", "num_threads", "block_rows"), [(1, None, 8192), (17, 2, 8), (300, 3, 111), (900, 1, 8192)]
)
def test_result_is_the_same_bits_for_any_order_sharding_blocks_and_threads(
    mixture, monkeypatch, shard_rows, num_threads, block_rows
):
    vectors, keys = mixture.vectors(900, dim=24, centres=40, spread=0.4), mixture.keys(900)
    wanted = fit(shards_of(vectors, keys, 900), 60, 4, seed=3)
    monkeypatch.setattr(kmeans, "BATCH_ROWS", block_rows)
    monkeypatch.setattr(assignment, "_CENTROID_ROWS", 1 + block_rows % 32)
    order = mixture.rng.permutation(900)
    found = fit(shards_of(vectors[order], keys[order], shard_rows), 60, 4, 3, num_threads)
    assert np.array_equal(found.vectors.view(np.uint32), wanted.vectors.view(np.uint32))
    assert found.history == wanted.history


def test_threads_are_as_many_as_faiss_has_unless_a_number_is_given(points):
    with preselect.threads(3), assignment.workers() as found:
        assert found.num_threads == 3
    with preselect.threads(3), assignment.workers(2) as found:
        assert found.num_threads == 2


def with_copies(vectors, keys):
    """Return centroids of which many are within the error of a score, and more than a GPU is asked for."""
    centroids = initial_centroids(shards_of(vectors, keys, 999), 40, 0)
    return np.concatenate([centroids, np.repeat(centroids[:3], 300, axis=0)])


def test_assignment_by_the_search_that_a_gpu_has_is_that_of_the_processor(points, monkeypatch):
    # Done by the processor: what is around the search is the same.
    centroids = with_copies(*points)
    expected = assign(points[0], centroids)
    monkeypatch.setattr(preselect, "gpu_knn", lambda: faiss.knn)
    monkeypatch.setattr(assignment, "gpu_knn", lambda: faiss.knn)

    for found, wanted in zip(assign(points[0], centroids), expected, strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(preselect.gpu_knn() is None, reason="Faiss sees no GPU")
def test_a_gpu_fits_the_centroids_that_the_processor_fits(points, monkeypatch):
    on_gpu = fit(shards_of(*points, 512), 40, 5, seed=1)
    monkeypatch.setattr(preselect, "gpu_knn", lambda: None)
    monkeypatch.setattr(assignment, "gpu_knn", lambda: None)

    assert np.array_equal(on_gpu.vectors, fit(shards_of(*points, 512), 40, 5, seed=1).vectors)


def test_partial_sums_merge_in_any_order_to_the_same_update(points, mixture):
    vectors, keys = points
    centroids = initial_centroids(shards_of(vectors, keys, 500), 30, 0)
    whole, seen = update(centroids, partial_sums(vectors, keys, centroids))
    parts = [partial_sums(vectors[i : i + 300], keys[i : i + 300], centroids) for i in range(0, 2000, 300)]
    total = PartialSums.empty(*centroids.shape)
    for i in mixture.rng.permutation(len(parts)):
        total.merge(parts[i])
    merged, seen_merged = update(centroids, total)
    assert np.array_equal(whole, merged)
    assert seen == seen_merged


def test_assignment_is_the_definition(points, exact_similarities):
    vectors, keys = points
    centroids = fit(shards_of(vectors, keys, 999), 50, 4, seed=0).vectors
    numbers, similarities = assign(vectors, centroids, num_threads=2)
    scores = exact_similarities(vectors, centroids)
    assert np.array_equal(numbers, scores.argmax(axis=1))  # argmax takes the first of equals
    assert np.array_equal(similarities, scores.max(axis=1).astype(np.float32))
    assert (numbers.dtype, similarities.dtype) == (np.int32, np.float32)


def test_equal_centroids_give_points_to_the_smallest_number(points):
    vectors, keys = points
    centroids = initial_centroids(shards_of(vectors, keys, 999), 20, 0)
    doubled = np.concatenate([centroids, centroids])
    assert assign(vectors, doubled)[0].max() < 20


def test_objective_never_falls_and_equals_the_mean_similarity(points):
    vectors, keys = points
    found = fit(shards_of(vectors, keys, 512), 40, 30, seed=5)
    objectives = [iteration.objective for iteration in found.history]
    assert all(after >= before - 1e-6 for before, after in pairwise(objectives))
    assert objectives[-1] > objectives[0] + 0.01
    assert found.converged
    assert len(found.history) < 30
    mean = assign(vectors, found.vectors)[1].astype(np.float64).mean()
    assert abs(mean - objectives[-1]) < 1e-6


def test_an_update_is_the_normalised_mean_of_each_cluster(points):
    vectors, keys = points
    centroids = initial_centroids(shards_of(vectors, keys, 2000), 10, 0)
    numbers, _ = assign(vectors, centroids)
    updated, iteration = update(centroids, partial_sums(vectors, keys, centroids))
    for number in range(10):
        mean = vectors[numbers == number].astype(np.float64).sum(axis=0)
        assert np.abs(updated[number] - mean / np.linalg.norm(mean)).max() < 1e-7
    sizes = np.bincount(numbers, minlength=10)
    assert iteration.imbalance == pytest.approx(10 * (sizes**2).sum() / 2000**2)
    assert np.array_equal(np.rint(updated * 2**24) / 2**24, updated)  # on the grid: similarities are exact


def test_first_centroids_are_distinct_points_and_depend_on_the_seed_alone(points, mixture):
    vectors, keys = points
    found = initial_centroids(shards_of(vectors, keys, 77), 25, seed=11)
    order = mixture.rng.permutation(len(keys))
    assert np.array_equal(found, initial_centroids(shards_of(vectors[order], keys[order], 500), 25, 11, num_threads=3))
    scaled = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    assert np.abs(found[:, None] - scaled[None]).max(axis=2).min(axis=1).max() < 1e-7
    assert len(np.unique(found, axis=0)) == 25
    assert not np.array_equal(found, initial_centroids(shards_of(vectors, keys, 77), 25, seed=12))


def test_every_group_that_stands_apart_gets_a_first_centroid(mixture):
    k = 4 * ROUNDS
    vectors = mixture.vectors(OVERSAMPLING * k, dim=64, centres=k // 2, spread=0.05)
    found = initial_centroids(shards_of(vectors, mixture.keys(len(vectors)), 999), k, seed=0)
    assert assign(vectors, found)[1].min() > 0.9  # random points leave several of the groups without one


def test_k_is_at_most_the_number_of_distinct_vectors_and_that_is_said(points, caplog):
    vectors, keys = points
    vectors = vectors[np.arange(2000) % 7]
    found = fit(shards_of(vectors, keys, 100), 50, 10, seed=0)
    assert len(found.vectors) == 7
    assert "only 7 different vectors: as many clusters instead of 50" in caplog.text
    assert found.history[-1].num_empty == 0
    assert found.history[-1].objective > 0.999  # of float16 vectors, whose norm is only about 1


def test_five_thousand_copies_are_one_cluster(points):
    vectors = np.repeat(points[0][:1], 5000, axis=0)
    keys = np.arange(10_000, dtype=np.uint64).reshape(5000, 2)
    found = fit(shards_of(vectors, keys, 1000), 10, 5, seed=0)
    assert len(found.vectors) == 1
    assert found.converged
    assert found.history[0].num_empty == 0


def test_empty_clusters_start_again_at_the_farthest_points(points, exact_similarities):
    vectors, keys = points
    centroids = initial_centroids(shards_of(vectors, keys, 2000), 8, 0)
    centroids[[2, 5]] = -centroids[[0, 1]]
    centroids[[2, 5]] = centroids[0]  # equal to a smaller number: nothing is left for them
    nearest = exact_similarities(vectors, centroids).max(axis=1)
    order = np.lexsort((keys[:, 1], keys[:, 0], nearest))
    updated, iteration = update(centroids, partial_sums(vectors, keys, centroids))
    assert (iteration.num_empty, iteration.num_reseeded) == (2, 2)
    for number, row in zip((2, 5), order, strict=False):
        assert exact_similarities(vectors[row : row + 1], updated[number : number + 1])[0, 0] > 0.999
    _, later = update(updated, partial_sums(vectors, keys, updated))
    assert later.num_empty == 0


def test_points_that_cancel_out_leave_their_centroid_where_it_is():
    vectors = np.array([[1, 0], [-1, 0]], np.float16)
    keys = np.array([[0, 1], [0, 2]], np.uint64)
    centroids = np.array([[0, 1]], np.float32)
    updated, _ = update(centroids, partial_sums(vectors, keys, centroids))
    assert np.array_equal(updated, centroids)


def test_empty_shards_are_passed_over_and_no_points_are_an_error(points):
    vectors, keys = points

    def with_gaps():
        yield vectors[:0], keys[:0]
        yield vectors, keys
        yield vectors[:0], keys[:0]

    wanted = fit(shards_of(vectors, keys, 2000), 10, 3, seed=0)
    assert np.array_equal(fit(with_gaps, 10, 3, seed=0).vectors, wanted.vectors)
    assert assign(vectors[:0], wanted.vectors)[0].shape == (0,)
    for nothing in (shards_of(vectors[:0], keys[:0], 1), lambda: [(vectors[:0], keys[:0])]):
        with pytest.raises(VectorError, match="no vector"):
            fit(nothing, 10, 3, seed=0)


def test_bad_input_is_refused(points):
    vectors, keys = points
    broken = vectors.copy()
    broken[1234, 5] = np.nan
    for k in (2, 10, 200):  # the sample of first centroids has 16 k vectors, in the order of their hashes
        for shard_rows in (100, 2000):
            with pytest.raises(VectorError, match=f"image {hex_from_keys(keys)[1234]} has a value that is not finite"):
                fit(shards_of(broken, keys, shard_rows), k, 3, seed=0)
    with pytest.raises(DimensionError, match="k must be"):
        fit(shards_of(vectors, keys, 2000), 0, 3, seed=0)
    with pytest.raises(DimensionError, match="iterations"):
        fit(shards_of(vectors, keys, 2000), 3, 0, seed=0)
    with pytest.raises(DimensionError):
        assign(vectors, np.eye(5, dtype=np.float32))
    with pytest.raises(DimensionError, match="keys"):
        partial_sums(vectors, keys[:10], initial_centroids(shards_of(vectors, keys, 99), 3, 0))


def test_a_fit_that_goes_on_from_any_iteration_ends_with_the_same_bits(points, tmp_path):
    vectors, keys = points
    states = []
    whole = fit(shards_of(vectors, keys, 300), 40, 6, seed=2, on_iteration=states.append)
    assert [len(state.history) for state in states] == list(range(1, len(whole.history) + 1))
    for state in states:
        state.save(tmp_path / "state.npz")
        again = fit(shards_of(vectors, keys, 999), 40, 6, seed=2, resume=Centroids.load(tmp_path / "state.npz"))
        assert np.array_equal(again.vectors, whole.vectors)
        assert again.history == whole.history


def test_partial_sums_survive_a_file(points, tmp_path):
    vectors, keys = points
    centroids = initial_centroids(shards_of(vectors, keys, 500), 30, 0)
    centroids[7] = centroids[3]  # an empty cluster, so that the farthest points count
    total = PartialSums.empty(*centroids.shape)
    for start in (0, 1000, 2000):  # the last has no points
        partial_sums(vectors[start : start + 1000], keys[start : start + 1000], centroids).save(tmp_path / "part.npz")
        total.merge(PartialSums.load(tmp_path / "part.npz"))
    merged, seen = update(centroids, total)
    whole, seen_whole = update(centroids, partial_sums(vectors, keys, centroids))
    assert np.array_equal(merged, whole)
    assert seen == seen_whole
    assert seen.num_reseeded == 1


@pytest.mark.parametrize("kind", [Centroids, PartialSums])
def test_a_file_that_was_cut_short_or_damaged_is_refused(kind, points, tmp_path):
    path = tmp_path / "state.npz"
    (Centroids(np.eye(3, dtype=np.float32)) if kind is Centroids else PartialSums.empty(3, 3)).save(path)
    kind.load(path)
    data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")  # of the directory; a flipped bit says that the array is encrypted
    encrypted = data[: entry + 8] + b"\x01" + data[entry + 9 :]
    for content in (b"", b"text", data[:-30], data[:40], encrypted):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match="not"):
            kind.load(path)
    path.unlink()
    with pytest.raises(CorruptError):
        kind.load(path)


def test_scores_that_are_all_negative_still_have_a_nearest_centroid():
    vectors = np.array([[-1, 0], [0, -1]], np.float16)
    centroids = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    assert assign(vectors, np.rint(centroids * 2**24) / np.float32(2**24))[0].tolist() == [2, 0]
