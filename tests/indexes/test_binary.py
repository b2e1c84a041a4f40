import numpy as np
import pytest

from curation.errors import DimensionError
from curation.indexes.binary import pairs_within


def codes_with_neighbours(count, flips, seed=0):
    """Random codes, each with a copy in which up to so many bits are flipped; sorted."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**64, count, dtype=np.uint64)
    near = codes.copy()
    for _ in range(flips):
        near ^= np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
    return np.unique(np.concatenate([codes, near]))


def found(codes, radius, **options):
    pairs = [
        pair for left, right in pairs_within(codes, radius, 1, **options) for pair in zip(left, right, strict=True)
    ]
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


def brute(codes, radius):
    distances = np.bitwise_count(codes[:, None] ^ codes[None])
    return {(left, right) for left, right in zip(*np.nonzero(distances <= radius), strict=True) if left < right}


@pytest.mark.parametrize("radius", range(9))
@pytest.mark.parametrize("chunk_codes", [1 << 20, 1500, 400])
def test_every_pair_within_the_radius_is_found_once(radius, chunk_codes):
    codes = codes_with_neighbours(1000, 6)

    assert found(codes, radius, chunk_codes=chunk_codes) == brute(codes, radius)


@pytest.mark.parametrize("radius", [1, 2, 3, 4])
def test_multi_index_hashing_finds_what_comparing_everything_finds(radius):
    codes = codes_with_neighbours(6000, 4, seed=radius)

    assert found(codes, radius) == brute(codes, radius)


def test_a_crowd_of_similar_codes_is_found_in_pieces():
    base = np.uint64(0x0123456789ABCDEF)
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    codes = np.unique(np.concatenate([base ^ bits, (base ^ bits[:, None] ^ bits[None]).ravel()]))

    assert found(codes, 2) == brute(codes, 2)


def test_equal_codes_are_pairs_and_nothing_has_none():
    assert found(np.array([5, 5, 7], np.uint64), 0) == {(0, 1)}
    assert found(np.empty(0, np.uint64), 3) == set()
    assert found(np.array([5], np.uint64), 3) == set()


def test_other_arrays_and_radii_are_refused():
    with pytest.raises(DimensionError):
        list(pairs_within(np.zeros(3, np.int64), 1))
    with pytest.raises(DimensionError):
        list(pairs_within(np.zeros((3, 1), np.uint64), 1))
    with pytest.raises(DimensionError):
        list(pairs_within(np.zeros(3, np.uint64), 9))
