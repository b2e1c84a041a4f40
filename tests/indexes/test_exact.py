import numpy as np
import pytest

from curation.errors import DimensionError, VectorError
from curation.indexes.exact import best_match, cross_join, nearest, self_join


def edge_list(pieces):
    return sorted((int(i), int(j), float(s)) for piece in pieces for i, j, s in zip(*piece, strict=True))


@pytest.mark.parametrize(("block_rows", "num_threads"), [(7, 1), (100, 2), (4096, None)])
def test_self_join_finds_every_pair_above_the_threshold_once(mixture, exact_similarities, block_rows, num_threads):
    vectors = mixture.vectors(300)
    scores = exact_similarities(vectors, vectors)
    threshold = float(np.sort(scores, axis=None)[60_000])  # some pair lies exactly on it
    left, right = np.nonzero(np.triu(scores > threshold, 1))
    wanted = [(int(i), int(j), float(scores[i, j])) for i, j in zip(left, right, strict=True)]
    assert (scores == threshold).any()
    assert edge_list(self_join(vectors, threshold, block_rows, num_threads)) == wanted


def test_self_join_does_not_depend_on_row_order(mixture):
    vectors = mixture.vectors(300)
    order = mixture.rng.permutation(300)
    found = edge_list(self_join(vectors[order], 0.6, 64))
    moved = sorted((*sorted((int(order[i]), int(order[j]))), s) for i, j, s in found)
    assert moved == edge_list(self_join(vectors, 0.6, 64))


def test_edges_of_a_piece_are_sorted(mixture):
    for edges in self_join(mixture.vectors(300), 0.2, 50):
        assert len(edges.left)
        assert np.array_equal(np.lexsort((edges.right, edges.left)), np.arange(len(edges.left)))


@pytest.mark.parametrize("block_rows", [9, 4096])
def test_cross_join_finds_every_pair_above_the_threshold(mixture, exact_similarities, block_rows):
    queries, references = mixture.vectors(120), mixture.vectors(90)
    scores = exact_similarities(queries, references)
    wanted = sorted((int(i), int(j), float(scores[i, j])) for i, j in zip(*np.nonzero(scores > 0.5), strict=True))
    assert edge_list(cross_join(queries, references, 0.5, block_rows)) == wanted
    assert edge_list(cross_join(queries, references[:0], 0.5)) == []
    assert edge_list(cross_join(queries[:0], references, 0.5)) == []


def test_memory_maps_give_the_same_edges(mixture, tmp_path):
    vectors = mixture.vectors(200)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert edge_list(self_join(mapped, 0.6, 50)) == edge_list(self_join(vectors, 0.6, 50))


def test_a_bad_row_anywhere_stops_before_the_first_edge(mixture):
    vectors = mixture.vectors(200)
    vectors[199, 0] = np.nan
    with pytest.raises(VectorError, match="row 199"):
        next(self_join(vectors, 0.0, 50))
    with pytest.raises(VectorError, match="row 199"):
        next(cross_join(vectors[:100], vectors, 0.0, 50))
    with pytest.raises(DimensionError):
        next(cross_join(vectors, vectors[:, :8], 0.0))


def test_five_thousand_copies_give_every_pair_of_them():
    vectors = np.zeros((5000, 8), np.float16)
    vectors[:, 2] = 1
    assert sum(len(edges.left) for edges in self_join(vectors, 0.999999)) == 5000 * 4999 // 2
    assert list(self_join(vectors, 1.0)) == []


@pytest.mark.parametrize(("block_rows", "num_threads"), [(5, 1), (64, 2), (16384, None)])
@pytest.mark.parametrize("k", [1, 4, 70])
def test_nearest_equals_brute_force(mixture, brute_nearest, k, block_rows, num_threads):
    references, keys = mixture.vectors(400), mixture.keys(400)
    queries = np.concatenate([mixture.vectors(50), references[:50]])
    rows, scores = brute_nearest(queries, references, keys, k)
    shards = [(references[:150], keys[:150]), (references[150:150], keys[150:150]), (references[150:], keys[150:])]
    found = nearest(queries, shards, k, block_rows, num_threads)
    assert np.array_equal(found.rows, rows)
    assert np.array_equal(found.keys, keys[rows])
    assert np.array_equal(found.similarities, np.take_along_axis(scores, rows, axis=1))


def test_near_ties_closer_than_float32_can_tell_are_decided_exactly(mixture, brute_nearest):
    # 600 vectors that differ from one another in the last bit of one value, in 512 dimensions.
    one = mixture.vectors(1, dim=512)
    references = np.repeat(one, 600, axis=0)
    bits = references.view(np.uint16)
    bits[np.arange(600), mixture.rng.integers(0, 512, 600)] ^= 1
    keys = mixture.keys(600)
    queries = mixture.vectors(20, dim=512)
    rows, scores = brute_nearest(queries, references, keys, 10)
    assert (np.diff(np.sort(scores[0])) == 0).any()  # ties after rounding too
    assert np.array_equal(nearest(queries, [(references, keys)], 10).rows, rows)


def test_best_match_breaks_ties_by_key_and_knows_when_there_is_none(mixture, brute_nearest):
    references, keys, queries = mixture.vectors(200), mixture.keys(200), mixture.vectors(30)
    queries = np.concatenate([queries, references])
    rows, similarity = best_match(queries, references, keys, block_rows=33)
    wanted, scores = brute_nearest(queries, references, keys, 1)
    assert np.array_equal(rows, wanted[:, 0])
    assert np.array_equal(similarity, scores[np.arange(len(rows)), rows])
    rows, similarity = best_match(queries, references[:0], keys[:0])
    assert (rows == -1).all()
    assert (similarity == -np.inf).all()
