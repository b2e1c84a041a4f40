import numpy as np
import pytest

from curation.errors import DimensionError
from curation.indexes.balanced import QuotaSample, fill, shares
from curation.indexes.sampling import hash_keys

RANKS = np.arange(100, dtype=np.uint64)


@pytest.mark.parametrize(
    ("sizes", "budget", "wanted"),
    [
        ([10, 10, 10], 6, [2, 2, 2]),
        ([1, 10, 10], 7, [1, 3, 3]),
        ([0, 10, 2], 7, [0, 5, 2]),
        ([10, 10, 10], 7, [3, 2, 2]),  # what cannot be split goes to the smallest rank
        ([1, 2, 100], 50, [1, 2, 47]),
        ([5, 5], 100, [5, 5]),
        ([5, 5], 0, [0, 0]),
        ([0, 0], 3, [0, 0]),
        ([], 3, []),
    ],
)
def test_a_budget_is_split_evenly_and_what_small_clusters_cannot_use_goes_to_the_others(sizes, budget, wanted):
    assert fill(np.array(sizes, np.int64), budget, RANKS[: len(sizes)]).tolist() == wanted


def test_parts_are_as_even_as_sizes_allow():
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = rng.integers(0, 12, rng.integers(1, 9))
        budget = int(rng.integers(0, sizes.sum() + 4))
        parts = fill(sizes, budget, RANKS[: len(sizes)])
        assert parts.sum() == min(budget, sizes.sum())
        assert (parts <= sizes).all()
        unfilled = parts[parts < sizes]
        assert not len(unfilled) or parts.max() <= unfilled.min() + 1


def test_shares_are_equal_from_the_top_down_and_a_poor_branch_leaves_its_rest_to_the_others():
    sizes = np.array([100, 100, 100, 4, 100])
    parents = (np.array([0, 0, 1, 2, 3], np.int32), np.array([0, 0, 1, 1], np.int32))
    # Two top branches share 60: the first has two clusters of 15 + 15 and 30; the second 4 at most, and the rest.
    assert shares(sizes, parents, 60, seed=0).tolist() == [8, 7, 15, 4, 26] or shares(
        sizes, parents, 60, seed=0
    ).tolist() == [7, 8, 15, 4, 26]


@pytest.mark.parametrize("budget", [0, 1, 7, 50, 333, 10_000])
def test_a_budget_is_spent_exactly_whatever_the_tree(budget):
    rng = np.random.default_rng(budget)
    sizes = rng.integers(0, 30, 40)
    parents = (rng.integers(0, 9, 40).astype(np.int32), rng.integers(0, 4, 9).astype(np.int32))
    taken = shares(sizes, parents, budget, seed=1)
    assert taken.sum() == min(budget, sizes.sum())
    assert (taken <= sizes).all()


def test_without_levels_all_clusters_share_alike():
    assert sorted(shares(np.array([9, 9, 1]), (), 9, seed=0).tolist()) == [1, 4, 4]


def test_sizes_and_parents_that_do_not_fit_are_refused():
    with pytest.raises(DimensionError, match="parents"):
        shares(np.ones(3, np.int64), (np.zeros(4, np.int32),), 2, seed=0)
    with pytest.raises(DimensionError, match="budget"):
        shares(np.ones(3, np.int64), (), -1, seed=0)


@pytest.mark.parametrize("batch", [1, 37, 5000])
def test_a_sample_is_the_smallest_hashes_of_each_cluster_in_any_order(mixture, monkeypatch, batch):
    monkeypatch.setattr("curation.indexes.balanced._MIN_PENDING", 50)
    keys, clusters = mixture.keys(1000), mixture.rng.integers(0, 7, 1000)
    quotas = np.array([0, 1, 5, 40, 500, 3, 0])
    sample = QuotaSample(quotas, seed=9)
    order = mixture.rng.permutation(1000)
    for start in range(0, 1000, batch):
        rows = order[start : start + batch]
        sample.add(clusters[rows], keys[rows])
    ranks = hash_keys(keys, 9)
    wanted = [
        tuple(keys[row].tolist())
        for cluster, quota in enumerate(quotas)
        for row in sorted(np.flatnonzero(clusters == cluster), key=lambda row: ranks[row])[:quota]
    ]
    assert [tuple(key) for key in sample.result().tolist()] == wanted
