import numpy as np

from curation.indexes.exact import Edges
from curation.stages import dedup_edges


def edges(left, right, similarity):
    return Edges(np.array(left, np.int64), np.array(right, np.int64), np.array(similarity))


def few_of_each(found, num_rows, few):
    parts = list(dedup_edges._best_few_of_each(iter(found), num_rows, few))
    left, right, millionths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return list(zip(left.tolist(), right.tolist(), millionths.tolist(), strict=True))


def test_each_row_keeps_its_most_similar_ones_and_of_equal_ones_the_first():
    found = [edges([0, 0, 2], [5, 3, 1], [0.7, 0.9, 0.6]), edges([0, 0, 2], [4, 1, 0], [0.7, 0.95, 0.8])]

    assert few_of_each(found, 3, 3) == [
        (0, 1, 950_000),
        (0, 3, 900_000),
        (0, 4, 700_000),
        (2, 0, 800_000),
        (2, 1, 600_000),
    ]
    assert few_of_each([], 3, 3) == []


def test_what_is_kept_does_not_depend_on_the_pieces_that_pairs_come_in(monkeypatch):
    random = np.random.default_rng(0)
    left, right = random.integers(0, 20, 5000), random.integers(0, 400, 5000)
    similarity = random.integers(500, 1000, 5000) / 1000
    whole = few_of_each([edges(left, right, similarity)], 20, 7)
    monkeypatch.setattr(dedup_edges, "_TABLE_ROWS", 10)  # so that they are cut down again and again
    order = random.permutation(5000)
    pieces = [edges(left[part], right[part], similarity[part]) for part in np.array_split(order, 37)]

    assert few_of_each(pieces, 20, 7) == whole
    assert len(whole) == 20 * 7
