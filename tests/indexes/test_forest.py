import numpy as np
import pytest

from curation.errors import DimensionError
from curation.indexes import forest as forest_module
from curation.indexes.components import UnionFind
from curation.indexes.forest import SpanningForest


def edges_of(seed, num_rows=200, num_edges=3000, num_weights=40):
    random = np.random.default_rng(seed)
    left, right = random.integers(0, num_rows, (2, num_edges)).astype(np.int32)
    return left, right, random.integers(0, num_weights, num_edges).astype(np.int32)


def labels_of(num_rows, edges, threshold):
    left, right, weight = edges
    union = UnionFind(num_rows)
    union.add(left[weight > threshold], right[weight > threshold])
    return union.labels().tolist()


def forest_of(num_rows, edges, batch=100):
    forest = SpanningForest(num_rows)
    for start in range(0, len(edges[0]), batch):
        forest.add(*(column[start : start + batch] for column in edges))
    return forest.edges()


@pytest.fixture
def small_buffer(monkeypatch):
    """Reduce many times."""
    monkeypatch.setattr(forest_module, "_MIN_BUFFER", 64)


@pytest.mark.parametrize("seed", range(5))
def test_a_forest_has_the_components_of_all_edges_at_every_threshold(seed, small_buffer):
    edges = edges_of(seed)

    found = forest_of(200, edges)

    assert len(found[0]) < 200
    for threshold in range(-1, 41):
        assert labels_of(200, found, threshold) == labels_of(200, edges, threshold)


@pytest.mark.parametrize("seed", range(5))
def test_so_has_a_union_of_forests_of_parts(seed, small_buffer):
    edges = edges_of(seed)
    bounds = sorted(np.random.default_rng(seed).integers(0, 3000, 4).tolist())
    parts = [tuple(np.split(column, bounds)[part] for column in edges) for part in range(5)]

    found = [forest_of(200, part) for part in parts]

    together = tuple(np.concatenate(columns) for columns in zip(*found, strict=True))
    for threshold in range(-1, 41):
        assert labels_of(200, together, threshold) == labels_of(200, edges, threshold)


def test_it_does_not_depend_on_order_or_batches(small_buffer):
    left, right, weight = edges_of(7)
    order = np.random.default_rng(1).permutation(len(left))

    found = forest_of(200, (left, right, weight), 100)
    again = forest_of(200, (left[order], right[order], weight[order]), 37)

    assert [column.tolist() for column in found] == [column.tolist() for column in again]


def test_a_hub_keeps_all_of_its_copies():
    copies = np.arange(1, 5000, dtype=np.int32)

    left, _, _ = forest_of(5000, (np.zeros_like(copies), copies, np.full_like(copies, 900_000)))

    assert len(left) == 4999


def test_nothing_is_a_forest_of_nothing():
    assert [len(column) for column in SpanningForest(0).edges()] == [0, 0, 0]


@pytest.mark.parametrize("row", [-1, 3])
def test_rows_that_do_not_exist_are_refused(row):
    one = np.array([row], np.int32)

    with pytest.raises(DimensionError, match=r"outside 0\.\.2"):
        SpanningForest(3).add(one, np.zeros_like(one), one)
