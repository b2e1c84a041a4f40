import numpy as np
import pytest

from curation.errors import DimensionError, VectorError
from curation.indexes.linkage import average_linkage


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def slowly(points):
    """Return, for each number of clusters, the clusters as sets, by comparing all pairs of clusters each time."""
    values = np.rint(points.astype(np.float64) @ points.T.astype(np.float64) * 1e6)
    clusters = [[row] for row in range(len(points))]
    found = {len(points): {frozenset(cluster) for cluster in clusters}}
    while len(clusters) > 1:
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]
        left, right = max(pairs, key=lambda pair: values[np.ix_(clusters[pair[0]], clusters[pair[1]])].mean())
        clusters[left] += clusters.pop(right)
        found[len(clusters)] = {frozenset(cluster) for cluster in clusters}
    return found


def as_sets(numbers):
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in np.unique(numbers)}


@pytest.mark.parametrize("seed", range(5))
def test_the_most_similar_clusters_are_merged_first(seed):
    points = unit(np.random.default_rng(seed).standard_normal((40, 6)))
    merges = average_linkage(points)
    for count, clusters in slowly(points).items():
        assert as_sets(merges.cut(count)) == clusters
    assert (np.diff(merges.similarities) <= 0).all()


def test_clusters_are_numbered_by_their_first_points_and_smaller_counts_are_unions():
    merges = average_linkage(unit(np.random.default_rng(0).standard_normal((300, 4))))
    for count in (1, 7, 100, 300):
        numbers = merges.cut(count)
        _, first = np.unique(numbers, return_index=True)
        assert len(first) == count
        assert (np.diff(first) > 0).all()
        finer = merges.cut(min(300, 2 * count))
        assert len(np.unique(np.stack([finer, numbers]), axis=1).T) == finer.max() + 1
    assert np.array_equal(merges.cut(1000), np.arange(300))


@pytest.mark.parametrize("num_groups", [2, 5, 30])
def test_the_widest_gap_is_at_the_number_of_groups_that_stand_apart_whatever_their_sizes(num_groups):
    rng = np.random.default_rng(num_groups)
    middle = np.linalg.qr(rng.standard_normal((32, 32)))[0][:num_groups]
    label = np.repeat(np.arange(num_groups), rng.integers(1, 60, num_groups))
    merges = average_linkage(unit(middle[label] + 0.05 * rng.standard_normal((len(label), 32))))
    assert merges.widest_gap() == num_groups
    assert np.array_equal(merges.cut(num_groups), label)


def test_equal_points_and_one_point_are_linked_too():
    same = np.tile(unit(np.ones((1, 8))), (50, 1))
    merges = average_linkage(same)
    assert np.array_equal(merges.cut(50), np.arange(50))
    assert not merges.cut(1).any()
    one = average_linkage(same[:1])
    assert (one.cut(1).tolist(), one.widest_gap()) == ([0], 1)


def test_other_arrays_than_unit_rows_are_refused():
    with pytest.raises(VectorError, match="norm"):
        average_linkage(np.full((3, 8), 1, np.float16))
    with pytest.raises(DimensionError, match="float16"):
        average_linkage(np.eye(3))
