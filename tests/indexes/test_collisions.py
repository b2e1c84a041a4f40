import numpy as np
import pytest

from curation.indexes.collisions import START, Coded, buckets, collisions, tables
from curation.indexes.cross_polytope import SKETCH_WORDS, compare, encode, random_signs

ALLOWED = (110, 210)


def codes(num, seed, rotations=3):
    rng = np.random.default_rng(seed)
    values = np.random.default_rng(0).standard_normal((8, 32))[rng.integers(0, 8, num)] + rng.standard_normal((num, 32))
    return encode(
        (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16), random_signs(32, rotations, 0)
    )


def found(left, right, size, limit):
    pairs = []
    left_codes = Coded.of(left)
    right_codes = left_codes if left is right else Coded.of(right)
    for table in tables(left.shape[1] - SKETCH_WORDS, size):
        of_left = buckets(left, table)
        of_right = of_left if left is right else buckets(right, table)
        cursor = START
        while cursor is not None:
            some = collisions(left_codes, of_left, right_codes, of_right, table, ALLOWED, cursor, limit)
            assert len(some[0]) == len(some[1]) <= limit
            pairs += zip(some[0].tolist(), some[1].tolist(), strict=True)
            cursor = some[2]
    return pairs


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", [513, 100_000])
@pytest.mark.parametrize("is_self", [True, False])
def test_each_pair_that_meets_comes_once(size, limit, is_self):
    rotations = 1 if size == 3 else 3  # many tables of 2^21 buckets each
    left = codes(1300, 1, rotations)  # buckets of more than one tile
    right = left if is_self else codes(700, 2, rotations)
    rows = np.triu_indices(len(left), 1) if is_self else np.indices((len(left), len(right))).reshape(2, -1)
    equal, distances = compare(left[rows[0]], right[rows[1]])
    meets = (equal >= size).any(axis=1) & (distances <= ALLOWED).all(axis=1)
    pairs = found(left, right, size, limit)
    assert sorted(pairs) == list(zip(rows[0][meets].tolist(), rows[1][meets].tolist(), strict=True))
    assert len(pairs) > 1000


def test_a_crowd_in_one_bucket_comes_in_pieces():
    crowd = np.repeat(codes(1, 3), 1200, axis=0)
    pairs = found(crowd, crowd, 2, 2000)
    assert len(pairs) == len(set(pairs)) == 1200 * 1199 // 2


def test_buckets_hold_rows_in_order():
    words = codes(500, 4)
    table = tables(3, 2)[40]
    assert (table.rotation, table.groups) == (1, (1, 7))
    order, starts = buckets(words, table)
    hashes = words.view(np.uint8).reshape(500, -1, 8)[:, 8 + 1].astype(int)
    keys = hashes[:, 1] * 128 + hashes[:, 7]
    assert np.array_equal(order, np.argsort(keys, kind="stable"))
    assert np.array_equal(np.diff(starts), np.bincount(keys, minlength=128**2))
