import numpy as np

from curation.indexes import identical
from curation.indexes.exact import Edges


def unit(num, dim=20, seed=0):
    values = np.random.default_rng(seed).standard_normal((num, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def test_a_star_joins_each_group_to_its_first_row():
    rng = np.random.default_rng(1)
    content = rng.integers(0, 300, 1000)
    vectors = unit(300)[content]
    left, right, similarity = identical.identical_rows(vectors, 0.6)
    first = {c: int(np.flatnonzero(content == c)[0]) for c in set(content.tolist())}
    wanted = sorted((first[c], row) for row, c in enumerate(content.tolist()) if row != first[c])
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == wanted
    assert np.array_equal(similarity, np.round((vectors[left].astype(np.float64) ** 2).sum(axis=1), 6))
    stay = identical.distinct_rows(1000, Edges(left, right, similarity))
    assert stay.tolist() == sorted(first.values())


def test_rows_with_equal_hashes_are_told_apart(monkeypatch):
    monkeypatch.setattr(identical, "_hash_rows", lambda bits, factors, hashes: hashes.fill(7))
    vectors = unit(10)[[0, 1, 2, 0, 3, 1, 0]]
    left, right, _ = identical.identical_rows(vectors, 0.6)
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == [(0, 3), (0, 6)]


def test_zeros_of_either_sign_are_different_bytes():
    vectors = np.zeros((2, 4), np.float16)
    vectors[:, 0] = 1
    vectors[1, 1] = -0.0
    assert not len(identical.identical_rows(vectors, 0.6).left)


def test_copies_get_edges_in_bounded_pieces(monkeypatch):
    monkeypatch.setattr(identical, "MAX_EDGES", 4)
    edges = Edges(np.array([0, 0, 2]), np.array([0, 3, 3]), np.array([0.7, 0.8, 0.9]))
    lefts = Edges(np.zeros(3, int), np.array([4, 5, 6]), np.ones(3))
    rights = Edges(np.full(2, 3), np.array([7, 8]), np.ones(2))
    pieces = list(identical.with_copies(edges, lefts, rights))
    pairs = sorted((i, j, s) for piece in pieces for i, j, s in zip(*map(np.ndarray.tolist, piece), strict=True))
    assert pairs == sorted(
        [(0, 0, 0.7), (0, 3, 0.8), (2, 3, 0.9)]
        + [(i, j, s) for i in (4, 5, 6) for j, s in ((0, 0.7), (3, 0.8))]
        + [(i, j, s) for j in (7, 8) for i, s in ((0, 0.8), (2, 0.9))]
    )
    assert max(len(piece.left) for piece in pieces) <= 4 + 3
    star = Edges(np.zeros(9, int), np.arange(1, 10), np.ones(9))
    assert [len(piece.left) for piece in identical.pieces(star)] == [4, 4, 1]
