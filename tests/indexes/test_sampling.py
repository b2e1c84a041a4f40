import numpy as np
import pytest

from curation.errors import DimensionError
from curation.indexes.sampling import MIN_PENDING, HashSample, SmallestRanks, hash_keys


def splitmix(value):
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) % 2**64
    return value ^ value >> 31


def test_the_hash_is_the_documented_one():
    golden = 0x9E3779B97F4A7C15
    keys = np.random.default_rng(0).integers(0, 2**64, (50, 2), dtype=np.uint64)
    for seed in (0, 1, 2**63, -1):
        for (first, second), found in zip(keys.tolist(), hash_keys(keys, seed).tolist(), strict=True):
            half = splitmix(splitmix((seed + golden) % 2**64) ^ first)
            assert found == splitmix(splitmix((half + golden) % 2**64) ^ second)


def test_hashes_of_neighbouring_keys_and_seeds_look_independent():
    keys = np.zeros((20_000, 2), np.uint64)
    keys[:, 1] = np.arange(20_000)
    for seed in range(4):
        assert abs((hash_keys(keys, seed) / 2**64).mean() - 0.5) < 0.01
    same = np.corrcoef(hash_keys(keys, 0).astype(float), hash_keys(keys, 1).astype(float))[0, 1]
    assert abs(same) < 0.03
    swapped = hash_keys(keys[:, ::-1].copy(), 0)
    assert len(np.unique(np.concatenate([hash_keys(keys, 0), swapped]))) == 2 * 20_000 - 1  # key 0 is its own mirror


@pytest.mark.parametrize("size", [0, 1, 500, 6000, 40_000])
def test_sample_is_the_smallest_hashes_for_any_order_and_batches(mixture, size):
    keys = mixture.keys(20_000)
    wanted = np.argsort(hash_keys(keys, 7))[:size]
    for batch in (333, 20_000):
        order = mixture.rng.permutation(len(keys))
        sample = HashSample(7, size)
        for start in range(0, len(keys), batch):
            rows = order[start : start + batch]
            sample.add(keys[rows], rows)
            assert sum(len(part.rows) for part in sample._smallest._parts) <= 2 * max(size, MIN_PENDING) + batch
        assert np.array_equal(sample.result().rows, wanted)
        assert np.array_equal(sample.result().keys, keys[wanted])


def test_merged_samples_are_the_sample_of_the_union(mixture):
    keys, rows = mixture.keys(9000), np.arange(9000)
    whole, left, right = (HashSample(3, 100) for _ in range(3))
    whole.add(keys, rows)
    left.add(keys[:5000], rows[:5000])
    right.add(keys[5000:], rows[5000:])
    left.merge(right)
    assert np.array_equal(left.result().rows, whole.result().rows)
    with pytest.raises(DimensionError, match="seeds 3 and 4"):
        left.merge(HashSample(4, 100))


def test_equal_ranks_go_to_the_smaller_key(mixture):
    keys = mixture.keys(10_000)
    smallest = SmallestRanks(20)
    for start in range(0, 10_000, 1000):
        smallest.add(np.zeros(1000, np.uint64), keys[start : start + 1000], np.arange(start, start + 1000))
    assert np.array_equal(smallest.result().rows, np.lexsort((keys[:, 1], keys[:, 0]))[:20])


def test_distinct_rows_count_once_with_their_best_rank(mixture):
    keys = mixture.keys(30_000)
    rows = mixture.rng.integers(0, 300, (30_000, 2)).astype(np.float16)
    rows[rows == 0] = mixture.rng.choice([0.0, -0.0], (rows == 0).sum())  # equal values with different bytes
    seen, wanted = set(), []
    for row in rows[np.argsort(hash_keys(keys, 0))].tolist():
        if tuple(row) not in seen:
            wanted.append(row)
        seen.add(tuple(row))
    for size in (50, 10_000):
        sample = HashSample(0, size, distinct=True)
        for part in np.array_split(mixture.rng.permutation(30_000), 7):
            sample.add(keys[part], rows[part])
        assert sample.result().rows.tolist() == wanted[:size]


def test_payloads_must_fit_together(mixture):
    keys = mixture.keys(5)
    sample = HashSample(0, 5)
    assert len(sample.result().rows) == 0
    sample.add(keys[:0], np.empty((0, 3)))
    sample.add(keys, np.zeros((5, 3)))
    with pytest.raises(DimensionError, match="rows were"):
        sample.add(keys, np.zeros((5, 4)))
    with pytest.raises(DimensionError, match="keys must be"):
        sample.add(keys[:4], np.zeros((5, 3)))
    with pytest.raises(DimensionError, match="ranks must be"):
        SmallestRanks(5).add(np.zeros(5), keys, np.zeros((5, 3)))
    with pytest.raises(DimensionError):
        HashSample(0, -1)
