import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from curation.indexes import inverted_lists
from curation.indexes.quantizer import GRID, nearest_lists, train


@pytest.fixture
def trained(mixture):
    vectors = mixture.vectors(600, dim=30)
    return train(vectors, 9, 4, 20), vectors


def test_scores_of_centroids_are_exact_for_any_batch(trained):
    quantizer, vectors = trained
    points = quantizer.project(vectors)
    wanted = points.astype(np.float64) @ quantizer.centroids_LE.T.astype(np.float64)
    for size in (1, 7, 600):
        for start in range(0, 600, size):
            lists, scores = nearest_lists(points[start : start + size], quantizer.centroids_LE, 4)
            assert np.array_equal(scores, np.take_along_axis(wanted[start : start + size], lists, axis=1))
            assert np.array_equal(scores[:, 0], wanted[start : start + size].max(axis=1))


def test_ties_of_lists_go_to_the_smaller_number(trained):
    quantizer, vectors = trained
    doubled = np.repeat(quantizer.centroids_LE, 3, axis=0)
    lists, _ = nearest_lists(quantizer.project(vectors[:50]), doubled, 4)
    assert (lists[:, :3] % 3 == [0, 1, 2]).all()
    assert (lists[:, 3] % 3 == 0).all()


def test_everything_lies_on_the_grid_and_the_rotation_keeps_lengths(trained):
    quantizer, vectors = trained
    for values in (quantizer.centroids_LE, quantizer.codebook_MSK, quantizer.project(vectors)):
        assert np.array_equal(values * GRID, np.rint(values * GRID))
    assert (quantizer.dim, quantizer.num_lists, quantizer.code_bytes) == (30, 9, 4)
    assert quantizer.rotation_DE.shape == (30, 24)  # 20 directions, in 8 pieces of 3 values
    turned = train(vectors, 9, 4, 30)
    assert np.abs(np.linalg.norm(turned.project(vectors), axis=1) - 1).max() < 2e-3


def test_the_directions_that_vary_most_are_kept(mixture):
    vectors = np.zeros((500, 40), np.float16)
    vectors[:, 7:15] = mixture.vectors(500, dim=8)
    quantizer = train(vectors, 4, 4, 8)
    assert np.abs(np.linalg.norm(quantizer.project(vectors), axis=1) - 1).max() < 3e-3


def test_threads_of_blas_choose_no_direction_where_the_sample_has_too_few(mixture):
    vectors = mixture.vectors(100, dim=640)
    found = []
    for num_threads in (1, 2):
        with threadpool_limits(num_threads, "blas"):
            found.append(train(vectors, 2, 43, 256))
    assert found[0] == found[1]


def test_codes_depend_on_no_batch(trained):
    quantizer, vectors = trained
    lists, codes = quantizer.encode(vectors)
    for rows in np.array_split(np.random.default_rng(0).permutation(600), 7):
        some_lists, some_codes = quantizer.encode(vectors[rows])
        assert np.array_equal(some_lists, lists[rows])
        assert np.array_equal(some_codes, codes[rows])


def test_more_bytes_come_closer(mixture):
    vectors = mixture.vectors(2000, dim=24)
    errors = []
    for code_bytes in (2, 6, 12):
        quantizer = train(vectors, 8, code_bytes, 24)
        lists, codes = quantizer.encode(vectors)
        pieces = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
        book = quantizer.codebook_MSK
        parts = [book[piece][:, pieces[:, piece]].T for piece in range(len(book))]
        difference = quantizer.project(vectors) - quantizer.centroids_LE[lists] - np.concatenate(parts, axis=1)
        errors.append(float((difference**2).sum(axis=1).mean()))
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.3 * errors[2]


@pytest.mark.parametrize("num_rows", [0, 1, 31, 32, 33, 100])
def test_unpacking_gives_what_was_packed(num_rows):
    codes = np.random.default_rng(0).integers(0, 256, (num_rows, 5)).astype(np.uint8)
    packed = inverted_lists.pack(codes)
    assert packed.shape == (-(-num_rows // 32), 5, 32)
    assert np.array_equal(inverted_lists.unpack(packed)[:num_rows], codes)


def test_codes_that_faiss_packs_in_another_way_are_refused(monkeypatch):
    inverted_lists._check_layout()
    monkeypatch.setattr(inverted_lists, "pack", lambda codes: codes[::-1])
    with pytest.raises(inverted_lists.StoreError, match="packs codes"):
        inverted_lists._check_layout()
